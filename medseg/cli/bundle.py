"""``medseg bundle``: models of other programs in, and out."""

from pathlib import Path
from typing import Annotated

import typer

bundle = typer.Typer(
    name="bundle",
    help="Models of other programs (nnU-Net, MONAI, ONNX, OpenVINO): in, and out.",
    no_args_is_help=True,
)


@bundle.command("import")
def import_model(
    source: Annotated[
        Path, typer.Argument(readable=False, help="nnU-Net results folder or exported zip, or a bundle.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Bundle to write: a folder, or a .medseg file.")],
) -> None:
    """Write a model of nnU-Net as a bundle."""


@bundle.command("export")
def export_model(
    model: Annotated[Path, typer.Argument(readable=False, help="Bundle, or any model that predict takes.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="What to write.")],
) -> None:
    """Write a model in another program's format."""
