"""Faces: a head with one is told from heads without and from trunks, in any orientation; deface takes it and leaves the brain."""

import itertools

import numpy as np
import pytest

from hvd_imaging.privacy.faces import _turn, _turned, deface, face_risk

SIZE = (240, 240, 200)  # mm: from the vertex down, front to back, right to left


def head(spacing=(2.0, 1.0, 1.0), contrast="ct", length=190.0):
    """A skull with brain, face and nose; and where brain and nose are. Axes: down, back, left."""
    axes = [np.arange(0, size, mm) for size, mm in zip(SIZE, spacing, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    scale = length / 190.0

    def inside(center, radii):
        return sum(((c - m) / (r * scale)) ** 2 for c, m, r in zip((z, y, x), center, radii, strict=True)) <= 1

    top = 10 + 95 * scale
    skin = inside((top, 125, 100), (95, 95, 75))
    jaw = inside((top + 50 * scale, 100, 100), (75, 65, 60))
    nose = inside((top + 25 * scale, 125 - 95 * scale, 100), (22, 20, 16)) & ~skin & ~jaw
    brain = inside((top - 8 * scale, 127, 100), (72, 80, 64))
    brain &= (z < top - 5 * scale) | (y > 127 - 37 * scale)  # the orbits' roof; temporal lobes begin farther back
    skull = inside((top - 8 * scale, 127, 100), (79, 88, 70)) & ~brain
    values = {"ct": (-1000, 40, 35, 900), "mr": (0, 120, 200, 15)}[contrast]
    array = np.full(z.shape, values[0], np.float32)
    for where, value in ((jaw | skin | nose, values[1]), (brain, values[2]), (skull, values[3])):
        array[where] = value
    array += np.random.default_rng(0).normal(0, 10, array.shape).astype(np.float32)
    return (np.abs(array) if contrast == "mr" else array), brain, nose


def placed(spacing, order=(0, 1, 2), flips=(False, False, False), turn=0.0):
    """Affine of an array whose axes are (down, back, left) before transposing by ``order`` and flipping."""
    down, back, left = np.array([0, 0, -1.0]), np.array([0, 1.0, 0]), np.array([1.0, 0, 0])
    angle = np.deg2rad(turn)
    rotate = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    columns = [rotate @ axis * mm for axis, mm in zip((down, back, left), spacing, strict=True)]
    affine = np.eye(4)
    for new, old in enumerate(order):
        affine[:3, new] = columns[old] * (-1 if flips[new] else 1)
    return affine


@pytest.mark.parametrize("contrast", ["ct", "mr"])
@pytest.mark.parametrize("length", [165.0, 190.0, 205.0])
def test_the_face_goes_and_the_brain_stays(contrast, length):
    spacing = (2.0, 1.0, 1.0)
    array, brain, nose = head(spacing, contrast, length)
    risk = face_risk(array, placed(spacing))
    assert risk.level == "face", risk.reason
    kept = array.copy()
    bare = deface(array, placed(spacing), risk)
    assert np.array_equal(array, kept)
    assert (bare[nose] == array.min()).mean() > 0.9
    assert (bare[brain] == array[brain]).mean() > 0.995
    # A plane is left, not the face a little farther back.
    fronts = (bare[risk.brow + 10 : risk.brow + 30, :, 80:120] > np.median(array)).argmax(axis=1)
    assert fronts.min() >= risk.plane


@pytest.mark.parametrize("cut", [20, 40])
def test_a_picture_may_begin_below_the_vertex(cut):
    spacing = (2.0, 1.0, 1.0)
    array, brain, nose = (volume[cut // 2 :] for volume in head(spacing))
    risk = face_risk(array, placed(spacing))
    assert risk.level == "face", risk.reason
    bare = deface(array, placed(spacing), risk)
    assert (bare[nose] == array.min()).mean() > 0.9 and (bare[brain] == array[brain]).mean() > 0.99


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(False, False, False), (True, False, True), (True, True, True)])
def test_orientations(order, flips):
    spacing = (3.0, 2.0, 2.0)
    array, brain, nose = head(spacing)

    def lay(volume):
        return volume.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]

    affine = placed(spacing, order, flips, turn=8.0)
    assert np.array_equal(_turned(lay(array), *_turn(affine)[:2]), array)
    risk = face_risk(lay(array), affine)
    assert risk.level == "face", risk.reason
    bare = deface(lay(array), affine, risk)
    assert (bare[lay(nose)] == array.min()).mean() > 0.9 and (bare[lay(brain)] == lay(array)[lay(brain)]).mean() > 0.995


def test_what_is_no_face():
    from hvd_imaging.sources.phantom import draw_patient

    spacing = (3.0, 2.0, 2.0)
    array, brain, _ = head(spacing, "mr")
    stripped = np.where(brain, array, 0)
    assert face_risk(stripped, placed(spacing)).level != "face"
    assert face_risk(array[:30], placed(spacing)).level == "head"  # ends above the brow
    assert face_risk(array[:, :, 99:101], placed(spacing)).level == "none"
    assert face_risk(np.zeros((20, 30, 30), np.float32), np.eye(4)).level == "none"
    coarse = np.array(placed((10.0, 2.0, 2.0)))
    assert "too coarse" in face_risk(array[::3], coarse).reason
    for index in range(6):
        patient = draw_patient(4, index)
        points = patient.acquisition.points()
        assert face_risk(patient.anatomy.hu(points).astype(np.float32), patient.acquisition.affine).level == "none"


def series(folder, array, spacing, study, big=False, **more):
    """CT files of a volume whose axes are (down, back, left)."""
    import planted
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

    names = planted._Names(study)
    for number, plane in enumerate(array):
        ds = planted._image(names, "4711", number)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = f"1.2.{study}", f"1.2.{study}.1"
        ds.Rows, ds.Columns = plane.shape
        ds.PixelSpacing, ds.ImagePositionPatient = list(spacing[1:]), [0, 0, -spacing[0] * number]
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 1, 16, 15
        ds.PixelData = (plane + 1024).round().astype(">i2" if big else "<i2").tobytes()
        for name, value in more.items():
            setattr(ds, name, value)
        planted._save(ds, folder / f"{study}-{number}.dcm", names, ExplicitVRBigEndian if big else ExplicitVRLittleEndian)


@pytest.mark.parametrize("big", [False, True])
def test_deidentify_cuts_faces_off(tmp_path, big):
    import pydicom
    from click.testing import CliRunner

    from hvd_imaging.cli.deidentify import command
    from hvd_imaging.sources.dicom import read_series, scan_dicom
    from hvd_imaging.sources.phantom import draw_patient

    spacing = (4.0, 3.0, 3.0)
    array, brain, nose = head(spacing)
    series(tmp_path / "in", array, spacing, 1, big)
    trunk = draw_patient(4, 0)
    trunk = trunk.anatomy.hu(trunk.acquisition.points()).astype(np.float32)[:, ::4, ::4]
    series(tmp_path / "in", trunk, (3.0, 3.0, 3.0), 2)
    series(tmp_path / "in", array[:2], spacing, 3, NumberOfFrames=1)
    done = CliRunner().invoke(command, [str(tmp_path / "in"), str(tmp_path / "out"), "--deface"])
    assert done.exit_code == 10, done.output
    assert f"{len(array) + len(trunk)} files of 1 patients" in done.output and f"{len(array)} without their face" in done.output
    assert "many frames in a file" in done.output and len(list((tmp_path / "out").rglob("*.dcm"))) == len(array) + len(trunk)
    found = {len(one.files): read_series(one, "stored") for one in scan_dicom(tmp_path / "out").series}
    volume = found[len(array)]
    bare = (volume.array[::-1] if volume.affine[2, 0] > 0 else volume.array) - 1024
    assert (bare[nose] == bare.min()).mean() > 0.9 and np.abs(bare - array)[brain].max() <= 1
    assert face_risk(volume.array, volume.affine).level == "head"
    other = found[len(trunk)]
    assert np.abs((other.array[::-1] if other.affine[2, 0] > 0 else other.array) - 1024 - trunk).max() <= 1
    claims = {}
    for path in (tmp_path / "out").rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        claimed = "113102" in [item.CodeValue for item in ds.DeidentificationMethodCodeSequence]
        claims.setdefault(ds.SeriesInstanceUID, set()).add((claimed, ds.get("RecognizableVisualFeatures")))
    assert sorted(claims.values(), key=str) == [{(False, None)}, {(True, "NO")}]


@pytest.mark.shared
def test_real_images(shared_data):
    """Two brain MR series of thick slices with noses in them, and a chest."""
    import nibabel

    from hvd_imaging.sources.dicom import read_series, scan_dicom
    from hvd_imaging.volume import flip_ras_lps

    series = max(scan_dicom(shared_data / "brain_series").series, key=lambda one: len(one.files))
    volume = read_series(series, "stored")
    assert face_risk(volume.array, volume.affine).level == "face"
    for name, level in (("brain1", "face"), ("lung2", "none"), ("breast1", "none")):
        image = nibabel.load(shared_data / f"lesions/imagesTr/{name}.nii.gz")
        array = np.asarray(image.dataobj, np.float32)
        array = array if array.ndim == 3 else array[..., 0]
        assert face_risk(array, flip_ras_lps(image.affine)).level == level


@pytest.mark.parametrize(("mode", "note"), [("note", "can be seen"), ("deface", "cut off"), ("quarantine", None), ("keep", "")])
def test_ingest_and_audit(tmp_path, mode, note):
    import nibabel

    from hvd_imaging.audit.run import audit
    from hvd_imaging.communicator import Alone
    from hvd_imaging.config import IngestConfig, load
    from hvd_imaging.errors import SourceError
    from hvd_imaging.ingest import ingest
    from hvd_imaging.volume import flip_ras_lps

    array, _, _ = head((4.0, 3.0, 3.0), "mr")
    (tmp_path / "in").mkdir()
    nibabel.save(nibabel.Nifti1Image(array, flip_ras_lps(placed((4.0, 3.0, 3.0)))), tmp_path / "in/one.nii.gz")
    config = load(IngestConfig, None, [f"privacy.faces={mode}"])
    if note is None:
        with pytest.raises(SourceError, match="a face can be seen"):
            ingest(tmp_path / "in", tmp_path / "data", config, task="unlabelled")
        return
    result = ingest(tmp_path / "in", tmp_path / "data", config, task="unlabelled")
    assert [item.note for item in result.notes if "face" in item.note] == ([] if not note else [item.note for item in result.notes if note in item.note])
    assert len(audit(tmp_path / "data", Alone()).faces) == (mode != "deface")
