"""``medseg demo``: the whole way from images to a measured model, on phantoms, in minutes."""

import json as json_module
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.files import write_text

if TYPE_CHECKING:
    from medseg.io import Dataset
    from medseg.metrics import Evaluation
    from medseg.metrics.report import HtmlReport, Picture
    from medseg.plan import Plan

# What two cores segment well after this training, found by measurement (DECISIONS.md, "The demo").
CASES, TEST_CASES, VOXELS, SEED = 14, 4, 64, 2026
# Steps end the training, not the clock: a busy machine takes longer and gets the same model. One thread:
# where other work shares the cores, two wait for each other at every layer (DECISIONS.md, 18).
OVERRIDES = (
    *("epochs=15", "steps_per_epoch=50", "val_samples=12"),
    *("oversample_foreground=0.67", "threads=1"),
)
# The planner shrinks the patch until this time allows enough steps.
PLANNED_MINUTES = 3.5
# One compact organ: a box on one slice says what is meant.
PROMPTED = "spleen"
# Half a voxel.
NSD_MM = 3.0
# Soft tissue, as radiologists look at an abdomen.
WINDOW_HU = (-160.0, 240.0)


def demo(
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for everything that the demo makes.")
    ] = Path("demo"),
    minutes: Annotated[
        float | None, typer.Option(min=0.05, help="End the training after this time, with a worse result.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Make phantom patients, plan, train, predict unseen ones, evaluate, and write OUT/report.html.

    Steps that OUT already holds are not done again; remove the folder to start anew.
    """
    from medseg.files import check_writable

    check_writable(out, folder=True)
    if dry_run:
        typer.echo(
            f"{out}: would hold {CASES} phantom patients to train on, {TEST_CASES} to test, and a report."
        )
        return
    run = Run(out, minutes)
    dataset = run.dataset()
    plan = run.plan(dataset)
    bundle = run.train(dataset, plan)
    evaluation = run.evaluate(dataset, bundle)
    run.prompt(dataset)
    with run.step("report"):
        write_report(run, dataset, plan, evaluation)
    result = run.result(evaluation)
    _write_result(out, result)
    typer.echo(json_module.dumps(result) if json else _readable(result))


@dataclass
class Run:
    """The steps of the demo; each leaves its result in `out` and takes up what is there."""

    out: Path
    minutes: float | None
    seconds: dict[str, float] = field(default_factory=dict)
    prompted: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure a step and say that it is done."""
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        typer.echo(f"{name}: {self.seconds[name]:.1f} s", err=True)

    def dataset(self) -> "Dataset":
        """Make the phantoms, look for mistakes, open the dataset."""
        from medseg.errors import DatasetError
        from medseg.io import check_dataset, open_dataset
        from medseg.phantom import write_phantom_dataset

        folder = self.out / "Dataset900_Phantom"
        if not (folder / "dataset.json").exists():
            with self.step("phantoms"):
                write_phantom_dataset(folder, CASES, TEST_CASES, SEED, VOXELS)
        with self.step("check"):
            errors = [f for f in check_dataset(folder) if f.severity == "error"]
        if errors:
            raise DatasetError(f"{folder}: {errors[0].message} Remove the folder and run the demo again.")
        return open_dataset(folder)

    def plan(self, dataset: "Dataset") -> "Plan":
        """Plan for a machine without GPU, in such a size that the time allows enough steps."""
        from medseg.plan import load_plan, make_plan, save_plan

        path = self.out / "plan.yaml"
        if path.exists():
            return load_plan(path)
        with self.step("plan"):
            plan = make_plan(dataset, preset="cpu", minutes=PLANNED_MINUTES)
            save_plan(plan, path)
        return plan

    def train(self, dataset: "Dataset", plan: "Plan") -> Path:
        """Train fold 0, or go on where an interrupted run stopped."""
        from medseg.train import fit

        folder = self.out / "run"
        if (folder / "fold_0" / "report.html").exists():
            return folder / "bundle"
        begun = any((folder / "fold_0").glob("state*"))
        with self.step("train"):
            return fit(dataset, folder, plan, max_minutes=self.minutes, resume=begun, overrides=OVERRIDES)

    def evaluate(self, dataset: "Dataset", bundle: Path) -> "Evaluation":
        """Predict the unseen patients and measure the result."""
        from medseg.bundle import load_bundle
        from medseg.metrics import evaluate
        from medseg.pipeline import predict_folder

        predictions = self.out / "predictions"
        with self.step("predict"):
            predict_folder(dataset.root / "imagesTs", [load_bundle(bundle)], predictions)
        with self.step("evaluate"):
            evaluation = evaluate(predictions, dataset.root / "labelsTs", NSD_MM, dataset.labels)
            evaluation.to_json(self.out / "metrics.json")
        return evaluation

    def prompt(self, dataset: "Dataset") -> None:
        """Point at an organ of the first unseen patient with one box, if the weights can be had."""
        from medseg.errors import AssetError, OutputError, ResourceError
        from medseg.io import read
        from medseg.log import logger
        from medseg.prompt.example import point_at_known

        path = self.out / "prompted.json"
        if path.exists():
            self.prompted = json_module.loads(path.read_text(encoding="utf-8"))
            return
        case = dataset.test[0]
        image, truth = read(case.images[0]), read(dataset.root / "labelsTs" / f"{case.name}.nii.gz")
        organ = dataset.labels.foreground[PROMPTED]
        try:
            with self.step("prompt"):
                found = point_at_known(image, truth, organ, PROMPTED, self.out / "prompted.nii.gz", SEED)
        except (AssetError, OutputError, ResourceError) as error:
            logger.warning("The prompted organ is left out: %s", error)
            self.seconds.pop("prompt", None)
            return
        self.prompted = {"organ": found.name, "dice": round(found.dice, 4), "slices": found.slices}
        write_text(path, json_module.dumps(self.prompted))

    def result(self, evaluation: "Evaluation") -> dict[str, Any]:
        """Return the figures that ``--json`` prints."""
        from medseg.phantom import ORGANS

        dice = {name: round(evaluation.mean("dice", name), 4) for name in evaluation.labels}
        return {
            "organ_dice": round(sum(dice[name] for name in ORGANS) / len(ORGANS), 4),
            "dice": dice,
            "prompted": self.prompted or None,
            "cases": len(evaluation.cases),
            "seconds": round(sum(self.seconds.values()), 1),
            "steps": dict(self.seconds),
            "report": str(self.out / "report.html"),
        }


def write_report(run: Run, dataset: "Dataset", plan: "Plan", evaluation: "Evaluation") -> None:
    """Write the page: the unseen patients first, then figures, training, and how it was decided."""
    from medseg.metrics.page import add_evaluation
    from medseg.metrics.report import HtmlReport, class_colours

    result = run.result(evaluation)
    tiles = {f"Dice {name}": f"{value:.3f}" for name, value in result["dice"].items()}
    minutes = f"{result['seconds'] / 60:.1f}"
    page = HtmlReport(
        "medseg demo",
        f"{len(dataset.training)} phantom patients to learn from, {result['cases']} unseen ones to measure",
        {**tiles, "minutes": minutes},
    )
    page.add_pictures(
        "Unseen patients",
        _pictures(dataset, evaluation, run.out / "predictions"),
        note="Solid line: the truth. Tint and dashed line: what the model says. Window -160 to 240 HU.",
        legend=class_colours(evaluation.labels),
    )
    if run.prompted:
        _add_prompted(page, run)
    page.add_text("What this is", *_story(result))
    images = {case.name: case.images[0] for case in dataset.test}
    add_evaluation(page, evaluation, images)
    _add_training(page, run.out / "run" / "fold_0" / "log.jsonl")
    _add_plan(page, plan)
    page.add_facts("Seconds", result["steps"])
    page.write(run.out / "report.html")


def _add_prompted(page: "HtmlReport", run: Run) -> None:
    found = run.prompted
    page.add_figure(
        f"Pointed at: {found['organ']}",
        (run.out / "prompted.png").read_bytes(),
        f"One box (green, dashed) on one slice gave {found['slices']} slices, Dice {found['dice']:.3f} with "
        "the phantom's truth. No training: published weights that have never seen a phantom. Command: "
        "medseg prompt IMAGE --box X,Y,Z,X,Y,Z -o LABELS.nii.gz",
    )


def _story(result: Mapping[str, Any]) -> tuple[str, ...]:
    dice = result["dice"]
    return (
        "The patients are phantoms: abdomens drawn by medseg.phantom with known truth, no two alike. Their "
        "figures show that the pipeline works; they say nothing about real patients.",
        f"Mean Dice of liver, spleen and kidneys is {result['organ_dice']:.3f}. Lesions are counted apart: "
        f"{dice['lesion']:.3f}. They are few voxels of low contrast, and minutes of training are few.",
        "With your own data: medseg check, plan, train, predict, evaluate; the README shows the five lines.",
    )


def _pictures(dataset: "Dataset", evaluation: "Evaluation", predictions: Path) -> Iterator["Picture"]:
    """Draw each unseen patient from below and from the front, where most of the organs are."""
    from medseg.geometry.orient import axis_codes
    from medseg.io import read
    from medseg.log import progress
    from medseg.metrics.report import Picture, class_colours, slice_picture, worst_slice

    colours = dict(zip(range(1, 255), class_colours(evaluation.labels).values(), strict=False))
    files = {case.name: case.images[0] for case in dataset.test}
    for name in progress(evaluation.cases, "Drawing"):
        image = read(files[name])
        truth = read(dataset.root / "labelsTs" / f"{name}.nii.gz").array[0]
        guess = read(predictions / f"{name}.nii.gz").array[0]
        codes = axis_codes(image.geometry.affine)
        for view, letters in (("axial", "SI"), ("coronal", "AP")):
            axis = next(k for k, code in enumerate(codes) if code in letters)
            png = slice_picture(
                image.array[0].clip(*WINDOW_HU),
                truth,
                guess,
                image.spacing,
                codes,
                axis=axis,
                index=worst_slice(truth, truth, axis),
                colours=colours,
            )
            yield Picture(png, f"{name}, {view}", _dice_of(evaluation, name))


def _dice_of(evaluation: "Evaluation", case: str) -> str:
    rows = [row for row in evaluation.rows if row.case == case]
    return "Dice " + ", ".join(f"{row.label} {row.counts.dice:.2f}" for row in rows)


def _add_training(page: "HtmlReport", log: Path) -> None:
    from medseg.metrics.report import curves

    rows = [json_module.loads(line) for line in log.read_text().splitlines()]
    epochs = [row["epoch"] for row in rows]
    lines = {"training loss": (epochs, [row["loss"] for row in rows])}
    measured = [row for row in rows if "dice" in row]  # not an epoch that the clock cut short
    epochs = [row["epoch"] for row in measured]
    for name in measured[0]["dice"] if measured else ():
        values = [row["dice"].get(name) for row in measured]
        lines[f"Dice {name}"] = (epochs, [float("nan") if v is None else v for v in values])
    page.add_figure("Training", curves(lines, "epoch", ""), "Dice is of the validation cases' patches.")


def _add_plan(page: "HtmlReport", plan: "Plan") -> None:
    from medseg.plan import explain

    name = plan.default_configuration
    rows = [[e.name, e.value, e.rule, e.source] for e in explain(plan) if e.section in ("dataset", name)]
    note = "medseg plan DATASET --explain prints this with the numbers that went in."
    page.add_table("What was decided, and why", ["value", "chosen", "rule", "source"], rows, note=note)


def _write_result(out: Path, result: Mapping[str, Any]) -> None:
    write_text(out / "result.json", json_module.dumps(result, indent=1))


def _readable(result: Mapping[str, Any]) -> str:
    lines = [f"Dice of {result['cases']} unseen phantom patients:"]
    lines += [f"  {name:<8} {value:.3f}" for name, value in result["dice"].items()]
    if result["prompted"]:
        found = result["prompted"]
        lines.append(f"{found['organ'].capitalize()} from one box, without training: {found['dice']:.3f}")
    lines += [f"Organs (without lesion): {result['organ_dice']:.3f}", f"Time: {result['seconds']:.0f} s"]
    return "\n".join([*lines, f"Look at {result['report']}"])
