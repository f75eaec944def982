"""The store: patches from disk, keys, interruption, failures, cleaning."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from medseg import log
from medseg.errors import Cancelled, DataError
from medseg.io import Case, Dataset, open_dataset, read_image, read_label, write
from medseg.plan import Plan
from medseg.preprocess import Store, build_store, class_locations, clean, preprocess
from medseg.preprocess.store import chunk_shape
from tests.preprocess.cases import make_case, make_plan


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    root = tmp_path / "Dataset001_Test"
    for number in range(3):
        image, label = make_case(number, (14, 12, 10), (1.0, 1.0, 2.0))
        write(image, root / "imagesTr" / f"case_{number}_0000.nii.gz")
        write(label, root / "labelsTr" / f"case_{number}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "a": 1, "b": 2, "c": 3},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return open_dataset(root)


@pytest.fixture
def plan() -> Plan:
    return make_plan((1.5, 1.0, 1.0))


def test_a_stored_case_is_what_preprocess_gives(dataset: Dataset, plan: Plan, tmp_path: Path) -> None:
    store = build_store(dataset, plan, "test", tmp_path / "store")
    assert store.cases == ("case_0", "case_1", "case_2")
    for case in dataset.training:
        expected = preprocess(read_image(case), plan, "test", read_label(case))
        assert expected.seg is not None
        found = store.open(case.name)
        box = (slice(None), slice(1, 5), slice(0, 4), slice(3, 9))
        assert_array_equal(found.data[box], expected.data[box])
        assert_array_equal(found.seg[:], expected.seg)
        assert found.record == expected.record
        assert found.previous is None
        for name, places in class_locations(expected.seg, plan.labels).items():
            assert_array_equal(found.locations[name], places)
        memory = found.in_memory()
        assert isinstance(memory.data, np.ndarray)
        assert_array_equal(memory.data, expected.data)


def test_half_precision_is_stored_as_asked(dataset: Dataset, plan: Plan, tmp_path: Path) -> None:
    store = build_store(dataset, plan, "test", tmp_path, cases=dataset.training[:1], precision="float16")
    assert store.open("case_0").data.dtype == np.float16


def test_a_second_build_touches_nothing(dataset: Dataset, plan: Plan, tmp_path: Path) -> None:
    first = build_store(dataset, plan, "test", tmp_path / "store")
    times = {entry: (first.folder / entry).stat().st_mtime_ns for entry in first.entries}
    second = build_store(dataset, plan, "test", tmp_path / "store")
    assert times == {entry: (second.folder / entry).stat().st_mtime_ns for entry in second.entries}


def test_another_plan_or_another_image_makes_another_entry(
    dataset: Dataset, plan: Plan, tmp_path: Path
) -> None:
    first = build_store(dataset, plan, "test", tmp_path / "store")
    other = build_store(dataset, make_plan((1.0, 1.0, 1.0)), "test", tmp_path / "store")
    assert not set(first.entries) & set(other.entries)
    image, _ = make_case(9, (14, 12, 10), (1.0, 1.0, 2.0))
    write(image, dataset.training[0].images[0])
    changed = build_store(dataset, plan, "test", tmp_path / "store")
    assert set(first.entries) - set(changed.entries) == {first.path("case_0").name}
    removed = clean(tmp_path / "store")
    assert len(removed) == 4
    assert Store(tmp_path / "store").open("case_0").data.shape[0] == 1


def test_a_build_that_was_stopped_goes_on_where_it_was(dataset: Dataset, plan: Plan, tmp_path: Path) -> None:
    class Stop(log.Listener):
        steps = 0

        def advanced(self, key: int, steps: int, note: str) -> None:
            self.steps += steps

        def cancelled(self) -> bool:
            return self.steps > 0

    with log.listening(Stop()), pytest.raises(Cancelled):
        build_store(dataset, plan, "test", tmp_path / "store", threads=1)
    done = {p.name for p in (tmp_path / "store").glob("case_*")}
    assert 1 <= len(done) <= 3
    store = build_store(dataset, plan, "test", tmp_path / "store")
    assert done <= set(store.entries)
    assert len(store.cases) == 3


def test_one_broken_case_does_not_lose_the_others(dataset: Dataset, plan: Plan, tmp_path: Path) -> None:
    dataset.training[1].images[0].write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"1 of 3 cases could not be preprocessed.*case_1"):
        build_store(dataset, plan, "test", tmp_path / "store")
    assert Store(tmp_path / "store").cases == ("case_0", "case_2")


def test_a_missing_file_is_a_failure_of_its_case(dataset: Dataset, plan: Plan, tmp_path: Path) -> None:
    lost = Case("lost", (tmp_path / "nowhere.nii.gz",), None, "lost")
    with pytest.raises(DataError, match=r"lost: .*nowhere"):
        build_store(dataset, plan, "test", tmp_path / "store", cases=(lost, dataset.training[0]))
    assert Store(tmp_path / "store").cases == ("case_0",)


def test_previous_labels_are_kept_beside_a_case(dataset: Dataset, plan: Plan, tmp_path: Path) -> None:
    store = build_store(dataset, plan, "test", tmp_path / "store")
    labels = np.maximum(store.open("case_1").seg[:], 0).astype(np.uint8)
    store.add_previous("case_1", labels)
    assert_array_equal(store.open("case_1").previous[:], labels)
    with pytest.raises(DataError, match="do not fit"):
        store.add_previous("case_1", labels[:, 1:])


def test_clean_removes_leftovers_and_what_is_not_kept(dataset: Dataset, plan: Plan, tmp_path: Path) -> None:
    store = build_store(dataset, plan, "test", tmp_path / "store")
    (tmp_path / "store" / ".case_7-abc.x1").mkdir()
    assert clean(store.folder) == (".case_7-abc.x1",)
    kept = store.path("case_2").name
    assert len(clean(store.folder, keep=[kept])) == 2
    assert Store(store.folder).cases == ("case_2",)


def test_a_store_that_is_not_there_or_damaged_says_so(dataset: Dataset, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no preprocessed cases"):
        Store(tmp_path / "nothing")
    store = build_store(dataset, plan, "test", tmp_path / "store")
    with pytest.raises(DataError, match="no case 'x'"):
        store.open("x")
    (store.path("case_0") / "case.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        store.open("case_0")
    (store.path("case_1") / "data.b2nd").unlink()
    with pytest.raises(DataError, match=r"data\.b2nd is missing"):
        store.open("case_1")
    (store.folder / "store.json").write_text(json.dumps({"version": 0, "cases": {}}))
    with pytest.raises(DataError, match="another version"):
        Store(store.folder)


def test_chunks_follow_the_patch_and_stay_small() -> None:
    assert chunk_shape((40, 50, 40), (40, 56, 40)) == (40, 50, 40)
    assert chunk_shape((300, 400, 400), (64, 64)) == (1, 96, 96)
    assert np.prod(chunk_shape((600, 600, 600), (256, 256, 256))) * 4 <= 6 << 20
