"""The models in the package, on phantoms, and on real images where they are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medseg.errors import BundleError, ConfigError
from medseg.instances.centre_model import CentreSettings
from medseg.instances.models import MODELS, ObjectModel, load_object_model, own_diameter
from medseg.instances.scale import Scale
from medseg.train.centre_config import CentreConfig, SyntheticConfig, load_centre
from medseg.train.centre_measure import count_matches
from medseg.train.synthetic_cells import draw_cells, paint_cells
from medseg.volume import Geometry, Volume

SCENE = SyntheticConfig(
    diameter=(15, 16), crowd=(0.3, 0.35), noise=(0.03, 0.04), blur=(0.6, 0.7), elongation=1.3
)
SHAPES = {"nuclei2d": (180, 200), "nuclei3d": (40, 44, 48)}


@pytest.fixture(scope="module")
def models() -> dict[str, ObjectModel]:
    return {name: load_object_model(name, threads=1) for name in MODELS}


def scene(name: str, seed: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = draw_cells(SHAPES[name], SCENE, rng)
    return labels, paint_cells(labels, SCENE, rng)


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_model_finds_the_cells_of_a_drawn_scene(name: str, models: dict[str, ObjectModel]) -> None:
    labels, image = scene(name)
    found = models[name].segment(image, diameter=15.0)
    true, invented, missed = count_matches(labels, found.labels)[0.5]
    assert true / (true + invented + missed) > 0.6
    assert found.labels.dtype == np.int32 and found.labels.shape == labels.shape
    assert found.scores.shape == (found.labels.max(),) and ((found.scores > 0) & (found.scores <= 1)).all()


@pytest.mark.parametrize("name", MODELS)
def test_type_and_range_of_an_image_do_not_matter(name: str, models: dict[str, ObjectModel]) -> None:
    _, image = scene(name)
    first = models[name].segment(image, diameter=15.0)
    for other in ((image * 1000 + 3000).astype(np.int16), (image.astype(np.float64) - 5) * 1e-6):
        again = models[name].segment(other, diameter=15.0)
        true, invented, missed = count_matches(first.labels, again.labels)[0.5]
        assert true >= 0.9 * (true + invented + missed)


@pytest.mark.parametrize("name", MODELS)
def test_an_image_of_nothing_holds_nothing(name: str, models: dict[str, ObjectModel]) -> None:
    shape = tuple(n // 2 for n in SHAPES[name])
    for image in (np.zeros(shape, np.uint8), np.full(shape, 1e-30), np.zeros((0, *shape[1:]), np.uint16)):
        found = models[name].segment(image)
        assert not found.labels.any() and found.labels.shape == image.shape and len(found.scores) == 0


def test_colour_grey_and_alpha_are_taken_and_other_axes_refused(models: dict[str, ObjectModel]) -> None:
    _, image = scene("nuclei2d")
    byte = (255 * image.clip(0, 1)).astype(np.uint8)
    grey = models["nuclei2d"].segment(byte, diameter=15.0)
    for shown in (
        np.stack([byte] * 3, -1),
        np.stack([byte] * 3),
        np.stack([byte] * 3 + [byte * 0 + 255], -1),
    ):
        assert (models["nuclei2d"].segment(shown, diameter=15.0).labels == grey.labels).all()
    with pytest.raises(ConfigError, match="axes"):
        models["nuclei3d"].segment(byte)
    with pytest.raises(ConfigError, match="diameter"):
        models["nuclei2d"].segment(byte, diameter=-1.0)
    with pytest.raises(ConfigError, match="colours, stains or time points"):
        models["nuclei2d"].segment(np.stack([byte, byte[::-1]]), diameter=15.0)
    with pytest.raises(ConfigError, match="memory does not hold"):
        models["nuclei2d"].segment(np.random.default_rng(0).random((2000, 2000)), diameter=1.0)
    with pytest.raises(ConfigError, match="spacing"):
        models["nuclei2d"].segment(byte, spacing=(1.0, 0.0))


def test_objects_do_not_depend_on_the_unit(models: dict[str, ObjectModel]) -> None:
    _, image = scene("nuclei2d")
    micron = models["nuclei2d"].segment(image, (0.5, 0.5), diameter=7.5)
    for unit in (2.0**20, 2.0**-20):
        other = models["nuclei2d"].segment(image, (0.5 * unit, 0.5 * unit), diameter=7.5 * unit)
        assert (other.labels == micron.labels).all() and other.diameter == 7.5 * unit
    found = models["nuclei2d"].segment(image, (500.0, 500.0), diameter=7500.0)
    assert len(found.scores) == len(micron.scores), "nanometres"


@pytest.mark.parametrize(
    ("kept", "spacing", "unit", "expected", "note"),
    [
        ("pixel", None, "pixel", 18.0, None),
        ("pixel", (1.0, 1.0), "pixel", 18.0, None),
        ("pixel", (0.5, 0.5), "micron", 9.0, "18 pixels"),
        ("mm", (0.5, 0.5), "mm", 18.0, None),
        ("mm", (500.0, 500.0), "micron", 18000.0, None),
        ("micron", (0.0005, 0.0005), "mm", 0.018, None),
        ("micron", None, "pixel", None, "no scale"),
        ("mm", (1.0, 1.0), "pixel", None, "no scale"),
        (None, None, "pixel", None, None),
        (None, (1.0, 1.0), "micron", 18.0, None),
        ("micron", (0.5, 0.5), None, 18.0, None),
    ],
)
def test_the_diameter_of_a_model_is_brought_to_the_unit_of_the_image(
    kept: Scale | None,
    spacing: tuple[float, float] | None,
    unit: Scale | None,
    expected: float | None,
    note: str | None,
) -> None:
    settings = CentreSettings(diameter=18.0, diameter_unit=kept)
    found, notes = own_diameter(settings, spacing, unit)
    assert found == (None if expected is None else pytest.approx(expected))
    assert not notes if note is None else note in notes[0]


def test_a_model_that_stores_a_size_in_micrometres_estimates_it_without_a_scale(
    models: dict[str, ObjectModel],
) -> None:
    _, image = scene("nuclei2d")
    picture = Volume(image.T[..., None], Geometry((*image.T.shape, 1), np.diag([0.5, 0.5, 1, 1]), "micron"))
    model = models["nuclei2d"].with_settings(diameter=0.0075, diameter_unit="mm")
    assert model.find(picture).diameter == pytest.approx(7.5)
    estimated = model.find(picture, in_pixels=True)
    assert estimated.diameter == models["nuclei2d"].find(picture, in_pixels=True).diameter != 15.0
    assert "no scale" in estimated.notes[0]


def test_an_anisotropic_volume_holds_the_same_cells(models: dict[str, ObjectModel]) -> None:
    labels, image = scene("nuclei3d")
    thick = image.reshape(20, 2, 44, 48).mean(axis=1)
    found = models["nuclei3d"].segment(thick, (2.0, 1.0, 1.0), diameter=15.0)
    true, invented, missed = count_matches(labels[::2], found.labels)[0.5]
    assert true / (true + invented + missed) > 0.5


def test_a_name_that_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nuclei2d, nuclei3d"):
        load_object_model("nuclei4d")


@pytest.mark.parametrize("name", MODELS)
def test_the_recipe_and_the_card_of_a_shipped_model_are_there(
    name: str, models: dict[str, ObjectModel]
) -> None:
    root = Path(__file__).parents[2]
    recipe = load_centre(str(root / "configs" / "instances" / f"{name}.yaml"))
    assert CentreConfig.from_dict(models[name].bundle.card["recipe"]) == recipe  # keys may be added
    card = (root / "medseg" / "instances" / "weights" / f"{name}.md").read_text()
    for word in ("Licence", "Trained on", "Measured", "Not for"):
        assert word in card


def test_nuclei2d_finds_nuclei_that_it_never_saw(models: dict[str, ObjectModel], data_dir: Path) -> None:
    """Four of the images held out; tests.benchmarks.instances.nuclei measures all 60."""
    from medseg.io import open_dataset
    from medseg.train.centre import OBJECTS, hold_out

    folder = data_dir / "nuclei2d_dsb2018"
    if not folder.is_dir():
        pytest.skip("nuclei2d_dsb2018 is not on this machine")
    _, held = hold_out(open_dataset(folder, OBJECTS).training, load_centre("configs/instances/nuclei2d.yaml"))
    counts = np.zeros(3, int)
    pairs = [[np.asarray(Image.open(path)) for path in (c.images[0], c.label)] for c in held[:8] if c.label]
    bright = [
        (image, labels) for image, labels in pairs if image[labels > 0].mean() > image[labels == 0].mean()
    ]
    for image, labels in bright[:4]:
        counts += count_matches(labels, models["nuclei2d"].segment(image).labels)[0.5]
    assert counts[0] / counts.sum() > 0.7
