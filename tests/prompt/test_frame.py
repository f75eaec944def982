import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.nets.sam import SPECS
from medseg.prompt.frame import CERTAIN, Frame, prepare, resize_area, resize_cubic
from tests.nets.peer_sam import SHAPES, organ, packed_levels

GOLDEN = json.loads((Path(__file__).parents[1] / "nets" / "golden" / "sam.json").read_text())
LITE, MOBILE, MEDSAM = SPECS["lite-medsam"], SPECS["mobile-sam"], SPECS["medsam-vit-b"]


@pytest.mark.parametrize("shape", SHAPES)
def test_area_resize_is_that_of_opencv(shape: tuple[int, int]) -> None:
    golden = GOLDEN["lite-medsam"]["{}x{}".format(*shape)]["resized"]
    small = resize_area(organ(*shape), Frame.of(LITE, shape, 256).new)
    found = packed_levels(small)
    assert found["sum"] == golden["sum"]
    assert found["values"] == golden["values"]


@pytest.mark.parametrize("shape", SHAPES)
def test_sam_gets_the_pixels_of_its_reference(shape: tuple[int, int]) -> None:
    golden = GOLDEN["mobile-sam"]["{}x{}".format(*shape)]["resized"]
    frame = Frame.of(MOBILE, shape, 1024)
    image = prepare(organ(*shape).astype(np.float32), MOBILE, frame)
    levels = image[0, 0, : frame.new[0], : frame.new[1]] * 58.395 + 123.675
    assert round(float(levels.double().sum())) == pytest.approx(golden["sum"], abs=100)
    assert float(image[..., frame.new[0] :, :].abs().sum()) == 0


@pytest.mark.parametrize(("shape", "new"), [((120, 90), (64, 64)), ((30, 41), (64, 64))])
def test_cubic_resize_is_that_of_scikit_image(shape: tuple[int, int], new: tuple[int, int]) -> None:
    transform = pytest.importorskip("skimage.transform")
    levels = organ(*shape)
    wanted = transform.resize(levels, new, order=3, preserve_range=True, anti_aliasing=True).astype(np.uint8)
    assert np.abs(resize_cubic(levels, new).astype(int) - wanted).max() <= 1
    assert (resize_cubic(levels, new) == wanted).mean() > 0.999


def test_a_slice_for_a_medical_network_runs_from_0_to_1_and_is_padded_with_black() -> None:
    frame = Frame.of(LITE, (100, 50), 256)
    image = prepare(np.linspace(50, 200, 5000).reshape(100, 50).astype(np.float32), LITE, frame)
    assert image.shape == (1, 3, 256, 256)
    assert frame.new == (256, 128)
    assert (float(image.min()), float(image.max())) == (0, 1)
    assert float(image[..., 128:].abs().sum()) == 0
    assert torch.equal(image[0, 0], image[0, 2])


@pytest.mark.parametrize("spec", [LITE, MOBILE, MEDSAM])
def test_a_slice_of_one_value_gives_numbers(spec: object) -> None:
    frame = Frame.of(spec, (20, 30), 64)  # type: ignore[arg-type]
    image = prepare(np.full((20, 30), 7.0, np.float32), spec, frame)  # type: ignore[arg-type]
    assert bool(torch.isfinite(image).all())


def test_box_corners_are_those_of_the_reference_where_a_slice_is_not_enlarged() -> None:
    edges = (99.5, 49.5, 200.5, 120.5)  # voxels 100..200, 50..120
    assert Frame.of(LITE, (512, 512), 256).box(edges).tolist() == [25, 50, 60, 100]
    assert Frame.of(LITE, (300, 217), 256).box(edges).tolist() == [42, 85, 102, 170]
    assert Frame.of(MEDSAM, (2048, 1024), 1024).box(edges).tolist() == [50, 50, 120, 100]
    assert Frame.of(MOBILE, (512, 512), 512).points(np.array([[3, 7]])).tolist() == [[7, 3]]


def test_an_enlarged_box_covers_its_voxels_to_their_edges() -> None:
    frame = Frame.of(MOBILE, (64, 64), 512)  # a voxel is 8 pixels
    assert frame.box((1.5, 2.5, 4.5, 3.5)).tolist() == [24, 16, 31, 39]
    assert frame.points(np.array([[2, 3]])).tolist() == [[27.5, 19.5]]


def test_a_box_beyond_the_field_is_cut_to_it() -> None:
    frame = Frame.of(MOBILE, (100, 80), 100)
    assert frame.box((-40, -3, 700, 900)).tolist() == [0, 0, 79, 99]


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 700), columns=st.integers(1, 700), name=st.sampled_from(sorted(SPECS)))
def test_every_field_fits_its_square_and_comes_back_at_its_shape(rows: int, columns: int, name: str) -> None:
    spec = SPECS[name]
    frame = Frame.of(spec, (rows, columns), 64)
    assert max(frame.new) == 64
    assert min(frame.new) >= 1
    found = frame.logits(torch.zeros(2, 16, 16))
    assert found.shape == (2, rows, columns)
    mask = frame.mask(found[0], 16)
    assert mask.shape == (1, 1, 16, 16)


@pytest.mark.parametrize("spec", [LITE, MOBILE, MEDSAM])
def test_a_mask_goes_there_and_back(spec: object) -> None:
    frame = Frame.of(spec, (96, 60), 64)  # type: ignore[arg-type]
    y, x = np.mgrid[:96, :60]
    disc = (y - 40) ** 2 + (x - 33) ** 2 < 18**2
    low = frame.mask(np.where(disc, CERTAIN, -CERTAIN), 64)
    back = frame.logits(low[0])[0] > 0
    assert (back & disc).sum() / (back | disc).sum() > 0.95
