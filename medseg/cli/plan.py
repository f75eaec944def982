"""``medseg plan``."""

import json as json_module
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from medseg.plan import Explanation, Fingerprint, Plan, PlanOptions

# Explanations are set at this width, or the terminal's if it is narrower.
WIDTH = 80


def plan(
    dataset: Annotated[Path | None, typer.Argument(help="Dataset folder or CSV manifest.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the plan, e.g. configurations.3d_fullres.batch_size=4."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Plan file, .yaml or .json.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="nnunet, resenc, resenc-m, resenc-l, resenc-xl, cpu, or a YAML file that extends one. "
            "Without it: cpu if there is no CUDA device, else nnunet."
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show every value with its reason.")] = False,
    to: Annotated[
        str | None, typer.Option(help="nnunet: write nnU-Net's plans.json (default preset: nnunet).")
    ] = None,
    fingerprint: Annotated[
        Path | None, typer.Option(help="nnU-Net's dataset_fingerprint.json, instead of looking at images.")
    ] = None,
    dataset_json: Annotated[
        Path | None, typer.Option(help="nnU-Net's dataset.json; with --fingerprint no images are needed.")
    ] = None,
    dataset_name: Annotated[str | None, typer.Option(help="Name of the dataset in the plan.")] = None,
    gpu_memory_gb: Annotated[float | None, typer.Option(help="Memory of the GPU.")] = None,
    ram_gb: Annotated[float | None, typer.Option(help="Host memory that training may use.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time that training may take.")] = None,
    max_batch_size: Annotated[int | None, typer.Option(help="No batch is larger.")] = None,
    overwrite_spacing: Annotated[
        str | None, typer.Option(help="Target spacing in reader order k,j,i, e.g. 3,0.8,0.8.")
    ] = None,
    suppress_transpose: Annotated[
        bool, typer.Option("--suppress-transpose", help="Keep the order of the axes.")
    ] = False,
    save_fingerprint: Annotated[Path | None, typer.Option(help="Also write the fingerprint (JSON).")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Intensity statistics without nnU-Net's random draws.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Look at DATASET and decide everything about training on it."""
    from medseg.errors import ConfigError
    from medseg.files import check_writable

    if to not in (None, "nnunet"):
        raise ConfigError(f"--to {to}: expected nnunet.")
    if out is None and not (dry_run or explain or json):
        raise ConfigError("--out: say where to write the plan, or use --dry-run, --explain or --json.")
    for path in (out, save_fingerprint):
        if path is not None and not dry_run:
            check_writable(path)
    changes = list(overrides or ())
    if dataset is not None and fingerprint is not None and "=" in str(dataset):
        changes.insert(0, str(dataset))  # no dataset was named, so the first override took its place
        dataset = None
    options = _options(
        gpu_memory_gb=gpu_memory_gb,
        ram_gb=ram_gb,
        minutes=minutes,
        max_batch_size=max_batch_size,
        target_spacing=_numbers(overwrite_spacing),
        suppress_transpose=suppress_transpose,
    )
    chosen = preset or ("nnunet" if to == "nnunet" else None)
    seen, info = _look(dataset, fingerprint, dataset_json, dataset_name, exact=not fast)
    made = _change(_make(seen, info, chosen, options), changes)
    if not dry_run:
        _save(made, seen, out, save_fingerprint, to)
    _show(made, seen, info.n_training, explain, json, to)
    if out is not None and not dry_run:
        typer.echo(f"Plan: {out}", err=True)


def _options(**values: Any) -> "PlanOptions":
    from medseg.plan.schema import PlanOptions

    return PlanOptions.from_dict(values, "options")


def _numbers(text: str | None) -> list[float] | None:
    from medseg.errors import ConfigError

    if text is None:
        return None
    try:
        numbers = [float(part) for part in re.split(r"[,\sx]+", text.strip())]
    except ValueError as error:
        raise ConfigError(f"--overwrite-spacing {text}: expected three numbers, e.g. 3,0.8,0.8.") from error
    if len(numbers) != 3:
        raise ConfigError(f"--overwrite-spacing {text}: expected three numbers, found {len(numbers)}.")
    return numbers


def _look(
    dataset: Path | None, fingerprint: Path | None, dataset_json: Path | None, name: str | None, exact: bool
) -> tuple["Fingerprint", Any]:
    """Return the fingerprint and the description, from files where they are given."""
    from medseg.config import read_mapping
    from medseg.errors import ConfigError
    from medseg.plan.planner import DatasetInfo
    from medseg.plan.schema import Fingerprint

    if dataset is None:
        if fingerprint is None or dataset_json is None:
            raise ConfigError("plan: name a DATASET, or give both --fingerprint and --dataset-json.")
        seen = Fingerprint.load(fingerprint)
        description = read_mapping(dataset_json)
        return seen, DatasetInfo.from_json(description, name or _name(description, dataset_json), seen)

    from medseg.io import open_dataset

    opened = open_dataset(dataset)
    info = DatasetInfo.from_dataset(opened)
    if name is not None:
        info = info.replace(name=name)
    if fingerprint is not None:
        return Fingerprint.load(fingerprint), info

    from medseg.plan.fingerprint import extract_fingerprint

    return extract_fingerprint(opened, exact), info


def _name(description: dict[str, Any], path: Path) -> str:
    """The folder's name if it is nnU-Net's, else the description's own, else the folder's."""
    folder = path.resolve().parent.name
    if re.match(r"Dataset\d{3}_", folder):
        return folder
    return str(description.get("name") or folder or "Dataset")


def _make(seen: "Fingerprint", info: Any, preset: str | None, options: "PlanOptions") -> "Plan":
    from medseg.plan.planner import plan_dataset

    return plan_dataset(seen, info, preset, options)


def _change(made: "Plan", overrides: list[str]) -> "Plan":
    return made.with_overrides(overrides, "plan") if overrides else made


def _save(
    made: "Plan", seen: "Fingerprint", out: Path | None, save_fingerprint: Path | None, to: str | None
) -> None:
    from medseg.files import write_text
    from medseg.plan.files import save_nnunet_plan, save_plan

    if out is not None:
        (save_nnunet_plan if to == "nnunet" else save_plan)(made, out)
    if save_fingerprint is not None:
        write_text(save_fingerprint, json_module.dumps(seen.to_dict(), indent=2))


def _show(
    made: "Plan", seen: "Fingerprint", n_training: int, explain: bool, json: bool, to: str | None
) -> None:
    from medseg.plan.explain import explain as explain_plan
    from medseg.plan.nnunet import to_nnunet

    reasons = explain_plan(made, seen, n_training) if explain else []
    if json:
        result: Any = to_nnunet(made) if to == "nnunet" else made.to_dict()
        if explain:
            result = {"plan": result, "explanations": [vars(reason) for reason in reasons]}
        typer.echo(json_module.dumps(result))
    elif explain:
        print_explanations(made, n_training, reasons)
    else:
        print_summary(made)


def print_summary(made: "Plan") -> None:
    """Print one line a configuration."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("configuration", "spacing", "patch", "batch", "features", box=None, header_style="dim")
    for name, configuration in made.configurations.items():
        table.add_row(
            f"[bold]{escape(name)}[/]",
            " ".join(f"{s:.3g}" for s in configuration.spacing),
            "x".join(map(str, configuration.patch_size)),
            str(configuration.batch_size),
            " ".join(map(str, configuration.architecture.features_per_stage)),
        )
    console = Console(highlight=False)
    name = escape(made.dataset_name)
    console.print(f"[bold]{name}[/], preset [bold]{made.preset}[/], {escape(made.plans_name)}")
    console.print(table)


def print_explanations(made: "Plan", n_training: int, reasons: "list[Explanation]") -> None:
    """Print every value with its rule, the numbers that went in, and the source."""
    from rich.console import Console
    from rich.markup import escape
    from rich.rule import Rule

    from medseg.plan.explain import REFERENCES

    console = Console(highlight=False)
    console = Console(highlight=False, width=min(console.width, WIDTH))
    labels = escape(", ".join(made.labels.foreground))
    console.print(f"[bold]{escape(made.dataset_name)}[/]  {n_training} training cases")
    console.print(f"[dim]labels: {labels}[/]", overflow="ellipsis", no_wrap=True)
    for section in dict.fromkeys(reason.section for reason in reasons):
        console.print()
        console.print(Rule(f"[bold cyan]{section}[/]", align="left", style="cyan"))
        console.print(_section([reason for reason in reasons if reason.section == section]))
    console.print(Rule(style="dim"))
    for short, full in REFERENCES.items():
        console.print(f"[dim italic]{short}:[/] [dim]{full}[/]")


def _section(reasons: "list[Explanation]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", width=14)
    table.add_column()
    for reason in reasons:
        text = Text()
        text.append(reason.value, "bold green")
        text.append(f"\n{reason.rule}")
        if reason.numbers:
            text.append(f"\n{reason.numbers}", "yellow")
        text.append(f"\n{reason.source}\n", "dim italic")
        table.add_row(reason.name, text)
    return table
