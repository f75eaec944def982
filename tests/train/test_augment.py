import numpy as np
import pytest

from medseg.train import augment
from medseg.train.config import AugmentConfig, Elastic, Ranged, Rotation, Scaling

STILL = AugmentConfig(
    rotation=Rotation(p=0),
    scaling=Scaling(p=0),
    noise=Ranged(p=0, low=0, high=0.1),
    blur={"p": 0, "low": 0.5, "high": 1},
    brightness=Ranged(p=0, low=0.75, high=1.25),
    contrast=Ranged(p=0, low=0.75, high=1.25),
    low_resolution={"p": 0, "low": 0.5, "high": 1},
    gamma_inverted=Ranged(p=0, low=0.7, high=1.5),
    gamma=Ranged(p=0, low=0.7, high=1.5),
)


def blob(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(2, *shape)).astype(np.float32)
    return image, rng.integers(-1, 3, (1, *shape)).astype(np.int16)


@pytest.mark.parametrize("patch", [(6, 8, 10), (7, 9), (3, 16, 16)])
def test_no_movement_reads_the_patch_itself(patch: tuple[int, ...]) -> None:
    spatial = augment.Spatial(np.eye(len(patch)), None)
    image, seg = blob(spatial.reach(patch))
    moved, labels = augment.resample_patch(image, seg, spatial, patch)
    margin = [(b - p) // 2 for b, p in zip(image.shape[1:], patch, strict=True)]
    inner = (slice(None), *[slice(m, m + p) for m, p in zip(margin, patch, strict=True)])
    np.testing.assert_allclose(moved, image[inner], atol=1e-5)
    np.testing.assert_array_equal(labels, seg[inner])


def test_a_quarter_turn_is_rot90() -> None:
    matrix = np.eye(3)
    matrix[1:, 1:] = [[0, -1], [1, 0]]
    spatial = augment.Spatial(matrix, None)
    patch = (4, 8, 8)
    image, seg = blob(spatial.reach(patch))
    moved, labels = augment.resample_patch(image, seg, spatial, patch)
    margin = [(b - p) // 2 for b, p in zip(image.shape[1:], patch, strict=True)]
    inner = (slice(None), *[slice(m, m + p) for m, p in zip(margin, patch, strict=True)])
    np.testing.assert_allclose(moved, np.rot90(image[inner], -1, (2, 3)), atol=1e-4)
    np.testing.assert_array_equal(labels, np.rot90(seg[inner], -1, (2, 3)))


@pytest.mark.parametrize("patch", [(20, 24, 28), (8, 64, 64), (40, 44)])
def test_the_box_always_holds_what_is_read(patch: tuple[int, ...]) -> None:
    config = AugmentConfig(rotation=Rotation(p=1), scaling=Scaling(p=1), elastic=Elastic(p=1))
    for seed in range(20):
        spatial = augment.draw_spatial(np.random.default_rng(seed), patch, config)
        assert spatial is not None
        box = spatial.reach(patch)
        moved, _ = augment.resample_patch(
            np.ones((1, *box), np.float32), np.ones((1, *box), np.int16), spatial, patch
        )
        assert moved.min() == pytest.approx(1.0, abs=1e-5)  # anything outside would be read as 0


def test_thin_patches_are_turned_slice_by_slice() -> None:
    config = AugmentConfig(rotation=Rotation(p=1), scaling=Scaling(p=1))
    spatial = augment.draw_spatial(np.random.default_rng(1), (8, 64, 64), config)
    assert spatial is not None
    np.testing.assert_array_equal(spatial.matrix[0], [1, 0, 0])
    np.testing.assert_array_equal(spatial.matrix[:, 0], [1, 0, 0])


# nnunetv2 2.8.1: get_patch_size(patch, rotation ranges, scale (0.85, 1.25)) as its trainer calls it
@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ((40, 56, 40), (73, 80, 64)),
        ((128, 128, 128), (205, 205, 205)),
        ((56, 40), (65, 65)),
        ((64, 40), (84, 47)),
    ],
)
def test_initial_patch_equals_nnunet(patch: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert augment.initial_patch(patch, AugmentConfig()) == expected


def test_the_same_generator_gives_the_same_image() -> None:
    image, _ = blob((12, 12, 12))
    always = AugmentConfig(
        noise={"p": 1, "low": 0, "high": 0.1},
        blur={"p": 1, "low": 0.5, "high": 1},
        gamma={"p": 1, "low": 0.7, "high": 1.5},
        low_resolution={"p": 1, "low": 0.5, "high": 1},
    )
    first, second = (augment.augment_intensity(image, np.random.default_rng(3), always) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - image).max() > 0.1


def test_gamma_keeps_mean_and_spread() -> None:
    image, _ = blob((16, 16, 16))
    config = STILL.replace(gamma={"p": 1.0, "low": 0.7, "high": 1.5})
    bent = augment.augment_intensity(image, np.random.default_rng(0), config)
    np.testing.assert_allclose(bent.mean((1, 2, 3)), image.mean((1, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(bent.std((1, 2, 3)), image.std((1, 2, 3)), rtol=1e-4)


def test_switched_off_it_changes_nothing() -> None:
    image, _ = blob((9, 9, 9))
    rng = np.random.default_rng(0)
    assert augment.draw_spatial(rng, (9, 9, 9), STILL) is None
    np.testing.assert_array_equal(augment.augment_intensity(image, rng, STILL), image)


def test_a_disturbed_previous_stage_stays_binary() -> None:
    onehot = np.zeros((2, 16, 16, 16), np.float32)
    onehot[0, 3:9, 3:9, 3:9] = onehot[1, 10:14, 10:14, 10:14] = 1
    config = AugmentConfig(cascade={"p_morphology": 1, "p_label": 1, "p_remove": 1, "max_radius": 2})
    changed = augment.disturb_previous(onehot, np.random.default_rng(0), config, 3)
    assert set(np.unique(changed)) <= {0.0, 1.0}
    assert (changed != onehot).any()
