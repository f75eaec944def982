"""The command line: one file a verb; this one lists them and turns errors into exit codes."""

import gc
import logging
import os
import sys
import threading
from typing import Annotated, NoReturn

import typer

import medseg
from medseg.cli.assets import assets
from medseg.cli.bundle import bundle
from medseg.cli.check import check
from medseg.cli.clean import clean
from medseg.cli.count import count
from medseg.cli.demo import demo
from medseg.cli.evaluate import evaluate
from medseg.cli.evaluate_prompts import evaluate_prompts
from medseg.cli.info import info
from medseg.cli.panoptic import panoptic
from medseg.cli.plan import plan
from medseg.cli.predict import predict
from medseg.cli.progress import MessageHandler, TerminalListener
from medseg.cli.prompt import PromptCommand, prompt
from medseg.cli.select import select
from medseg.cli.signals import PATIENT, Signals, leave
from medseg.cli.split import split
from medseg.cli.track import track
from medseg.cli.train import stop, train
from medseg.errors import Cancelled, MedsegError, ResourceError
from medseg.files import DISK_FULL, is_disk_full
from medseg.log import listening, logger

app = typer.Typer(
    help="From a folder of images to a trained, evaluated 3D segmentation model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(medseg.__version__)
        raise typer.Exit
    if isinstance(context.obj, Signals):
        context.obj.patient = context.invoked_subcommand in PATIENT


for verb in (check, plan, train, stop, predict, evaluate):
    app.command()(verb)
app.command(cls=PromptCommand)(prompt)
for further in (count, split, panoptic, track, evaluate_prompts, select, demo, info, clean):
    app.command()(further)
app.add_typer(bundle)
app.add_typer(assets)


def main() -> NoReturn:
    """Run ``medseg``: one sentence on stderr and the exit code of `medseg.errors` when something fails."""
    # Waiting threads sleep instead of spinning: beside other work, a step of training took 0.6 CPU-seconds
    # instead of 1.1 to 1.7 (DECISIONS.md, 19). The OpenMP runtime reads this once, when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    listener = TerminalListener()
    signals = Signals(listener)
    signals.watch()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[MessageHandler(listener)])
    logger.setLevel(logging.INFO)
    with listening(listener):
        code = _run(signals)
    listener.close()
    # Python ends around a thread that is still busy: inside torch, that aborts the process.
    if signals.received or any(thread.name.startswith("medseg ") for thread in threading.enumerate()):
        leave(code)
    gc.freeze()  # what ends with the process need not be searched for cycles: half a second with torch
    sys.exit(code)


def _run(signals: Signals) -> int:
    """Run the command that was asked for; return its exit code."""
    try:
        app(obj=signals)
    except SystemExit as error:  # how a command ends that went well, and one with a wrong option
        return error.code if isinstance(error.code, int) else 0
    except Cancelled as error:
        _report(error)
        return signals.exit_code
    except MedsegError as error:
        return _report(error)
    except KeyboardInterrupt:
        logger.error("Stopped. Run the command again, with --resume where it has one.")
        return signals.exit_code
    except (MemoryError, OSError) as error:
        return _report(_said(error))
    return 0


def _said(error: MemoryError | OSError) -> MedsegError:
    """Return what the system refused as one of medseg's own errors."""
    if isinstance(error, MemoryError):
        return ResourceError("memory ran out. Close other programs, or split the work.")
    if is_disk_full(error):
        return ResourceError(DISK_FULL)
    where = f"{error.filename}: " if error.filename else ""
    return MedsegError(f"{where}{error.strerror or error}. Check the path and its permissions.")


def _report(error: MedsegError) -> int:
    logger.error("Error: %s", error)
    return error.exit_code
