"""``medseg split``: what a person types, reads and gets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner, Result

from medseg.cli import app
from medseg.errors import ConfigError, DataError, GeometryError
from medseg.instances.scale import knows_spacing
from medseg.io import read, write
from medseg.types import Array
from medseg.volume import Geometry, Unit, Volume
from tests.instances.volumes import discs
from tests.phantoms import affine

PAIR = discs((24, 40), [(12.0, 12.0), (12.0, 27.0)], 8.4, (1.0, 1.0))


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["split", *map(str, words)])


def facts_of(*words: str | Path) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def saved(path: Path, array: Array, spacing: float = 1.0, unit: Unit = "mm") -> Path:
    volume = array[..., None] if array.ndim == 2 else array
    matrix = np.diag([spacing] * 3 + [1.0]) if path.suffix == ".tif" else affine("LPS", (spacing,) * 3)
    write(Volume(volume, Geometry(volume.shape, matrix, unit)), path)
    return path


@pytest.mark.parametrize("name", ["mask.nii.gz", "mask.nrrd", "mask.tif"])
def test_a_mask_becomes_objects_on_its_own_grid(tmp_path: Path, name: str) -> None:
    thick = np.repeat(PAIR[..., None], 5, axis=2).astype(np.uint8)
    source = saved(tmp_path / name, thick)
    result = run(source, "-o", tmp_path / "out" / name)
    assert result.exit_code == 0, result.output
    assert "2 objects of a mask, by basins" in result.stdout
    before, after = read(source), read(tmp_path / "out" / name)
    assert after.geometry.matches(before.geometry)
    assert after.array.dtype == np.uint16 and after.array.max() == 2
    assert np.array_equal(after.array > 0, before.array > 0)


def test_the_json_says_how_many_of_what_and_what_was_removed(tmp_path: Path) -> None:
    labels = np.where(PAIR, 3, 0).astype(np.int16)
    labels[0, 0] = labels[23, 39] = 8
    facts = facts_of(
        saved(tmp_path / "l.nii.gz", labels, 2.0), "-o", tmp_path / "o.nii.gz", "--min-volume-mm3", "5"
    )
    assert facts["objects"] == 2 and facts["objects_of_label"] == {"3": 2}
    assert facts["dropped"] == [{"rule": "smaller than 5 mm2", "count": 2, "voxels": 2}]
    assert facts["spacing"] == [2.0, 2.0] and facts["unit"] == "mm"
    assert facts["settings"] == {"h": 1.5, "rel": 0.0, "floor": 0.0, "connectivity": 26}


def test_depths_and_volumes_are_in_mm_in_a_microscope_too(tmp_path: Path) -> None:
    source = saved(tmp_path / "cells.tif", PAIR.astype(np.uint8), 1.0, "micron")
    facts = facts_of(source, "-o", tmp_path / "o.tif", "--h-mm", "0.002")
    assert facts["settings"]["h"] == 2.0 and facts["objects"] == 2 and facts["unit"] == "um"
    assert facts_of(source, "-o", tmp_path / "o.tif", "--h-mm", "0.02")["objects"] == 1
    few = facts_of(source, "-o", tmp_path / "o.tif", "--min-volume-mm3", "0.0009")
    assert few["objects"] == 0 and few["dropped"][0]["rule"] == "smaller than 900 um2"
    assert few["notes"][-1].startswith("every object was removed: --min-volume-mm3 0.0009 is 900 um2 here")


def test_a_smallest_volume_above_the_whole_image_is_refused_in_its_unit(tmp_path: Path) -> None:
    source = saved(tmp_path / "cells.tif", PAIR.astype(np.uint8), 1.0, "micron")
    error = run(source, "-o", tmp_path / "o.tif", "--min-volume-mm3", "5").exception
    assert isinstance(error, ConfigError)
    assert "--min-volume-mm3 5 is 5e+06 um2 here, and the whole image has only 960 um2" in str(error)
    assert not (tmp_path / "o.tif").exists()


def test_a_height_map_needs_a_depth_and_has_its_own_unit(tmp_path: Path) -> None:
    probability = np.array([[0.1, 0.9, 0.6, 0.8, 0.4, 0.9]], dtype=np.float32)
    source = saved(tmp_path / "p.nii.gz", probability)
    error = run(source, "-o", tmp_path / "o.nii.gz").exception
    assert isinstance(error, ConfigError) and "how deep must the valley" in str(error)
    facts = facts_of(source, "-o", tmp_path / "o.nii.gz", "--h-mm", "0.15", "--floor", "0.5")
    assert facts["kind"] == "height map" and facts["objects"] == 3


def test_labels_stored_as_floats_are_labels(tmp_path: Path) -> None:
    source = saved(tmp_path / "f.nii.gz", PAIR.astype(np.float32))
    assert facts_of(source, "-o", tmp_path / "o.nii.gz")["kind"] == "label map"
    grey = saved(tmp_path / "g.nii.gz", np.array([[9, 3, 8, 0, 7]], dtype=np.uint8))
    facts = facts_of(grey, "-o", tmp_path / "o.nii.gz", "--height-map", "--h-mm", "2")
    assert facts["kind"] == "height map" and facts["objects"] == 3


def test_a_tiff_without_a_voxel_size_is_a_question(tmp_path: Path) -> None:
    import tifffile

    source = tmp_path / "plain.tif"
    tifffile.imwrite(source, PAIR.astype(np.uint8))
    error = run(source, "-o", tmp_path / "o.tif").exception
    assert isinstance(error, GeometryError)
    assert "does not tell the size" in str(error) and "--pixel-size '0.5 micron'" in str(error)
    assert not (tmp_path / "o.tif").exists()
    facts = facts_of(source, "-o", tmp_path / "o.tif", "--pixel-size", "0.5 um")
    assert facts["spacing"] == [0.5, 0.5] and facts["objects"] == 2
    assert read(tmp_path / "o.tif").spacing[:2] == (0.5, 0.5)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("--pixel-size", "1 mm"), ConfigError, "Leave out --pixel-size"),
        (("--method", "magic"), ConfigError, "is unknown"),
        (("--method", "components", "--rel", "0.1"), ConfigError, "components have no depth"),
        (("--connectivity", "7"), ConfigError, "connectivity 7"),
    ],
)
def test_wrong_options_are_one_sentence(
    tmp_path: Path, words: tuple[str, ...], error: type[Exception], message: str
) -> None:
    source = saved(tmp_path / "m.nii.gz", PAIR.astype(np.uint8))
    found = run(source, "-o", tmp_path / "o.nii.gz", *words).exception
    assert isinstance(found, error) and message in str(found)


@pytest.mark.parametrize("text", ["0.5", "um", "a um", "0.5 furlong"])
def test_a_spacing_without_its_unit_is_refused(tmp_path: Path, text: str) -> None:
    import tifffile

    source = tmp_path / "plain.tif"
    tifffile.imwrite(source, PAIR.astype(np.uint8))
    found = run(source, "-o", tmp_path / "o.tif", "--pixel-size", text).exception
    assert isinstance(found, ConfigError) and "lengths with a unit" in str(found)


def test_an_image_of_several_channels_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "c.nii.gz"
    write(Volume(np.zeros((2, 4, 4, 3), np.uint8), Geometry((4, 4, 3), np.eye(4))), source)
    found = run(source, "-o", tmp_path / "o.nii.gz").exception
    assert isinstance(found, DataError) and "has 2 channels" in str(found)


def test_more_objects_than_16_bits_are_written_in_32(tmp_path: Path) -> None:
    mask = np.zeros((530, 500), dtype=np.uint8)
    mask[::2, ::2] = 1
    facts = facts_of(saved(tmp_path / "m.tif", mask), "-o", tmp_path / "o.tif", "--method", "components")
    after = read(tmp_path / "o.tif").array
    assert after.max() == facts["objects"] == 265 * 250 and after.dtype == np.int32


def test_depths_can_be_tuned_by_a_reference(tmp_path: Path) -> None:
    source = saved(tmp_path / "mask.nii.gz", PAIR.astype(np.uint8))
    whole = saved(tmp_path / "one.nii.gz", PAIR.astype(np.uint8) * 7)
    halves = saved(
        tmp_path / "two.nii.gz", np.where(np.indices(PAIR.shape)[1] < 20, 1, 2) * PAIR.astype(np.uint8)
    )
    for reference, objects in ((whole, 1), (halves, 2)):
        facts = facts_of(source, "-o", tmp_path / "o.nii.gz", "--tune", reference)
        best = facts["tuned"]["trials"][0]
        assert facts["objects"] == best["objects"] == objects and best["f1"] == 1
        assert facts["settings"]["h"] == best["h"] and facts["settings"]["rel"] == best["rel"]
    told = run(source, "-o", tmp_path / "o.nii.gz", "--tune", halves, "--method", "watershed").stdout
    assert "tuned: --h-mm " in told and "F1 1.000" in told


def test_the_given_size_is_also_that_of_the_reference(tmp_path: Path) -> None:
    source, reference = tmp_path / "mask.tif", tmp_path / "ref.tif"
    for path in (source, reference):
        tifffile.imwrite(path, PAIR.astype(np.uint8))
    words = (source, "-o", tmp_path / "o.tif", "--pixel-size", "1 micron", "--tune")
    assert facts_of(*words, reference)["tuned"]["f1"] == 1
    after = read(tmp_path / "o.tif")
    assert after.spacing[:2] == (1.0, 1.0) and after.geometry.unit == "micron" and knows_spacing(after)
    other = saved(tmp_path / "other.tif", PAIR.T.astype(np.uint8), 2.0, "micron")
    assert "spacing 2x2" in str(run(*words, other).exception)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("--h-mm", "1"), ConfigError, "Leave them out"),
        (("--method", "components"), ConfigError, "no depth to tune"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    tmp_path: Path, words: tuple[str, ...], error: type[Exception], message: str
) -> None:
    source = saved(tmp_path / "m.nii.gz", PAIR.astype(np.uint8))
    labels = saved(tmp_path / "l.nii.gz", PAIR.astype(np.uint8) * 7)
    found = run(source, "-o", tmp_path / "o.nii.gz", "--tune", labels, *words).exception
    assert isinstance(found, error) and message in str(found)
    other = saved(tmp_path / "other.nii.gz", PAIR[:-1].astype(np.uint8))
    found = run(source, "-o", tmp_path / "o.nii.gz", "--tune", other).exception
    assert isinstance(found, GeometryError) and "same image" in str(found)
