"""What the README says was measured is what the committed results say."""

import ast
import json
import re
from pathlib import Path

import pytest

from tests.benchmarks import table

RESULTS = sorted(table.RESULTS.glob("*.json"))
SCRIPTS = sorted([*Path(__file__).parent.glob("*_vs_*.py"), Path(__file__).with_name("goldens.py")])


def a_result(what="predict", met=True, day="2026-01-31", **machine):
    row = {"what": what, "peer": "9 s", "ours": "1 s", "bar": "≤ 3 s", "met": met}
    machine = {"cpu": "Chip", "cores": 2, "memory_gb": 23.5, **machine}
    return {"rows": [row], "machine": machine, "date": day, "command": "python x.py"}


def test_the_readme_holds_the_table_that_the_results_make() -> None:
    readme = table.README.read_text(encoding="utf-8")
    assert table.block(table.load_results(table.RESULTS)) in readme, "run tests/benchmarks/table.py --write"


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_a_result_is_of_a_script_that_exists_and_was_run_in_full(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".py").name in {script.name for script in SCRIPTS}
    assert result["rows"] and not result["quick"]
    assert result["command"].startswith(f"python tests/benchmarks/{path.stem}.py")
    assert set(result["versions"]) >= {"medseg"}


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_a_result_names_no_path(path: Path) -> None:
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', path.read_text(encoding="utf-8"))
    assert not [text for text in strings if re.search(r"(^|[\s=:'(])(~|[A-Za-z]:\\\\|/\w)", text)]


def test_splitting_was_measured_in_full_beside_scikit_image_and_met_its_bars() -> None:
    text = (Path(__file__).parent / "instances" / "split_vs_skimage.json").read_text(encoding="utf-8")
    result = json.loads(text)
    assert not result["quick"] and result["phantom"]["objects"] == 4913
    assert result["command"] == "python tests/benchmarks/instances/split_vs_skimage.py"
    assert result["ratio"]["cpu"] >= 8 and result["ratio"]["memory"] >= 3
    assert all(row["met"] for row in result["rows"]) and set(result["versions"]["medseg"]) >= {"scikit-image"}
    assert "/tmp" not in text and "/work" not in text


def test_a_missed_bar_is_shown_as_missed() -> None:
    results = {"a": a_result("first", met=True), "b": a_result("second", met=False)}
    lines = [line for line in table.block(results).splitlines() if line.startswith("| ")]
    assert [line.split("|")[5].strip() for line in lines] == ["met", "yes", "**no**"]
    assert table.unmet(results) == ["second"]


def test_every_row_has_six_cells_whatever_is_in_it() -> None:
    text = table.line({"what": "a|b", "peer": "-", "ours": "1", "bar": "", "met": None}, "s")
    assert text.count("|") == 7


def test_known_scripts_come_in_order_and_others_last(tmp_path: Path) -> None:
    for name in ("zebra", "train_vs_nnunet", "goldens"):
        (tmp_path / f"{name}.json").write_text(json.dumps(a_result()))
    assert list(table.load_results(tmp_path)) == ["goldens", "train_vs_nnunet", "zebra"]


def test_only_what_is_between_the_markers_changes() -> None:
    readme = f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n"
    new = table.replaced(readme, table.block({"a": a_result()}))
    assert new.startswith("above\n") and new.endswith("\nbelow\n") and "old" not in new
    assert table.replaced(new, table.block({"a": a_result()})) == new


def test_machine_and_days_are_named_once() -> None:
    results = {"a": a_result(day="2026-01-31"), "b": a_result(day="2026-02-01")}
    text = "\n".join(table.notes(results))
    assert text.count("2 cores of Chip, 24 GB, no GPU") == 1
    assert "2026-01-31 to 2026-02-01" in text


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_every_benchmark_takes_the_options_of_make_bench(script: Path) -> None:
    source = script.read_text(encoding="utf-8")
    ast.parse(source)
    assert "save_result(" in source, (
        "write the result with measure.save_result, so that the README can show it"
    )
