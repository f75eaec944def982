"""Files of objects, read back by other programs."""

import csv
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medseg.errors import ConfigError, GeometryError, OutputError
from medseg.instances.dropped import Dropped
from medseg.instances.export import (
    describe_qc,
    write_csv,
    write_geojson,
    write_label_map,
    write_overlay,
    write_panoptic_overlay,
    write_qc,
    write_rois,
    write_table,
)
from medseg.instances.export.overlay import draw_outlines
from medseg.instances.panoptic import merge_dense, panoptic_of
from medseg.instances.schema import Instances, instances_of
from medseg.instances.table import BASIC, measure_objects
from medseg.io import read
from medseg.labels import PanopticLabels
from medseg.metrics.report import PALETTE
from medseg.volume import Geometry, Volume
from tests.instances.shapes import OBLIQUE, objects, scattered


@pytest.fixture
def cells() -> Instances:
    labels = scattered((30, 26), 12, seed=3)
    labels[5:12, 5:12], labels[7:9, 7:9] = 20, 0
    return objects(labels, (0.5, 0.5), "micron")


def test_a_csv_holds_every_number_to_the_last_bit(cells: Instances, tmp_path: Path) -> None:
    table = measure_objects(cells, config=BASIC)
    write_csv(table, tmp_path / "cells.csv")
    with open(tmp_path / "cells.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == list(table.columns)
    assert [float(row["area_um2"]) for row in rows] == table["area_um2"].tolist()
    assert {row["score"] for row in rows} == {""}, "what is undefined is empty"
    assert {row["touches_border"] for row in rows} <= {"0", "1"}


def test_parquet_has_the_types_of_the_columns(cells: Instances, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = measure_objects(cells, config=BASIC)
    write_table(table, tmp_path / "cells.parquet")
    back = parquet.read_table(tmp_path / "cells.parquet")
    assert back.column_names == list(table.columns)
    assert back["area_um2"].to_pylist() == table["area_um2"].tolist()
    assert str(back.schema.field("touches_border").type) == "bool"


def test_json_of_a_table_is_strict(cells: Instances, tmp_path: Path) -> None:
    table = measure_objects(cells, config=BASIC)
    write_table(table, tmp_path / "cells.json")
    rows = json.loads((tmp_path / "cells.json").read_text())
    assert [row["area_um2"] for row in rows] == table["area_um2"].tolist()
    assert {row["score"] for row in rows} == {None}


@pytest.mark.parametrize(("package", "file"), [("pyarrow", "a.parquet"), ("zarr", "a.zarr")])
def test_a_missing_package_is_named_with_what_to_do(
    package: str, file: str, cells: Instances, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"{package}.*pip install"):
        if package == "zarr":
            write_label_map(cells, tmp_path / file)
        else:
            write_table(measure_objects(cells, config=BASIC), tmp_path / file)
    assert not list(tmp_path.iterdir())


def test_geojson_has_a_closed_valid_ring_for_each_piece_and_measurements(
    cells: Instances, tmp_path: Path
) -> None:
    table = measure_objects(cells, config=BASIC)
    write_geojson(cells, tmp_path / "cells.geojson", table)
    content = json.loads((tmp_path / "cells.geojson").read_text())
    assert content["pixel_size"] == {"x": 0.5, "y": 0.5, "unit": "micron"}
    assert [feature["id"] for feature in content["features"]] == table["label"].tolist()
    for feature, area, voxels in zip(content["features"], table["area_um2"], cells.voxels, strict=True):
        shape = feature["geometry"]
        shapes = [shape["coordinates"]] if shape["type"] == "Polygon" else shape["coordinates"]
        inside = 0.0
        for rings in shapes:
            for number, ring in enumerate(rings):
                assert ring[0] == ring[-1]
                x, y = np.array(ring).T
                signed = ((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2
                assert (signed > 0) == (number == 0)
                inside += signed
        assert inside == voxels
        assert feature["properties"]["measurements"]["area_um2"] == area
        assert "score" not in feature["properties"]["measurements"], "NaN is no JSON"


def test_rois_are_read_by_a_decoder_of_the_format(cells: Instances, tmp_path: Path) -> None:
    write_rois(cells, tmp_path / "rois.zip")
    with zipfile.ZipFile(tmp_path / "rois.zip") as archive:
        assert len(archive.namelist()) == len(cells)
        for label, name in enumerate(archive.namelist(), 1):
            data = archive.read(name)
            magic, version, kind = struct.unpack(">4sHB", data[:7])
            top, left, bottom, right, count = struct.unpack(">5H", data[8:18])
            floats = struct.unpack(">i", data[36:40])[0]
            where = np.argwhere(cells.labels == label)
            assert (magic, version) == (b"Iout", 227)
            assert [left, top] == where.min(axis=0).tolist()
            assert [right, bottom] == (where.max(axis=0) + 1).tolist()
            if kind == 8:
                x, y = np.frombuffer(data[64:], ">u2").reshape(2, count).astype(int)
                area = ((x * np.roll(y, -1)) - (np.roll(x, -1) * y)).sum() / 2
                assert area == len(where)
            else:
                assert (kind, count) == (1, 0)
                assert len(data) == 64 + 4 * floats


def test_rois_are_read_by_roifile(cells: Instances, tmp_path: Path) -> None:
    roifile = pytest.importorskip("roifile")
    write_rois(cells, tmp_path / "rois.zip")
    for label, roi in enumerate(roifile.roiread(tmp_path / "rois.zip"), 1):
        where = np.argwhere(cells.labels == label)
        assert (roi.left, roi.top) == tuple(where.min(axis=0))
        if roi.roitype == roifile.ROI_TYPE.TRACED:
            x, y = roi.coordinates().T
            assert abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2) == len(where)
        else:
            assert roi.composite
            rings = roi.coordinates(multi=True)
            area = sum((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2 for x, y in (ring.T for ring in rings))
            assert abs(area) == len(where)


def test_outlines_of_volumes_are_refused(tmp_path: Path) -> None:
    found = objects(scattered((6, 7, 5), 3))
    for write in (write_geojson, write_rois):
        with pytest.raises(GeometryError, match="two"):
            write(found, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".nii.gz", ".tif", ".nrrd"])
def test_a_label_map_is_read_back_on_its_grid(suffix: str, tmp_path: Path) -> None:
    plain = np.diag([0.5, 0.6, 2.0, 1.0])
    grid = Geometry((8, 9, 7), plain if suffix == ".tif" else OBLIQUE)
    found = instances_of(Volume(scattered((8, 9, 7), 6), grid))
    write_label_map(found, tmp_path / f"labels{suffix}")
    back = read(tmp_path / f"labels{suffix}")
    assert back.array.dtype == np.uint16
    assert (back.array == found.volume.array).all()
    assert back.geometry.matches(found.geometry)


def test_more_labels_than_sixteen_bits_are_stored_in_thirty_two(tmp_path: Path) -> None:
    many = objects(np.arange(1, 65_537, dtype=np.int32).reshape(256, 256))
    write_label_map(many, tmp_path / "many.tif")
    assert (read(tmp_path / "many.tif").array == many.volume.array).all()
    with pytest.raises(OutputError, match="65535 labels"):
        write_label_map(many, tmp_path / "many.png")


def test_ome_zarr_has_axes_scale_and_properties(cells: Instances, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    volume = instances_of(Volume(scattered((8, 9, 7), 6), Geometry((8, 9, 7), OBLIQUE)))
    for found, axes in ((cells, "yx"), (volume, "zyx")):
        table = measure_objects(found, config=BASIC)
        write_label_map(found, tmp_path / f"{axes}.zarr", table)
        group = zarr.open_group(str(tmp_path / f"{axes}.zarr"), mode="r")
        image = group.attrs["ome"]["multiscales"][0]
        assert "".join(axis["name"] for axis in image["axes"]) == axes
        scale = image["datasets"][0]["coordinateTransformations"][0]["scale"]
        assert scale[::-1] == list(found.geometry.spacing[: found.ndim])
        assert (found.labels == group["0"][...].T).all()
        assert len(group.attrs["ome"]["image-label"]["properties"]) == len(found)
        assert group.attrs["medseg"]["affine"] == found.geometry.affine.tolist()


def test_qc_counts_add_up_and_name_the_rule() -> None:
    labels = scattered((9, 9, 9), 5)
    plain = objects(labels, (1.0, 1.0, 2.0))
    dropped = (Dropped("smaller than 3 mm3", 4, 6), Dropped("score below 0.5", 1, 50))
    found = instances_of(plain.volume, dropped=dropped)
    assert "volume_px3" in describe_qc(found, in_pixels=True)["dropped"][0]
    report = describe_qc(found, ["tile 3: out of memory"])
    assert report["found_objects"] == report["objects"] + 5
    assert report["dropped"][0] == {"rule": "smaller than 3 mm3", "count": 4, "voxels": 6, "volume_mm3": 12.0}
    assert report["failures"] == ["tile 3: out of memory"]
    border = [k for k in range(1, len(found) + 1) if {0, 8} & set(np.argwhere(found.labels == k).ravel())]
    assert report["touch_border"] == border


def test_qc_of_an_empty_image_is_written(tmp_path: Path) -> None:
    write_qc(objects(np.zeros((4, 4), np.int32)), tmp_path / "qc.json")
    assert json.loads((tmp_path / "qc.json").read_text())["objects"] == 0


def test_an_outline_lies_inside_its_object_in_its_own_colour() -> None:
    labels = np.zeros((12, 12), np.int32)
    labels[2:6, 2:6], labels[6:10, 2:6] = 1, 2
    drawn = draw_outlines(np.zeros((12, 12)), labels)
    lit = np.asarray(drawn.any(axis=2))
    assert not lit[labels == 0].any()
    assert lit[2, 2] and lit[5, 3] and lit[6, 3]
    assert not lit[3:5, 3:5].any(), "the inside is left as it is"
    assert not (drawn[5, 3] == drawn[6, 3]).all()
    assert draw_outlines(np.zeros((12, 12)), labels, zoom=3).shape == (36, 36, 3)


@pytest.mark.parametrize("shape", [(20, 16, 1), (20, 16, 9)])
@pytest.mark.parametrize("kind", ["grey", "colour", "constant with NaN", "empty"])
def test_an_overlay_is_drawn_of_every_image(shape: tuple[int, int, int], kind: str, tmp_path: Path) -> None:
    grid = Geometry(shape, np.diag([1.0, 1.0, 3.0, 1.0]))
    labels = np.zeros(shape, np.int32) if kind == "empty" else scattered(shape, 5)
    array = np.random.default_rng(0).integers(0, 255, (3 if kind == "colour" else 1, *shape)).astype(np.uint8)
    values = np.full(array.shape, np.nan) if kind == "constant with NaN" else array
    found = instances_of(Volume(labels, grid))
    write_overlay(found, Volume(values, grid), tmp_path / "overlay.png", "a title")
    with Image.open(tmp_path / "overlay.png") as picture:
        assert picture.format == "PNG"
        coloured = np.ptp(np.asarray(picture).astype(int), axis=2).max() > 60
    assert coloured or kind == "empty"


@pytest.mark.parametrize("shape", [(40, 30, 1), (30, 26, 20)])
def test_things_and_stuff_are_painted_in_the_colours_of_the_legend(
    shape: tuple[int, int, int], tmp_path: Path
) -> None:
    classes = PanopticLabels(labels={"liver": 3, "cyst": 5}, things=("cyst",))
    semantic = np.full(shape, 3)
    semantic[:12, :12] = 0
    objects = np.zeros(shape, int)
    objects[20:26, 15:22], semantic[20:26, 15:22] = 4, 5
    grid = Volume(np.full(shape, 100, np.uint8), Geometry(shape, np.diag([1.0, 1.0, 2.0, 1.0])))
    panoptic = panoptic_of(merge_dense(semantic, objects, classes), grid, classes)
    first, second = [tuple(int(text[i : i + 2], 16) for i in (1, 3, 5)) for text in PALETTE[:2]]
    for image in (None, grid):
        write_panoptic_overlay(panoptic, image, tmp_path / "o.png", "a title")
        with Image.open(tmp_path / "o.png") as picture:
            pixels = np.asarray(picture)
        legend = pixels[-28:]
        for colour in (first, second):  # the thing has the first colour, then comes the stuff
            assert (legend == colour).all(axis=2).any()
        for colour, part in ((first, 0.45), (second, 0.28)):  # an image of one value is black
            tinted = np.round(np.array(colour) * part).clip(1 if shape[2] > 1 else 0)
            assert (pixels[:-28] == tinted).all(axis=2).any()


def test_an_overlay_on_another_grid_is_refused(cells: Instances, tmp_path: Path) -> None:
    other = Volume(np.zeros((5, 5, 1)), Geometry((5, 5, 1), np.eye(4)))
    with pytest.raises(GeometryError, match="shape"):
        write_overlay(cells, other, tmp_path / "x.png")


def test_the_schema_and_its_table_do_not_load_torch() -> None:
    script = (
        "import sys, medseg.instances.table, medseg.instances.export; print({'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
