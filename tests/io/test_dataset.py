"""Four layouts become the same Dataset."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medseg.errors import DatasetError, GeometryError, LabelError, ReadError
from medseg.io import Case, list_cases, open_dataset, read, read_image, read_label, write
from medseg.volume import Geometry, Volume

from .conftest import GRID, image, label, write_description

GOLDEN = ["aniso_ct", "hippocampus", "sagittal_ct", "two_channel_mr"]


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_dataset_is_what_nnunet_says(golden_dir: Path, name: str) -> None:
    folder = golden_dir / "preprocess" / name
    dataset = open_dataset(folder)
    description = json.loads((folder / "dataset.json").read_text())
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    fingerprint = json.loads((folder / "dataset_fingerprint.json").read_text())
    assert dataset.to_dataset_json() == description
    assert list(dataset.to_dataset_json()["labels"]) == list(description["labels"])
    assert dataset.reader == plans["image_reader_writer"]
    assert dataset.name == name
    spacings = [list(read_image(case).spacing[::-1]) for case in dataset.training]
    assert spacings == fingerprint["spacings"]


def test_regions_and_ignore_label_come_through(golden_dir: Path) -> None:
    dataset = open_dataset(golden_dir / "preprocess" / "two_channel_mr")
    assert dataset.labels.has_regions
    assert dataset.labels.ignore == 4
    assert dataset.channels == ("T1", "T2")
    first = read_image(dataset.training[0])
    assert first.channels == 2
    assert first.array.dtype == np.float32
    np.testing.assert_array_equal(first.array[1], read(dataset.training[0].images[1]).array[0])
    assert read_label(dataset.training[0]).array.dtype.kind in "iu"


def test_a_raw_folder_lists_cases_by_name_with_their_test_images(raw) -> None:
    folder = raw(channels=2)
    for channel in range(2):
        write(image(90 + channel), folder / "imagesTs" / f"t_{channel:04d}.nii.gz")
    (folder / "imagesTr" / "._a_0000.nii.gz").write_bytes(b"macOS")
    dataset = open_dataset(folder)
    assert [case.name for case in dataset.training] == ["a", "b", "c"]
    assert dataset.training[0].images == tuple(folder / "imagesTr" / f"a_{c:04d}.nii.gz" for c in range(2))
    assert dataset.training[0].label == folder / "labelsTr" / "a.nii.gz"
    assert [case.name for case in dataset.test] == ["t"]
    assert dataset.test[0].label is None
    assert dataset.num_training == 3


def test_the_legacy_key_modality_names_the_channels(raw) -> None:
    assert open_dataset(raw(channel_names=None, modality={"0": "CT"})).channels == ("CT",)


def test_channel_order_is_the_order_in_the_file(raw) -> None:
    folder = raw(channels=2, channel_names={"1": "T2", "0": "T1"})
    assert open_dataset(folder).channels == ("T2", "T1")


def test_explicit_paths_replace_the_folders(raw, tmp_path: Path) -> None:
    folder = raw()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in (folder / "imagesTr" / "a_0000.nii.gz", folder / "labelsTr" / "a.nii.gz"):
        shutil.copy(path, elsewhere)
    entries = {
        "far": {"images": ["../elsewhere/a_0000.nii.gz"], "label": str(elsewhere / "a.nii.gz")},
        "near": {"images": ["imagesTr/b_0000.nii.gz"], "label": "labelsTr/b.nii.gz"},
    }
    write_description(folder, dataset=entries, numTraining=2)
    dataset = open_dataset(folder)
    assert [case.name for case in dataset.training] == ["far", "near"]
    assert read_label(dataset.training[0]).array.max() == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "SimpleITKIO"),
        ({"overwrite_image_reader_writer": "NibabelIO"}, "NibabelIO"),
        ({"overwrite_image_reader_writer": "NibabelIOWithReorient"}, "NibabelIOWithReorient"),
        ({"overwrite_image_reader_writer": "None"}, "SimpleITKIO"),
        ({"overwrite_image_reader_writer": "NoSuchIO"}, "SimpleITKIO"),
    ],
)
def test_the_reader_is_the_one_nnunet_chooses(raw, changes: dict[str, str], expected: str) -> None:
    assert open_dataset(raw(**changes)).reader == expected


def test_a_sheared_nifti_goes_to_nibabel_as_in_nnunet(raw) -> None:
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[0, 1] = 0.3
    folder = raw()
    for name in "abc":
        write(image(1, Geometry(GRID.shape, affine)), folder / "imagesTr" / f"{name}_0000.nii.gz")
    assert open_dataset(folder).reader == "NibabelIO"


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (".nii", "NibabelIO"),
        (".nrrd", "SimpleITKIO"),
        (".mha", "SimpleITKIO"),
        (".tif", "Tiff3DIO"),
        (".tiff", "Tiff3DIO"),
    ],
)
def test_the_file_ending_chooses_the_reader(tmp_path: Path, ending: str, expected: str) -> None:
    write(image(1), tmp_path / "imagesTr" / f"a_0000{ending}")
    write(label(), tmp_path / "labelsTr" / f"a{ending}")
    write_description(tmp_path, numTraining=1, file_ending=ending)
    assert open_dataset(tmp_path).reader == expected


def test_colour_pictures_hold_all_channels_in_one_file(tmp_path: Path) -> None:
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "imagesTr" / "a_0000.png")
    Image.fromarray(np.ones((4, 5), np.uint8)).save(tmp_path / "labelsTr" / "a.png")
    names = {"0": "R", "1": "G", "2": "B"}
    write_description(tmp_path, channel_names=names, numTraining=1, file_ending=".png")
    dataset = open_dataset(tmp_path)
    assert dataset.reader == "NaturalImage2DIO"
    assert read_image(dataset.training[0]).array.shape == (3, 5, 4, 1)
    assert read_image(dataset.training[0]).spacing[::-1] == (999.0, 1.0, 1.0)


def test_a_decathlon_task_is_read(tmp_path: Path) -> None:
    four = Volume(np.stack([image(1).array[0], image(2).array[0]]), GRID)
    for name in "ab":
        write(four, tmp_path / "imagesTr" / f"brain_{name}.nii.gz")
        write(label(), tmp_path / "labelsTr" / f"brain_{name}.nii.gz")
    write(four, tmp_path / "imagesTs" / "brain_t.nii.gz")
    (tmp_path / "imagesTr" / "._brain_a.nii.gz").write_bytes(b"macOS")
    names = [f"brain_{n}.nii.gz" for n in "ab"] + ["._brain_a.nii.gz"]
    pairs = [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names]
    description = {
        "modality": {"0": "FLAIR", "1": "T1w"},
        "labels": {"0": "background", "1": "edema", "2": "tumour"},
        "numTraining": 2,
        "training": pairs,
        "test": ["./imagesTs/brain_t.nii.gz"],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    dataset = open_dataset(tmp_path)
    assert dataset.channels == ("FLAIR", "T1w")
    assert dataset.labels.entries == {"background": 0, "edema": 1, "tumour": 2}
    assert [case.name for case in dataset.training] == ["brain_a", "brain_b"]
    assert [case.name for case in dataset.test] == ["brain_t"]
    assert (dataset.file_ending, dataset.reader) == (".nii.gz", "SimpleITKIO")
    assert read_image(dataset.training[0]).channels == 2


def test_plain_folders_need_no_description(data_dir: Path) -> None:
    dataset = open_dataset(data_dir / "hippocampus")
    assert dataset.num_training == 120
    assert dataset.channels == ("MRI",)
    assert dataset.labels.entries == {"background": 0, "label_1": 1, "label_2": 2}
    assert dataset.training[0] == Case(
        "hippocampus_001",
        (data_dir / "hippocampus" / "images" / "hippocampus_001.nii.gz",),
        data_dir / "hippocampus" / "labels" / "hippocampus_001.nii.gz",
        "hippocampus_001",
    )


def test_micrometre_volumes_are_a_dataset(data_dir: Path) -> None:
    dataset = open_dataset(data_dir / "nuclei3d_ovules")
    assert dataset.num_training == 3
    assert read_image(dataset.training[0]).geometry.unit == "micron"
    assert read_label(dataset.training[0]).array.dtype == np.uint16


def test_a_description_beside_plain_folders_names_everything(tmp_path: Path) -> None:
    write(image(1), tmp_path / "images" / "a.nii.gz")
    write(label(), tmp_path / "labels" / "a.nii.gz")
    (tmp_path / "dataset.yaml").write_text(
        "channel_names: [CT]\nlabels: {background: 0, liver: 1, spleen: 2}\npatients: {a: P7}\n"
    )
    dataset = open_dataset(tmp_path)
    assert dataset.channels == ("CT",)
    assert list(dataset.labels.foreground) == ["liver", "spleen"]
    assert dataset.training[0].patient == "P7"


def test_hounsfield_like_values_make_a_channel_ct(tmp_path: Path, data_dir: Path) -> None:
    for folder, name in (("images", "example_ct"), ("labels", "example_ct")):
        (tmp_path / folder).mkdir()
        source = f"{name}.nii.gz" if folder == "images" else f"{name}_seg117_pseudo.nii.gz"
        shutil.copy(data_dir / "ct_organs" / source, tmp_path / folder / f"{name}.nii.gz")
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, **{f"s{i}": i for i in range(1, 118)}}})
    )
    assert open_dataset(tmp_path).channels == ("CT",)


def test_four_digits_at_the_end_are_a_channel_only_if_the_labels_say_so(tmp_path: Path) -> None:
    for number in range(2):
        write(image(number), tmp_path / "one" / "images" / f"case_{number:04d}.nii.gz")
        write(label(), tmp_path / "one" / "labels" / f"case_{number:04d}.nii.gz")
        write(image(number), tmp_path / "two" / "images" / f"case_{number:04d}.nii.gz")
    write(label(), tmp_path / "two" / "labels" / "case.nii.gz")
    one, two = open_dataset(tmp_path / "one"), open_dataset(tmp_path / "two")
    assert [case.name for case in one.training] == ["case_0000", "case_0001"]
    assert [len(case.images) for case in two.training] == [2]
    assert two.channels == ("MRI", "MRI")


def test_a_csv_manifest_names_paths_patients_and_test_cases(tmp_path: Path) -> None:
    for number in range(4):
        write(image(number), tmp_path / "scans" / f"{number}.nii.gz")
    write(label(), tmp_path / "scans" / "seg.nii.gz")
    (tmp_path / "cohort.csv").write_text(
        "case, image_0, image_1, label, patient\n"
        "x, scans/0.nii.gz, scans/1.nii.gz, scans/seg.nii.gz, P1\n"
        "y, scans/2.nii.gz, scans/3.nii.gz, ,\n"
    )
    dataset = open_dataset(tmp_path / "cohort.csv")
    assert dataset.name == "cohort"
    assert [case.name for case in dataset.training] == ["x"]
    assert [case.name for case in dataset.test] == ["y"]
    assert dataset.training[0].patient == "P1"
    assert read_image(dataset.training[0]).channels == 2


def test_a_csv_from_a_german_excel_is_read(tmp_path: Path) -> None:
    write(image(1), tmp_path / "a.nii.gz")
    write(label(), tmp_path / "seg.nii.gz")
    (tmp_path / "list.csv").write_bytes("\ufeffImage;Label\r\na.nii.gz;seg.nii.gz\r\n".encode())
    assert [case.name for case in open_dataset(tmp_path / "list.csv").training] == ["a"]


def test_patients_come_from_bids_names_and_from_a_mapping(tmp_path: Path) -> None:
    for name in ("sub-01_ses-1", "sub-01_ses-2", "other", "more"):
        write(image(1), tmp_path / "images" / f"{name}.nii.gz")
        write(label(), tmp_path / "labels" / f"{name}.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"patients": {"P9": ["other", "more"]}}))
    patients = {case.name: case.patient for case in open_dataset(tmp_path).training}
    assert patients == {"sub-01_ses-1": "sub-01", "sub-01_ses-2": "sub-01", "other": "P9", "more": "P9"}


def test_missing_files_are_an_error_that_points_to_check(raw) -> None:
    folder = raw(channels=2)
    (folder / "labelsTr" / "a.nii.gz").unlink()
    (folder / "imagesTr" / "b_0001.nii.gz").unlink()
    with pytest.raises(
        DatasetError, match=r"a: the image has no label.*And 1 more; `medseg check` lists them"
    ):
        open_dataset(folder)


def test_a_label_without_image_is_left_out_as_nnunet_does(raw, caplog: pytest.LogCaptureFixture) -> None:
    folder = raw()
    (folder / "imagesTr" / "b_0000.nii.gz").unlink()
    assert [case.name for case in open_dataset(folder).training] == ["a", "c"]
    assert "1 labels have no image" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", r"not valid JSON"),
        ("[1]", r"expected {\.\.\.} at the top level, found list"),
        ('{"labels": {"background": 1}, "file_ending": ".nii.gz"}', "'background' must be present and 0"),
        ('{"labels": {"background": 0, "x": 5}, "file_ending": ".nii.gz"}', "must be consecutive"),
        ('{"file_ending": ".nii.gz"}', "does not name them"),
        ('{"labels": {"background": 0, "x": 1}, "file_ending": ".xyz"}', "not a format that medseg reads"),
    ],
)
def test_a_wrong_description_says_what_to_do(raw, text: str, expected: str) -> None:
    folder = raw()
    (folder / "dataset.json").write_text(text)
    with pytest.raises((DatasetError, LabelError), match=expected):
        open_dataset(folder)


def test_what_is_no_dataset_is_told_the_layouts(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"not a dataset\. Expected dataset\.json with imagesTr"):
        open_dataset(tmp_path)
    with pytest.raises(DatasetError, match="no such dataset"):
        open_dataset(tmp_path / "absent")


def test_label_values_with_gaps_are_not_guessed(tmp_path: Path) -> None:
    write(image(1), tmp_path / "images" / "a.nii.gz")
    write(label(values=(1, 7)), tmp_path / "labels" / "a.nii.gz")
    with pytest.raises(LabelError, match=r"the label maps hold the values 1, 7; .* but 7 is in a"):
        open_dataset(tmp_path)


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    moved = np.diag([1.0, 1.0, 2.0, 1.0])
    moved[0, 3] = 5.0
    write(image(1), tmp_path / "a.nii.gz")
    write(image(2, Geometry(GRID.shape, moved)), tmp_path / "b.nii.gz")
    case = Case("x", (tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"), None, "x")
    with pytest.raises(
        GeometryError, match=r"b\.nii\.gz: position differs from a\.nii\.gz: voxels are up to 5 mm"
    ):
        read_image(case)


def test_voxels_of_a_read_image_are_contiguous_along_i(raw) -> None:
    volume = read_image(open_dataset(raw(channels=2)).training[0])
    assert volume.array.transpose(0, 3, 2, 1).flags.c_contiguous


def test_float_labels_are_accepted_when_whole(tmp_path: Path) -> None:
    volume = label()
    write(volume.with_array(volume.array.astype(np.float32) + np.float32(1e-6)), tmp_path / "a.nii.gz")
    read_back = read_label(Case("a", (), tmp_path / "a.nii.gz", "a"))
    assert read_back.array.dtype == np.uint8
    np.testing.assert_array_equal(read_back.array, volume.array)


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_fractions_and_nan_are_no_labels(tmp_path: Path, value: float) -> None:
    volume = label().with_array(label().array.astype(np.float32))
    volume.array[0, 0, 0, 0] = value
    write(volume, tmp_path / "a.nii.gz")
    with pytest.raises(LabelError, match=r"a\.nii\.gz: holds .*; a label map holds whole numbers only"):
        read_label(Case("a", (), tmp_path / "a.nii.gz", "a"))


def test_a_colour_picture_is_no_label(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(LabelError, match="has 3 channels; expected one label map"):
        read_label(Case("a", (), tmp_path / "a.png", "a"))
    with pytest.raises(LabelError, match="has no label map"):
        read_label(Case("a", (), None, "a"))


def test_cases_to_predict_are_listed_with_and_without_channel_numbers(tmp_path: Path) -> None:
    for name in ("a_0000", "b", "scan_0012"):
        write(image(1), tmp_path / f"{name}.nii.gz")
    assert [case.name for case in list_cases(tmp_path, 1)] == ["a", "b", "scan_0012"]
    assert list_cases(tmp_path / "a_0000.nii.gz", 1)[0].name == "a"
    assert list_cases(tmp_path / "b.nii.gz", 1)[0].images == (tmp_path / "b.nii.gz",)


def test_a_missing_channel_fails_its_case_only(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0001"):
        write(image(1), tmp_path / f"{name}.nii.gz")
    first, second = list_cases(tmp_path, 2)
    assert read_image(first).channels == 2
    with pytest.raises(ReadError, match=r"b_0000\.nii\.gz: no such file"):
        read_image(second)


def test_one_file_brings_its_other_channels_or_holds_them_all(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001"):
        write(image(1), tmp_path / f"{name}.nii.gz")
    write(Volume(np.zeros((2, *GRID.shape), np.float32), GRID), tmp_path / "four.nii.gz")
    assert len(list_cases(tmp_path / "a_0000.nii.gz", 2)[0].images) == 2
    assert len(list_cases(tmp_path / "four.nii.gz", 2)[0].images) == 1


@pytest.mark.parametrize("name", ["absent.nii.gz", "notes.txt"])
def test_what_cannot_be_predicted_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ReadError, match=name):
        list_cases(tmp_path / name, 1)
    with pytest.raises(DatasetError, match=r"holds no image\. Expected files such as CASE_0000"):
        list_cases(tmp_path, 1)


def test_two_files_of_one_case_are_refused(tmp_path: Path) -> None:
    write(image(1), tmp_path / "a.nii.gz")
    write(image(1), tmp_path / "a.nrrd")
    with pytest.raises(DatasetError, match="two images are of case a"):
        list_cases(tmp_path, 1)
