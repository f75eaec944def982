import json

import numpy as np
import pytest
from scipy import ndimage

from medseg.errors import ConfigError
from medseg.geometry.orient import axis_codes, is_orthonormal
from medseg.io import open_dataset, read_image, read_label
from medseg.phantom import LABELS, ORGANS, SIDED_LABELS, Phantom, make_phantom, write_phantom_dataset


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(seed, size=60) for seed in range(4)]


def _hu(phantom: Phantom, name: str) -> float:
    return float(np.median(phantom.image.array[phantom.labels.mask(phantom.label.array, name)]))


def _centre_mm(phantom: Phantom, name: str) -> np.ndarray:
    voxels = np.argwhere(phantom.labels.mask(phantom.label.array[0], name))
    affine = phantom.image.geometry.affine
    return affine[:3, :3] @ voxels.mean(axis=0) + affine[:3, 3]


def test_a_seed_always_gives_the_same_phantom() -> None:
    first, second = make_phantom(5, size=24), make_phantom(np.random.default_rng(5), size=24)
    assert np.array_equal(first.image.array, second.image.array)
    assert np.array_equal(first.label.array, second.label.array)
    assert first.image.geometry == second.image.geometry


def test_no_two_phantoms_are_alike(phantoms: list[Phantom]) -> None:
    volumes = [[int((p.label.array == v).sum()) for v in (1, 2, 3)] for p in phantoms]
    assert len({tuple(v) for v in volumes}) == len(phantoms)
    assert len({p.image.geometry.affine.tobytes() for p in phantoms}) == len(phantoms)


def test_every_label_is_present_and_image_and_truth_share_their_grid(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        assert phantom.image.geometry == phantom.label.geometry
        assert set(np.unique(phantom.label.array)) == set(LABELS.values)
        assert phantom.image.array.dtype == np.int16
        assert phantom.label.array.dtype == np.uint8


def test_organs_have_the_volumes_of_adults(phantoms: list[Phantom]) -> None:
    ranges_ml = {"liver": (900, 3500), "spleen": (60, 500), "kidneys": (180, 600), "lesion": (2, 250)}
    for phantom in phantoms:
        voxel_ml = phantom.label.geometry.voxel_volume / 1000
        for name, (low, high) in ranges_ml.items():
            ml = phantom.labels.mask(phantom.label.array, name).sum() * voxel_ml
            assert low < ml < high, (name, ml)


def test_organs_lie_where_they_belong(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        liver, spleen = _centre_mm(phantom, "liver"), _centre_mm(phantom, "spleen")
        kidneys = _centre_mm(phantom, "kidneys")
        assert liver[0] > kidneys[0] + 20  # RAS+: the patient's right
        assert spleen[0] < kidneys[0] - 40
        assert kidneys[1] < liver[1]  # behind
        assert kidneys[2] < min(liver[2], spleen[2])  # below


def test_tissues_have_the_attenuation_of_their_kind(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        assert 80 < _hu(phantom, "liver") < 140
        assert _hu(phantom, "kidneys") > _hu(phantom, "liver") + 10
        assert _hu(phantom, "lesion") < _hu(phantom, "liver") - 15
        values = phantom.image.array
        assert values.min() == -1024
        assert np.mean(values < -900) > 0.2  # air around
        assert values.max() > 350  # bone


def test_lesions_lie_inside_the_liver(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        lesion = phantom.label.array[0] == LABELS.entries["lesion"]
        rim = ndimage.binary_dilation(lesion) & ~lesion
        assert np.mean(phantom.label.array[0][rim] == LABELS.entries["liver"]) > 0.6


def test_noise_is_correlated_between_neighbours() -> None:
    phantom = make_phantom(3, size=64)
    air = phantom.image.array[0].astype(float)
    liver = ndimage.binary_erosion(phantom.label.array[0] == 1, iterations=2)
    residual = np.where(liver, air - ndimage.uniform_filter(air, 5), 0)
    pairs = liver[1:] & liver[:-1]
    correlation = np.corrcoef(residual[1:][pairs], residual[:-1][pairs])[0, 1]
    assert 0.1 < correlation < 0.9


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "SRA"])
def test_the_grid_points_where_it_was_asked_to_and_shows_the_same_patient(codes: str) -> None:
    straight = make_phantom(8, size=32, orientation="RAS", oblique_deg=0.0)
    turned = make_phantom(8, size=32, orientation=codes, oblique_deg=0.0)
    assert axis_codes(turned.image.geometry.affine) == codes
    assert np.allclose(_centre_mm(turned, "liver"), _centre_mm(straight, "liver"), atol=1e-3)


def test_a_tilted_grid_is_oblique_and_still_right_angled() -> None:
    affine = make_phantom(8, size=24, oblique_deg=12.0).image.geometry.affine
    assert is_orthonormal(affine)
    assert np.abs(affine[:3, :3]).min() > 1e-3


def test_sided_phantoms_have_the_right_kidney_on_the_right() -> None:
    phantom = make_phantom(4, size=40, sided=True)
    assert phantom.labels == SIDED_LABELS
    assert phantom.labels.sided == ("kidney_left", "kidney_right")
    assert _centre_mm(phantom, "kidney_right")[0] > _centre_mm(phantom, "kidney_left")[0] + 60


@pytest.mark.parametrize(("size", "orientation"), [(8, "LPS"), (32, "LLS"), (32, "XYZ"), (32, "LP")])
def test_an_impossible_phantom_is_refused(size: int, orientation: str) -> None:
    with pytest.raises(ConfigError, match=r"size|orientation"):
        make_phantom(0, size, orientation=orientation)


def test_the_dataset_opens_as_any_other_and_holds_its_own_truth(tmp_path) -> None:
    folder = write_phantom_dataset(tmp_path / "Dataset900_Phantom", n_train=2, n_test=1, seed=1, size=24)
    dataset = open_dataset(folder)
    assert [case.name for case in dataset.training] == ["phantom_000", "phantom_001"]
    assert dataset.labels == LABELS
    for case in dataset.training:
        assert read_image(case).geometry.matches(read_label(case).geometry)
    assert (folder / "labelsTs" / "phantom_002.nii.gz").exists()
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2
    assert set(ORGANS) < set(LABELS.entries)


def test_a_dataset_of_lesions_alone_keeps_their_masks(tmp_path) -> None:
    made = [
        write_phantom_dataset(tmp_path / name, n_train=1, n_test=0, seed=1, size=32, only=only)
        for name, only in (("all", None), ("lesions", "lesion"))
    ]
    maps = [read_label(open_dataset(folder).training[0]).array for folder in made]
    assert list(open_dataset(made[1]).labels.foreground) == ["lesion"]
    np.testing.assert_array_equal(maps[1], maps[0] == LABELS.entries["lesion"])
    with pytest.raises(ConfigError, match="spleen"):
        write_phantom_dataset(tmp_path / "none", only="lesions")


def test_an_interrupted_dataset_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("medseg.phantom.make_phantom", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_phantom_dataset(tmp_path / "data", n_train=1, n_test=0)
    assert not list(tmp_path.iterdir())
