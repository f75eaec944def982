"""The table: units in its names, and values for every awkward image."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from medseg.errors import GeometryError
from medseg.instances.compiled import COMPILED
from medseg.instances.export import write_csv
from medseg.instances.schema import instances_of
from medseg.instances.table import BASIC, MeasureConfig, measure_objects, measure_regions
from medseg.volume import Geometry, Volume
from tests.instances.shapes import OBLIQUE, ellipse, ellipsoid, objects, scattered

EVERYTHING = MeasureConfig(hull=True, percentiles=(5, 50, 95))


def test_an_ellipsoid_on_an_oblique_grid_has_its_size_place_and_shape() -> None:
    grid = Geometry((44, 40, 30), OBLIQUE)
    found = ellipsoid(grid, (14.0, 9.0, 9.0))
    middle = OBLIQUE @ [*(np.array(grid.shape) - 1) / 2, 1]
    image = Volume(np.full(grid.shape, 7.0, np.float32), grid)
    row = next(measure_objects(found, image, config=EVERYTHING).rows())
    assert row["volume_mm3"] == pytest.approx(4 / 3 * np.pi * 14 * 81, rel=0.01)
    assert row["volume_ml"] == pytest.approx(row["volume_mm3"] / 1000)
    centroid = [row[f"centroid_{a}_ras_mm"] for a in "xyz"]
    np.testing.assert_allclose(centroid, middle[:3], atol=0.05)
    assert row["equivalent_diameter_mm"] == pytest.approx(2 * (14 * 81) ** (1 / 3), rel=0.01)
    assert row["axis_major_mm"] == pytest.approx(28, rel=0.01)
    assert row["axis_minor_mm"] == pytest.approx(18, rel=0.02)
    assert row["elongation"] == pytest.approx(28 / 18, rel=0.02)
    assert 28 <= row["max_feret_3d_mm"] < 30
    assert row["recist_longest_mm"] <= row["max_feret_3d_mm"]
    assert not row["touches_border"]
    assert row["intensity_mean"] == 7
    assert row["intensity_std"] == 0
    assert row["intensity_p50"] == 7
    assert row["neighbours"] == 0
    assert row["nearest_neighbour_mm"] == np.inf
    a, b = (np.array([row[f"recist_longest_{end}_{x}_ras_mm"] for x in "xyz"]) for end in "ab")
    assert np.linalg.norm(a - b) == pytest.approx(row["recist_longest_mm"])


def test_a_picture_has_areas_and_micrometres() -> None:
    found = objects(ellipse((60, 70), (1.0, 1.0), (40.0, 20.0), 30).labels, (0.5, 0.5), "micron")
    row = next(measure_objects(found, config=EVERYTHING).rows())
    assert row["area_um2"] == pytest.approx(np.pi * 20 * 10 / 4, rel=0.01)
    assert row["axis_major_um"] == pytest.approx(20, rel=0.01)
    assert row["orientation_deg"] == pytest.approx(30, abs=1)
    assert row["perimeter_um"] > np.pi * 10
    assert 0.6 < row["circularity"] < 0.9
    assert not [name for name in row if "mm" in name or "_k_" in name or "volume" in name]


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 1)])
def test_an_empty_image_and_an_image_that_is_one_object_have_their_tables(
    shape: tuple[int, int, int],
) -> None:
    grid = Geometry(shape, np.eye(4))
    image = Volume(np.zeros(shape), grid)
    empty = measure_objects(
        instances_of(Volume(np.zeros(shape, np.uint8), grid)), image, image, config=EVERYTHING
    )
    full = measure_objects(
        instances_of(Volume(np.ones(shape, np.uint8), grid)), image, image, config=EVERYTHING
    )
    assert len(empty) == 0
    assert len(full) == 1
    assert list(empty.columns) == list(full.columns)
    assert full["touches_border"].tolist() == [True]
    assert full["voxel_count"].tolist() == [np.prod(shape)]
    assert full["parent_name"].tolist() == [""]


def test_the_border_of_a_picture_is_not_its_only_slice() -> None:
    labels = np.zeros((6, 6), np.int32)
    labels[2:4, 2:4], labels[5, 3] = 1, 2
    assert measure_objects(objects(labels), config=BASIC)["touches_border"].tolist() == [False, True]


def test_regions_count_objects_with_densities_also_where_nothing_is() -> None:
    labels = np.zeros((10, 10, 10), np.int32)
    labels[1, 1, 1], labels[3, 3, 3], labels[7, 7, 7] = 1, 2, 3
    regions = np.zeros(labels.shape)
    regions[:5], regions[5:, :5], regions[5:, 5:] = 1, 2, 3
    found = objects(labels, (2.0, 1.0, 1.0))
    table = measure_regions(found, found.volume.with_array(regions), {1: "cortex"})
    assert table["region_name"].tolist() == ["cortex", "region 2", "region 3"]
    assert table["object_count"].tolist() == [2, 0, 1]
    np.testing.assert_allclose(table["density_per_mm3"], [2 / 1000, 0, 1 / 500])
    np.testing.assert_allclose(table["density_per_ml"], [2, 0, 2])
    parents = measure_objects(found, regions=found.volume.with_array(regions), config=BASIC)
    assert parents["parent"].tolist() == [1, 1, 3]


def test_channels_of_an_image_have_their_own_columns() -> None:
    found = objects(scattered((8, 9, 7), 4))
    image = Volume(np.random.default_rng(0).normal(size=(2, 8, 9, 7)), found.geometry)
    table = measure_objects(found, image, config=BASIC)
    second = [image.array[1][found.labels == label].mean() for label in range(1, len(found) + 1)]
    np.testing.assert_allclose(table["intensity_1_mean"], second)


def test_another_grid_is_refused_with_what_differs() -> None:
    found = objects(scattered((8, 9, 7), 4))
    wrong = Volume(np.zeros((8, 9, 6)), Geometry((8, 9, 6), np.eye(4)))
    with pytest.raises(GeometryError, match="image: shape"):
        measure_objects(found, wrong)
    moved = Volume(np.zeros((8, 9, 7)), Geometry((8, 9, 7), np.diag([1.0, 1.0, 2.0, 1.0])))
    with pytest.raises(GeometryError, match="regions: spacing"):
        measure_regions(found, moved)


def test_sizes_equal_scikit_image_with_spacing() -> None:
    measure = pytest.importorskip("skimage.measure")
    labels, spacing = scattered((16, 15, 14), 9), (0.7, 1.0, 2.0)
    found = objects(labels, spacing)
    table = measure_objects(found, config=BASIC)
    for region in measure.regionprops(found.labels, spacing=spacing):
        row = region.label - 1
        assert table["volume_mm3"][row] == pytest.approx(region.area)
        assert table["equivalent_diameter_mm"][row] == pytest.approx(region.equivalent_diameter_area)
        ours = [table[f"centroid_{a}_vox"][row] for a in "ijk"]
        np.testing.assert_allclose(np.array(ours) * spacing, region.centroid)
        box = [table[f"box_{a}_{end}_edge"][row] for end in ("low", "high") for a in "ijk"]
        assert box == list(region.bbox)


@pytest.mark.skipif(not COMPILED, reason="numba is not installed")
def test_a_hundred_thousand_objects_are_measured_in_seconds() -> None:
    index = np.indices((188, 188, 188), dtype=np.int32) // 4
    labels = (index[0] * 47 + index[1]) * 47 + index[2] + 1
    found = objects(np.ascontiguousarray(labels, np.int32))
    before = time.process_time()
    table = measure_objects(found, config=MeasureConfig(diameters=False))
    assert len(table) == 47**3 > 100_000
    assert (table["volume_mm3"] == 64).all()
    assert table["neighbours"].max() == 6
    assert time.process_time() - before < 30


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import numpy as np
from medseg.instances.compiled import COMPILED
from medseg.instances.export import write_csv
from medseg.instances.table import measure_objects
from medseg.volume import Volume
from tests.instances.shapes import objects, scattered
from tests.instances.test_table import EVERYTHING
assert not COMPILED
for n, shape in enumerate([(14, 13), (9, 8, 7)]):
    found = objects(scattered(shape, 9))
    image = Volume(np.random.default_rng(0).normal(size=found.volume.array.shape), found.geometry)
    write_csv(measure_objects(found, image, config=EVERYTHING), f"{sys.argv[1]}/{n}.csv")
"""


@pytest.mark.skipif(not COMPILED, reason="numba is not installed")
def test_without_numba_every_number_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", WITHOUT_NUMBA, str(tmp_path)], check=True, cwd=root)
    for n, shape in enumerate([(14, 13), (9, 8, 7)]):
        found = objects(scattered(shape, 9))
        image = Volume(np.random.default_rng(0).normal(size=found.volume.array.shape), found.geometry)
        write_csv(measure_objects(found, image, config=EVERYTHING), tmp_path / "ours.csv")
        assert (tmp_path / "ours.csv").read_text() == (tmp_path / f"{n}.csv").read_text()
