"""Small plans and cases that the tests of this folder share."""

import numpy as np
from scipy.spatial.transform import Rotation

from medseg.labels import LabelSet
from medseg.plan import Architecture, ChannelStats, Configuration, Plan
from medseg.volume import Geometry, Volume

TRANSPOSES = {(0, 1, 2): (0, 1, 2), (2, 0, 1): (1, 2, 0), (1, 0, 2): (1, 0, 2)}
CLASSES = LabelSet.parse({"background": 0, "a": 1, "b": 2, "c": 3})


def make_plan(
    spacing: tuple[float, ...],
    transpose: tuple[int, int, int] = (0, 1, 2),
    labels: LabelSet = CLASSES,
    normalization: str = "zscore",
) -> Plan:
    dims = len(spacing)
    architecture = Architecture(
        features_per_stage=(4,),
        strides=((1,) * dims,),
        kernel_sizes=((3,) * dims,),
        blocks_per_stage=(1,),
        decoder_convs_per_stage=(),
    )
    configuration = Configuration(
        spacing=spacing,
        patch_size=(8,) * dims,
        batch_size=2,
        median_shape=(8.0,) * dims,
        normalization=(normalization,),
        use_mask_for_norm=(False,),
        batch_dice=False,
        architecture=architecture,
    )
    stats = ChannelStats(max=1, mean=0, median=0, min=-1, percentile_00_5=-1, percentile_99_5=1, std=1)
    return Plan(
        dataset_name="Dataset001_Test",
        plans_name="plans",
        preset="nnunet",
        recipe="nnunet",
        channels=("MRI",),
        labels=labels,
        file_ending=".nii.gz",
        reader="SimpleITKIO",
        transpose_forward=transpose,
        transpose_backward=TRANSPOSES[transpose],
        original_median_spacing=(1.0, 1.0, 1.0),
        original_median_shape=(8, 8, 8),
        intensity={"0": stats},
        configurations={"test": configuration},
    )


def make_case(seed: int, shape: tuple[int, int, int], spacing: tuple[float, ...]) -> tuple[Volume, Volume]:
    """An oblique, flipped image with a zero border, and a label map inside."""
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(rng=rng).as_matrix() * np.array(spacing) * rng.choice([-1, 1], 3)
    affine[:3, 3] = rng.normal(size=3) * 50
    inner = tuple(slice(int(n > 4), n - int(n > 6)) for n in shape)
    image = np.zeros((1, *shape), dtype=np.float32)
    image[0][inner] = rng.normal(5, 1, image[0][inner].shape)
    label = np.zeros((1, *shape), dtype=np.uint8)
    label[0][inner] = rng.integers(0, 4, label[0][inner].shape)
    grid = Geometry(shape, affine)
    return Volume(image, grid), Volume(label, grid)
