"""The command line: one file a verb; this one lists them and turns errors into exit codes."""

import logging
import os
import sys
from typing import Annotated

import typer

import medseg
from medseg.cli.bundle import bundle
from medseg.cli.check import check
from medseg.cli.clean import clean
from medseg.cli.demo import demo
from medseg.cli.evaluate import evaluate
from medseg.cli.info import info
from medseg.cli.plan import plan
from medseg.cli.predict import predict
from medseg.cli.progress import TerminalListener
from medseg.cli.select import select
from medseg.cli.train import stop, train
from medseg.errors import MedsegError, ResourceError
from medseg.files import DISK_FULL, is_disk_full
from medseg.log import listening

app = typer.Typer(
    help="From a folder of images to a trained, evaluated 3D segmentation model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(medseg.__version__)
        raise typer.Exit


for verb in (check, plan, train, stop, predict, evaluate, select, demo, info, clean):
    app.command()(verb)
app.add_typer(bundle)


def main() -> None:
    """Run ``medseg``: one sentence on stderr and the exit code of `medseg.errors` when something fails."""
    # Waiting threads sleep instead of spinning: beside other work, a step of training took 0.6 CPU-seconds
    # instead of 1.1 to 1.7 (DECISIONS.md, 19). The OpenMP runtime reads this once, when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    listener = TerminalListener()
    listener.watch_interrupt()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("medseg").setLevel(logging.INFO)
    try:
        with listening(listener):
            app()
    except MedsegError as error:
        sys.exit(_report(error))
    except KeyboardInterrupt:
        sys.stderr.write("Stopped. Run the same command again to continue.\n")
        sys.exit(130)
    except (MemoryError, OSError) as error:
        sys.exit(_report(_said(error)))


def _said(error: MemoryError | OSError) -> MedsegError:
    """Return what the system refused as one of medseg's own errors."""
    if isinstance(error, MemoryError):
        return ResourceError("memory ran out. Close other programs, or split the work.")
    if is_disk_full(error):
        return ResourceError(DISK_FULL)
    where = f"{error.filename}: " if error.filename else ""
    return MedsegError(f"{where}{error.strerror or error}. Check the path and its permissions.")


def _report(error: MedsegError) -> int:
    sys.stderr.write(f"Error: {error}\n")
    return error.exit_code
