"""Streamed results are those of the whole volume, bit for bit, whatever is cut where."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import BundleError, ResourceError
from medseg.geometry.resample import axis_taps, axis_weights
from medseg.infer import Predictor, sliding, stream
from medseg.infer.sliding import Window
from medseg.labels import LabelSet
from medseg.preprocess import bricks, restore
from medseg.preprocess.bricks import Block, Way
from medseg.preprocess.restore import _elect, _paint, restore_labels, restore_probabilities
from tests.infer.models import image, tiny_bundle

CPU = {"device": "cpu", "threads": 1}
REGIONS = LabelSet.parse({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": [3]}, [1, 2, 3])
CLASSES = LabelSet.parse({"background": 0, "a": 1, "b": 2})


@pytest.fixture
def crumbs(monkeypatch):
    """Cut everything as small as it goes."""
    monkeypatch.setattr(stream, "CHUNK_VALUES", 1)
    monkeypatch.setattr(stream, "MEMORY_BYTES", 100)
    monkeypatch.setattr(stream, "LINES_OF_PATCH", 0.0)
    monkeypatch.setattr(stream, "STEP_VALUES", 50)
    monkeypatch.setattr(bricks, "BRICK_VOXELS", 40)
    monkeypatch.setattr(bricks, "SLAB_BYTES", 2000)
    monkeypatch.setattr(bricks, "BRICK_SIDES", (3, 5))


def noise(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def window(networks, patch=(6, 6, 6), outputs=3, mirror=(), step=0.5, **changes):
    return Window(networks, patch, outputs, mirror, step, torch.device("cpu"), 1, **changes)


def convolution(seed, outputs=3, dims=3, scale=1.0):
    torch.manual_seed(seed)
    kind = torch.nn.Conv3d if dims == 3 else torch.nn.Conv2d
    network = kind(1, outputs, 3, padding=1)
    network.weight.data *= scale
    return network


def joined(blocks, shape):
    """Put blocks together, and see that they overlap by one row and line as they must."""
    result = np.full(shape, np.nan, np.float32)
    for block in blocks:
        assert block.values.shape[1:3] == (
            block.rows.stop - block.rows.start,
            block.lines.stop - block.lines.start,
        )
        place = result[:, block.rows, block.lines]
        known = ~np.isnan(place)
        assert (place[known] == block.values.numpy()[known]).all()
        result[:, block.rows, block.lines] = block.values
    return result


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(3, 19)] * 3),
    flat=st.booleans(),
    folds=st.integers(1, 3),
    mirror=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    least=st.sampled_from([1, 400, 1 << 21]),
    memory=st.sampled_from([100, 1 << 30]),
)
def test_blocks_are_the_whole_volume_cut(shape, flat, folds, mirror, dtype, least, memory):
    dims = 2 if flat else 3
    networks = [convolution(seed, dims=dims) for seed in range(folds)]
    seen = window(networks, (6,) * dims, mirror=(0,) if mirror else ())
    data = noise((1, *shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK_VALUES", least)
        patch.setattr(stream, "MEMORY_BYTES", memory)
        patch.setattr(stream, "LARGE_BYTES", memory)
        patch.setattr(stream, "LINES_OF_PATCH", 0.0)
        cut = joined(seen.blocks(data, dtype), (3, *shape))
    whole = seen.whole(data, dtype)
    assert whole.dtype == (np.float16 if dtype == torch.float16 else np.float32)
    assert (cut == whole).all()


@pytest.mark.parametrize(
    ("spacing", "transpose", "patch", "orders"),
    [
        ((1.3, 0.9, 1.1), (0, 1, 2), (6, 6, 6), (1, 0)),
        ((1.3, 0.9, 1.1), (2, 0, 1), (6, 6, 6), (1, 0)),
        ((1.1, 0.9, 0.8), (1, 0, 2), (24, 6, 6), (1, 0)),  # padded along the first axis
        ((5.0, 1.1, 1.2), (0, 1, 2), (4, 8, 8), (1, 0)),  # slices one by one
        ((5.0, 1.1, 1.2), (0, 1, 2), (4, 8, 8), (1, 1)),
        ((1.2, 5.0, 1.1), (1, 0, 2), (8, 4, 8), (1, 0)),
        ((0.8, 1.2), (0, 1, 2), (6, 6), (1, 0)),  # 2D
        ((0.8, 1.2), (2, 0, 1), (6, 6), (1, 0)),
        ((1.3, 0.9, 1.1), (0, 1, 2), (6, 6, 6), (0, 0)),
        ((1.3, 0.9, 1.1), (0, 1, 2), (6, 6, 6), (3, 0)),  # a spline needs the whole volume
        ((1.4, 1.0, 0.8), (0, 1, 2), (6, 6, 6), (1, 0)),  # the grid of the image: nothing to resample
    ],
)
@pytest.mark.parametrize("labels", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_a_streamed_result_equals_the_whole_one(spacing, transpose, patch, orders, labels, crumbs, tmp_path):
    name = "3d_fullres" if len(patch) == 3 else "2d"
    bundle = tiny_bundle(name, folds=2, spacing=spacing, transpose=transpose, patch=patch, labels=labels)
    changed = bundle.settings.replace(order_probabilities=orders[0], order_z=orders[1])
    plan = bundle.plan.replace(configurations={**bundle.plan.configurations, name: changed})
    predictor = Predictor(replace(bundle, plan=plan), **CPU)
    volume = image((17, 15, 13))
    case = predictor.prepare(volume)[0]
    streamed = predictor.segment(volume).volume.array
    painted = predictor.segment(volume, tmp_path / "streamed.npz").volume.array
    with pytest.MonkeyPatch.context() as whole:
        if orders[0] < 2:  # matrix products of splines are always cut alike
            whole.setattr(bricks, "BRICK_VOXELS", 1 << 30)
            whole.setattr(bricks, "SLAB_BYTES", 1 << 30)
            whole.setattr(bricks, "BRICK_SIDES", (1 << 20, 1 << 20))
        logits = predictor.models[0].logits(case.data, case.record)
        at_once = restore_labels(logits, case.record, labels, changed)
        saved = restore_probabilities(logits, case.record, labels, changed, tmp_path / "whole.npz")
    assert (streamed == at_once.array).all() and len(np.unique(streamed)) > 1
    assert (painted == saved.array).all()
    with np.load(tmp_path / "streamed.npz") as mine, np.load(tmp_path / "whole.npz") as theirs:
        assert (mine["probabilities"] == theirs["probabilities"]).all()


@settings(max_examples=60, deadline=None)
@given(n_in=st.integers(1, 40), n_out=st.integers(1, 40), order=st.sampled_from([0, 1]))
def test_taps_are_the_matrix_of_the_zoom_and_parts_follow_one_another(n_in, n_out, order):
    taps = axis_taps(n_in, n_out, order)
    matrix = np.zeros((n_out, n_in))
    np.add.at(matrix, (np.arange(n_out), taps.lower), taps.weights[0])
    np.add.at(matrix, (np.arange(n_out), taps.upper), taps.weights[1])
    np.testing.assert_allclose(matrix, axis_weights(n_in, n_out, order), atol=1e-6)
    done = 0
    for stop in range(1, n_in + 1):
        part = taps.ready(max(0, stop - 2), stop)
        if part.stop > part.start:
            assert part.start == done and taps.upper[part].max() < stop
            assert taps.lower[part].min() >= max(0, stop - 2)
            done = part.stop
    assert done == n_out


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    target=st.tuples(*[st.integers(1, 14)] * 3),
    dtype=st.sampled_from([np.float16, np.float32]),
    step=st.sampled_from([1.0, 2.0**-11, 0.25]),
)
def test_leaving_out_classes_that_cannot_win_changes_no_voxel(seed, shape, target, dtype, step):
    rng = np.random.default_rng(seed)
    # Few distinct values around 1, so that ties and near ties abound.
    logits = (1 + step * rng.integers(-3, 3, (6, *shape))).astype(dtype)
    logits[rng.integers(0, 6)] += dtype(4 * step)
    way, block = Way(shape, target, 1, None, 0), Block.whole(torch.from_numpy(logits))
    margin = 0.0 if dtype == np.float16 else restore.CLEAR
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bricks, "BRICK_VOXELS", 12)
        for brick in way.bricks(block):
            values = np.stack([brick.sample(number).numpy() for number in range(6)])
            assert (np.broadcast_to(_elect(brick, margin), values.shape[1:]) == values.argmax(0)).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-7, 1e-3, 1.0]))
def test_regions_that_are_surely_in_or_out_change_no_voxel(seed, scale):
    rng = np.random.default_rng(seed)
    logits = (scale * (rng.normal(size=(3, 5, 6, 7)) + rng.integers(-2, 3, (3, 1, 1, 1)))).astype(np.float16)
    way, block = Way((5, 6, 7), (9, 5, 11), 1, None, 0), Block.whole(torch.from_numpy(logits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bricks, "BRICK_VOXELS", 12)
        for brick in way.bricks(block):
            expected = np.zeros(brick.sample(0).shape, int)
            for number, value in enumerate((1, 2, 3)):
                expected[brick.sample(number).numpy() > restore.SIGMOID_HALF] = value
            assert (np.broadcast_to(_paint(brick, REGIONS), expected.shape) == expected).all()


def test_a_volume_of_any_length_holds_one_patch_of_rows(monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_VALUES", 1)
    held: list[int] = []
    original = stream.Sums.finish

    def finish(self, place):
        held.append(sum(each.numel() for chunk in self._chunks.values() for each in chunk.sums))
        return original(self, place)

    monkeypatch.setattr(stream.Sums, "finish", finish)
    most = []
    for length in (24, 96):
        held.clear()
        for _ in window([convolution(0)], (8, 8, 8)).blocks(noise((1, length, 20, 20)), torch.float16):
            pass
        most.append(max(held))
    assert most[1] == most[0] < 96 * 3 * 20 * 20 / 2


def test_what_overflows_after_some_rows_starts_again_in_float32(caplog, crumbs, monkeypatch, tmp_path):
    bundle = tiny_bundle(folds=2)
    monkeypatch.setattr(sliding, "BATCH_VOXELS", 1)
    predictor, volume = Predictor(bundle, mirror=False, **CPU), image((13, 15, 20))
    volume.array[0, 6, 6, -2] = 100  # in the last rows
    model = predictor.models[0]

    def network(fold):
        plain = convolution(int(fold))
        # Later tiles only: the first blocks have been written by then.
        return lambda batch: plain(batch) * (1e5 if float(batch.max()) > 10 else 1.0)

    model._callable = network
    case = predictor.prepare(volume)[0]
    with caplog.at_level(logging.WARNING, "medseg"):
        streamed = predictor.segment(volume, tmp_path / "p.npz").volume.array
    assert caplog.text.count("again with 32 bits") == 1
    logits = model.window(case.record).whole(case.data, torch.float32)
    assert np.abs(logits).max() > 65504
    expected = restore_probabilities(logits, case.record, bundle.labels, bundle.settings, tmp_path / "q.npz")
    assert (streamed == expected.array).all()
    model._callable = lambda fold: lambda batch: convolution(0)(batch) * float("nan")
    with pytest.raises(BundleError, match="not finite"):
        predictor.segment(volume)


def test_folds_whose_sum_leaves_float16_are_summed_in_float32(caplog):
    large = window([lambda batch: batch.repeat(1, 3, 1, 1, 1) * 0 + 4e4] * 2)
    with caplog.at_level(logging.WARNING, "medseg"):
        logits = sliding.in_half_or_single(lambda dtype: large.whole(noise((1, 6, 6, 6)), dtype), True)
    assert "32 bits" in caplog.text
    np.testing.assert_allclose(logits, 4e4, rtol=1e-5)


def test_tiles_of_one_value_are_computed_once(monkeypatch):
    monkeypatch.setattr(sliding, "BATCH_VOXELS", 1)
    data = noise((1, 12, 12, 30))
    data[..., 6:] = 0.25
    data[..., 24:] = -1
    calls = []
    plain = convolution(0)
    counted = window([lambda batch: calls.append(1) or plain(batch)], mirror=(0,))
    result = counted.whole(data, torch.float16)
    assert len(calls) == 2 * (3 * 9 + 2)  # three mixed columns of tiles, and two values
    monkeypatch.setattr(sliding, "REUSE_BYTES", 0)
    assert (counted.whole(data, torch.float16) == result).all()
    assert len(calls) == 2 * (3 * 9 + 2) + 2 * 81


def test_air_is_left_out_on_request_only_and_is_background(monkeypatch):
    monkeypatch.setattr(sliding, "BATCH_VOXELS", 1)
    volume = image((20, 15, 13), affine=np.eye(4))
    volume.array[...] = np.abs(volume.array) + 1
    volume.array[:, 10:] = 1  # the minimum, and not cropped
    calls = []
    for skip in (False, True):
        bundle = tiny_bundle(patch=(4, 4, 4), labels=CLASSES)
        predictor = Predictor(bundle, mirror=False, skip_air=skip, **CPU)
        model = predictor.models[0]
        seen = []
        model._callable = lambda fold, seen=seen: (
            lambda batch: (
                seen.append(1) or torch.stack([0 * batch[:, 0], 0 * batch[:, 0], 0 * batch[:, 0] + 1], 1)
            )
        )
        labels = predictor.segment(volume).volume.array
        calls.append(len(seen))
        assert (labels[0, :8] == 2).all()
        assert (labels[0, 15:] == (0 if skip else 2)).all()
    assert calls[1] < calls[0]


class Starved:
    """A network on a device with room for a few tiles only."""

    def __init__(self, room, message=None):
        self.room, self.message, self.batches = room, message, []

    def __call__(self, batch):
        if len(batch) > self.room:
            raise RuntimeError(self.message) if self.message else torch.OutOfMemoryError("CUDA out of memory")
        self.batches.append(len(batch))
        return batch.repeat(1, 3, *(1,) * (batch.ndim - 2))


@pytest.mark.parametrize("message", [None, "DefaultCPUAllocator: can't allocate memory: you tried"])
def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_said_so(caplog, message):
    data = noise((1, 9, 9, 9))
    network = Starved(3, message)
    with caplog.at_level(logging.WARNING, "medseg"):
        result = window([network], (4, 4, 4)).whole(data, torch.float16)
    assert max(network.batches) <= 3 and sum(network.batches) == 64
    assert (result == window([Starved(99)], (4, 4, 4)).whole(data, torch.float16)).all()
    assert [record.getMessage() for record in caplog.records] == [
        "Memory ran out for 64 tiles at a time: going on with fewer."
    ]


def test_sums_leave_a_full_device_before_it_is_given_up(caplog, monkeypatch):
    devices = []
    monkeypatch.setattr(stream.Sums, "to", lambda self, device: devices.append(device))
    seen = window([Starved(0)], (4, 4, 4))
    run = sliding._Pass(
        seen,
        torch.zeros(1, 4, 4, 4),
        stream.Grid.plan([(slice(0, 4),) * 3], (4,) * 3, (slice(0, 4),) * 3, 0),
        torch.float16,
    )
    run.sums.device = torch.device("meta")
    with caplog.at_level(logging.WARNING, "medseg"):
        run._make_room(1)
    assert devices == [torch.device("cpu")] and "sums on the CPU" in caplog.text


def test_not_even_one_tile_is_a_resource_error_with_a_remedy():
    with pytest.raises(ResourceError, match=r"one tile of 4 x 4 x 4 voxels.*predict with more memory"):
        window([Starved(0)], (4, 4, 4)).whole(noise((1, 9, 9, 9)), torch.float16)


def test_other_errors_of_a_network_are_not_taken_for_a_lack_of_memory():
    def broken(batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        window([broken], (4, 4, 4)).whole(noise((1, 4, 4, 4)), torch.float16)
