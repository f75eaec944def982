"""Folds equal nnU-Net's, patients stay together, custom files are respected."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.errors import DatasetError, ReadError
from medseg.plan import Split, choose_split, make_splits


@dataclass(frozen=True)
class Case:
    name: str
    patient: str


def cases(n: int, patients: int | None = None) -> list[Case]:
    return [Case(f"c{i:03d}", f"p{i % patients}" if patients else f"c{i:03d}") for i in range(n)]


# scikit-learn 1.9.1, KFold(5, shuffle=True, random_state=12345): validation indices of each fold.
KFOLD_12 = [[0, 3, 8], [7, 10, 11], [6, 9], [1, 4], [2, 5]]


def test_folds_equal_scikit_learns_shuffled_kfold() -> None:
    ours = [[int(name[1:]) for name in split.val] for split in make_splits(cases(12))]
    assert ours == KFOLD_12


def test_the_order_in_which_cases_come_does_not_matter() -> None:
    assert make_splits(cases(12)) == make_splits(cases(12)[::-1])


def test_patient_names_do_not_change_folds_where_each_case_is_its_own_patient() -> None:
    renamed = [Case(case.name, f"z{99 - i}") for i, case in enumerate(cases(12))]
    assert make_splits(renamed) == make_splits(cases(12))


@given(n=st.integers(2, 40), patients=st.integers(2, 12), folds=st.integers(2, 6))
def test_every_case_is_validated_once_and_no_patient_is_on_both_sides(
    n: int, patients: int, folds: int
) -> None:
    chosen = cases(n, min(n, patients))
    patient = {case.name: case.patient for case in chosen}
    splits = make_splits(chosen, folds)
    assert sorted(name for split in splits for name in split.val) == sorted(patient)
    assert len(splits) == min(folds, len(set(patient.values())))
    for split in splits:
        assert sorted([*split.train, *split.val]) == sorted(patient)
        assert split.train and split.val
        assert not {patient[name] for name in split.train} & {patient[name] for name in split.val}


def test_fewer_cases_than_folds_leave_one_out() -> None:
    splits = make_splits(cases(3))
    assert len(splits) == 3
    assert all(len(split.val) == 1 for split in splits)


def test_one_case_validates_on_itself_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert make_splits(cases(1)) == [Split(("c000",), ("c000",))]
    assert "one patient" in caplog.text


def test_no_cases_are_an_error() -> None:
    with pytest.raises(DatasetError, match="no training cases"):
        make_splits([])


def test_all_trains_and_validates_on_everything() -> None:
    split = choose_split(cases(5), "all")
    assert split.train == split.val == tuple(f"c{i:03d}" for i in range(5))


def test_a_fold_beyond_the_splits_is_a_seeded_80_20_split(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        split = choose_split(cases(10), 7)
    assert caplog.text.count("there are only folds 0 to 4, so as in nnU-Net a random 80:20 split") == 1
    # numpy.random.RandomState(12345 + 7).choice(10, 8, replace=False), as in nnU-Net's do_split
    assert (len(split.train), len(split.val)) == (8, 2)
    assert split == choose_split(cases(10), 7) != choose_split(cases(10), 8)


def test_a_negative_fold_is_refused() -> None:
    with pytest.raises(DatasetError, match="fold -1"):
        choose_split(cases(10), -1)


def test_a_splits_file_of_nnunet_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["c001", "c002"], "val": ["c000"]}]))
    assert choose_split(cases(4), 0, path) == Split(("c001", "c002"), ("c000",))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[", "expected JSON"),
        ('{"train": []}', "expected JSON"),
        ("[]", "no split"),
        ('[{"train": ["c000"], "val": ["nobody"]}]', "nobody"),
        ('[{"train": ["c000"], "val": []}]', "at least one"),
    ],
)
def test_a_bad_splits_file_is_one_clear_error(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(content)
    with pytest.raises(DatasetError, match=match):
        choose_split(cases(4), 0, path)


def test_a_missing_splits_file_is_a_read_error_like_any_other(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"none\.json: no such file\. Check the path\."):
        choose_split(cases(4), 0, tmp_path / "none.json")
