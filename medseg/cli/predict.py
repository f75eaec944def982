"""``medseg predict``."""

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medseg.pipeline import CaseResult


def predict(
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", readable=False, help="Image, or folder of CASE_0000.nii.gz files."),
    ],
    model: Annotated[
        list[Path],
        typer.Option("-m", "--model", help="Bundle (folder, .medseg or run folder). Several are averaged."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for label maps, or a file for one image.")],
    no_mirror: Annotated[
        bool, typer.Option("--no-mirror", help="Do not average over flips: faster, slightly worse.")
    ] = False,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Write CASE.npz with class probabilities as well.")
    ] = False,
    fold: Annotated[list[str] | None, typer.Option(help="Only this fold; may be repeated.")] = None,
    step: Annotated[float, typer.Option(help="Distance of tiles as a part of the patch.")] = 0.5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or fp16; by default what the bundle says.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out cases that these models have done already.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be predicted, and stop.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Segment an image or a folder of images; label maps are on the grid of their image."""
    from medseg import pipeline

    if dry_run:
        _print(pipeline.list_work(source, list(model), out), out, json)
        return
    from medseg.infer import Options

    options = Options(
        mirror=False if no_mirror else None,
        precision=precision,
        device=device,
        step=step,
        threads=threads,
        folds=tuple(fold) if fold else None,
    )
    results = pipeline.predict_folder(source, list(model), out, save_probabilities, resume, options)
    _print(results, out, json)
    _raise_if_failed(results, out)


def _print(results: "list[CaseResult]", out: Path, json: bool) -> None:
    if json:
        typer.echo(json_module.dumps({"output": str(out), "cases": [row.to_dict() for row in results]}))
        return
    for row in results:
        if row.status != "failed":  # failures have been said on stderr
            typer.echo(f"{row.status:<8}{row.output}")


def _raise_if_failed(results: "list[CaseResult]", out: Path) -> None:
    from medseg.errors import PartialFailure

    failed = [row.case for row in results if row.status == "failed"]
    if failed:
        sys.stdout.flush()
        raise PartialFailure(
            f"{out}: {len(failed)} of {len(results)} cases failed ({', '.join(failed[:5])}). "
            "Mend them and run the same command with --resume."
        )
