"""Orient, crop, resample, normalize, project: one order for ingest and for prediction. Pure functions."""

from __future__ import annotations

import numpy as np

from ..config import PreprocessConfig
from ..errors import SourceError
from ..orientation import to_patient
from ..volume import Spacing, Volume, filled
from . import crop, resample
from .intensity import normalize


def resolve(config: PreprocessConfig, modality: str) -> PreprocessConfig:
    """The configuration without "auto": the window for CT, percentiles for everything else."""
    if config.intensity != "auto":
        return config
    return config.model_copy(update={"intensity": "window" if modality == "CT" else "percentile"})


def preprocess(
    volume: Volume, mask: np.ndarray | None, config: PreprocessConfig, reuse: bool = False
) -> tuple[Volume, np.ndarray | None]:
    """From a source volume to what the network sees.

    Args:
        volume: ``(D, H, W)`` or ``(D, H, W, C)`` in HU or stored units.
        mask: integer labels ``(D, H, W)`` on the same grid, or None.
        config: resolved; see `resolve`.
        reuse: the volume's voxels may be overwritten; saves an array of its size.

    Returns:
        Volume float32 ``(D', H', W', C)`` with the exact affine of the new grid, its axes as ``config.orientation`` says; D' is 1
        after a projection.
        uint8 mask ``(D', H', W')`` of the same grid, or None.

    Raises:
        SourceError: nothing to crop to, no finite voxel, a mask of another shape, or a spacing in mm asked of pixels
            whose size is not known.
    """
    if mask is not None and mask.shape != volume.shape:
        raise SourceError(f"mask: expected the image's shape {volume.shape}, found {mask.shape}")
    if 0 in volume.array.shape:
        raise SourceError(f"expected voxels along each axis, found the shape {volume.array.shape}")
    volume, mask = oriented(volume, mask, config)
    array = volume.array if volume.array.ndim == 4 else volume.array[..., np.newaxis]
    array, _ = filled(np.asarray(array, np.float32), volume.modality)
    if not np.isfinite(array.flat[0]):
        raise SourceError("expected finite voxel values, found none")
    affine = np.asarray(volume.affine, np.float64)

    box = _crop_box(array, volume, config)
    if box is not None:
        array, affine = array[box], crop.cropped_affine(affine, box)
        mask = mask if mask is None else mask[box]

    if config.spacing is not None:
        spacing = spacing_for(volume, config.spacing)
        depth, height, width = array.shape[:3]
        _, affine, positions = resample.grid((depth, height, width), affine, spacing)
        array = np.stack([resample.linear(array[..., c], positions) for c in range(array.shape[3])], axis=3)
        mask = mask if mask is None else resample.nearest(mask, positions)

    if reuse and array.flags.writeable:
        for c in range(array.shape[3]):
            normalize(array[..., c], config, out=array[..., c])
    else:
        channels = [normalize(array[..., c], config) for c in range(array.shape[3])]
        array = channels[0][..., np.newaxis] if len(channels) == 1 else np.stack(channels, axis=3)

    if config.projection != "none":
        slab = slab_of(array.shape[0], config.projection_slab)
        box = (slab, slice(0, array.shape[1]), slice(0, array.shape[2]))
        mask = mask if mask is None else mask[slab]
        array, mask, affine = project(array[slab], mask, crop.cropped_affine(affine, box), config.projection)

    result = volume.with_array(np.ascontiguousarray(array, np.float32), affine)
    return result, None if mask is None else np.ascontiguousarray(mask, np.uint8)


def oriented(volume: Volume, mask: np.ndarray | None, config: PreprocessConfig) -> tuple[Volume, np.ndarray | None]:
    """Volume and mask with their axes as ``config.orientation`` wants them. Images without a place in the patient stay as they are."""
    if config.orientation == "source" or volume.geometry != "patient":
        return volume, mask
    turn = to_patient(volume.affine, volume.shape)
    if turn.is_identity:
        return volume, mask
    # Contiguous again: the steps that follow go through the voxels several times.
    array = np.ascontiguousarray(turn.array(volume.array))
    turned = volume.with_array(array, turn.affine(volume.affine, volume.shape))
    return turned, None if mask is None else np.ascontiguousarray(turn.array(mask))


def spacing_for(volume: Volume, asked: Spacing) -> Spacing:
    """The spacing to resample to: frames of a cine are not mixed, because the distance between them is no length.

    Raises:
        SourceError: the size of the volume's pixels is not known.
    """
    if volume.geometry == "none":
        raise SourceError(
            "the size of its pixels is not known, so it cannot be resampled to a spacing in mm; set preprocess.spacing=null "
            "or leave such images out"
        )
    return (volume.spacing[0], asked[1], asked[2]) if volume.geometry == "image" else asked


def slab_of(depth: int, shares: tuple[float, float]) -> slice:
    """The slices between two shares of the depth, at least one."""
    start = min(round(shares[0] * depth), depth - 1)
    return slice(start, max(round(shares[1] * depth), start + 1))


def project(
    array: np.ndarray, mask: np.ndarray | None, affine: np.ndarray, how: str
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """One image of the whole depth: the voxels become one thick slice, centred in the middle of the stack.

    Args:
        array: ``(D, H, W, C)``.
        mask: ``(D, H, W)`` or None; the largest label along the depth stays.
        how: "mip" or "mean".

    Returns:
        ``(1, H, W, C)``, ``(1, H, W)`` or None, and the affine whose depth spacing is the stack's thickness.
    """
    depth = array.shape[0]
    thick = affine.astype(np.float64)
    thick[:3, 3] = affine[:3, 3] + affine[:3, 0] * ((depth - 1) / 2)
    thick[:3, 0] = affine[:3, 0] * depth
    if how == "mip":
        flat = array.max(axis=0, keepdims=True)
    else:
        flat = array.mean(axis=0, keepdims=True, dtype=np.float64).astype(array.dtype)
    return flat, None if mask is None else mask.max(axis=0, keepdims=True), thick


def _crop_box(array: np.ndarray, volume: Volume, config: PreprocessConfig) -> crop.Box | None:
    if config.crop == "none":
        return None
    if config.crop == "body":
        if volume.modality not in ("CT", ""):
            raise SourceError(
                f"crop=body needs CT in HU, found modality {volume.modality}; set preprocess.crop=foreground or none"
            )
        box = crop.body_box(array[..., 0])
    else:
        box = crop.foreground_box(array)
    return crop.widen(box, config.crop_margin_mm, volume.spacing, volume.shape)
