"""The README's table of measurements, made from ``results/*.json`` and from nothing else.

::

    python tests/benchmarks/table.py            # print it
    python tests/benchmarks/table.py --write    # put it between the two markers in README.md

Only the standard library is used: the test that compares README and results needs no benchmark to run.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
README = ROOT / "README.md"
BEGIN = "<!-- measured: written by tests/benchmarks/table.py from tests/benchmarks/results, do not edit -->"
END = "<!-- end of measured -->"
# What a reader asks first comes first; a script that is not listed comes last.
ORDER = (
    "goldens",
    "large_ct_vs_nnunet",
    "tiles_vs_nnunet",
    "predict_vs_nnunet",
    "preprocess_vs_nnunet",
    "train_vs_nnunet",
)
VERDICTS = {True: "yes", False: "**no**", None: ""}


def main() -> None:
    """Print the table or write it into the README."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="into README.md, between its markers")
    options = parser.parse_args()
    text = block(load_results(options.results))
    if not options.write:
        print(text)
    elif BEGIN not in README.read_text(encoding="utf-8"):
        raise SystemExit(f"README.md: no marker. Add these two lines:\n{BEGIN}\n{END}")
    else:
        README.write_text(replaced(README.read_text(encoding="utf-8"), text), encoding="utf-8")


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every result by the name of its script, in the order of the table."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    known = [name for name in ORDER if name in found]
    return {name: found[name] for name in (*known, *sorted(set(found) - set(known)))}


def block(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the markers and all between them; nothing is between them before anything was measured."""
    if not results:
        return f"{BEGIN}\n{END}"
    lines = ["| what | nnU-Net 2.8.1 | medseg | bar | met | script |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        script = f"[{name}](tests/benchmarks/{name}.py)"
        lines += [line(row, script) for row in result["rows"]]
    return "\n".join((BEGIN, *lines, "", *notes(results), END))


def line(row: Mapping[str, Any], script: str) -> str:
    """Return one line of the table."""
    cells = (row["what"], row["peer"], row["ours"], row["bar"], VERDICTS[row["met"]], script)
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def notes(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say how, on what and when this was measured, and with which command."""
    machines = sorted({describe(result["machine"]) for result in results.values()})
    days = sorted(date.fromisoformat(result["date"]) for result in results.values())
    when = " to ".join(str(day) for day in dict.fromkeys((days[0], days[-1])))
    commands = [f"- `{result['command']}`" for result in results.values()]
    return [
        "CPU seconds / peak memory of whole processes with their children (or what the row names); medians "
        f"of runs in turns. {'; '.join(machines)}; {when}.",
        "`make bench` measures all of it again; every single run is in "
        "[tests/benchmarks/results](tests/benchmarks/results). The commands:",
        "",
        *commands,
    ]


def describe(machine: Mapping[str, Any]) -> str:
    """Return the hardware in words."""
    extra = f", {machine['gpu']}" if machine.get("gpu") else ", no GPU"
    return f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']:.0f} GB{extra}"


def replaced(readme: str, text: str) -> str:
    """Return the README with a new block."""
    before, rest = readme.split(BEGIN, 1)
    return before + text + rest.split(END, 1)[1]


def unmet(results: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """Return the rows that miss their bar."""
    return [row["what"] for result in results.values() for row in result["rows"] if row["met"] is False]


if __name__ == "__main__":
    main()
