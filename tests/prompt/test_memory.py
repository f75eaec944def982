"""Following an object by memory: what is remembered, asked and let go. SAM 2's own weights are not needed."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg import log
from medseg.errors import Cancelled, DataError
from medseg.files import sha256_file
from medseg.prompt import memory, propagate
from medseg.prompt.embeddings import EmbeddingCache
from medseg.prompt.memory import Follower, MemoryConfig, Ring, closest, pack, serves, unpack
from medseg.prompt.prompts import Mask, Prompt
from medseg.prompt.provenance import models_at_work
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.prompt.slicewise import Models, Zoom
from medseg.prompt.target import Propagation, Target
from medseg.types import BoolArray
from tests.prompt.bright import box_of, click, scene_of, tube
from tests.prompt.bright_memory import BrightMemory, ages, pixel

SHAPE = (40, 40, 30)


def dice(a: BoolArray, b: BoolArray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def flat_box(scene: Scene, k: int, low: int = 12, high: int = 28) -> Prompt:
    return box_of(scene, (low, low, k), (high, high, k + 1), "axial")


def run(
    monkeypatch: pytest.MonkeyPatch,
    scene: Scene,
    model: BrightMemory,
    target: Target,
    cache: EmbeddingCache | None = None,
    **settings: object,
) -> Propagation:
    monkeypatch.setattr(memory, "network", lambda models, config: model)
    memory._digests[model] = "stand-in"
    models = Models.open(scene, cache)
    return propagate(models, target, "memory", MemoryConfig.from_dict({"size": 64, **settings}))


def test_the_object_is_followed_in_both_directions_to_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = tube(SHAPE, 6, 22)
    scene, model = scene_of(mask), BrightMemory()
    found = run(monkeypatch, scene, model, Target((flat_box(scene, 14),), 2))
    assert dice(found.region.full(), mask) > 0.9
    assert (found.region.start[2], found.region.stop[2]) == (6, 23)
    assert "ended before slice" in " ".join(found.notes)


def test_each_slice_is_encoded_once_and_not_again_for_the_next_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene, model, cache = scene_of(tube(SHAPE, 6, 22)), BrightMemory(), EmbeddingCache()
    target = Target((flat_box(scene, 14),), 2)
    first = run(monkeypatch, scene, model, target, cache, follow=False)
    looked = len(first.confidence)
    # 17 slices with the object, and on each side two without, that end it.
    assert looked == 21
    assert model.calls.count("encode") == looked
    assert model.calls.count("prompted") == 1 and model.calls.count("tracked") == looked - 1
    second = run(monkeypatch, scene, model, target, cache, follow=False)
    assert model.calls.count("encode") == looked
    assert second.region == first.region


def test_memory_does_not_grow_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (32, 32, 120)
    scene, model = scene_of(np.ones(shape, dtype=bool)), BrightMemory()
    run(monkeypatch, scene, model, Target((flat_box(scene, 3, 8, 24),), 2))
    assert len(model.recalls) == 119
    assert model.most_alive <= 3
    memories, pointers = zip(*(ages(recall) for recall in model.recalls), strict=True)
    assert max(map(len, memories)) == 7  # the prompted slice and six recent ones
    assert max(map(len, pointers)) == 16


def test_a_slice_sees_prompted_slices_at_age_0_and_recent_ones_in_the_direction_of_travel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene, model = scene_of(tube(SHAPE, 0, 29)), BrightMemory()
    prompts = (flat_box(scene, 10), flat_box(scene, 20))
    run(monkeypatch, scene, model, Target(prompts, 2))
    seen = [ages(recall) for recall in model.recalls]
    # Down from 10: both anchors lie behind.
    assert seen[0] == ([0, 0], [1, 11])
    assert seen[2] == ([0, 0, 2, 1], [3, 13, 1, 2])
    # Up from 20, after the 10 slices below.
    assert seen[10] == ([0, 0], [11, 1])
    # Between them, up from 10: the pointer of 20 lies ahead and is not seen.
    assert seen[19] == ([0, 0], [1])


def test_the_object_ends_after_so_many_slices_whose_score_says_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = scene_of(tube(SHAPE, 0, 29))
    for empty in (1, 3):
        model = BrightMemory(gone=4)
        target = Target((flat_box(scene, 29),), 2)
        found = run(monkeypatch, scene, model, target, stops={"empty": empty})
        assert model.calls.count("tracked") == 4 + empty
        assert found.region.start[2] == 25
        assert found.confidence[24] == 1.0


def test_limits_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, model = scene_of(tube(SHAPE, 0, 29)), BrightMemory()
    found = run(monkeypatch, scene, model, Target((flat_box(scene, 14),), 2, limits=(12, 18)))
    assert (found.region.start[2], found.region.stop[2]) == (12, 19)
    assert set(found.confidence) == set(range(12, 19))


def test_prompts_reach_the_network_in_its_pixels_the_box_first(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, model = scene_of(tube(SHAPE, 0, 29)), BrightMemory()
    zoom = {"times": 1, "least": 32}
    prompts = (click(scene, 18, 24, 14), click(scene, 12, 12, 14, positive=False), flat_box(scene, 14, 4, 36))
    run(monkeypatch, scene, model, Target(prompts, 2, limits=(14, 14)), zoom=zoom)
    points, labels = model.points[0]
    assert labels == [2, 3, 1, 0]
    # The crop is voxels 4 to 35 in 64 pixels: the centre of voxel i is at 2 (i - 4) + 0.5.
    assert pixel(points) == [[-0.5, -0.5], [63.5, 63.5], [40.5, 28.5], [16.5, 16.5]]


def test_a_click_alone_is_asked_on_the_slice_and_then_in_a_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = tube((90, 90, 9), 0, 8)
    scene, model = scene_of(mask), BrightMemory()
    found = run(monkeypatch, scene, model, Target((click(scene, 45, 45, 4),), 2))
    assert model.calls.count("prompted") == 2
    assert pixel(model.points[0][0]) != pixel(model.points[1][0])
    assert dice(found.region.full(), mask) > 0.85


def test_a_mask_is_taken_as_it_is_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = tube(SHAPE, 6, 22)
    scene, model = scene_of(mask), BrightMemory()
    known = mask.copy()
    known[..., :10], known[..., 14:] = False, False
    found = run(monkeypatch, scene, model, Target((Mask.of(Region.of(known)),), 2, limits=(6, 22)))
    assert np.array_equal(found.region.full()[..., 10:14], mask[..., 10:14])
    assert "prompted" not in model.calls
    assert 0 < model.calls.count("given") <= 4
    assert dice(found.region.full(), mask) > 0.9


def test_only_the_prompted_slices_that_are_nearest_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, model = scene_of(tube(SHAPE, 0, 29)), BrightMemory()
    prompts = tuple(flat_box(scene, k) for k in (2, 6, 10, 14, 18))
    run(monkeypatch, scene, model, Target(prompts, 2), prompted=2)
    assert {ages(recall)[0].count(0) for recall in model.recalls} == {2}
    assert closest(7, [2, 6, 10, 14], 3) == [2, 6, 10]
    assert closest(1, [2, 6, 10], 1) == [2]


def test_a_correction_asks_near_it_only(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = tube(SHAPE, 2, 27)
    scene, model = scene_of(mask), BrightMemory()
    box = flat_box(scene, 10)
    before = run(monkeypatch, scene, model, Target((box,), 2))
    model.calls.clear()
    prompts = (box, click(scene, 22, 20, 20))
    after = run(monkeypatch, scene, model, Target(prompts, 2, previous=before.region, fresh=1))
    assert model.calls.count("tracked") <= 4
    assert dice(after.region.full(), mask) > 0.9


def test_a_crop_follows_the_object_and_a_fixed_one_stays() -> None:
    shape = (120, 120, 30)
    i, j, k = np.indices(shape)
    moving = (i - 20 - 2.5 * k) ** 2 + (j - 60) ** 2 <= 64
    scene = scene_of(moving)
    target = Target((box_of(scene, (12, 52, 0), (29, 69, 1), "axial"),), 2)
    for follow in (True, False):
        fields = []
        follower = Follower(BrightMemory(), scene, target, MemoryConfig(size=64, follow=follow))
        seen = follower.ask(0, follower.given[0], None)
        for index in range(1, 12):
            seen = follower.ask(index, None, seen)
            fields.append(follower.field)
        assert dice(seen.mask, moving[..., 11]) > 0.85 or not follow
        assert (len(set(fields)) > 1) == follow
        assert len(set(fields)) < 8, "the crop moves only when it must"


def test_a_crop_serves_until_the_object_nears_its_edge_or_shrinks() -> None:
    zoom, shape = Zoom(times=2, least=32), (100, 100)
    assert serves((20, 20, 68, 68), (30, 30, 54, 54), shape, zoom)
    assert not serves((20, 20, 68, 68), (30, 30, 66, 54), shape, zoom)
    assert not serves((0, 0, 100, 100), (30, 30, 40, 40), shape, zoom)
    assert serves((0, 20, 48, 68), (-0.5, 30, 24, 54), shape, zoom), "the edge of the slice is no edge"


def test_only_negative_clicks_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_of(tube(SHAPE, 6, 22))
    with pytest.raises(DataError, match="only where the object is not"):
        run(monkeypatch, scene, BrightMemory(), Target((click(scene, 2, 2, 14, positive=False),), 2))


def test_a_run_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(log.Listener):
        def cancelled(self) -> bool:
            return model.calls.count("tracked") >= 3

    scene, model = scene_of(tube(SHAPE, 0, 29)), BrightMemory()
    with log.listening(Impatient()), pytest.raises(Cancelled):
        run(monkeypatch, scene, model, Target((flat_box(scene, 14),), 2))
    assert model.calls.count("tracked") == 3


def test_a_ring_lets_the_oldest_go() -> None:
    ring = Ring(2, 3)
    for index in range(5):
        ring.add(index, memory.Memory(torch.full((1,), index), torch.zeros(1)))
    assert [index for index, _ in ring.memories] == [3, 4]
    assert [index for index, _ in ring.pointers] == [2, 3, 4]


def test_features_survive_the_cache() -> None:
    sizes = ((256, 4), (64, 8), (32, 16))
    features = memory.Features(*(torch.rand(1, channels, side, side) for channels, side in sizes))
    back = unpack(pack(features), 64)
    for name in ("coarse", "middle", "fine"):
        assert torch.equal(getattr(back, name), getattr(features, name))


def test_the_same_prompts_give_the_same_bytes_with_a_real_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tests.nets.test_sam2 import SMALL, filled

    model = filled(SMALL, score=3.0)
    monkeypatch.setattr(memory, "network", lambda models, config: model)
    scene = scene_of(tube((40, 36, 10), 0, 9))
    target = Target((box_of(scene, (12, 12, 4), (28, 26, 5), "axial"),), 2)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        found.append(propagate(Models.open(scene), target, "memory", MemoryConfig(size=64)))
    assert found[0].region == found[1].region
    assert found[0].confidence == found[1].confidence
    assert found[0].region.voxels


def test_a_given_file_is_loaded_once_and_its_features_are_cached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    from medseg.nets import sam2
    from tests.nets.test_sam2 import SMALL, filled

    monkeypatch.setattr(sam2, "SPECS", (SMALL,))
    weights = sam2.to_original(filled(SMALL, score=3.0).network.state_dict())
    torch.save({"model": weights}, tmp_path / "small.pt")
    scene = scene_of(tube((40, 36, 6), 0, 5))
    models = Models.open(scene, EmbeddingCache(), given={"medsam2": tmp_path / "small.pt"})
    target = Target((box_of(scene, (12, 12, 3), (28, 26, 4), "axial"),), 2)
    config = MemoryConfig(size=64, weights="medsam2", precision="fp32")
    first = propagate(models, target, "memory", config)
    loaded = memory.network(models, config)
    assert memory.network(Models.open(scene, given=models.given), config) is loaded
    (known,) = models_at_work(models)
    assert known["name"] == "medsam2" and known["sha256"] == sha256_file(tmp_path / "small.pt")
    monkeypatch.setattr(loaded, "encode", None)  # would raise if it were called
    assert propagate(models, target, "memory", config).region == first.region


def test_prompting_does_not_load_transformers() -> None:
    code = "import sys, medseg.prompt, medseg.prompt.memory; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
