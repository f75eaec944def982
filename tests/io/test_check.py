"""Each fault that a dataset can have is one finding, and no fault is an exception."""

import gzip
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medseg.io import Finding, check_dataset, read, write
from medseg.log import Listener, listening
from medseg.volume import Geometry, Volume

from .conftest import GRID, image, label, write_description


def codes(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(finding.severity, finding.case, finding.code) for finding in findings]


def moved(**place: float) -> Geometry:
    affine = GRID.affine.copy()
    affine[0, 3] = place.get("x", 0.0)
    affine[2, 2] = place.get("thickness", 2.0)
    return Geometry(GRID.shape, affine)


def test_a_healthy_dataset_has_no_findings(raw) -> None:
    assert check_dataset(raw(channels=2)) == []


@pytest.mark.parametrize("name", ["aniso_ct", "hippocampus", "sagittal_ct", "two_channel_mr"])
def test_the_golden_datasets_have_no_findings(golden_dir: Path, name: str) -> None:
    assert check_dataset(golden_dir / "preprocess" / name) == []


def test_the_real_hippocampus_set_gets_one_warning_about_intensity(data_dir: Path) -> None:
    findings = check_dataset(data_dir / "hippocampus")
    assert codes(findings) == [("warning", "", "intensity"), ("info", "", "channel_names")]
    assert "run from 112 to 1.7e+06" in findings[0].message


def test_everything_wrong_is_found_at_once(raw) -> None:
    folder = raw(channels=2)
    (folder / "labelsTr" / "a.nii.gz").unlink()
    (folder / "imagesTr" / "b_0001.nii.gz").unlink()
    write(label(values=(1, 9)), folder / "labelsTr" / "c.nii.gz")
    write(label(), folder / "labelsTr" / "d.nii.gz")
    found = codes(check_dataset(folder))
    assert ("error", "a", "missing_label") in found
    assert ("error", "b", "missing_channel") in found
    assert ("error", "c", "unknown_labels") in found
    assert ("error", "d", "missing_image") in found
    assert ("warning", "", "num_training") in found


def replace_label(folder: Path, volume: Volume) -> None:
    write(volume, folder / "labelsTr" / "a.nii.gz")


def replace_image(folder: Path, volume: Volume) -> None:
    write(volume, folder / "imagesTr" / "a_0000.nii.gz")


def with_values(volume: Volume, *values: float) -> Volume:
    array = volume.array.astype(np.float32).copy()
    array[0, 0, 0, : len(values)] = values
    return volume.with_array(array)


FAULTS = {
    "label of another shape": (
        lambda f: replace_label(f, label(Geometry((5, 5, 4), GRID.affine))),
        ("error", "a", "label_grid"),
        "shape (5, 5, 4) differs from (6, 5, 4) of its image",
    ),
    "label elsewhere": (
        lambda f: replace_label(f, label(moved(x=3.0))),
        ("error", "a", "label_grid"),
        "position differs from its image: voxels are up to 3 mm apart",
    ),
    "label of another spacing": (
        lambda f: replace_label(f, label(moved(thickness=2.5))),
        ("error", "a", "label_grid"),
        "spacing 1x1x2.5 differs from 1x1x2",
    ),
    "label flipped": (
        lambda f: replace_label(f, label(Geometry(GRID.shape, np.diag([-1.0, 1.0, 2.0, 1.0])))),
        ("error", "a", "label_grid"),
        "direction differs from its image",
    ),
    "unknown value": (
        lambda f: replace_label(f, label(values=(1, 2, 7))),
        ("error", "a", "unknown_labels"),
        "label holds 7; dataset.json knows 0, 1, 2",
    ),
    "fractions in a label": (
        lambda f: replace_label(f, with_values(label(), 0.5)),
        ("error", "a", "label_values"),
        "labelsTr/a.nii.gz: holds 0.5",
    ),
    "NaN in a label": (
        lambda f: replace_label(f, with_values(label(), np.nan)),
        ("error", "a", "label_values"),
        "holds nan",
    ),
    "NaN and infinity in an image": (
        lambda f: replace_image(f, with_values(image(1), np.nan, np.inf)),
        ("error", "a", "not_finite"),
        "a_0000.nii.gz holds 2 NaN or infinite voxels",
    ),
    "4D where 3D is meant": (
        lambda f: replace_image(f, Volume(np.random.default_rng(0).random((3, *GRID.shape)), GRID)),
        ("error", "a", "channel_count"),
        "has 3 channels, 1 are named (MRI)",
    ),
    "empty label": (
        lambda f: replace_label(f, label(values=())),
        ("warning", "a", "empty_label"),
        "label holds nothing but background",
    ),
    "constant image": (
        lambda f: replace_image(f, Volume(np.full(GRID.shape, 7, np.int16), GRID)),
        ("error", "a", "constant"),
        "has the value 7 everywhere",
    ),
    "copy of another image": (
        lambda f: replace_image(f, read(f / "imagesTr" / "b_0000.nii.gz")),
        ("warning", "", "duplicate_image"),
        "the same voxels in a_0000.nii.gz, b_0000.nii.gz",
    ),
    "spacing in another unit": (
        lambda f: (
            replace_image(f, image(1, moved(thickness=20.0))),
            replace_label(f, label(moved(thickness=20.0))),
        ),
        ("warning", "", "spacing"),
        "1 cases have a spacing over 3x off the median (1x1x2): a",
    ),
    "intensity of another scale": (
        lambda f: replace_image(f, image(1, scale=1e6)),
        ("warning", "", "intensity"),
        "intensity maxima of MRI run from",
    ),
    "turned image": (
        lambda f: (
            replace_image(f, image(1, Geometry(GRID.shape, np.diag([-1.0, 1.0, 2.0, 1.0])))),
            replace_label(f, label(Geometry(GRID.shape, np.diag([-1.0, 1.0, 2.0, 1.0])))),
        ),
        ("warning", "", "orientation"),
        "voxel axes point RAS (2x), LAS (1x); rare: a",
    ),
    "micrometres among millimetres": (
        lambda f: (
            replace_image(f, image(1, Geometry(GRID.shape, GRID.affine, "micron"))),
            replace_label(f, label(Geometry(GRID.shape, GRID.affine, "micron"))),
        ),
        ("error", "", "units"),
        "some images are in mm and some in micron; micron: a",
    ),
    "one slice": (
        lambda f: (
            replace_image(f, image(1, Geometry((6, 5, 1), GRID.affine))),
            replace_label(f, label(Geometry((6, 5, 1), GRID.affine))),
        ),
        ("warning", "", "one_slice"),
        "1 of 3 images have one slice: a",
    ),
    "label that never occurs": (
        lambda f: write_description(f, labels={"background": 0, "liver": 1, "spleen": 2, "kidney": 3}),
        ("warning", "", "unused_label"),
        "never occurs in a label map: kidney",
    ),
    "left and right": (
        lambda f: write_description(f, labels={"background": 0, "kidney_left": 1, "kidney_right": 2}),
        ("info", "", "sided_labels"),
        "labels name a side: kidney_left, kidney_right",
    ),
    "CT that is none": (
        lambda f: (
            write_description(f, channel_names={"0": "CT"}),
            replace_image(f, Volume(np.abs(image(1).array), GRID)),
        ),
        ("warning", "", "not_hounsfield"),
        "channel 0 is CT, but 1 of 3 cases are not in Hounsfield units: a",
    ),
    "name without a channel number": (
        lambda f: (f / "imagesTr" / "b_0000.nii.gz").rename(f / "imagesTr" / "b.nii.gz"),
        ("error", "b", "file_name"),
        "imagesTr/b.nii.gz is not named CASE_0000.nii.gz",
    ),
    "wrong labels": (
        lambda f: write_description(f, labels={"liver": 1}),
        ("error", "", "labels"),
        "'background' must be present and 0",
    ),
    "patients with several cases": (
        lambda f: write_description(f, patients={"P1": ["a", "b"]}),
        ("info", "", "duplicate_patient"),
        "1 patients have several cases: P1",
    ),
    "patients of no case": (
        lambda f: write_description(f, patients={"zz": "P1"}),
        ("warning", "", "patients"),
        "'patients' names cases that do not exist: zz",
    ),
    "a patient in training and test": (
        lambda f: write(image(77), f / "imagesTs" / "a_0000.nii.gz"),
        ("warning", "", "patient_in_test"),
        "1 patients are in training and in test: a",
    ),
    "a reader that reorients": (
        lambda f: write_description(f, overwrite_image_reader_writer="NibabelIOWithReorient"),
        ("info", "", "reorient"),
        "images are turned to RAS before all else",
    ),
    "no description of channels": (
        lambda f: write_description(f, channel_names=None),
        ("warning", "", "channel_names"),
        "does not name the channels; MRI is assumed",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_finding_with_a_remedy(raw, fault: str) -> None:
    folder = raw()
    apply, expected, message = FAULTS[fault]
    apply(folder)
    findings = check_dataset(folder)
    matching = [finding for finding in findings if codes([finding]) == [expected]]
    assert len(matching) == 1, findings
    assert message in matching[0].message
    assert matching[0].remedy.endswith(".")


def test_a_truncated_gzip_is_found_for_image_and_label(raw) -> None:
    folder = raw()
    for path in (folder / "imagesTr" / "a_0000.nii.gz", folder / "labelsTr" / "b.nii.gz"):
        path.write_bytes(path.read_bytes()[:-20])
    findings = check_dataset(folder)
    assert codes(findings) == [("error", "a", "unreadable"), ("error", "b", "unreadable")]
    assert findings[0].message == "imagesTr/a_0000.nii.gz: the file is truncated or damaged"
    assert findings[0].remedy == "Copy or download it again."


def test_channels_on_different_grids_are_found(raw) -> None:
    folder = raw(channels=2)
    write(image(5, moved(x=9.0)), folder / "imagesTr" / "a_0001.nii.gz")
    assert codes(check_dataset(folder)) == [("error", "a", "channel_grid")]


def test_sform_and_qform_in_conflict_are_found(raw) -> None:
    folder = raw()
    path = folder / "imagesTr" / "a_0000.nii.gz"
    nifti = nibabel.load(path)
    array = np.asanyarray(nifti.dataobj)
    nifti.header.set_qform(np.diag([-1.0, -1.0, 2.0, 1.0]), code=1)
    broken = nibabel.Nifti1Image(array, None, nifti.header)
    broken.header.set_sform(GRID.affine, code=2)
    nibabel.save(broken, path)
    findings = check_dataset(folder)
    assert codes(findings) == [("warning", "a", "sform_qform")]
    assert "sform is used" in findings[0].message


def test_a_skewed_grid_is_found(raw) -> None:
    folder = raw()
    affine = GRID.affine.copy()
    affine[0, 1] = 0.3
    replace_image(folder, image(1, Geometry(GRID.shape, affine)))
    replace_label(folder, label(Geometry(GRID.shape, affine)))
    assert ("warning", "a", "not_orthonormal") in codes(check_dataset(folder))


def test_one_slice_everywhere_is_only_told(data_dir: Path, tmp_path: Path) -> None:
    for name in "ab":
        write(image(ord(name), Geometry((6, 5, 1), GRID.affine)), tmp_path / "images" / f"{name}.nii.gz")
        write(label(Geometry((6, 5, 1), GRID.affine)), tmp_path / "labels" / f"{name}.nii.gz")
    assert ("info", "", "one_slice") in codes(check_dataset(tmp_path))


def test_only_annotated_voxels_count_as_foreground(raw) -> None:
    folder = raw(labels={"background": 0, "liver": 1, "spleen": 2, "ignore": 3})
    replace_label(folder, label(values=(3,)))
    findings = check_dataset(folder)
    assert codes(findings) == [("warning", "a", "empty_label")]
    assert findings[0].message == "label holds no annotated foreground"


def test_a_region_of_which_one_value_occurs_is_used(raw) -> None:
    regions = {"background": 0, "whole": [1, 2], "core": [2]}
    assert check_dataset(raw(labels=regions, regions_class_order=[1, 2])) == []


@pytest.mark.parametrize("kind", ["absent", "empty folder", "bad json", "a picture", "empty csv"])
def test_what_is_no_dataset_is_one_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "set"
    if kind != "absent":
        path.mkdir()
    if kind == "bad json":
        (path / "dataset.json").write_text("{]")
        (path / "imagesTr").mkdir()
    if kind == "a picture":
        path = path / "a.png"
        path.write_bytes(b"x")
    if kind == "empty csv":
        path = path / "a.csv"
        path.touch()
    assert codes(check_dataset(path)) == [("error", "", "layout")]


HOSTILE = [
    '{"training": 3, "labels": {}}',
    '{"training": [1, null, {"image": 5}], "labels": {"0": "background"}}',
    '{"dataset": {"a": 3}, "labels": {"background": 0}}',
    '{"dataset": [], "labels": {"background": 0}}',
    '{"labels": {"background": "zero"}, "channel_names": 4, "file_ending": 7, "numTraining": "x"}',
    '{"labels": [1, 2], "channel_names": [], "patients": [1], "file_ending": ""}',
    '{"labels": {"background": 0, "a": [1, "x"]}, "regions_class_order": 5}',
    '{"labels": {"background": 0, "a": {"b": 1}}, "channel_names": {"0": null}}',
    '{"labels": {"background": 0, "ignore": 1}, "channel_names": {"0": ["x"]}, "patients": {"a": null}}',
    '{"labels": {}}',
    '{"labels": {"background": 0, "ignore": [1, 2]}, "overwrite_image_reader_writer": {"a": 1}}',
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_description_is_told_not_raised(raw, text: str) -> None:
    folder = raw()
    (folder / "dataset.json").write_text(text)
    assert any(finding.severity == "error" for finding in check_dataset(folder))


@given(
    keys=st.dictionaries(
        st.sampled_from(
            ["labels", "channel_names", "dataset", "training", "file_ending", "patients", "test"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_description_whatever_raises(tmp_path: Path, keys: dict) -> None:
    (tmp_path / "imagesTr").mkdir(exist_ok=True)
    (tmp_path / "dataset.json").write_text(json.dumps(keys))
    assert check_dataset(tmp_path)


def test_files_that_are_no_images_are_findings(raw) -> None:
    folder = raw()
    (folder / "imagesTr" / "a_0000.nii.gz").write_bytes(b"")
    (folder / "imagesTr" / "b_0000.nii.gz").write_bytes(gzip.compress(b"not an image" * 100))
    (folder / "labelsTr" / "c.nii.gz").write_bytes(b"\x1f\x8bgarbage")
    findings = check_dataset(folder)
    assert [finding.code for finding in findings] == ["unreadable"] * 3
    assert [finding.case for finding in findings] == ["a", "b", "c"]


def test_progress_is_reported_and_cancelling_works(raw) -> None:
    class Counter(Listener):
        steps = 0

        def advanced(self, key: int, steps: int, note: str) -> None:
            self.steps += steps

    counter = Counter()
    with listening(counter):
        check_dataset(raw())
    assert counter.steps == 3


def test_a_blank_channel_beside_a_good_one_is_only_a_warning(raw) -> None:
    folder = raw(channels=2)
    write(Volume(np.zeros(GRID.shape, np.int16), GRID), folder / "imagesTr" / "a_0001.nii.gz")
    assert ("warning", "a", "constant") in codes(check_dataset(folder))


def manifest(folder: Path, *lines: str) -> list[str]:
    (folder / "m.csv").write_text("\n".join(("case,image,label", *lines)))
    return [str(finding) for finding in check_dataset(folder / "m.csv") if finding.severity == "error"]


def test_a_manifest_tells_each_missing_file_once_with_its_line(raw) -> None:
    folder = raw()
    good = "a,imagesTr/a_0000.nii.gz,labelsTr/a.nii.gz"
    errors = manifest(folder, good, "", "b,hip/nope.nii.gz,labelsTr/b.nii.gz")
    assert errors == ["b: m.csv line 4: hip/nope.nii.gz does not exist. Correct the path."]
    errors = manifest(folder, good, "c,imagesTr/c_0000.nii.gz,labels/nope.nii.gz")
    assert errors == ["c: m.csv line 3: labels/nope.nii.gz does not exist. Correct the path."]


def test_an_empty_manifest_is_told_its_columns(tmp_path: Path) -> None:
    for text in ("", "a,b\n1,2\n"):
        (tmp_path / "m.csv").write_text(text)
        (finding,) = check_dataset(tmp_path / "m.csv")
        assert finding.remedy == "Name the columns in the first line, then write one line a case."
    assert manifest(tmp_path) == ["there is no training case. Add a line with case, image and label."]


@pytest.mark.parametrize(("values", "says"), [((1, 7), "7 is in b"), ((), "Mark the objects")])
def test_remedies_for_plain_folders_name_no_file_that_is_not_there(
    tmp_path: Path, values: tuple[int, ...], says: str
) -> None:
    for number, name in enumerate("ab"):
        write(image(number), tmp_path / "images" / f"{name}.nii.gz")
        write(label(values=values if name == "b" else values[:1]), tmp_path / "labels" / f"{name}.nii.gz")
    errors = [str(finding) for finding in check_dataset(tmp_path) if finding.code == "labels"]
    assert len(errors) == 1
    assert says in errors[0]
    assert "dataset.json" not in errors[0]


def test_negative_labels_of_plain_folders_name_the_case(tmp_path: Path) -> None:
    write(image(1), tmp_path / "images" / "a.nii.gz")
    array = label(values=(1,)).array[0].astype(np.int16)
    array[1, 1, 1] = -1
    write(Volume(array, GRID), tmp_path / "labels" / "a.nii.gz")
    assert any("-1 is in a. Renumber" in str(finding) for finding in check_dataset(tmp_path))


def test_empty_folders_are_told_what_to_put_where(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    assert [str(finding) for finding in check_dataset(tmp_path)] == [
        "there is no training case. Put images such as CASE.nii.gz into images and label maps such as "
        "CASE.nii.gz into labels."
    ]


def test_a_file_without_permission_is_not_called_damaged(raw, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = raw()
    original = Path.open

    def guarded(path: Path, *args: object, **kwargs: object) -> object:
        if path.name == "b_0000.nii.gz":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", guarded)
    (finding,) = check_dataset(folder)
    assert (finding.case, finding.code) == ("b", "unreadable")
    assert finding.remedy == "Change its permissions."


def test_values_beyond_float32_count_as_infinite(raw) -> None:
    folder = raw()
    array = image(1).array.astype(np.float64)
    array[0, 0, 0, :2] = 1e300
    write(Volume(array, GRID), folder / "imagesTr" / "a_0000.nii.gz")
    assert ("error", "a", "not_finite") in codes(check_dataset(folder))


def test_maps_of_classes_beside_objects_are_checked_in_place_of_their_numbers(tmp_path: Path) -> None:
    objects = np.zeros(GRID.shape, np.uint16)
    objects[1:3, 1:3, 1:3], objects[4:6, 1:3, 1:3] = 17, 300
    classes = np.where(objects > 0, 2, 1).astype(np.uint8)
    for name in "ab":
        write(image(seed=ord(name)), tmp_path / "images" / f"{name}.nii.gz")
        write(Volume(objects, GRID), tmp_path / "labels" / f"{name}.nii.gz")
        write(Volume(classes, GRID), tmp_path / "semantic" / f"{name}.nii.gz")
    described = {"channel_names": {"0": "MRI"}, "labels": {"organ": 1, "lesion": 2}, "things": ["lesion"]}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    assert check_dataset(tmp_path) == []
    write(Volume(np.ones_like(classes), GRID), tmp_path / "semantic" / "a.nii.gz")
    (finding,) = check_dataset(tmp_path)
    assert (finding.severity, finding.case, finding.code) == ("error", "a", "semantic")
    assert "voxels of objects have no class of a thing" in finding.message
    (tmp_path / "dataset.json").write_text(json.dumps(described | {"things": ["tumour"]}))
    assert ("error", "", "semantic") in codes(check_dataset(tmp_path))
