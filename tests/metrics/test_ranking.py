"""Objects with scores on the command line: where scores are read, and what is printed of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from medseg.cli import app
from medseg.errors import ConfigError, DatasetError, ReadError
from medseg.io import write
from medseg.metrics.instances import evaluate_instances
from medseg.metrics.overlap_table import overlap_table
from medseg.metrics.ranking import ScoredObjects, join_classes, rank_objects, read_scores, score_objects
from medseg.volume import Geometry, Volume

GRID = Geometry((12, 10, 4), np.eye(4))


def label_map(*boxes: tuple[int, int]) -> Volume:
    """Return a map with an object from i = low to high for each pair, over all j and k."""
    array = np.zeros((1, *GRID.shape), np.int32)
    for number, (low, high) in enumerate(boxes):
        array[0, low:high] = number + 1
    return Volume(array, GRID)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two scans: of four lesions three are found, and one is invented; scores 0.9, 0.4, 0.8 and 0.6."""
    known, found = tmp_path / "r", tmp_path / "p"
    write(label_map((0, 2), (6, 8)), known / "a.nii.gz")
    write(label_map((0, 2), (6, 8)), known / "b.nii.gz")
    write(label_map((0, 2), (10, 12)), found / "a.nii.gz")
    write(label_map((0, 2), (6, 8)), found / "b_labels.nii.gz")
    objects = [{"label": 1, "class": "lesion", "score": 0.9}, {"label": 2, "class": "lesion", "score": 0.6}]
    (found / "a.json").write_text(json.dumps({"objects": objects}))
    (found / "b_objects.csv").write_text("label,score,x\n1,0.4,0\n2,0.8,0\n")
    return found, known


def test_scores_of_both_kinds_of_files_rank_the_objects(folders: tuple[Path, Path]) -> None:
    ranking = evaluate_instances(*folders).ranking
    assert ranking is not None
    # by score: true 0.9, true 0.8, false 0.6, true 0.4, of 4 lesions in 2 scans
    assert ranking.froc.sensitivities.tolist() == [0, 0.25, 0.5, 0.5, 0.75]
    assert ranking.froc.rates.tolist() == [0, 0, 0, 0.5, 0.5]
    # precision 1 up to recall 0.5 (51 recalls), 3/4 up to 0.75 (25 more), and none beyond
    expected = (51 + 25 * 0.75) / 101
    assert ranking.masks.ap == pytest.approx([expected] * 10)
    assert ranking.boxes.ap == pytest.approx([expected] * 10)


def test_the_command_line_prints_formulas_and_writes_them(folders: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["evaluate", *map(str, folders), "--instances", "--lesions", "MET"]
    files = ["--json", str(tmp_path / "o.json"), "--html", str(tmp_path / "o.html")]
    shown = CliRunner().invoke(app, [*words, *files])
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for words_of_it in ("AP (COCO)", "FROC", "CPM", "lesion Dice", "false positive ml", "mask IoU >= 0.5"):
        assert words_of_it in shown.stdout
    told = json.loads((tmp_path / "o.json").read_text())
    assert told["ranking"]["froc"]["sensitivity"]["1"] == 0.75
    assert told["lesions"]["images"]["b"]["lesion Dice"] == 1 and told["lesions"]["rules"] == "MET"
    page = (tmp_path / "o.html").read_text()
    assert "FROC" in page and "Lesion by lesion" in page


def test_without_scores_beside_every_image_nothing_is_ranked(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    (folders[0] / "a.json").unlink()
    assert evaluate_instances(*folders).ranking is None
    assert "No scores lie beside a" in caplog.text


def test_scores_that_lack_an_object_or_cannot_be_read_are_told(folders: tuple[Path, Path]) -> None:
    (folders[0] / "b_objects.csv").write_text("label,score\n1,0.4\n")
    assert "object 2" in evaluate_instances(*folders).failures[0].error
    (folders[0] / "b_objects.csv").write_text("name\nx\n")
    with pytest.raises(ReadError, match="a label and a score"):
        read_scores(folders[0] / "b_labels.nii.gz")
    (folders[0] / "b_objects.csv").write_text("label,score\n1,\n2,\n")
    assert read_scores(folders[0] / "b_labels.nii.gz") is None
    (folders[0] / "a.json").write_text('{"labels": {}}')
    assert read_scores(folders[0] / "a.nii.gz") is None


def test_rules_of_lesions_that_there_are_not_are_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="GLI, SSA"):
        evaluate_instances(*folders, lesion_rules="gli")
    with pytest.raises(DatasetError, match="no image"):
        rank_objects([])


def test_classes_of_one_image_never_meet() -> None:
    first, second = label_map((0, 2)).array[0], label_map((0, 2), (6, 8)).array[0]
    parts: list[ScoredObjects] = [
        score_objects(first, second, np.array([0.3, 0.5]), overlap_table(first, second)),
        score_objects(second, first, np.array([0.9]), overlap_table(second, first)),
    ]
    joined = join_classes(parts).masks
    assert joined.n_ref == 3 and joined.scores.tolist() == [0.3, 0.5, 0.9]
    assert joined.pairs.tolist() == [[0, 0], [1, 2]]
