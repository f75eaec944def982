"""Names that find objects: every one listed opens, and what cannot find anything by itself is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from medseg import assets
from medseg.cli import app
from medseg.errors import BundleError, ConfigError, GeometryError
from medseg.instances.finders import FINDERS, open_finder
from medseg.instances.instanseg import KINDS
from medseg.instances.models import MODELS
from tests.instances.test_count import MIDDLES, nuclei


def test_every_name_is_a_model_of_the_package_or_has_an_asset() -> None:
    assert set(MODELS) | set(KINDS) <= set(FINDERS)
    for name in set(FINDERS) - set(MODELS):
        assert assets.get_asset(KINDS[name].asset if name in KINDS else name)


@pytest.mark.parametrize("name", FINDERS)
def test_every_name_is_told_by_the_help(name: str) -> None:
    told = CliRunner().invoke(app, ["count", "--help"], env={"COLUMNS": "200"}).stdout
    assert name in told


def test_a_network_of_boxes_and_an_unknown_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="lite-medsam: answers boxes"):
        open_finder("lite-medsam")
    with pytest.raises(BundleError, match="instanseg-brightfield"):
        open_finder("nuclei4d")


def test_nuclei_are_counted_by_instanseg(instanseg_paths: dict[str, Path], tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", nuclei(noise=3.0))
    model = ["--model", "instanseg-fluorescence"]
    model += ["--weights", f"instanseg-fluorescence={instanseg_paths['instanseg-fluorescence']}"]
    given = ["count", str(tmp_path / "a.tif"), "-o", str(tmp_path / "out"), *model, "--json"]
    refused = CliRunner().invoke(app, [*given, "--pixel-size", "pixel"])
    assert isinstance(refused.exception, GeometryError) and "--diameter" in str(refused.exception)
    result = CliRunner().invoke(app, [*given, "--pixel-size", "0.5 micron"], catch_exceptions=False)
    (row,) = json.loads(result.stdout)["images"]
    assert row["objects"] == len(MIDDLES) and row["diameter"] is None and row["unit"] == "um"
    assert row["size"]["median"] == pytest.approx(np.pi * 4**2, rel=0.2)
    assert tifffile.imread(tmp_path / "out" / "a_labels.tif").max() == len(MIDDLES)
