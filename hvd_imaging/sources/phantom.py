"""A synthetic chest CT archive: anatomy as formulas in patient coordinates, sampled into DICOM like a scanner would.

Good for trying the whole chain without patient data, and as a truth to test geometry against: an oblique series samples
the same formulas along its own grid. What it is not: realistic enough to train anything for patients.

Everything follows from (seed, index of the patient): patient 3 is the same in an archive of 4 and of 400.
"""

from __future__ import annotations

import csv
import hashlib
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from ..errors import ConfigError
from ..files import atomic_folder

SEGMENTS = ("lung", "nodule")
AIR, LUNG, FAT, SOFT = -1000.0, -850.0, -100.0, 40.0
NOISE_HU = 15.0


@dataclass(frozen=True)
class Anatomy:
    """The shapes of one patient; mm in LPS, the origin in the middle of the chest.

    Attributes:
        body: half axes (left-right, front-back) of the elliptic trunk.
        lungs: ``(2, 6)`` centre and half axes of each lung.
        heart: ``(6,)`` centre and half axes.
        vessels: ``(N, 8)`` tubes inside the lungs: start, end, radius at start and end.
        nodules: ``(N, 4)`` centre and radius; N may be 0.
        bone: HU of ribs and spine.
        rib_phase: mm, where along z the ribs lie.
    """

    body: tuple[float, float]
    lungs: np.ndarray
    heart: np.ndarray
    vessels: np.ndarray
    nodules: np.ndarray
    bone: float
    rib_phase: float

    def hu(self, points: np.ndarray) -> np.ndarray:
        """HU without noise at ``points`` ``(..., 3)``."""
        x, y, z = np.moveaxis(points, -1, 0)
        radial = np.hypot(x / self.body[0], y / self.body[1])
        inside = (radial - 1) * min(self.body)  # mm to the skin, negative inside
        hu = np.full(x.shape, AIR)
        hu = _blend(hu, FAT, inside)
        hu = _blend(hu, SOFT, inside + 10)
        # Ribs: a shell under the fat, cut into rings that fall towards the front.
        ring = np.mod(z - self.rib_phase + 0.25 * y, 26.0) - 13.0
        hu = _blend(hu, self.bone, np.maximum(np.abs(inside + 17) - 4, np.abs(ring) - 4.5))
        # Spine: vertebrae with softer discs between them.
        column = np.hypot(x, y - 0.62 * self.body[1]) - 17
        disc = np.abs(np.mod(z, 32.0) - 16.0) - 13.0
        hu = _blend(hu, 90.0, column)
        hu = _blend(hu, self.bone - 80, np.maximum(column, disc))
        hu = _blend(hu, LUNG, self.lung_distance(points))
        for tube in self.vessels:
            hu = _blend(hu, 30.0, _tube(points, tube))
        hu = _blend(hu, SOFT, _ellipsoid(points, self.heart))
        hu = _blend(hu, 50.0, np.hypot(x - 14, y - 0.3 * self.body[1]) - 12)
        for nodule in self.nodules:
            distance = np.linalg.norm(points - nodule[:3], axis=-1) - nodule[3]
            hu = _blend(hu, SOFT, distance, width=2.0)
        return hu

    def lung_distance(self, points: np.ndarray) -> np.ndarray:
        """About the mm to the lungs' surface, negative inside."""
        return np.minimum(*(_ellipsoid(points, lung) for lung in self.lungs))

    def labels(self, points: np.ndarray) -> np.ndarray:
        """uint8: 0 outside, 1 lung (without heart), 2 nodule."""
        result = ((self.lung_distance(points) < 0) & (_ellipsoid(points, self.heart) >= 0)).astype(np.uint8)
        for nodule in self.nodules:
            result[np.linalg.norm(points - nodule[:3], axis=-1) < nodule[3]] = 2
        return result


@dataclass(frozen=True)
class Acquisition:
    """How one patient is scanned.

    Attributes:
        shape: (D, H, W).
        affine: ``(4, 4)`` (d, h, w, 1) to LPS mm, from rounded values as DICOM stores them.
        slope, intercept: stored value x slope + intercept = HU.
        signed: whether stored values are int16, else uint16.
        suffix: of the file names, may be "".
        oblique: whether the slices are rotated.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    slope: float
    intercept: float
    signed: bool
    suffix: str
    oblique: bool

    def points(self) -> np.ndarray:
        """``(D, H, W, 3)`` LPS mm of the voxel centres."""
        index = np.stack(np.meshgrid(*(np.arange(n) for n in self.shape), indexing="ij"), -1)
        return index @ self.affine[:3, :3].T + self.affine[:3, 3]


@dataclass(frozen=True)
class PhantomPatient:
    """One synthetic patient, ready to be written."""

    seed: int
    index: int
    anatomy: Anatomy
    acquisition: Acquisition

    @property
    def patient_id(self) -> str:
        """The (fictitious) PatientID."""
        return f"PHANTOM-{self.seed}-{self.index:04d}"

    @property
    def label(self) -> int:
        """1 with nodules, else 0."""
        return int(len(self.anatomy.nodules) > 0)

    def uid(self, *what: object) -> str:
        """A UID that depends on the seed, the index and ``what`` only."""
        return str(generate_uid(entropy_srcs=["hvd_imaging phantom", str(self.seed), str(self.index), *map(str, what)]))

    def name(self, *what: object) -> str:
        """A file name that tells nothing about order."""
        return hashlib.sha256(self.uid(*what).encode()).hexdigest()[:16] + self.acquisition.suffix

    def noise(self) -> np.ndarray:
        """``(D, H, W)`` HU."""
        return np.random.default_rng([self.seed, self.index, 2]).normal(0, NOISE_HU, self.acquisition.shape)


@dataclass(frozen=True)
class PhantomArchive:
    """What `make_archive` wrote."""

    patients: int
    with_nodules: int
    oblique: int
    slices: int
    files: int


def draw_patient(seed: int, index: int) -> PhantomPatient:
    """Patient ``index`` of the archive of ``seed``. Of each pair (0, 1), (2, 3), ... one has nodules."""
    has_nodules = (index % 2 == 1) ^ bool(np.random.default_rng([seed, index // 2, 0]).integers(2))
    random = np.random.default_rng([seed, index, 1])
    body = float(random.uniform(135, 146)), float(random.uniform(96, 108))
    height = random.uniform(88, 104)
    lungs = np.array(
        [
            [side * random.uniform(58, 62), random.uniform(-6, 2), 0, random.uniform(40, 46), random.uniform(58, 66), height]
            for side in (-1, 1)
        ]
    )
    heart = np.array([22, -22, -32, 42, 38, 44]) + random.uniform(-3, 3, 6)
    vessels = []
    for lung in lungs:
        hilum = np.array([lung[0] * 0.55, 5.0, 0.0])
        for _ in range(7):
            direction = random.normal(size=3)
            end = lung[:3] + 0.8 * direction / np.linalg.norm(direction) * lung[3:]
            vessels.append([*hilum, *end, random.uniform(2, 3), random.uniform(0.7, 1.2)])
    nodules = _draw_nodules(random, lungs, heart) if has_nodules else np.zeros((0, 4))
    anatomy = Anatomy(body, lungs, heart, np.array(vessels), nodules, random.uniform(450, 650), random.uniform(0, 26))
    return PhantomPatient(seed, index, anatomy, _draw_acquisition(random, index))


def _draw_nodules(random: np.random.Generator, lungs: np.ndarray, heart: np.ndarray) -> np.ndarray:
    nodules: list[np.ndarray] = []
    wanted = int(random.integers(1, 4))
    while len(nodules) < wanted:
        lung = lungs[random.integers(2)]
        centre = lung[:3] + random.uniform(-0.65, 0.65, 3) * lung[3:]
        radius = random.uniform(8, 14)
        room = -max(float(_ellipsoid(centre, lung)), -float(_ellipsoid(centre, heart)))
        apart = all(np.linalg.norm(centre - n[:3]) > radius + n[3] + 4 for n in nodules)
        # In the middle of the stack, where a slab projection shows the lungs at their widest.
        if room > radius and apart and abs(centre[2]) < 45:
            nodules.append(np.array([*centre, radius]))
    return np.array(nodules)


def _draw_acquisition(random: np.random.Generator, index: int) -> Acquisition:
    spacing = float(np.round(random.uniform(4, 6), 2))
    count = int(np.clip(round(205 / spacing), 36, 48))
    rows, columns = (88, 96) if random.integers(3) == 0 else (96, 96)
    pixel = float(np.round(random.uniform(3.15, 3.35), 4))
    oblique = index % 3 == 2
    tilt = np.radians(random.uniform(4, 10, 2) * random.choice([-1, 1], 2)) * oblique
    row = np.array([np.cos(tilt[0]), np.sin(tilt[0]), 0.0])
    column = np.array([-np.sin(tilt[0]) * np.cos(tilt[1]), np.cos(tilt[0]) * np.cos(tilt[1]), np.sin(tilt[1])])
    row, column = np.round(row, 8), np.round(column, 8)
    normal = np.cross(row, column)
    first = random.uniform(-3, 3, 3) - (
        row * pixel * (columns - 1) + column * pixel * (rows - 1) + normal * spacing * (count - 1)
    ) / 2
    affine = np.eye(4)
    affine[:3, :] = np.stack([normal * spacing, column * pixel, row * pixel, first], axis=1)
    slope, intercept, signed = ((1.0, -1024.0, False), (1.0, 0.0, True), (0.5, -2000.0, False))[random.integers(3)]
    suffix = ("", ".dcm", ".ima")[random.integers(3)]
    return Acquisition((count, rows, columns), affine, slope, intercept, signed, suffix, oblique)


def make_archive(
    out: Path,
    patients: int,
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> PhantomArchive:
    """Write an archive: for each patient a CT series and a DICOM SEG (lung, nodule); and labels.csv (1: has a nodule).

    Files of a series have names and times that tell nothing about their order; some have no suffix. Some series are
    oblique, and rescale differs between them.

    Args:
        out: must not exist yet, or be empty; takes its name when the archive is whole.
        progress: wraps the indices of the patients.

    Raises:
        ConfigError: ``out`` holds files already, or no patients are asked for.
    """
    out = Path(out)
    if patients < 1 or seed < 0:
        raise ConfigError(f"expected at least 1 patient and a seed of 0 or more, found {patients} and {seed}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: expected a new or empty folder, found {'files in it' if out.is_dir() else 'a file'}")
    rows, slices, oblique = [], 0, 0
    with atomic_folder(out) as folder:
        for index in progress(range(patients)):
            patient = draw_patient(seed, index)
            _write_patient(folder / f"patient_{index:04d}", patient)
            rows.append((patient.patient_id, patient.label))
            slices += patient.acquisition.shape[0]
            oblique += patient.acquisition.oblique
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([("PatientID", "label"), *rows])
        (folder / "labels.csv").write_text(text.getvalue(), encoding="utf-8")
    return PhantomArchive(patients, sum(label for _, label in rows), oblique, slices, slices + patients + 1)


def make_large_series(folder: Path, index: int, shape: tuple[int, int, int], seed: int = 0) -> int:
    """Write one uncompressed CT series of ``shape`` (D, H, W) and no mask: coarse anatomy under noise, quick to make.

    Returns:
        Bytes of its pixels.
    """
    patient = draw_patient(seed, index)
    whole = patient.acquisition
    step = np.array(whole.shape) / np.array(shape)
    affine = whole.affine.copy()
    affine[:3, :3] = np.round(affine[:3, :3] * step, 6)
    patient = replace(patient, acquisition=replace(whole, shape=shape, affine=affine, slope=1.0, intercept=-1024.0, signed=False))
    coarse = patient.anatomy.hu(whole.points())
    places = [np.minimum((np.arange(n) * s).astype(int), m - 1) for n, s, m in zip(shape, step, whole.shape, strict=True)]
    noise = np.random.default_rng([seed, index, 4]).normal(0, NOISE_HU, shape[1:])
    (folder / f"series_{index:04d}").mkdir(parents=True)
    for number in range(shape[0]):
        hu = coarse[places[0][number]][np.ix_(places[1], places[2])] + np.roll(noise, (7 * number, 13 * number), (0, 1))
        stored = np.clip(np.round(hu + 1024), 0, 4095).astype("<u2")
        slice_ = _ct_slice(patient, number, stored)
        slice_.save_as(folder / f"series_{index:04d}" / f"{number:04d}.dcm", enforce_file_format=True)
    return 2 * int(np.prod(shape))


def make_single_images(folder: Path, count: int, side: int, seed: int = 0) -> int:
    """Write ``count`` uncompressed CT images of ``side`` x ``side`` in one folder, each a series and a patient: smooth, with noise.

    Returns:
        Bytes of their pixels.
    """
    folder.mkdir(parents=True)
    for index in range(count):
        patient = draw_patient(seed, index)
        random = np.random.default_rng([seed, index, 5])
        waves = [np.sin(np.outer(random.uniform(1, 4, 3), np.linspace(0, np.pi, side)) + random.uniform(0, 6, (3, 1))) for _ in range(2)]
        hu = 300 * np.einsum("ki,kj->ij", *waves) + random.normal(0, NOISE_HU, (side, side))
        patient = replace(patient, acquisition=replace(patient.acquisition, shape=(1, side, side), slope=1.0, intercept=-1024.0, signed=False))
        stored = np.clip(np.round(hu + 1024), 0, 4095).astype("<u2")
        _ct_slice(patient, 0, stored).save_as(folder / f"{index:05d}.dcm", enforce_file_format=True)
    return 2 * count * side * side


def _write_patient(folder: Path, patient: PhantomPatient) -> None:
    acquisition = patient.acquisition
    points = acquisition.points()
    hu = patient.anatomy.hu(points) + patient.noise()
    limits = np.iinfo(np.int16 if acquisition.signed else np.uint16)
    stored = np.clip(np.round((hu - acquisition.intercept) / acquisition.slope), limits.min, limits.max)
    stored = stored.astype("<i2" if acquisition.signed else "<u2")
    count = acquisition.shape[0]
    slices = [_ct_slice(patient, index, stored[index]) for index in range(count)]
    (folder / "series").mkdir(parents=True)
    for index in np.random.default_rng([patient.seed, patient.index, 3]).permutation(count):
        slices[index].save_as(folder / "series" / patient.name("slice", index), enforce_file_format=True)
    (folder / "mask").mkdir()
    seg = _segmentation(patient, slices, patient.anatomy.labels(points))
    seg.save_as(folder / "mask" / patient.name("mask"), enforce_file_format=True)


def _ct_slice(patient: PhantomPatient, index: int, stored: np.ndarray) -> Dataset:
    acquisition = patient.acquisition
    affine = acquisition.affine
    rows, columns = (float(np.linalg.norm(affine[:3, axis])) for axis in (1, 2))  # mm between rows, between columns
    orientation = np.concatenate([affine[:3, 2] / columns, affine[:3, 1] / rows])
    position = affine[:3, 3] + index * affine[:3, 0]
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID = CTImageStorage
    d.file_meta.MediaStorageSOPInstanceUID = UID(patient.uid("slice", index))
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID = CTImageStorage
    d.SOPInstanceUID = patient.uid("slice", index)
    d.SpecificCharacterSet = "ISO_IR 192"
    d.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    d.StudyDate = d.SeriesDate = d.ContentDate = "20000101"
    d.StudyTime = d.SeriesTime = d.ContentTime = "120000"
    d.AccessionNumber = ""
    d.Modality = "CT"
    d.Manufacturer = "hvd_imaging"
    d.ManufacturerModelName = "phantom"
    d.ReferringPhysicianName = ""
    d.PatientName = f"Phantom^{patient.index:04d}"
    d.PatientID = patient.patient_id
    d.PatientBirthDate = ""
    d.PatientSex = "O"
    d.PatientPosition = "HFS"
    d.StudyInstanceUID = patient.uid("study")
    d.SeriesInstanceUID = patient.uid("series")
    d.FrameOfReferenceUID = patient.uid("frame of reference")
    d.PositionReferenceIndicator = ""
    d.StudyID = "1"
    d.SeriesNumber = 1
    d.AcquisitionNumber = 1
    # Numbers count against the position, as on many scanners: who sorts by them gets the volume upside down.
    d.InstanceNumber = acquisition.shape[0] - index
    d.KVP = "120"
    d.SliceThickness = "5"  # nominal, as in real archives: not the distance of the slices
    d.ImagePositionPatient = [f"{v:.6f}" for v in position]
    d.ImageOrientationPatient = [f"{v:.8f}" for v in orientation]
    d.PixelSpacing = [f"{rows:.4f}", f"{columns:.4f}"]
    d.Rows, d.Columns = stored.shape
    d.SamplesPerPixel = 1
    d.PhotometricInterpretation = "MONOCHROME2"
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit = 15
    d.PixelRepresentation = int(acquisition.signed)
    d.RescaleSlope = f"{acquisition.slope:g}"
    d.RescaleIntercept = f"{acquisition.intercept:g}"
    d.RescaleType = "HU"
    d.WindowCenter, d.WindowWidth = "-500", "1500"
    d.PixelData = stored.tobytes()
    return d


def _segmentation(patient: PhantomPatient, slices: list[Dataset], labels: np.ndarray) -> Dataset:
    import highdicom  # late: its import takes longer than a patient
    from pydicom.sr.codedict import codes

    meaning = {"lung": (codes.SCT.Organ, codes.SCT.Lung), "nodule": (codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Nodule)}
    present = [name for number, name in enumerate(SEGMENTS, start=1) if (labels == number).any()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seg = highdicom.seg.Segmentation(
            source_images=slices,
            pixel_array=labels,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[
                highdicom.seg.SegmentDescription(
                    segment_number=number,
                    segment_label=name,
                    segmented_property_category=meaning[name][0],
                    segmented_property_type=meaning[name][1],
                    algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
                )
                for number, name in enumerate(present, start=1)
            ],
            series_instance_uid=patient.uid("mask series"),
            series_number=2,
            sop_instance_uid=patient.uid("mask"),
            instance_number=1,
            manufacturer="hvd_imaging",
            manufacturer_model_name="phantom",
            software_versions="1",
            device_serial_number="0",
        )
    # The library stamps the present time and a random organization: replace both, so that a seed gives the same bytes.
    for name in ("ContentDate", "SeriesDate", "InstanceCreationDate", "ContentTime", "SeriesTime", "InstanceCreationTime"):
        if name in seg:
            setattr(seg, name, "20000101" if name.endswith("Date") else "120000")
    for item in seg.get("ContributingEquipmentSequence", []):
        item.ContributionDateTime = "20000101120000"
    organization = patient.uid("dimensions")
    for item in [*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence]:
        item.DimensionOrganizationUID = organization
    return seg


def _blend(hu: np.ndarray, value: float, distance: np.ndarray, width: float = 1.5) -> np.ndarray:
    """``value`` where ``distance`` is negative, with an edge ``width`` mm wide."""
    share = np.clip(0.5 - distance / width, 0, 1)
    return hu + share * (value - hu)


def _ellipsoid(points: np.ndarray, shape: np.ndarray) -> np.ndarray:
    q = np.linalg.norm((points - shape[:3]) / shape[3:], axis=-1)
    return (q - 1) * shape[3:].min()


def _tube(points: np.ndarray, tube: np.ndarray) -> np.ndarray:
    start, axis = tube[:3], tube[3:6] - tube[:3]
    share = np.clip((points - start) @ axis / (axis @ axis), 0, 1)
    radius = tube[6] + share * (tube[7] - tube[6])
    return np.linalg.norm(points - start - share[..., None] * axis, axis=-1) - radius
