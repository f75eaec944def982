"""Two times of a made patient: events, growth and transforms are known."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medseg.errors import DataError, GeometryError
from medseg.instances.export.follow_up import describe_follow_up, write_follow_up
from medseg.instances.follow_up import FollowUpConfig, follow_up
from medseg.instances.read import components_of
from medseg.instances.register import register_images
from medseg.instances.schema import instances_of
from medseg.io import read
from medseg.types import FloatArray
from medseg.volume import Geometry, Volume
from tests.instances.patients import Ball, body, centred, lesions, rigid

BASELINE = [
    Ball(1, (-25, 0, 0), 8),  # grows
    Ball(2, (10, -14, 12), 7),  # goes
    Ball(3, (8, 16, -14), 5),  # merges with 4
    Ball(4, (8, 16, -2), 5),
    Ball(5, (18, 2, 18), 9),  # falls apart
]
LATER = [
    Ball(1, (-25, 0, 0), 10),
    Ball(2, (8, 16, -13), 6),
    Ball(2, (8, 16, -3), 6),
    Ball(3, (18, -3, 18), 4),
    Ball(4, (18, 7, 18), 4),
    Ball(5, (-4, -18, -16), 6),  # new
]
GRID = centred((48, 44, 36), (2.0, 2.0, 2.5))
OTHER = centred((52, 48, 46), (1.9, 1.9, 2.1))


def kinds(config: FollowUpConfig, transform: FloatArray, with_images: bool) -> list[tuple[str, str, str]]:
    first, second = lesions(GRID, BASELINE), lesions(OTHER, LATER, transform)
    images = (body(GRID), body(OTHER, transform, seed=1)) if with_images else None
    table = follow_up(first, second, images, config=config).table
    names = ("event", "baseline_labels", "follow_up_labels")
    return [tuple(str(row[name]) for name in names) for row in table.rows()]  # type: ignore[misc]


TRUTH = [
    ("persistent", "1", "1"),
    ("gone", "2", ""),
    ("merged", "3 4", "2"),
    ("split", "5", "3 4"),
    ("new", "", "5"),
]


@pytest.mark.parametrize("shift", [(0.0, 0.0, 0.0), (2.0, -1.5, 1.0)])
def test_events_are_found_without_registration_where_the_patient_lies_alike(shift: tuple[float, ...]) -> None:
    moved = rigid((0, 0, 0), (shift[0], shift[1], shift[2]))
    assert kinds(FollowUpConfig(), moved, with_images=False) == TRUTH


@pytest.mark.parametrize(
    ("degrees", "shift"), [((4.0, -6.0, 9.0), (7.0, -12.0, 9.0)), ((0.0, 0.0, 0.0), (-20.0, 15.0, 25.0))]
)
def test_a_known_movement_is_found_from_the_images_and_the_events_with_it(
    degrees: tuple[float, float, float], shift: tuple[float, float, float]
) -> None:
    transform = rigid(degrees, shift)
    assert kinds(FollowUpConfig(), transform, with_images=True) == TRUTH
    found = register_images(body(GRID), body(OTHER, transform, seed=1)).matrix
    centres = np.array([[*ball.centre, 1.0] for ball in BASELINE])
    errors = np.linalg.norm((centres @ found.T - centres @ transform.T)[:, :3], axis=1)
    assert errors.max() < 1.5, "below a voxel"


def test_an_affine_registration_finds_a_stretch() -> None:
    transform = np.diag([1.06, 0.95, 1.04, 1.0]) @ rigid((2, 3, -4), (4, 2, -3))
    found = register_images(body(GRID), body(OTHER, transform, seed=1), "affine").matrix
    centres = np.array([[*ball.centre, 1.0] for ball in BASELINE])
    assert np.linalg.norm((centres @ (found - transform).T)[:, :3], axis=1).max() < 1.5


def test_a_registration_is_the_same_every_time() -> None:
    images = body(GRID), body(GRID, rigid((3, 0, 0), (2, 0, 0)))
    assert (register_images(*images).matrix == register_images(*images).matrix).all()


def test_growth_is_that_of_the_balls() -> None:
    found = follow_up(lesions(GRID, BASELINE), lesions(OTHER, LATER), config=FollowUpConfig(days=90))
    row = next(found.table.rows())
    assert row["baseline_volume_mm3"] == pytest.approx(4 / 3 * np.pi * 8**3, rel=0.05)
    assert row["change_volume_percent"] == pytest.approx(100 * (10**3 / 8**3 - 1), abs=8)
    assert row["baseline_longest_mm"] == pytest.approx(16, abs=3)
    assert row["follow_up_longest_mm"] == pytest.approx(20, abs=3)
    assert row["volume_doubling_days"] == pytest.approx(90 * np.log(2) / np.log(10**3 / 8**3), rel=0.1)
    assert row["centroid_distance_mm"] < 0.3
    assert found.response is not None
    assert found.response.overall == "PD", "a new lesion of 12 mm"
    assert found.response.new_lesions == (5,)


def test_numbers_of_the_baseline_last_in_the_follow_up() -> None:
    found = follow_up(lesions(GRID, BASELINE), lesions(GRID, LATER))
    labels = found.later_labels().array[0]
    at = [found.later.volume.array[0] == k for k in range(1, 6)]
    assert [int(np.unique(labels[mask]).item()) for mask in at] == [1, 3, 5, 5, 6]


@pytest.mark.parametrize("empty", ["first", "second", "both"])
def test_empty_images_are_all_new_or_all_gone(empty: str, tmp_path: Path) -> None:
    first = lesions(GRID, [] if empty in ("first", "both") else BASELINE)
    second = lesions(GRID, [] if empty in ("second", "both") else LATER)
    found = follow_up(first, second)
    expected = {"new": 5 * (empty == "first"), "gone": 5 * (empty == "second")}
    assert {kind: count for kind, count in found.counts().items() if count} == {
        k: n for k, n in expected.items() if n
    }
    write_follow_up(found, tmp_path)
    assert found.response is not None
    assert found.response.overall == {"first": "PD", "second": "CR", "both": "none"}[empty]


def test_images_that_cannot_be_registered_are_named() -> None:
    constant = Volume(np.zeros(GRID.shape), GRID)
    with pytest.raises(DataError, match="constant"):
        register_images(constant, body(GRID))
    flat = Volume(np.eye(9)[..., None], centred((9, 9, 1), (1.0, 1.0, 1.0)))
    with pytest.raises(GeometryError, match="both"):
        register_images(flat, body(GRID))


def test_everything_is_written_and_read_back(tmp_path: Path) -> None:
    transform = rigid((0, 0, 5), (2, 0, 0))
    images = (body(GRID), body(OTHER, transform))
    found = follow_up(lesions(GRID, BASELINE), lesions(OTHER, LATER, transform), images)
    files = write_follow_up(found, tmp_path, images)
    assert set(files) == {"events", "report", "labels", "picture"}
    assert (read(files["labels"]).array == found.later_labels().array).all()
    report = json.loads(files["report"].read_text())
    assert report == json.loads(json.dumps(describe_follow_up(found)))
    assert {kind: count for kind, count in report["counts"].items() if count} == {
        "new": 1,
        "gone": 1,
        "merged": 1,
        "split": 1,
        "persistent": 1,
    }
    assert report["response"]["overall"] == "PD"
    with Image.open(files["picture"]) as picture:
        assert picture.size[0] > 1000


def test_a_known_movement_of_a_real_head_is_found_with_the_lesions_that_went(data_dir: Path) -> None:
    folder = data_dir / "ms_lesion" / "patient19"
    image, mask = read(folder / "FLAIR.nii.gz"), read(folder / "GOLD_STANDARD.nii.gz")
    transform = rigid((6, -4, 10), (12, -8, 15))
    moved = Geometry(image.shape, transform @ image.geometry.affine)
    before = instances_of(components_of(mask))
    gone = np.argsort(-before.voxels)[3:8] + 1
    left = np.where(np.isin(before.volume.array, gone), 0, before.volume.array)
    # The baseline has every second voxel, so that its voxels are not those of the follow-up.
    thin = image.geometry.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    half = image.array[:, ::2, ::2, ::2]
    baseline = Volume(half, Geometry(half.shape[1:], thin))
    images = (baseline, Volume(image.array, moved))
    found = follow_up(before, instances_of(Volume(left, moved)), images)
    corners = np.array([[x, y, z, 1.0] for x in (-60, 60) for y in (-70, 50) for z in (-30, 60)])
    assert np.linalg.norm((corners @ (found.transform - transform).T)[:, :3], axis=1).max() < 1
    went = sorted(label for event in found.events if event.kind == "gone" for label in event.first)
    assert went == sorted(gone.tolist())
    assert found.counts()["new"] == 0
