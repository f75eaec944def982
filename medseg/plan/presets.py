"""The planners as one table of constants, and which of them fits this machine.

Every nnU-Net constant is that of version 2.8.1: class `ExperimentPlanner`
(``experiment_planners/default_experiment_planner.py``), `ResEncUNetPlanner`
(``resencUNet_planner.py``) and `nnUNetPlannerResEncM/L/XL` (``residual_encoder_unet_planners.py``).
The rules that read them are described in Isensee et al., Nature Methods 18 (2021) 203-211, and the
ResEnc presets in Isensee et al., nnU-Net Revisited, arXiv 2404.09556.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from medseg.config import Config, read_mapping
from medseg.errors import ConfigError
from medseg.plan.schema import NetworkName, Preset, Recipe
from medseg.types import PathLike

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class Rules(Config):
    """Constants of one planner. An optional limit that is None is not applied.

    Attributes
    ----------
    plans_name, planner : what nnU-Net calls the plan and its planner class
    shares_nnunet_data : use the preprocessed folders of ``nnUNetPlans`` for 2d and 3d_fullres
    network, recipe : network family and training recipe
    encoder_blocks : convolutions or residual blocks of each stage, the last number repeats
    decoder_convs : convolutions of each decoder stage
    base_features, max_features_3d, max_features_2d : features double from stage to stage up to a cap
    memory_gb : GPU memory that the references stand for
    reference_3d, reference_2d : feature-map elements of one sample that fill `memory_gb`, at batch 2 in
        3D and 12 in 2D
    shrink_at_min_batch : compare the memory of batch 2, not of the reference batch, when shrinking the patch
    coverage : a batch holds at most this share of all voxels of the dataset
    batch_size_3d, batch_size_2d : fixed batch size instead of filling the memory
    max_stages : most resolutions of the network
    max_patch_voxels_3d, max_patch_voxels_2d : largest patch
    max_patches_per_case : coarsen the target spacing until the median case holds no more patches
    only_default : plan 3d_fullres (2d for 2D data) and nothing else
    bytes_per_element : memory of one feature-map element in training
    elements_per_second : feature-map elements trained in a second
    min_steps : training steps that a time budget must leave room for
    """

    plans_name: str
    planner: str
    shares_nnunet_data: bool = False
    network: NetworkName = "unet"
    recipe: Recipe = "nnunet"
    encoder_blocks: tuple[Count, ...] = (2,)
    decoder_convs: Count = 2
    base_features: Count = 32
    max_features_3d: Count = 320
    max_features_2d: Count = 512
    memory_gb: Positive = 8.0
    reference_3d: Positive | None = 560e6
    reference_2d: Positive | None = 85e6
    shrink_at_min_batch: bool = True
    coverage: Positive = 0.05
    batch_size_3d: Count | None = None
    batch_size_2d: Count | None = None
    max_stages: Count | None = None
    max_patch_voxels_3d: Count | None = None
    max_patch_voxels_2d: Count | None = None
    max_patches_per_case: Positive | None = None
    only_default: bool = False
    # 8 GB for 560e6 elements at batch 2 (ExperimentPlanner): mixed precision on a GPU.
    bytes_per_element: Positive = 7.1
    # 250 steps of 2 x 560e6 elements in 82 s on a V100 (nnU-Net v1 documentation, Heart 3d_fullres).
    elements_per_second: Positive = 3.4e9
    min_steps: Count = 5000

    def blocks(self, n_stages: int) -> tuple[int, ...]:
        """Encoder blocks of `n_stages` stages."""
        given = self.encoder_blocks[:n_stages]
        return given + (self.encoder_blocks[-1],) * (n_stages - len(given))

    def features(self, n_stages: int, dimensions: int) -> tuple[int, ...]:
        """Features of `n_stages` stages, finest first."""
        cap = self.max_features_3d if dimensions == 3 else self.max_features_2d
        return tuple(min(cap, self.base_features * 2**stage) for stage in range(n_stages))

    def reference(self, dimensions: int) -> float | None:
        """Feature-map elements of one sample that fill `memory_gb`."""
        return self.reference_3d if dimensions == 3 else self.reference_2d

    def max_patch_voxels(self, dimensions: int) -> int | None:
        """Largest patch in voxels."""
        return self.max_patch_voxels_3d if dimensions == 3 else self.max_patch_voxels_2d

    def batch_size(self, dimensions: int) -> int | None:
        """Fixed batch size, if any."""
        return self.batch_size_3d if dimensions == 3 else self.batch_size_2d


def _resenc(size: str, memory_gb: float, reference_3d: float, reference_2d: float, coverage: float) -> Rules:
    planner = f"nnUNetPlannerResEnc{size}" if size else "ResEncUNetPlanner"
    return Rules(
        plans_name=f"nnUNetResEncUNet{size}Plans",
        planner=planner,
        shares_nnunet_data=True,
        network="resenc-unet",
        encoder_blocks=(1, 3, 4, 6),
        decoder_convs=1,
        memory_gb=memory_gb,
        reference_3d=reference_3d,
        reference_2d=reference_2d,
        shrink_at_min_batch=False,
        coverage=coverage,
    )


PRESETS: dict[Preset, Rules] = {
    "nnunet": Rules(plans_name="nnUNetPlans", planner="ExperimentPlanner"),
    #                     GB   3D       2D     coverage
    "resenc": _resenc("", 8, 680e6, 135e6, 0.05),
    "resenc-m": _resenc("M", 8, 680e6, 135e6, 1),
    "resenc-l": _resenc("L", 24, 2100e6, 380e6, 1),
    "resenc-xl": _resenc("XL", 40, 3600e6, 560e6, 1),
    # medseg's own: a small net, patches that two cores can train on. Measured on MSD hippocampus
    # (see DECISIONS.md); these numbers are the ones to tune.
    "cpu": Rules(
        plans_name="medsegCpuPlans",
        planner="medseg-cpu",
        recipe="cpu",
        base_features=16,
        max_features_3d=128,
        max_features_2d=256,
        max_stages=5,
        max_patch_voxels_3d=96**3,
        max_patch_voxels_2d=512**2,
        batch_size_3d=2,
        batch_size_2d=12,
        max_patches_per_case=32,
        reference_3d=None,
        reference_2d=None,
        only_default=True,
        # Measured with this network: a float32 training step of batch 2, patch 80^3 (112e6 elements) takes
        # 1.4 GB above the bare process; 7e6 to 19e6 elements a core and second (float32 small patch to
        # bfloat16 large patch), so about this many on two cores.
        bytes_per_element=13.0,
        elements_per_second=2.0e7,
        min_steps=500,
    ),
}


def read_preset(preset: PathLike) -> tuple[Preset, dict[str, Any]]:
    """Return a preset's name, and the changes to its rules that a YAML file makes.

    Parameters
    ----------
    preset : name or path
        ``cpu``, or a file such as ``configs/plan/gpu-4gb.yaml``: its key ``extends`` names a preset,
        every other key replaces one of :class:`Rules`.

    Raises
    ------
    ConfigError
        There is no such preset, or the file holds an unknown rule.
    """
    name = str(preset)
    if name in PRESETS:
        return name, {}
    if not name.endswith((".yaml", ".yml", ".json")):
        raise ConfigError(
            f"preset {name!r}: unknown. Use one of {', '.join(PRESETS)}, or the path of a YAML file."
        )
    changes = read_mapping(name)
    base = changes.pop("extends", None)
    if not isinstance(base, str) or base not in PRESETS:
        raise ConfigError(f"{name}: 'extends' must name one of {', '.join(PRESETS)}, found {base!r}.")
    change_rules(base, changes, name)
    return base, changes


def change_rules(preset: Preset, changes: Mapping[str, Any], where: str = "rules") -> Rules:
    """Return a preset's rules with some replaced.

    Raises
    ------
    ConfigError
        A rule is unknown or its value is wrong.
    """
    return Rules.from_dict({**PRESETS[preset].to_dict(), **changes}, where)


def preset_of_planner(planner: str, network: NetworkName) -> Preset:
    """Return the preset whose planner class nnU-Net recorded, else the plainest one of that network."""
    for name, rules in PRESETS.items():
        if rules.planner == planner:
            return name
    return "resenc" if network == "resenc-unet" else "nnunet"


def default_preset() -> Preset:
    """``nnunet`` where torch finds a CUDA device, else ``cpu``.

    Torch is imported only on a machine that has a GPU driver, because the import alone takes longer
    than planning.
    """
    return "nnunet" if _has_gpu_driver() and _torch_sees_cuda() else "cpu"


# NVIDIA's kernel driver, NVIDIA under WSL 2, AMD's kernel driver.
_DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/dxg", "/dev/kfd")


def _has_gpu_driver() -> bool:
    return sys.platform != "linux" or any(Path(path).exists() for path in _DRIVER_FILES)


def _torch_sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
