"""The harness: the same user for every entrant, numbers that are right, and no case that stops the others."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medseg.errors import Cancelled, ConfigError
from medseg.io import write
from medseg.log import Listener, listening
from medseg.prompt.cases import CasesFile, load_cases, open_entry
from medseg.prompt.evaluate import BASELINES, EvaluateConfig, PromptEvaluation, Question, evaluate_prompts
from medseg.prompt.evaluate_page import dump_json, mean_curves
from medseg.prompt.regions import Region
from medseg.prompt.segmenter import SliceMask
from medseg.prompt.simulate import draw_prompt
from medseg.prompt.slicewise import Models
from medseg.prompt.target import Propagation, Target
from medseg.volume import Geometry, Volume
from tests.phantoms import affine

SHAPE = (30, 32, 20)
CONFIG = EvaluateConfig(clicks=3)


def scene_labels() -> np.ndarray:
    index = np.indices(SHAPE)
    labels = np.zeros(SHAPE, np.uint8)
    for value, middle in ((1, (10, 10, 8)), (2, (21, 22, 12))):
        away = ((index - np.reshape(middle, (3, 1, 1, 1))) ** 2).sum(axis=0)
        labels[away <= 25] = value
    return labels


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    geometry = Geometry(SHAPE, affine("LPS", (1.0, 1.0, 1.5)))
    image = np.random.default_rng(0).normal(100, 6, SHAPE) + 80 * (scene_labels() > 0)
    write(Volume(image.astype(np.float32), geometry), tmp_path / "image.nii.gz")
    write(Volume(scene_labels(), geometry), tmp_path / "labels.nii.gz")
    path = tmp_path / "cases.yaml"
    path.write_text(
        "name: Two balls\ncases:\n"
        "- {image: image.nii.gz, labels: labels.nii.gz, value: 1, name: one, dataset: first}\n"
        "- {image: image.nii.gz, labels: labels.nii.gz, value: 2, name: two, dataset: second}\n"
    )
    return path


class Recorder:
    """A propagator that answers with a box around the first prompt, and remembers what it was asked."""

    def __init__(self) -> None:
        self.targets: list[Target] = []

    def __call__(self, models: Models, target: Target) -> Propagation:
        self.targets.append(target)
        box = target.prompts[0]
        corners = models.scene.to_voxel(np.array([box.corner_mm, box.opposite_mm]))
        low, high = (np.ceil(edge(axis=0) - 1e-6).astype(int) for edge in (corners.min, corners.max))
        mask = np.zeros(models.scene.shape, dtype=bool)
        mask[low[0] : high[0], low[1] : high[1], max(0, low[2] - 2) : high[2] + 3] = True
        return Propagation(Region.of(mask))


def run(cases: Path, *names: str, config: EvaluateConfig = CONFIG, **extra) -> PromptEvaluation:
    return evaluate_prompts(cases, names[0], names[1:], config=config, extra=extra)


def perfect(cases: Path):
    """Return a propagator that knows the answer, and one that knows it from the second click on."""
    items = {
        item.reference.start: item for e in load_cases(cases).cases for item in open_entry(e, [cases.parent])
    }

    def truth(models: Models, target: Target) -> Propagation:
        middle = models.scene.to_voxel(target.prompts[0].corner_mm)
        nearest = min(items.values(), key=lambda i: np.abs(np.array(i.reference.start) - middle).sum())
        return Propagation(nearest.reference)

    return truth


def test_a_perfect_propagator_has_dice_one_and_is_not_clicked(cases: Path) -> None:
    result = run(cases, "truth", truth=perfect(cases))
    assert [trace.dice for trace in result.traces] == [(1.0,) * 4] * 2
    assert [trace.nsd for trace in result.traces] == [(1.0,) * 4] * 2
    assert all(trace.clicks == () and len(trace.seconds) == 1 for trace in result.traces)
    assert not result.failures


def test_dice_is_that_of_the_two_masks(cases: Path) -> None:
    spy = Recorder()
    result = run(cases, "spy", spy=spy)
    for trace, entry in zip(result.traces, load_cases(cases).cases, strict=True):
        (item,) = open_entry(entry, [cases.parent])
        top, left, bottom, right = trace.prompt.box
        size = (bottom - top) * (right - left) * 5
        assert trace.dice[0] == pytest.approx(2 * _inside(item, trace) / (size + item.reference.voxels))
        assert trace.dice[0] == trace.dice[-1]


def _inside(item, trace) -> int:
    top, left, bottom, right = (round(edge + 0.5) for edge in trace.prompt.box)
    k = trace.prompt.index
    return int(item.reference.full()[top:bottom, left:right, k - 2 : k + 3].sum())


def test_every_click_comes_as_a_fresh_prompt_with_the_mask_before_it(cases: Path) -> None:
    spy = Recorder()
    run(cases, "spy", spy=spy)
    first = spy.targets[:4]
    assert [len(target.prompts) for target in first] == [1, 2, 3, 4]
    assert [target.fresh for target in first] == [0, 1, 1, 1]
    assert first[0].previous is None
    assert all(target.previous is not None and target.previous.voxels for target in first[1:])
    assert all(target.axis == 2 and target.limits is None for target in spy.targets)
    assert first[3].prompts[:3] == first[2].prompts


def test_the_true_range_of_slices_is_told_to_who_is_named_so(cases: Path) -> None:
    spy = Recorder()
    run(cases, "spy@z", spy=spy)
    assert {target.limits for target in spy.targets} == {(3, 13), (7, 17)}


def test_all_entrants_see_the_same_boxes_and_the_same_seed_gives_the_same_clicks(cases: Path) -> None:
    one, other = Recorder(), Recorder()
    config = EvaluateConfig(clicks=2, seeds=(3, 4))
    result = run(cases, "one", "watershed", "other", config=config, one=one, other=other)
    assert [t.prompts for t in one.targets] == [t.prompts for t in other.targets]
    prompts = {(t.object, t.seed): set() for t in result.traces}
    for trace in result.traces:
        prompts[trace.object, trace.seed].add(trace.prompt)
    assert all(len(drawn) == 1 for drawn in prompts.values())
    again = run(cases, "one", config=config, one=Recorder())
    assert [(t.prompt, t.clicks, t.dice) for t in again.traces] == [
        (t.prompt, t.clicks, t.dice) for t in result.traces if t.entrant == "one"
    ]


def test_another_seed_is_another_user_and_the_order_of_cases_changes_nothing(cases: Path) -> None:
    listed = load_cases(cases)
    turned = CasesFile(cases=tuple(reversed(listed.cases)))
    config = EvaluateConfig(clicks=1, seeds=(0, 1, 2))
    there = run(cases, "spy", config=config, spy=Recorder())
    back = evaluate_prompts(turned, "spy", data=[cases.parent], config=config, extra={"spy": Recorder()})
    table = {(t.object, t.seed): (t.prompt, t.clicks) for t in there.traces}
    assert table == {(t.object, t.seed): (t.prompt, t.clicks) for t in back.traces}
    assert len({table[("first", "one"), seed][0].box for seed in (0, 1, 2)}) > 1


def test_what_fails_is_listed_and_the_others_are_measured(cases: Path) -> None:
    text = cases.read_text()
    cases.write_text(text + "- {image: missing.nii.gz, labels: labels.nii.gz, name: gone, dataset: third}\n")

    def breaks(models: Models, target: Target) -> Propagation:
        if len(target.prompts) > 1 and target.limits is None:
            raise RuntimeError("no such slice")
        return Recorder()(models, target)

    result = run(cases, "spy", "breaks", spy=Recorder(), breaks=breaks)
    assert {trace.entrant for trace in result.traces} == {"spy"}
    assert [(f.dataset, f.name, f.entrant) for f in result.failures] == [
        ("first", "one", "breaks"),
        ("second", "two", "breaks"),
        ("third", "gone", ""),
    ]
    assert "no such slice" in result.failures[0].error
    assert "no such file" in result.failures[2].error


def test_masks_of_another_grid_are_a_failure_and_not_a_number(cases: Path) -> None:
    result = run(cases, "small", small=lambda models, target: Propagation(Region.empty((4, 4, 4))))
    assert not result.traces
    assert "different grids" in result.failures[0].error


def test_an_empty_mask_is_measured_as_zero(cases: Path) -> None:
    result = run(cases, "none", none=lambda models, target: Propagation(Region.empty(models.scene.shape)))
    assert all(trace.dice == trace.nsd == (0.0,) * 4 for trace in result.traces)
    assert all(click.positive for trace in result.traces for click in trace.clicks)


@pytest.mark.parametrize("name", ["volum", "box:stopz=1", "box:stops.iou=2"])
def test_an_unknown_entrant_or_setting_is_refused_before_anything_runs(cases: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=name.partition(":")[0]):
        run(cases, name)


def test_settings_reach_the_propagator(cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg.prompt import PROPAGATORS, propagators
    from medseg.prompt.slicewise import BoxConfig

    seen = []

    def spy(models: Models, target: Target, config: BoxConfig) -> Propagation:
        seen.append(config.stops.iou)
        return Recorder()(models, target)

    monkeypatch.setitem(propagators.PROPAGATORS, "box", (PROPAGATORS["box"][0], spy))
    result = run(cases, "box:stops.iou=0.25", config=EvaluateConfig(clicks=0))
    assert not result.failures
    assert seen == [0.25, 0.25]


def test_cancelling_stops_the_batch(cases: Path) -> None:
    class Stop(Listener):
        def cancelled(self) -> bool:
            return True

    with listening(Stop()), pytest.raises(Cancelled):
        run(cases, "spy", spy=Recorder())


class Fixed:
    """Stands in for the network of boxes: fills the box."""

    encoded = 0

    def predict(self, axis, index, prompts, field=None, multimask=None) -> SliceMask:
        self.encoded += 1
        top, left, bottom, right = (round(edge + 0.5) for edge in prompts.box)
        return SliceMask(np.ones((bottom - top, right - left)), (top, left, bottom, right), 1.0)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_answers_a_box_with_a_mask(name: str, cases: Path) -> None:
    (item,) = open_entry(load_cases(cases).cases[0], [cases.parent])
    prompt = draw_prompt(item.reference.full(), 2, np.random.default_rng(0))
    models = Models.open(item.scene(prompt))
    fixed = Fixed()
    models.ready["lite-medsam", None] = fixed
    question = Question(models, Target((), 2, item.limits), prompt, (), item.reference, 0)
    region = BASELINES[name](question)
    both = (region.full() & item.reference.full()).sum()
    assert 2 * both / (region.voxels + item.reference.voxels) > 0.6
    assert (region.start[2], region.stop[2]) >= (item.limits[0], item.limits[1])
    clicked = replace(question, target=Target((), 2, item.limits, region, 1))
    assert BASELINES[name](clicked).shape == item.volume.shape
    assert fixed.encoded == (11 if name == "slice-boxes" else 0)


def test_encoder_calls_are_counted_for_the_box_and_for_each_click(cases: Path) -> None:
    class Counted:
        encoded = 0

    def encodes(models: Models, target: Target) -> Propagation:
        counted = models.ready.setdefault(("fake", None), Counted())
        counted.encoded += 7 if target.previous is None else 2
        return Recorder()(models, target)

    result = run(cases, "encodes", encodes=encodes)
    assert {trace.encoded for trace in result.traces} == {(7, 2, 2, 2)}


def test_json_is_strict_and_holds_every_number(cases: Path) -> None:
    result = run(cases, "spy", "watershed", config=EvaluateConfig(clicks=2, seeds=(0, 1)), spy=Recorder())
    data = json.loads(dump_json(result), parse_constant=pytest.fail)
    assert data == json.loads(json.dumps(result.to_dict()))
    assert data["auc"] == {"points": 5, "first_click": 1, "most": 4, "rule": "trapezoid"}
    assert data["summary"][0]["mean"]["dsc_auc"] is None  # two clicks have no such area
    assert {row["dataset"] for row in data["summary"]} == {"all", "first", "second"}
    assert len(data["objects"]) == 4
    assert len(data["traces"]) == 8
    assert data["comparison"][0]["other"] == "watershed"


def test_curves_are_means_over_objects(cases: Path) -> None:
    result = run(cases, "spy", spy=Recorder())
    wanted = np.mean([trace.dice for trace in result.traces], axis=0)
    assert np.allclose(mean_curves(result, "dice")["spy"], wanted)


def test_page_and_plot_are_whole_files(cases: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(clicks=5, seeds=(0, 1))
    result = run(cases, "spy", "watershed", config=config, spy=Recorder())
    result.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"""(src|href)=["']?http""", page)
    assert "spy minus watershed" in page
    result.to_png(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_page_of_failures_only_says_so(cases: Path) -> None:
    from medseg.prompt.evaluate_page import build_page

    cases.write_text("- {image: missing.nii.gz, labels: labels.nii.gz}\n")
    page = build_page(run(cases, "spy", spy=Recorder())).render()
    assert "no such file" in page


def test_the_shared_cases_are_forty_one_objects_of_experts(data_dir: Path, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    listed = load_cases(root / "configs" / "prompt" / "shared_data.yaml")
    there = [entry for entry in listed.cases if not entry.dataset.startswith("sarcoma")]
    items = [item for entry in there for item in open_entry(entry, [data_dir])]
    assert len(listed.cases) - len(there) == 2
    assert len(items) == 39
    assert {item.dataset for item in items} == {"MS lesions", "brain tumour", "hippocampus"}
    assert all(item.axis == 2 for item in items)
    assert min(i.reference.voxels for i in items) >= 50
