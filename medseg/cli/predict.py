"""``medseg predict``."""

import gc
import json as json_module
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.signals import mortal

if TYPE_CHECKING:
    from medseg.pipeline import CaseResult


# Panels of the help, and what stands in the place of a flag's value.
MODEL, RUN, FLAG = "Model", "Where and how it computes", " "


def predict(
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", readable=False, help="Image, or folder of CASE_0000.nii.gz files."),
    ],
    model: Annotated[
        list[Path],
        typer.Option(
            "-m",
            "--model",
            metavar="PATH",
            help="Of medseg: run folder, bundle folder or .medseg. Of nnU-Net v2: results folder or exported "
            "zip. Of MONAI: bundle folder or zip. Several are averaged.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="PATH", help="Folder for label maps, or a file for one image."),
    ],
    save_probabilities: Annotated[
        bool,
        typer.Option("--save-probabilities", metavar=FLAG, help="Write CASE.npz with probabilities as well."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", metavar=FLAG, help="Leave out cases that these models have done already."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar=FLAG, help="List what would be predicted, and stop.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", metavar=FLAG, help="Print the result as JSON on stdout.")
    ] = False,
    no_mirror: Annotated[
        bool,
        typer.Option(
            "--no-mirror",
            metavar=FLAG,
            rich_help_panel=MODEL,
            help="Do not average over flips: faster, slightly worse.",
        ),
    ] = False,
    step: Annotated[
        float,
        typer.Option(metavar="PART", rich_help_panel=MODEL, help="Distance of tiles as a part of the patch."),
    ] = 0.5,
    skip_air: Annotated[
        bool,
        typer.Option(
            "--skip-air",
            metavar=FLAG,
            rich_help_panel=MODEL,
            help="Take tiles of nothing but air for background: faster; wrong where a model marks air.",
        ),
    ] = False,
    fold: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", rich_help_panel=MODEL, help="Only this fold; may be repeated."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=MODEL, help="final or best, of a model of nnU-Net."),
    ] = None,
    previous: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            rich_help_panel=MODEL,
            help="Model of a cascade's first stage, if it is not beside the second.",
        ),
    ] = None,
    previous_labels: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            rich_help_panel=MODEL,
            help="Folder of the first stage's label maps, instead of predicting them.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=RUN, help="auto, cpu, cuda, cuda:N or mps.")
    ] = "auto",
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", rich_help_panel=RUN, help="torch, openvino, or auto (default): the faster one."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=RUN,
            help="auto, fp32, bf16 or fp16; by default what the model says.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=RUN, help="CPU threads; all cores by default."),
    ] = None,
) -> None:
    """Segment an image or a folder of images; label maps are on the grid of their image.

    While a case is predicted, the next is read and the last is written.
    A case that fails is named, and the others finish. Ctrl-C ends within two
    seconds; --resume goes on.
    """
    with _quick_imports():
        from medseg import pipeline
    if dry_run:
        _print(pipeline.list_work(source, list(model), out, previous, checkpoint), out, json)
        return
    with _quick_imports():
        from medseg.infer import Options

    given: dict[str, Any] = {"runtime": runtime, "threads": threads, "precision": precision}
    options = Options(
        mirror=False if no_mirror else None,
        device=device,
        step=step,
        folds=tuple(fold) if fold else None,
        skip_air=skip_air,
        **{name: value for name, value in given.items() if value is not None},
    )
    began = time.monotonic()
    results = pipeline.predict_folder(
        source,
        list(model),
        out,
        save_probabilities,
        resume,
        options,
        previous=previous,
        previous_labels=previous_labels,
        checkpoint=checkpoint,
    )
    _print(results, out, json)
    typer.echo(_summary(results, time.monotonic() - began), err=True)
    _raise_if_failed(results, out)


@contextmanager
def _quick_imports() -> Iterator[None]:
    """Keep the collector of cycles out of imports: it finds nothing and takes a tenth of their time."""
    gc.disable()
    try:
        with mortal():
            yield
    finally:
        gc.freeze()
        gc.enable()


def _print(results: "list[CaseResult]", out: Path, json: bool) -> None:
    if json:
        rows = [row.to_dict() for row in results]
        typer.echo(json_module.dumps({"output": str(out), "counts": _count(results), "cases": rows}))
        return
    for row in results:
        if row.status != "failed":  # failures have been said on stderr
            typer.echo(f"{row.status:<8}{row.output}")


def _count(results: "list[CaseResult]") -> dict[str, int]:
    return {name: sum(row.status == name for row in results) for name in ("done", "skipped", "failed")}


def _summary(results: "list[CaseResult]", seconds: float) -> str:
    """Return one line: how many are done, were done, failed, and how long it took.

    >>> _summary([], 0.0)
    '0 done'
    """
    counts = _count(results)
    words = {"done": "done", "skipped": "done before", "failed": "failed"}
    text = ", ".join(f"{n} {words[name]}" for name, n in counts.items() if n or name == "done")
    if counts["done"]:
        text += f" in {_duration(seconds)}, {_duration(seconds / counts['done'])} a case"
    return text


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d} min"


def _raise_if_failed(results: "list[CaseResult]", out: Path) -> None:
    from medseg.errors import PartialFailure

    failed = [row.case for row in results if row.status == "failed"]
    if failed:
        sys.stdout.flush()
        remedy = "Mend them and run the same command with --resume."
        if len(failed) == len(results) > 1:  # hardly each by itself
            remedy = "What is wrong with each is said above. Check that the model is for these images."
        raise PartialFailure(
            f"{out}: {len(failed)} of {len(results)} cases failed ({', '.join(failed[:5])}). {remedy}"
        )
