"""Models of other programs: nnU-Net, MONAI, ONNX and OpenVINO, in and out.

>>> sorted(EXPORTERS)
['monai', 'nnunet', 'onnx', 'openvino']
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.bundle import MODELS, ZIP_SUFFIX, Bundle, load_bundle, no_such_model
from medseg.errors import BundleError, ConfigError
from medseg.files import recover_folder
from medseg.types import PathLike

if TYPE_CHECKING:
    from medseg.exchange.monai_in import MonaiModel

Exporter = Callable[[Bundle, Path, str | None], None]


def load_model(
    path: PathLike, previous: PathLike | None = None, checkpoint: str | None = None
) -> "Bundle | MonaiModel":
    """Open a trained model, whoever made it.

    Parameters
    ----------
    path : medseg bundle (folder, ``.medseg`` zip, or run folder), nnU-Net results folder or exported zip,
        or MONAI bundle (folder or zip)
    previous : model of the first stage of a cascade, where it is not with it
    checkpoint : of a model of nnU-Net, ``final``, ``best`` or ``latest``; by default the first of these

    Raises
    ------
    BundleError
        There is none, it is damaged, refused, or does not fit.
    ConfigError
        A checkpoint is asked for, and the model is not one of nnU-Net.
    """
    from medseg.exchange.nnunet import is_nnunet_model, load_nnunet

    path = Path(path)
    own = _is_bundle(path)
    if not own and is_nnunet_model(path):
        return load_nnunet(path, previous, checkpoint)
    if not path.exists():
        raise BundleError(no_such_model(path))
    if checkpoint is not None:
        raise ConfigError(
            f"{path}: is no model of nnU-Net, and only these have several checkpoints. Leave out "
            "--checkpoint."
        )
    if not own:
        if (model := _load_monai(path, previous)) is not None:
            return model
        raise BundleError(_unknown(path))
    bundle = load_bundle(path)
    return bundle if previous is None else with_previous(bundle, previous)


def _unknown(path: Path) -> str:
    text = (
        f"{path}: no bundle.yaml, so this is not a bundle; nor has it plans.json and fold_0 of nnU-Net, or "
        "configs/metadata.json of MONAI."
    )
    above = next((folder for folder in path.parents[:2] if (folder / "plans.json").is_file()), None)
    return f"{text} {f'Pass {MODELS}.' if above is None else f'Pass {above}, which has plans.json.'}"


def _is_bundle(path: Path) -> bool:
    recover_folder(path)
    if path.is_dir():
        recover_folder(path / "bundle")
        return (path / "bundle.yaml").exists() or (path / "bundle").is_dir()
    return path.suffix == ZIP_SUFFIX


def _load_monai(path: Path, previous: PathLike | None) -> "MonaiModel | None":
    from medseg.exchange.monai_in import is_monai_bundle, load_monai_bundle

    if not is_monai_bundle(path):
        return None
    if previous is not None:
        raise BundleError(f"{path}: a MONAI bundle has no first stage. Leave out --previous.")
    return load_monai_bundle(path)


def with_previous(bundle: Bundle, previous: "PathLike | Bundle") -> Bundle:
    """Return a cascade with the model of its first stage.

    Raises
    ------
    BundleError
        It is no cascade, or the other model has other labels or channels.
    """
    first = previous if isinstance(previous, Bundle) else load_model(previous)
    if not bundle.settings.previous_stage:
        raise BundleError(f"{bundle}: {bundle.configuration} is no cascade. Leave out --previous.")
    if not isinstance(first, Bundle) or first.labels != bundle.labels:
        raise BundleError(f"{previous}: has other labels than {bundle}, so it is not its first stage.")
    if len(first.plan.channels) != len(bundle.plan.channels):
        raise BundleError(f"{previous}: takes other channels than {bundle}, so it is not its first stage.")
    return replace(bundle, previous=first)


def _to_nnunet(bundle: Bundle, out: Path, fold: str | None) -> None:
    from medseg.exchange.nnunet import export_nnunet

    export_nnunet(bundle, out, fold)


def _to_monai(bundle: Bundle, out: Path, fold: str | None) -> None:
    from medseg.exchange.monai_out import export

    export(bundle, out, fold)


def _to_onnx(bundle: Bundle, out: Path, fold: str | None) -> None:
    from medseg.exchange.onnx import export

    export(bundle, out, fold)


def _to_openvino(bundle: Bundle, out: Path, fold: str | None) -> None:
    from medseg.exchange.openvino import export

    export(bundle, out, fold)


EXPORTERS: dict[str, Exporter] = {
    "nnunet": _to_nnunet,
    "monai": _to_monai,
    "onnx": _to_onnx,
    "openvino": _to_openvino,
}
