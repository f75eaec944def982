"""Rules of the house that a reviewer would otherwise have to remember (DESIGN.md, CONTRIBUTING.md)."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import medseg
from medseg.labels import LabelSet

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "medseg").rglob("*.py"))
HEAVY = ("torch", "monai", "scipy", "matplotlib", "SimpleITK")
# Lines of a function without its docstring. Half of the longest in code that reads badly.
LONGEST_FUNCTION = 60


def tracked(*suffixes: str) -> list[Path]:
    """Return the files that git tracks, or those of a source archive without git."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(p) for p in ROOT.rglob("*")]
    paths = [ROOT / name for name in names if name]
    return [p for p in paths if p.is_file() and (not suffixes or p.suffix in suffixes)]


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def loaded_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after `code`."""
    script = f"{code}\nimport sys; print('\\n'.join({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import medseg",
        "import medseg.cli",
        "import medseg.volume, medseg.labels, medseg.segmentation, medseg.log, medseg.files",
        "import medseg.plan",
    ],
)
def test_light_imports_stay_light(code: str) -> None:
    heavy = HEAVY[:2] if "plan" in code else HEAVY
    assert not loaded_after(code) & set(heavy)


def test_metrics_do_not_import_torch() -> None:
    assert not loaded_after("import medseg.metrics") & {"torch", "monai"}


def test_help_of_every_verb_loads_nothing_heavy_and_is_quick() -> None:
    code = """
import sys
from typer.testing import CliRunner
from medseg.cli import app
for words in (["--help"], *([*verb.split(), "--help"] for verb in {verbs})):
    assert CliRunner().invoke(app, words).exit_code == 0, words
"""
    assert not loaded_after(code.replace("{verbs}", repr(verbs()))) & set(HEAVY)
    before = os.times()
    subprocess.run([sys.executable, "-m", "medseg", "--help"], capture_output=True, check=True)
    after = os.times()
    # CPU time of the child, which a busy machine changes little; the promise is half a second of wall time.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.8


def verbs() -> list[str]:
    from medseg.cli import app

    groups = [(f"{group.typer_instance.info.name} ", group.typer_instance) for group in app.registered_groups]
    return [
        prefix + (command.name or command.callback.__name__.replace("_", "-"))
        for prefix, typer in (("", app), *groups)
        for command in typer.registered_commands
        if command.callback
    ]


@pytest.mark.parametrize("name", [name for name in medseg.__all__ if name != "__version__"])
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(medseg, name) is not None


def load_plan_config(path: Path) -> None:
    from medseg.plan.presets import change_rules, read_preset

    change_rules(*read_preset(path))


def load_train_config(path: Path) -> None:
    from medseg.train import load_recipe
    from medseg.train.promptable_config import load_promptable

    (load_promptable if path.stem == "promptable" else load_recipe)(str(path))


def load_prompt_config(path: Path) -> None:
    if path.name == "refiner.yaml":
        from medseg.train.refiner import Recipe

        Recipe.load(path)
    elif path.name == "batch.yaml":
        from medseg.prompt.batch import load_prompts

        load_prompts(path)
    else:
        from medseg.prompt.cases import load_cases

        load_cases(path)


# By folder: a new folder of configs/ gets its line here.
CONFIG_LOADERS = {"plan": load_plan_config, "train": load_train_config, "prompt": load_prompt_config}
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[str(p.relative_to(ROOT)) for p in CONFIGS])
def test_every_shipped_config_loads_and_is_commented(path: Path) -> None:
    CONFIG_LOADERS[path.parent.name](path)
    assert path.read_text().lstrip().startswith("#"), "say in a comment what it is for"


def test_configs_were_found() -> None:
    assert {p.parent.name for p in CONFIGS} == set(CONFIG_LOADERS)


RECIPES = sorted((ROOT / "datasets").glob("*/dataset.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[p.parent.name for p in RECIPES])
def test_every_dataset_recipe_is_complete(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text())
    assert set(recipe) == {
        *("name", "title", "modality", "channels", "labels", "cases", "licence", "source", "citation")
    }
    LabelSet.parse(recipe["labels"])
    assert {"README.md", "convert.py"} <= {p.name for p in path.parent.iterdir()}


def test_the_phantom_recipe_says_what_the_code_does() -> None:
    from medseg.phantom import LABELS

    recipe = yaml.safe_load((ROOT / "datasets" / "phantom" / "dataset.yaml").read_text())
    assert LabelSet.parse(recipe["labels"]) == LABELS


def test_no_function_is_longer_than_a_reader_can_hold() -> None:
    long = {}
    for path in SOURCES:
        for name, node in functions(path):
            doc = node.body[0] if ast.get_docstring(node) else None
            lines = (node.end_lineno or 0) - node.lineno + 1
            lines -= 0 if doc is None else (doc.end_lineno or 0) - doc.lineno + 1
            # A command's parameters are its documentation.
            lines -= node.body[0].lineno - node.lineno if "cli" in path.parts else 0
            if lines > LONGEST_FUNCTION:
                long[name] = lines
    assert not long


def test_public_functions_and_classes_say_what_they_do() -> None:
    silent = []
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not silent


def test_nothing_is_unpickled() -> None:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                unsafe = call in ("pickle.load", "pickle.loads", "torch.load", "joblib.load")
                if unsafe and keywords.get("weights_only") != "True":
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {call}")
                if keywords.get("allow_pickle") == "True":
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} allow_pickle")
    assert not found


def test_only_the_command_line_ends_the_process() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if "cli" not in path.parts and re.search(r"\bsys\.exit\(|\bos\._exit\(", path.read_text())
    ]
    assert not found


def test_no_module_is_named_after_nothing() -> None:
    vague = {"utils", "helpers", "common", "manager", "base", "misc"}
    assert not [path for path in SOURCES if path.stem in vague or path.parent.name in vague]


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    # Written in parts, so that this file does not find itself.
    hosts = ("pypi" + ".org", "pythonhosted" + ".org", "download.py" + "torch.org", "--index" + "-url")
    places = ("/wo" + "rk/", "/ho" + "me/", "/ro" + "ot/", "/Us" + "ers/", "file" + "://")
    found = []
    for path in tracked(
        ".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".ipynb", "", ".html", ".sh"
    ):
        text = path.read_text(encoding="utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {word}" for word in (*hosts, *places) if word in text]
    assert not found


def test_no_image_of_a_patient_and_nothing_large_is_tracked() -> None:
    images = {".nii", ".gz", ".dcm", ".nrrd", ".mha", ".mhd", ".tif", ".tiff", ".npz", ".pth", ".safetensors"}
    shipped = ROOT / "medseg/nets/refiner.safetensors"  # own weights; at most 10 MB in the package
    assert shipped.stat().st_size < 10_000_000
    others = [p for p in tracked() if p != shipped]
    assert not [p for p in others if p.suffix in images]
    assert not [p for p in others if p.stat().st_size > 300_000]


def test_torch_is_the_first_pin_and_every_pin_is_exact() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins[0] == "torch==2.13.0"
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    names = [re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins]
    assert len(set(names)) == len(names)
    assert not {"torchvision", "timm"} & set(names)


def test_every_dependency_is_pinned() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for e in project["optional-dependencies"].values() for d in e)]
    pinned = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    missing = [
        d for d in wanted if re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", d)[0]).lower() not in pinned
    ]
    assert not missing


# Being listed is being tested: each table of names with the test that every entry must pass.
REGISTRIES = {
    "medseg.nets.sam:ENCODERS": "nets.test_sam:test_an_encoder_gives_an_embedding_at_its_stride",
    "medseg.nets:NETS": "nets.test_nets:test_logits_have_the_shape_of_the_patch",
    "medseg.exchange:EXPORTERS": "exchange.test_exporters:test_an_export_is_written_whole_or_not_at_all",
    "medseg.instances.split:SPLITTERS": (
        "instances.test_split:test_a_splitter_finds_separate_objects_and_keeps_the_foreground"
    ),
    "medseg.io:READERS": "io.test_formats:test_a_file_of_something_else_is_one_sentence_with_its_name",
    "medseg.io:WRITERS": "io.test_formats:test_a_written_volume_is_read_back_with_values_type_and_grid",
    "medseg.metrics:METRICS": "metrics.test_registry:test_a_perfect_prediction_has_the_best_value",
    "medseg.plan:PRESETS": "plan.test_laws:test_every_plan_fits_its_network_and_its_memory",
    "medseg.prompt:PROPAGATORS": (
        "prompt.test_propagators:test_a_propagator_finds_the_object_from_one_box_and_no_more"
    ),
    "medseg.prompt.evaluate:BASELINES": "prompt.test_evaluate:test_a_baseline_answers_a_box_with_a_mask",
    "medseg.preprocess.normalize:NORMALIZERS": (
        "preprocess.test_normalize:test_every_scheme_works_in_place_and_stays_finite_on_a_constant_image"
    ),
    "medseg.train:RECIPES": "train.test_recipes:test_a_recipe_survives_the_disk",
}


def named(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def parametrized_over(test: Any) -> list[set[str]]:
    """Return the values that each argument of a test is given by ``parametrize``."""
    found = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            rows = [row if isinstance(row, tuple) else (row,) for row in mark.args[1]]
            found += [{str(value) for value in column} for column in zip(*rows, strict=True)]
    return found


@pytest.mark.parametrize("registry", REGISTRIES)
def test_every_registry_has_a_conformance_test(registry: str) -> None:
    table, test = named(registry), named(f"tests.{REGISTRIES[registry]}")
    assert table
    assert set(table) in parametrized_over(test), f"parametrize {test.__name__} over {registry}"


def test_every_registry_is_known_here() -> None:
    """A table of callables or settings in capitals is a registry, wherever it is written."""
    pattern = re.compile(
        r"^([A-Z]+): dict\[[^=]*(?:Callable|Builder|Exporter|Normalizer|Rules|Config|Metric)[^=]*= ", re.M
    )
    found = {name for path in SOURCES for name in pattern.findall(path.read_text(encoding="utf-8"))}
    assert found == {registry.split(":")[1] for registry in REGISTRIES}


def readme_commands() -> list[list[str]]:
    """Return the words of every ``medseg ...`` line in the code blocks of the README files."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "datasets").glob("*/README.md"))):
        for block in re.findall(r"```[a-z]*\n(.*?)```", path.read_text(), flags=re.DOTALL):
            for line in block.splitlines():
                words = line.split("#")[0].split()
                if words[:1] == ["medseg"]:
                    found.append(words[1:])
    return found


def test_the_readme_shows_commands_and_options_that_exist() -> None:
    from typer.main import get_command

    from medseg.cli import app

    group = get_command(app)
    shown = readme_commands()
    assert len(shown) >= 5
    for words in shown:
        command = group
        for word in words:
            if not hasattr(command, "commands"):
                break
            command = command.commands[word]
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word.strip("[]") for word in words if re.match(r"\[?-[-a-z]", word)}
        assert used - {"--help"} <= known, words


def test_the_readme_names_targets_and_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)`", text)) <= targets
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
