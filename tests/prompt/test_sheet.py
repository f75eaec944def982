"""The contact sheet: right way up, right shape, and drawn for whatever there is."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from medseg.prompt import sheet
from medseg.prompt.prompts import Box, Lasso, Point, Prompt, Scribble
from medseg.prompt.regions import Region, Triple
from medseg.prompt.scene import Scene
from medseg.prompt.session import PromptSession
from medseg.prompt.sheet import MOST_BLOCKS, Shown, draw_sheet, write_sheet
from medseg.types import Array, BoolArray
from medseg.volume import Geometry, Volume
from tests.phantoms import GEOMETRIES, affine, noise
from tests.prompt.fakes import fake_models, fake_propagate

PANELS = ("axial", "coronal", "sagittal")


def pixels(png: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def panel(picture: Array, number: int) -> Array:
    """Return the pixels of one of the three planes of the first block, without its frame."""
    inch = sheet._DPI
    width = (sheet._WIDTH - 2 * sheet._MARGIN - 2 * sheet._GAP) / 3
    left, top = sheet._MARGIN + number * (width + sheet._GAP), 0.15 + sheet._HEAD
    cut = [round(x * inch) for x in (top, top + sheet._PLANE, left, left + width)]
    return picture[cut[0] + 4 : cut[1] - 4, cut[2] + 4 : cut[3] - 4]


def coloured(part: Array, colour: str) -> BoolArray:
    """Return where a picture has nearly this colour."""
    return np.asarray(np.abs(part.astype(float) - np.array(to_rgb(colour)) * 255).max(axis=-1) < 30)


def corner_of(scene: Scene) -> Region:
    """Return a block at the patient's right, front and head end of the volume."""
    size = np.array(scene.shape)
    start, stop = size - np.maximum(3, size // 4) - 1, size - 1
    i, j, k = (int(x) for x in np.maximum(start, 0))
    block = np.ones(tuple(np.maximum(stop, [i + 1, j + 1, k + 1]) - [i, j, k]), dtype=bool)
    return Region.at(block, (i, j, k), scene.shape)


@pytest.mark.parametrize("name", ["straight", "flipped", "permuted", "oblique"])
def test_slices_are_in_the_view_of_a_radiologist(name: str) -> None:
    scene = Scene.of(noise(GEOMETRIES[name]), (0, 200))
    picture = pixels(draw_sheet(scene, [Shown("a", corner_of(scene))]))
    for number, plane in enumerate(PANELS):
        rows, columns = np.nonzero(coloured(panel(picture, number), sheet.PALETTE[0]))
        height, width = panel(picture, number).shape[:2]
        assert rows.size, plane
        assert columns.mean() < width / 2, f"{plane}: the patient's right, or front, is on the left"
        assert rows.mean() < height / 2, f"{plane}: front, or head, is at the top"


def test_a_cube_in_millimetres_is_a_square_in_every_plane() -> None:
    geometry = Geometry((40, 24, 10), affine("LPS", (1.0, 2.0, 4.0)))
    scene = Scene.of(noise(geometry), (0, 200))
    cube = Region.at(np.ones((24, 12, 6), dtype=bool), (8, 6, 2), scene.shape)
    picture = pixels(draw_sheet(scene, [Shown("a", cube)]))
    for number, plane in enumerate(PANELS):
        rows, columns = np.nonzero(coloured(panel(picture, number), sheet.PALETTE[0]))
        assert np.ptp(rows) == pytest.approx(np.ptp(columns), rel=0.04), plane


def world(scene: Scene, *voxels: tuple[float, float, float]) -> list[tuple[float, float, float]]:
    return [(x, y, z) for x, y, z in scene.to_world(np.array(voxels)).tolist()]


@pytest.mark.parametrize("kind", ["box", "box in 3D", "point", "outside", "scribble", "lasso"])
def test_a_prompt_is_drawn_where_it_was_made(kind: str) -> None:
    shape: Triple = (40, 40, 8)
    scene = Scene.of(Volume(np.zeros(shape, np.float32), Geometry(shape, affine())), (0, 200))
    a, b, c = world(scene, (4, 24, 4), (14, 24, 4), (14, 36, 4))
    prompts: dict[str, Prompt] = {
        "box": Box(corner_mm=a, opposite_mm=c, plane="axial"),
        "box in 3D": Box(corner_mm=a, opposite_mm=world(scene, (14, 36, 6))[0]),
        "point": Point(position_mm=world(scene, (9, 30, 4))[0]),
        "outside": Point(position_mm=world(scene, (9, 30, 4))[0], positive=False),
        "scribble": Scribble(points_mm=(a, b, c)),
        "lasso": Lasso(points_mm=(a, b, c), plane="axial"),
    }
    mask = np.zeros(shape, dtype=bool)
    mask[20:30, 4:14, 4] = True
    picture = pixels(draw_sheet(scene, [Shown("a", Region.of(mask), prompts=(prompts[kind],))]))
    part = panel(picture, 0)[30:]  # below the caption
    rows, columns = np.nonzero(coloured(part, sheet._OUTSIDE if kind == "outside" else sheet._INSIDE))
    scale = 40 / part.shape[1]
    assert rows.size
    across, up = 40 - columns * scale, 40 - (rows + 30) * scale
    assert across.min() >= 3 and across.max() <= 16 and up.min() >= 22 and up.max() <= 38


def test_every_slice_that_was_pointed_at_is_shown() -> None:
    shape: Triple = (20, 20, 60)
    scene = Scene.of(Volume(np.zeros(shape, np.float32), Geometry(shape, affine())), (0, 200))
    region = Region.at(np.ones((8, 8, 50), dtype=bool), (4, 4, 5), shape)
    prompts = tuple(Point(position_mm=world(scene, (8, 8, k))[0]) for k in (6, 23, 24, 41))
    confidence = {k: 0.2 if k == 33 else 0.9 for k in range(5, 55)}
    shown = sheet._slices_of(scene, Shown("a", region, 2, prompts, confidence))
    assert {6, 23, 24, 33, 41} <= set(shown) and len(shown) == 12
    assert shown == sorted(set(shown))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_any_grid_can_be_drawn(name: str, tmp_path: Path) -> None:
    session = PromptSession.open(noise(GEOMETRIES[name]), propagate=fake_propagate, models=fake_models)
    middle = world(session.scene, tuple((n - 1) / 2 for n in session.scene.shape))[0]
    session.add("a", Point(position_mm=middle))
    write_sheet(session, tmp_path / "sheet.png", name)
    assert pixels((tmp_path / "sheet.png").read_bytes()).std() > 1


@pytest.mark.parametrize("count", [0, 1, MOST_BLOCKS + 30])
def test_none_and_many_objects_fit_on_a_sheet(count: int) -> None:
    shape: Triple = (64, 16, 16)
    scene = Scene.of(Volume(np.zeros(shape, np.float32), Geometry(shape, affine())), (0, 200))
    block = np.ones((1, 4, 4), dtype=bool)
    objects = [Shown(f"object {n}", Region.at(block, (n, 4, 4), shape)) for n in range(count)]
    assert pixels(draw_sheet(scene, objects, "all")).shape[0] < 2000


def test_many_objects_keep_their_places_and_colours() -> None:
    scene = Scene.of(noise(GEOMETRIES["straight"]), (0, 200))
    block = np.ones((3, 3, 3), dtype=bool)
    right, left = (Region.at(block, (i, j, 3), scene.shape) for i, j in ((8, 6), (1, 1)))
    part = panel(pixels(draw_sheet(scene, [Shown("a", right), Shown("b", left)], together=True)), 0)
    places = [np.argwhere(coloured(part, colour)).mean(axis=0) for colour in sheet.PALETTE[:2]]
    middle = np.array(part.shape[:2]) / 2
    assert (places[0] < middle).all() and (places[1] > middle).all()


def test_an_object_that_was_not_found_has_its_name_and_no_pictures() -> None:
    scene = Scene.of(noise(GEOMETRIES["straight"]), (0, 200))
    empty = pixels(draw_sheet(scene, [Shown("a", Region.empty(scene.shape))]))
    assert empty.shape[0] < 200 and empty.std() > 0
