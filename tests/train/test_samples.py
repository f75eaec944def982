from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import TrainingError
from medseg.labels import LabelSet
from medseg.train.config import AugmentConfig, TrainConfig
from medseg.train.samples import Sampler, batches, read_box, to_target, validation_batches

LABELS = LabelSet(entries={"background": 0, "a": 1, "b": 2})


@dataclass(frozen=True)
class Arrays:
    data: Any
    seg: Any
    locations: Any
    previous: Any = None


def case(shape: tuple[int, ...], seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    seg = np.zeros((1, *shape), np.int16)
    seg[0, shape[0] // 2, 2:4, 2:4] = 1
    seg[0, 0, -3:, -3:] = 2
    places = {name: np.argwhere(seg[0] == value) for name, value in (("a", 1), ("b", 2))}
    return Arrays(rng.normal(size=(1, *shape)).astype(np.float32), seg, places)


def sampler(
    patch: tuple[int, ...] = (8, 8, 8), shape: tuple[int, ...] = (12, 20, 9), **kwargs: Any
) -> Sampler:
    return Sampler([case(shape, s) for s in range(3)], patch, LABELS, TrainConfig(), **kwargs)


@given(
    low=st.tuples(*[st.integers(-9, 9)] * 3),
    size=st.tuples(*[st.integers(1, 9)] * 3),
    shape=st.tuples(*[st.integers(1, 7)] * 3),
)
@settings(max_examples=60, deadline=None)
def test_a_box_is_what_padding_and_slicing_would_give(low: Any, size: Any, shape: Any) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) + 1
    padded = np.pad(array, [(0, 0)] + [(20, 20)] * 3)
    expected = padded[(slice(None), *[slice(a + 20, a + 20 + s) for a, s in zip(low, size, strict=True)])]
    np.testing.assert_array_equal(read_box(array, low, size, 0), expected)


@pytest.mark.parametrize("patch", [(8, 8, 8), (16, 16, 16), (8, 8)])
def test_a_forced_patch_shows_a_labelled_voxel(patch: tuple[int, ...]) -> None:
    drawn = sampler(patch, train=False)
    assert all((drawn.sample(n, forced=True).seg > 0).any() for n in range(30))
    assert drawn.sample(0, forced=True).image.shape == (1, *patch)


def test_free_patches_reach_every_voxel() -> None:
    shape = (12, 20, 9)
    data = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(1, *shape)
    base = case(shape)
    drawn = Sampler([Arrays(data, base.seg, base.locations)], (8, 8, 8), LABELS, TrainConfig(), train=False)
    seen = np.unique(np.concatenate([drawn.sample(n, forced=False).image.ravel() for n in range(400)]))
    assert len(seen[seen > 0]) == data.size


def test_a_sample_depends_on_nothing_but_its_number() -> None:
    first, second = sampler(mirror_axes=(0, 1, 2)), sampler(mirror_axes=(0, 1, 2))
    second.sample(5, forced=False)
    a, b = first.sample(17, forced=True), second.sample(17, forced=True)
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.seg, b.seg)


def test_two_processes_share_exactly_the_batch_of_one() -> None:
    drawn = sampler()
    whole = next(batches(drawn, 3, 4, 0, 1, 2))[0]
    shares = [next(batches(drawn, 3, 4, rank, 2, 1))[0] for rank in range(2)]
    torch.testing.assert_close(whole[0::2], shares[0], rtol=0, atol=0)
    torch.testing.assert_close(whole[1::2], shares[1], rtol=0, atol=0)


def test_resuming_continues_the_stream() -> None:
    drawn = sampler()
    stream = batches(drawn, 0, 2, 0, 1, 2)
    steps = [next(stream)[0] for _ in range(3)]
    torch.testing.assert_close(next(batches(drawn, 2, 2, 0, 1, 1))[0], steps[2], rtol=0, atol=0)


def test_an_error_in_a_loader_thread_is_raised_not_hung() -> None:
    broken = Sampler([case((9, 9, 9))], (8, 8, 8), LABELS, TrainConfig())
    object.__setattr__(broken.cases[0], "data", None)
    with pytest.raises(AttributeError):
        next(batches(broken, 0, 2, 0, 1, 2))


def test_validation_patches_are_the_same_every_time() -> None:
    drawn = sampler(train=False)
    first = torch.cat([images for images, _ in validation_batches(drawn, 5, 2, 0, 1)])
    second = torch.cat([images for images, _ in validation_batches(drawn, 5, 2, 0, 1)])
    assert len(first) == 5
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_cascade_sees_the_previous_stage_as_channels() -> None:
    base = case((12, 20, 9))
    arrays = Arrays(base.data, base.seg, base.locations, base.seg)
    config = TrainConfig(augment=AugmentConfig(cascade={"p_morphology": 0, "p_remove": 0}))
    drawn = Sampler([arrays], (8, 8, 8), LABELS, config, (0, 1, 2)).sample(3, forced=True)
    assert drawn.image.shape[0] == 3
    np.testing.assert_array_equal(drawn.image[1] > 0, drawn.seg == 1)
    np.testing.assert_array_equal(drawn.image[2] > 0, drawn.seg == 2)


def test_regions_and_ignore_become_channels_and_a_mask() -> None:
    labels = LabelSet.parse({"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, [1, 2])
    seg = torch.tensor([[0, 1, 2, 3]], dtype=torch.int16)
    target, valid = to_target(seg, labels)
    assert target.tolist() == [[[0, 1, 1, 0], [0, 0, 1, 0]]]
    assert valid is not None and valid.tolist() == [[True, True, True, False]]


def test_no_cases_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no cases"):
        Sampler([], (8, 8, 8), LABELS, TrainConfig())
