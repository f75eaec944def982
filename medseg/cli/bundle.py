"""``medseg bundle``: a model of nnU-Net in, and models out in the formats of other programs."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medseg.bundle import Bundle

bundle = typer.Typer(
    name="bundle",
    help="Import a model of nnU-Net; export one of medseg or nnU-Net (to nnU-Net, MONAI, ONNX, OpenVINO).",
    no_args_is_help=True,
)


# Endings of files: none is what somebody would call a folder.
_FILES = (".bin", ".json", ".onnx", ".pt", ".pth", ".safetensors", ".tar", ".ts", ".xml", ".zip")


class Checkpoint(StrEnum):
    """Which of nnU-Net's checkpoints."""

    FINAL = "final"
    BEST = "best"
    LATEST = "latest"


class Target(StrEnum):
    """The names of `medseg.exchange.EXPORTERS`, which a help text should not have to import."""

    NNUNET = "nnunet"
    MONAI = "monai"
    ONNX = "onnx"
    OPENVINO = "openvino"


@bundle.command("import")
def import_model(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            readable=False,
            help="nnU-Net results folder or exported zip. A path may go on inside a zip.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Bundle to write: a folder, or a .medseg file.")],
    previous: Annotated[
        Path | None, typer.Option(help="Model of a cascade's first stage, where it is not beside MODEL.")
    ] = None,
    checkpoint: Annotated[
        Checkpoint | None, typer.Option(help="By default the first of these that is there.")
    ] = None,
    postprocessing: Annotated[
        Path | None, typer.Option(help="nnU-Net's postprocessing.json, to be applied at every prediction.")
    ] = None,
) -> None:
    """Write a trained model of nnU-Net as a bundle: safetensors weights, hashes, no pickle."""
    from dataclasses import replace

    from medseg.bundle import write_bundle
    from medseg.exchange.nnunet import load_nnunet

    replaced = _check_replaceable(out)
    _check_importable(source)
    model = load_nnunet(source, previous, None if checkpoint is None else checkpoint.value)
    if postprocessing is not None:
        model = replace(model, postprocessing=_read_postprocessing(postprocessing))
    write_bundle(out, model)
    typer.echo(f"Bundle: {out} ({replaced}{_summary(model, len(model.folds))})")


@bundle.command("export")
def export_model(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", readable=False, help="Bundle, or a model of nnU-Net.")
    ],
    to: Annotated[Target, typer.Option("--to", help="Format.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="A file ending in .onnx for onnx; a folder for the others.")
    ],
    fold: Annotated[
        str | None, typer.Option(help="Only this fold; by default all that the format takes.")
    ] = None,
    previous: Annotated[
        Path | None, typer.Option(help="Model of a cascade's first stage, where it is not beside MODEL.")
    ] = None,
) -> None:
    """Write a model of medseg or nnU-Net in another program's format."""
    from medseg.bundle import Bundle
    from medseg.errors import BundleError
    from medseg.exchange import EXPORTERS, load_model

    _check_kind(out, to)
    replaced = _replaced(out)
    loaded = load_model(model, previous)
    if not isinstance(loaded, Bundle):
        raise BundleError(
            f"{model}: is a MONAI bundle, which is not converted. medseg predicts with it as it is (medseg "
            "predict IMAGES -m THIS -o OUT); export takes a bundle of medseg or a model of nnU-Net."
        )
    if loaded.settings.detection is not None:
        raise BundleError(f"{model}: finds objects, and detectors are not exported. Use the bundle itself.")
    if fold is not None:
        loaded.state_dict(fold)
    EXPORTERS[to.value](loaded, out, fold)
    typer.echo(f"{to.value}: {out} ({replaced}{_summary(loaded, 1 if fold else len(loaded.folds))})")


def _check_kind(out: Path, to: Target) -> None:
    """Refuse a folder for the format that is a file, and the name of a file for one that is a folder."""
    from medseg.errors import OutputError
    from medseg.files import check_writable

    single = to is Target.ONNX
    if single and out.suffix.lower() != ".onnx":
        raise OutputError(f"{out}: onnx is one file. Give it a name that ends in .onnx.")
    if not single and out.suffix.lower() in (*_FILES, ".medseg"):
        raise OutputError(
            f"{out}: {to.value} is a folder of several files. Give it a name without {out.suffix}."
        )
    check_writable(out, folder=not single)


def _replaced(out: Path) -> str:
    """Return a word for the last line if something is at `out` already."""
    return "replaced; " if out.is_file() or (out.is_dir() and any(out.iterdir())) else ""


def _check_importable(source: Path) -> None:
    """Refuse models that need no import."""
    from medseg.errors import BundleError
    from medseg.exchange.monai_in import is_monai_bundle
    from medseg.exchange.nnunet import is_nnunet_model

    if is_nnunet_model(source):
        return
    if is_monai_bundle(source):
        raise BundleError(
            f"{source}: is a MONAI bundle, which is not imported. medseg predicts with it as it is (medseg "
            "predict IMAGES -m THIS -o OUT); import takes a model of nnU-Net."
        )
    if source.suffix == ".medseg" or (source / "bundle.yaml").is_file():
        raise BundleError(f"{source}: is a bundle of medseg already. Import takes a model of nnU-Net.")


def _check_replaceable(out: Path) -> str:
    """Refuse to replace anything but an older import: a bundle may be all that is left of a training.

    Returns :func:`_replaced`.
    """
    from medseg.bundle import ZIP_SUFFIX, load_bundle
    from medseg.errors import BundleError, OutputError
    from medseg.files import check_writable

    if out.suffix.lower() in _FILES:
        raise OutputError(f"{out}: a bundle is a folder, or one file that ends in .medseg. Name it so.")
    check_writable(out, folder=out.suffix != ZIP_SUFFIX)
    if not (replaced := _replaced(out)):
        return replaced
    try:
        source = load_bundle(out).card.get("source")
    except BundleError as error:
        raise OutputError(f"{out}: holds something else already. Choose another output.") from error
    if source != "nnU-Net v2":
        raise OutputError(f"{out}: is a bundle that was not imported. Choose another output.")
    return replaced


def _read_postprocessing(path: Path) -> dict[str, object]:
    from medseg.config import read_mapping
    from medseg.errors import ConfigError
    from medseg.postprocess import Postprocessing

    try:
        return Postprocessing.from_nnunet(read_mapping(path)).to_dict()
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is no postprocessing.json of nnU-Net ({error}).") from error


def _summary(model: "Bundle", folds: int) -> str:
    first = "" if model.previous is None else f" with {model.previous.configuration} as its first stage"
    return (
        f"{model.configuration}{first}, {folds} fold{'s' if folds != 1 else ''}, "
        f"{len(model.labels.foreground)} labels, from {model}"
    )
