"""The phantom of touching ellipsoids and real nuclei, and what splitting makes of their masks."""

from pathlib import Path

import numpy as np
import pytest

from medseg.instances.basins import find_basins
from medseg.instances.components import label_components
from medseg.instances.distance import distance_map
from medseg.instances.flood import flood
from medseg.instances.split import BasinsConfig, split
from medseg.io import read
from medseg.types import Array, IntArray
from tests.ellipsoids import touching_ellipsoids


@pytest.fixture(scope="module")
def cells() -> IntArray:
    return touching_ellipsoids(per_axis=2, size=60)


def panoptic_quality(truth: Array, found: Array) -> tuple[float, float]:
    """Return F1 and PQ at IoU above a half, by counting pairs in a dense matrix."""
    shared = np.zeros((int(truth.max()) + 1, int(found.max()) + 1))
    np.add.at(shared, (truth.ravel(), found.ravel()), 1)
    union = shared.sum(axis=1)[1:, None] + shared.sum(axis=0)[None, 1:] - shared[1:, 1:]
    iou = shared[1:, 1:] / union
    hits = iou[iou > 0.5]
    total = (sum(shared.shape) - 2) / 2
    return len(hits) / total, hits.sum() / total


def test_the_phantom_is_the_same_again_and_crowded(cells: IntArray) -> None:
    assert np.array_equal(cells, touching_ellipsoids(per_axis=2, size=60))
    assert np.unique(cells).tolist() == list(range(9))
    assert 0.35 < (cells > 0).mean() < 0.6
    assert label_components(cells > 0).max() < 4


def test_every_ellipsoid_is_found_from_the_mask_alone(cells: IntArray) -> None:
    found = split(cells > 0, (1.0, 1.0, 1.0))
    f1, quality = panoptic_quality(cells, found.labels)
    assert found.count == 8 and f1 == 1.0 and quality > 0.95


def test_splitting_is_as_good_as_the_watershed_of_scikit_image(cells: IntArray) -> None:
    from skimage.segmentation import watershed

    mask = cells > 0
    distances = distance_map(mask, (1.0, 1.0, 1.0))
    basins = find_basins(distances)
    markers = np.zeros(mask.shape, dtype=np.int32)
    markers.reshape(-1)[basins.hierarchy.roots] = basins.hierarchy.merge(0.75)[1:]
    theirs = watershed(-distances, markers, np.ones((3, 3, 3)), mask=mask)
    ours = basins.labels(0.75)
    assert ours.max() == theirs.max()
    assert panoptic_quality(theirs, ours)[1] >= 0.98
    flooded = flood(distances, markers)
    assert panoptic_quality(theirs, flooded)[1] >= 0.98


def test_thick_slices_are_split_with_the_same_depth_in_mm(cells: IntArray) -> None:
    thick = cells[1::3]
    found = split(thick > 0, (3.0, 1.0, 1.0), config=BasinsConfig(h=1.0))
    f1, quality = panoptic_quality(thick, found.labels)
    assert found.count == 8 and f1 == 1.0 and quality > 0.9


@pytest.mark.parametrize(
    ("name", "least"),
    [("nuclei3d_ovules/labels/ovule_1135.nii.gz", 0.99), ("nuclei3d_stardist/mask3d.tif", 0.85)],
)
def test_real_nuclei_are_found_again_from_their_mask(data_dir: Path, name: str, least: float) -> None:
    volume = read(data_dir / name)
    truth = np.unique(volume.array[0], return_inverse=True)[1].reshape(volume.shape)
    found = split(truth > 0, volume.spacing)
    assert panoptic_quality(truth, found.labels)[0] >= least
    assert panoptic_quality(truth, label_components(truth > 0))[0] < least
