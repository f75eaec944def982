"""Everything in a volume: known objects are found whole, once, and the same in every order of axes."""

from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from medseg import log
from medseg.errors import Cancelled, ConfigError, DataError
from medseg.geometry.orient import to_ras
from medseg.nets.sam import build_sam
from medseg.prompt.automatic import (
    AutomaticConfig,
    Everything,
    SliceObject,
    box_overlaps,
    crop_fields,
    find_on_slice,
    grid_points,
    link,
    restore_labels,
    segment_everything,
    tidy,
    without_doubles,
)
from medseg.prompt.scene import Rectangle, Scene
from medseg.prompt.segmenter import SliceSegmenter
from medseg.prompt.slicewise import Models
from medseg.types import Array, FloatArray
from medseg.volume import Geometry, Volume
from tests.phantoms import affine, tilted

SHAPE = (48, 40, 12)
QUICK = AutomaticConfig(points=12, least_area_mm2=6)


def bodies(shape: tuple[int, int, int] = SHAPE) -> Array:
    """Grey tissue with a bright ball, a grey tube through all slices, and a small ball inside a large one."""
    i, j, k = np.indices(shape)
    image = np.full(shape, 60.0, dtype=np.float32)
    image[(i - 12) ** 2 + (j - 12) ** 2 < 36] = 120
    image[(i - 33) ** 2 + (j - 25) ** 2 + 2 * (k - 6) ** 2 < 100] = 180
    image[(i - 33) ** 2 + (j - 25) ** 2 + 2 * (k - 6) ** 2 < 16] = 240
    image[:, :3] = 0  # air
    return image


def scene_of(array: Array, matrix: FloatArray | None = None) -> Scene:
    shape = (array.shape[0], array.shape[1], array.shape[2])
    geometry = Geometry(shape, affine() if matrix is None else matrix)
    return Scene.of(Volume(array, geometry), (0.0, 255.0))


class Flood:
    """Answers a click with what is connected to it and at least as bright, and with all that is as bright."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.clicks = 0

    def __call__(
        self, axis: int, index: int, area: Rectangle, clicks: FloatArray, least: float
    ) -> tuple[FloatArray, FloatArray]:
        grey = self.scene.slice(axis, index, area)
        self.clicks += len(clicks)
        logits, scores = [], []
        for row, column in np.rint(clicks - np.array(area[:2])).astype(int):
            above = grey > grey[row, column] - 10
            parts, _ = ndimage.label(above)
            logits += [np.where(parts == parts[row, column], 9.0, -9.0), np.where(above, 1e-3, -9.0)]
            scores += [0.95, 0.99]  # the second is unstable, though it expects more of itself
        return np.array(logits, dtype=np.float32), np.array(scores)


def run(scene: Scene, config: AutomaticConfig = QUICK, axis: int = 2, **rest: object) -> Everything:
    return segment_everything(Models(scene), config, axis, ask=Flood(scene), **rest)  # type: ignore[arg-type]


def test_known_objects_are_found_whole_and_the_smaller_lies_in_front() -> None:
    image = bodies()
    labels, objects, _ = run(scene_of(image))
    assert labels.shape == SHAPE and labels.dtype == np.uint8
    assert [found.label for found in objects] == list(range(1, len(objects) + 1))
    values = {value: set(np.unique(labels[image == value]).tolist()) for value in (120, 180)}
    assert all(len(there) == 1 and 0 not in there for there in values.values())
    core = labels[33, 25, 6]
    assert core not in (0, labels[33, 33, 6])
    assert not labels[image == 0].any()
    assert labels.max() == len(objects) <= 4


def test_the_table_says_what_the_label_map_holds() -> None:
    scene = scene_of(bodies(), affine("RAS", (1.0, 1.0, 2.5)))
    labels, objects, _ = run(scene)
    for found in objects:
        where = np.argwhere(labels == found.label)
        assert found.voxels == len(where)
        assert found.volume_mm3 == pytest.approx(len(where) * 2.5)
        assert (found.first, found.last) == (where[:, 2].min(), where[:, 2].max())
        assert np.allclose(found.centre_mm, scene.to_world(where.mean(axis=0)))
        assert found.iou == pytest.approx(0.95) and found.stability == 1.0
    assert [found.voxels for found in objects] == sorted((f.voxels for f in objects), reverse=True)
    assert {"label", "iou", "centre_mm"} <= set(objects[0].to_dict())


def orders() -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    yield from product(permutations(range(3)), product((1, -1), repeat=3))


def test_objects_are_the_same_in_all_48_orders_of_axes() -> None:
    matrix = tilted(affine("RAS", (1.0, 1.1, 1.7)))
    image = bodies((30, 26, 3))
    reference = None
    for axes, signs in orders():
        turned = np.transpose(image, axes)[tuple(slice(None, None, s) for s in signs)]
        moved = np.eye(4)
        moved[:3, :3] = matrix[:3, :3][:, axes] * signs
        first = np.zeros(3)
        for new, (old, sign) in enumerate(zip(axes, signs, strict=True)):
            first[old] = 0 if sign > 0 else turned.shape[new] - 1
        moved[:3, 3] = matrix[:3, :3] @ first + matrix[:3, 3]
        scene = scene_of(turned, moved)
        labels, objects, _ = run(scene, QUICK.replace(points=5))
        restored = restore_labels(scene, labels)
        assert restored.geometry.matches(scene.source)
        assert np.array_equal(to_ras(restored).array[0], labels)
        if reference is None:
            reference = labels
            assert objects
        assert np.array_equal(labels, reference)


@pytest.mark.parametrize("axis", [0, 1])
def test_slices_may_run_across_any_axis(axis: int) -> None:
    labels = run(scene_of(bodies()), axis=axis).labels
    tube = labels[bodies() == 120]
    assert (tube == np.bincount(tube).argmax()).mean() > 0.9


def test_a_single_slice_gives_a_map_of_that_slice_alone() -> None:
    labels, objects, _ = run(scene_of(bodies()), slices=[6])
    assert objects and labels[..., 6].any()
    assert not np.delete(labels, 6, axis=2).any()


def test_an_object_missing_on_a_slice_stays_one_and_on_more_becomes_two() -> None:
    image = bodies()
    image[6:19, 6:19, 5] = 60
    once = run(scene_of(image)).labels
    assert once[12, 12, 4] == once[12, 12, 6] != 0 and once[12, 12, 5] != once[12, 12, 4]
    image[6:19, 6:19, 6] = 60
    twice = run(scene_of(image)).labels
    assert 0 != twice[12, 12, 4] != twice[12, 12, 7] != 0


def test_no_label_is_larger_than_the_number_of_objects_and_twice_is_the_same() -> None:
    scene = scene_of(bodies())
    first, second = run(scene), run(scene)
    assert first.objects == second.objects and np.array_equal(first.labels, second.labels)
    assert set(np.unique(first.labels)) == set(range(len(first.objects) + 1))


def test_settled_clicks_are_not_asked_again_and_nothing_is_lost() -> None:
    scene = scene_of(bodies())
    few, all_of_them = Flood(scene), Flood(scene)
    config = QUICK.replace(points=16, batch=4)
    quick = find_on_slice(scene, 2, 6, few, config)
    slow = find_on_slice(scene, 2, 6, all_of_them, config.replace(settled_cells=0))
    assert few.clicks < 0.95 * all_of_them.clicks
    assert {each.box for each in quick} == {each.box for each in slow}


def test_air_is_never_asked() -> None:
    scene = scene_of(np.zeros((20, 20, 1), np.float32))
    flood = Flood(scene)
    assert find_on_slice(scene, 2, 0, flood, QUICK) == [] and flood.clicks == 0
    assert segment_everything(Models(scene), QUICK, ask=flood).objects == ()


def test_small_islands_go_and_small_holes_are_filled() -> None:
    mask = np.zeros((12, 12), bool)
    mask[2:9, 2:9] = True
    mask[5, 5] = False
    mask[11, 11] = True
    tidied = tidy(mask, 3)
    assert tidied[5, 5] and not tidied[11, 11] and tidied.sum() == 49


def test_a_ring_and_what_is_inside_are_two_masks_but_a_double_is_one() -> None:
    disc = np.zeros((20, 20), bool)
    disc[2:18, 2:18] = True
    ring = disc.copy()
    ring[3:17, 3:17] = False
    near = disc.copy()
    near[2] = False
    masks = [SliceObject.of(m, (0, 0), s, 1.0, 0) for m, s in ((disc, 0.9), (ring, 0.8), (near, 0.95))]
    kept = without_doubles(masks, QUICK)
    assert [each.iou for each in kept] == [0.95, 0.8]
    assert masks[0].overlap(masks[1]) == pytest.approx(ring.sum() / disc.sum())
    assert np.array_equal(masks[1].mask, ring[2:18, 2:18])


def test_the_best_pairs_are_linked_first() -> None:
    def square(left: int) -> SliceObject:
        mask = np.zeros((8, 40), bool)
        mask[:, left : left + 10] = True
        return SliceObject.of(mask, (0, 0), 1.0, 1.0, 0)

    tracks = link([(3, [square(0)]), (4, [square(3), square(1)]), (5, [square(30)])], QUICK)
    assert [sorted(track.masks) for track in tracks] == [[3, 4], [4], [5]]
    assert tracks[0].newest.box[1] == 1


def test_a_gap_is_as_wide_in_mm_as_in_slices_and_the_longer_holds() -> None:
    square = SliceObject.of(np.ones((8, 8), bool), (0, 0), 1.0, 1.0, 0)
    slices = [(0, [square]), (1, []), (2, []), (3, [square])]
    for settings, thickness, tracks in (
        ({"gap": 0}, 1.0, 2),
        ({"gap": 2}, 1.0, 1),
        ({"gap": 0, "gap_mm": 2.0}, 1.0, 1),
        ({"gap": 0, "gap_mm": 2.0}, 1.5, 2),
    ):
        assert len(link(slices, QUICK.replace(**settings), thickness)) == tracks


def test_what_is_left_out_is_counted() -> None:
    scene = scene_of(bodies(), affine("RAS", (1.0, 1.0, 2.5)))
    all_there = run(scene, QUICK.replace(least_slices=1, least_visible=0))
    for change, rule in (
        ({"least_slices": 12}, "on fewer than 12 slices"),
        ({"least_extent_mm": 29.0}, "shorter than 29"),
        ({"most": 1}, "beyond the 1 most certain"),
        ({"least_visible": 0.99}, "less than 0.99"),
    ):
        found = run(scene, QUICK.replace(**{"least_slices": 1, "least_visible": 0, **change}))
        told = next(each for each in found.left_out if rule in each.rule)
        assert told.count >= 1 and told.voxels > 0
        assert len(found.objects) < len(all_there.objects) or change.get("most")


def test_crops_cover_the_slice_and_drop_masks_that_they_cut() -> None:
    config = QUICK.replace(crops=1)
    covered = np.zeros((48, 40), bool)
    for layer, (top, left, bottom, right) in crop_fields((48, 40), config):
        if layer:
            covered[top:bottom, left:right] = True
    assert covered.all()
    found = find_on_slice(scene_of(bodies()), 2, 6, Flood(scene_of(bodies())), config)
    image = bodies()[..., 6]
    ball = next(each for each in found if each.box[0] <= 33 < each.box[2] and each.area > 50 and each.layer)
    assert abs(ball.area - (image > 150).sum()) < 5


def test_a_grid_is_even_and_coarse_first() -> None:
    points = grid_points((10, 20, 26, 28), 8)
    assert points.shape == (32, 2)
    assert sorted(set(points[:, 0])) == [10.5 + 2 * n for n in range(8)]
    assert sorted(set(points[:, 1])) == [20.5 + 2 * n for n in range(4)]
    assert np.array_equal(points[0], [12.5, 22.5]) and len(grid_points((0, 0, 1, 50), 4)) == 4
    assert box_overlaps((0, 0, 2, 2), np.zeros((0, 4))).shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"axis": 3}, ConfigError, "axis 3"),
        ({"slices": []}, DataError, "none"),
        ({"slices": [0, 12]}, DataError, "slice 12 across axis 2: the volume has slices 0 to 11"),
        ({"slices": [-1]}, DataError, "slice -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    change: dict[str, object], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        run(scene_of(bodies()), **change)  # type: ignore[arg-type]


def test_a_network_of_boxes_is_refused() -> None:
    scene = scene_of(bodies())
    models = Models(scene)
    models.ready["lite-medsam", 768] = SliceSegmenter(build_sam("lite-medsam"), scene, size=256)
    with pytest.raises(ConfigError, match="does not understand clicks"):
        segment_everything(models, AutomaticConfig(asset="lite-medsam"))


def test_it_can_be_cancelled_within_a_slice() -> None:
    class Stop(log.Listener):
        def cancelled(self) -> bool:
            return True

    scene = scene_of(bodies())
    flood = Flood(scene)
    with log.listening(Stop()), pytest.raises(Cancelled):
        segment_everything(Models(scene), QUICK, ask=flood)
    assert flood.clicks == 0


def test_mobile_sam_finds_the_objects_of_a_phantom(mobile_sam_path: Path) -> None:
    image = bodies((96, 80, 3))
    i, j, _ = np.indices(image.shape)
    image[(i - 70) ** 2 + (j - 55) ** 2 < 250] = 200
    image += np.random.default_rng(0).normal(0, 4, image.shape).astype(np.float32)
    models = Models(scene_of(image), given={"mobile-sam": mobile_sam_path})
    config = AutomaticConfig(points=5)
    labels, objects, _ = segment_everything(models, config, slices=[1])
    disc = (i[..., 1] - 70) ** 2 + (j[..., 1] - 55) ** 2 < 250
    label = labels[70, 55, 1]
    found = labels[..., 1] == label
    assert label and 2 * (found & disc).sum() / (found.sum() + disc.sum()) > 0.95
    assert 1 <= len(objects) < 10 and all(each.iou >= config.least_iou for each in objects)
