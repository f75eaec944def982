"""The pages of counting: complete, self-contained, safe, and true to what was written beside them."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medseg.instances.count import Counted, describe_counted, write_counted
from medseg.instances.count_page import build_index, build_page
from medseg.instances.dropped import Dropped
from medseg.instances.export.overlay import colours_of, draw_views
from medseg.instances.schema import instances_of
from medseg.instances.table import measure_objects, measure_regions
from medseg.types import IntArray
from medseg.volume import Geometry, Unit, Volume

HOSTILE = "<script>alert('x')</script>"


def counted(labels: IntArray, unit: Unit = "micron", regions: bool = False) -> Counted:
    """Objects of 0.5 a pixel, with an image of noise on them."""
    grid = Geometry(labels.shape, np.diag([0.5, 0.5, 0.5, 1.0]), unit)
    image = Volume(np.random.default_rng(0).normal(10, 3, (1, *labels.shape)).astype(np.float32), grid)
    dropped = (Dropped("low score", 2, 30),)
    given = {"model": "nuclei2d", "diameter": 4.0, "medseg": "1.2.3"}
    found = instances_of(Volume(labels[None], grid), dropped=dropped, provenance=given)
    halves = Volume((np.indices(labels.shape)[0] > 9)[None].astype(np.uint8) + 1, grid) if regions else None
    areas = None if halves is None else measure_regions(found, halves, {1: "left", 2: HOSTILE})
    return Counted(image, found, measure_objects(found, image), areas, 4.0, in_pixels=False)


def squares() -> IntArray:
    labels = np.zeros((20, 30, 1), np.int32)
    labels[2:6, 3:8], labels[8:14, 10:20], labels[0, 0], labels[15:20, 25:30] = 1, 2, 3, 4
    return labels


def cubes() -> IntArray:
    labels = np.zeros((16, 14, 12), np.int32)
    labels[2:6, 3:8, 1:5], labels[8:14, 6:12, 6:11] = 1, 2
    return labels


def test_a_page_says_what_was_counted_dropped_and_measured(tmp_path: Path) -> None:
    found = counted(squares(), regions=True)
    files = write_counted(found, tmp_path / "out", "cells", tmp_path / "cells.tif")
    page = files["page"].read_text()
    assert files["page"] == tmp_path / "out" / "report.html"
    for text in ("cells.tif", "20 × 30 pixels of 0.5 × 0.5 µm", "area (µm²)", "low score", "4 µm", "left"):
        assert text in page, text
    assert "kept, but of a single voxel (labels 3)" in page and "of 6 found" in page
    assert page.count("<svg") == 1 and page.count("data:image/png;base64,") == 1
    assert not re.search(r'(src|href)="(?!data:|#)', page), "nothing is fetched"
    assert str(tmp_path) not in page, "folders are nobody's business"
    assert all(path.name in page for kind, path in files.items() if kind != "page")


def test_a_volume_is_shown_in_planes_a_projection_and_slices(tmp_path: Path) -> None:
    micron = build_page(counted(cubes()), "v", {"table": tmp_path / "t.csv"}).render()
    assert micron.count("data:image/png;base64,") == 3 + 1 + 5
    assert "projection (along k)" in micron and "volume (µm³)" in micron
    anatomy = build_page(counted(cubes(), "mm"), "v", {"table": tmp_path / "t.csv"}).render()
    assert "projection (coronal)" in anatomy and "slice axial" in anatomy


@pytest.mark.parametrize(("unit", "axis", "seen"), [("mm", 1, 2), ("micron", 2, 1)])
def test_a_projection_shows_the_object_in_front(unit: Unit, axis: int, seen: int) -> None:
    labels = np.zeros((6, 6, 6), np.int32)
    first, second = [2, 2, 2], [2, 2, 2]
    first[axis], second[axis] = 1, 4  # one behind the other: a patient's front is high along j, in RAS
    labels[tuple(first)], labels[tuple(second)] = 1, 2
    found = counted(labels, unit)
    picture = np.asarray(Image.open(io.BytesIO(draw_views(found.instances, found.image)[3].png)))
    drawn = [bool((picture == colour).all(axis=2).any()) for colour in colours_of(2)[1:]]
    assert drawn == [seen == 1, seen == 2]


def test_nothing_found_is_said_with_what_to_do(tmp_path: Path) -> None:
    found = counted(np.zeros((20, 30, 1), np.int32))
    page = write_counted(found, tmp_path, "cells", tmp_path / "cells.tif")["page"].read_text()
    assert "Nothing was found" in page and "--diameter" in page and "<svg" not in page


def test_of_many_objects_the_largest_are_listed() -> None:
    labels = np.arange(1, 401, dtype=np.int32).reshape(20, 20, 1)
    page = build_page(counted(labels), "many", {"table": Path("t.csv")}).render()
    assert "The 200 largest of 400. t.csv has every column" in page
    assert "(labels 1, 2, 3, 4, 5, 6, 7, 8, …)" in page


def test_names_cannot_inject_script(tmp_path: Path) -> None:
    found = counted(squares(), regions=True)
    page = build_page(found, HOSTILE, {"table": Path(f"{HOSTILE}.csv")}).render()
    assert "<script>alert" not in page
    files = write_counted(found, tmp_path, "a", "a.tif")
    row = {"image": HOSTILE} | describe_counted(found, files)
    index = build_index([row, row], {HOSTILE: HOSTILE}).render()
    assert "<script>alert" not in index


def test_an_index_leads_to_the_page_of_every_image(tmp_path: Path) -> None:
    rows = []
    for name in ("a b", "c&d"):
        files = write_counted(counted(squares()), tmp_path, name, f"{name}.tif", page=f"{name}_report.html")
        rows.append({"image": f"{name}.tif"} | describe_counted(counted(squares()), files))
    page = build_index(rows, {"bad.tif": "no picture"}).render()
    assert "bad.tif" in page and "no picture" in page and 'class="sortable"' in page
    assert re.findall(r'href="([^"]*)"', page) == ["./a%20b_report.html", "./c%26d_report.html"] * 2
    assert page.count("data:image/png;base64,") == 2 and "4 objects" in page


@pytest.mark.parametrize("objects", [0, 4])
def test_an_index_holds_images_without_objects(tmp_path: Path, objects: int) -> None:
    found = counted(squares() if objects else np.zeros((20, 30, 1), np.int32))
    files = write_counted(found, tmp_path, "a", "a.tif")
    page = build_index([{"image": "a.tif"} | describe_counted(found, files)] * 5, {}).render()
    assert f"{5 * objects}" in page and page.count("<svg") == 1
