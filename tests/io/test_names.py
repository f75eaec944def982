"""A case name becomes part of a path, so it must be one plain component."""

import json
from pathlib import Path

import pytest

from medseg.errors import DatasetError
from medseg.io import check_dataset, open_dataset, write

from .conftest import image, label, write_description

BAD = ["../../evil", "/evil", "a/b", "a\\b", ".", "..", ".hidden", "a\x07b", "x" * 201]


def refused(path: Path) -> None:
    with pytest.raises(DatasetError, match="no name for a case"):
        open_dataset(path)
    assert "case_name" in {finding.code for finding in check_dataset(path) if finding.severity == "error"}


@pytest.mark.parametrize("name", BAD)
def test_a_name_from_a_manifest_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    write(image(1), tmp_path / "i.nii.gz")
    write(label(), tmp_path / "l.nii.gz")
    write_description(tmp_path, numTraining=None)
    (tmp_path / "m.csv").write_text(f"case,image,label\nok,i.nii.gz,l.nii.gz\n{name},i.nii.gz,l.nii.gz\n")
    refused(tmp_path / "m.csv")


@pytest.mark.parametrize("name", BAD)
def test_a_name_from_nnunets_dataset_key_stays_in_its_folder(raw, name: str) -> None:
    entry = {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}
    refused(raw(dataset={name: entry, "b": entry}, numTraining=2))


def test_ordinary_names_pass(raw) -> None:
    entry = {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}
    names = ["sub-01_ses-2", "Müller 3", "a..b", "x" * 200]
    folder = raw(dataset=dict.fromkeys(names, entry), numTraining=4)
    assert {case.name for case in open_dataset(folder).training} == set(names)


def test_variables_are_expanded_in_the_dataset_key_only(raw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSEG_TEST_PLACE", "imagesTr")
    entry = {"images": ["$MEDSEG_TEST_PLACE/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}
    folder = raw(dataset={"a": entry}, numTraining=1)
    assert open_dataset(folder).training[0].images[0].is_file()
    msd = [{"image": "$MEDSEG_TEST_PLACE/a_0000.nii.gz", "label": "labelsTr/a.nii.gz"}]
    content = json.loads((folder / "dataset.json").read_text()) | {"training": msd}
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"does not exist|has no image"):
        open_dataset(folder)
