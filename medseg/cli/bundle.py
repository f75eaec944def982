"""``medseg bundle``: models of other programs in, and out."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medseg.bundle import Bundle

bundle = typer.Typer(
    name="bundle",
    help="Models of other programs (nnU-Net, MONAI, ONNX, OpenVINO): in, and out.",
    no_args_is_help=True,
)


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

    _check_replaceable(out)
    model = load_nnunet(source, previous, None if checkpoint is None else checkpoint.value)
    if postprocessing is not None:
        model = replace(model, postprocessing=_read_postprocessing(postprocessing))
    write_bundle(out, model)
    typer.echo(f"Bundle: {out} ({_summary(model, len(model.folds))})")


@bundle.command("export")
def export_model(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", readable=False, help="Bundle, or a model of nnU-Net.")
    ],
    to: Annotated[Target, typer.Option("--to", help="Format.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write, or a file for one network.")],
    fold: Annotated[
        str | None, typer.Option(help="Only this fold; by default all that the format takes.")
    ] = None,
    previous: Annotated[
        Path | None, typer.Option(help="Model of a cascade's first stage, where it is not beside MODEL.")
    ] = None,
) -> None:
    """Write a model in another program's format."""
    from medseg.bundle import Bundle
    from medseg.errors import BundleError
    from medseg.exchange import EXPORTERS, load_model
    from medseg.files import check_writable

    check_writable(out, folder=out.suffix != ".onnx")
    loaded = load_model(model, previous)
    if not isinstance(loaded, Bundle):
        raise BundleError(
            f"{model}: is a MONAI bundle already. Pass a bundle of medseg or a model of nnU-Net."
        )
    if fold is not None:
        loaded.state_dict(fold)
    EXPORTERS[to.value](loaded, out, fold)
    typer.echo(f"{to.value}: {out} ({_summary(loaded, 1 if fold else len(loaded.folds))})")


def _check_replaceable(out: Path) -> None:
    """Refuse to replace anything but an older import: a bundle may be all that is left of a training."""
    from medseg.bundle import ZIP_SUFFIX, load_bundle
    from medseg.errors import BundleError, OutputError
    from medseg.files import check_writable

    check_writable(out, folder=out.suffix != ZIP_SUFFIX)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        source = load_bundle(out).card.get("source")
    except BundleError as error:
        raise OutputError(f"{out}: holds something else already. Choose another output.") from error
    if source != "nnU-Net v2":
        raise OutputError(f"{out}: is a bundle that was not imported. Choose another output.")


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
