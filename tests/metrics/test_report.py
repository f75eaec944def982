"""The page and its drawings: complete, self-contained, safe against hostile names, the right way round."""

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medseg.io import write
from medseg.metrics import evaluate
from medseg.metrics.report import (
    PALETTE,
    Cell,
    HtmlReport,
    Panel,
    Picture,
    class_colours,
    curves,
    histogram,
    histogram_edges,
    slice_picture,
    strip_plot,
    worst_slice,
)
from medseg.volume import Volume
from tests.metrics.test_evaluation import LABELS, label_map

HOSTILE = "<script>alert('x')</script>"


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def place_of(picture: np.ndarray, colour: str) -> tuple[float, float]:
    """Return the centre (row, column), in [0, 1], of pixels near a colour."""
    wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(picture - wanted).sum(axis=2) < 60)
    assert rows.size, f"nothing is drawn in {colour}"
    return rows.mean() / picture.shape[0], columns.mean() / picture.shape[1]


def test_every_kind_of_section_is_on_the_page_and_nothing_is_fetched():
    page = (
        HtmlReport("Title", "sub", {"Dice": "0.9\nCI"})
        .add_text("Words", "one", "two")
        .add_facts("Facts", {"seed": 3})
        .add_table(
            "Table", ["case", "Dice"], [["a", 0.5], ["b", None], [Cell("c", tone="bad"), 1]], sortable=True
        )
        .add_figure("Curve", curves({"loss": ([0, 1], [1.0, 0.5])}, "epoch", "loss"), "falls")
        .add_figure("Image", slice_picture(None, np.ones((4, 4, 4), int), np.ones((4, 4, 4), int)))
        .add_pictures("Pictures", [Picture(b"png", "case a", "note")], legend={"liver": PALETTE[0]})
        .render()
    )
    assert page.count("<section") == 6
    assert page.count("<svg") == 1 and page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "aria-sort" in page and "<small>CI</small>" in page


def test_names_from_files_cannot_inject_script():
    page = HtmlReport(HOSTILE, HOSTILE).add_table(
        HOSTILE, [HOSTILE], [[HOSTILE]], note=HOSTILE, sortable=True
    )
    page.add_pictures(HOSTILE, [Picture(b"", HOSTILE, HOSTILE)], HOSTILE, {HOSTILE: "#000"})
    page.add_figure("x", strip_plot([Panel(HOSTILE, {HOSTILE: np.array([0.5])}, 1.0)]), HOSTILE)
    assert "<script>alert" not in page.render()


def test_links_lead_only_to_files_beside_the_page():
    name = '../a"b/javascript:alert(1).html'
    page = HtmlReport("x").add_table("t", ["c"], [[Cell("open", link=name)]])
    links = re.findall(r'href="([^"]*)"', page.add_pictures("p", [Picture(b"", "a", link=name)]).render())
    assert links == ["./..%2Fa%22b%2Fjavascript%3Aalert%281%29.html"] * 2


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_a_histogram_leaves_no_value_out(values):
    edges, log = histogram_edges(np.array(values))
    assert np.histogram(values, edges)[0].sum() == len(values)
    assert not log or min(values) > 0


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 1.0], [0.01, 1.0, 5000.0]])
def test_a_histogram_is_drawn_of_any_values(values):
    drawing = histogram(np.array(values), "area (µm²)", "objects")
    assert drawing.startswith("<svg") and "area (µm²)" in drawing and "median" in drawing


def test_an_evaluation_page_names_every_case_class_failure_and_definition(tmp_path):
    predictions = {"good": label_map(2), "bad": label_map(4), "broken": label_map(shape=(12, 11, 7))}
    references = {"good": label_map(2), "bad": label_map(2), "broken": label_map(2)}
    result = evaluate(predictions, references, labels=LABELS)
    image = Volume(np.random.default_rng(0).normal(size=(12, 11, 6)).astype(np.float32), label_map().geometry)
    write(image, tmp_path / "images" / "bad_0000.nii.gz")
    result.to_html(tmp_path / "page.html", tmp_path / "images")
    page = (tmp_path / "page.html").read_text()
    for text in (
        "good",
        "bad",
        "broken",
        "liver",
        "tumour",
        "Resample",
        "surface-distance 0.1",
        "NSD at 1 mm",
    ):
        assert text in page
    assert page.count("data:image/png;base64,") == 2
    worst = page[page.index("Worst cases") :]
    assert worst.index("<figcaption>bad") < worst.index("<figcaption>good")


def test_a_page_without_any_defined_value_can_still_be_written(tmp_path):
    result = evaluate(label_map(tumour=False), label_map(tumour=False), labels=LABELS)
    result.to_html(tmp_path / "page.html")
    assert "both empty" in (tmp_path / "page.html").read_text()


def test_the_slice_with_most_errors_is_shown():
    reference = np.zeros((6, 6, 8), int)
    reference[1:4, 1:4, 2:7] = 1
    prediction = reference.copy()
    prediction[1:4, 1:4, 5] = 0
    assert worst_slice(reference, prediction, axis=2) == 5
    assert worst_slice(reference, reference, axis=0) == 1


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR", "SRA"])
def test_patients_left_is_on_the_right_and_anterior_is_up_on_any_grid(codes):
    shape = [20, 20, 20]
    reference = np.zeros(shape, int)
    where = {"R": 15, "L": 4, "A": 15, "P": 4, "S": 10, "I": 9}  # index along an axis that points this way
    for value, (side, front) in enumerate((("L", "A"), ("R", "P")), start=1):
        centre = []
        for letter in codes:
            towards = side if letter in "RL" else front if letter in "AP" else "S"
            index = where["R" if letter in "RAS" else "L"] if letter == towards else None
            centre.append((15 if letter == towards else 4) if letter in "RLAP" else 10)
            assert index is None or index in (15, 4)
        reference[tuple(slice(c - 2, c + 3) for c in centre)] = value
    picture = pixels(slice_picture(None, reference, np.zeros_like(reference), codes=codes))
    left_front, right_back = place_of(picture, PALETTE[0]), place_of(picture, PALETTE[1])
    assert left_front[1] > 0.5 > left_front[0]
    assert right_back[1] < 0.5 < right_back[0]


def test_thick_slices_are_shown_whole_and_in_true_proportion():
    reference = np.zeros((40, 20, 6), int)
    reference[5:35, 5:15, 2] = 1
    picture = pixels(slice_picture(None, reference, reference, spacing=(1.0, 2.0, 6.0)))
    wanted = np.array([int(PALETTE[0][k : k + 2], 16) for k in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(picture - wanted).sum(axis=2) < 60)
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(30.0 / 20.0, rel=0.05)


def test_constant_and_not_finite_images_can_be_drawn():
    mask = np.zeros((8, 8, 8), int)
    mask[2:5, 2:5, 2:5] = 1
    for image in (np.zeros(mask.shape), np.full(mask.shape, np.nan), np.ones(mask.shape, bool)):
        assert slice_picture(image, mask, mask).startswith(b"\x89PNG")
    assert slice_picture(None, mask * 0, mask * 0).startswith(b"\x89PNG")


def test_colours_repeat_only_after_all_were_used():
    colours = class_colours([f"c{k}" for k in range(9)])
    assert len(set(list(colours.values())[:7])) == 7
    assert colours["c7"] == colours["c0"]


def test_many_points_do_not_swell_the_page():
    values = {f"organ {k}": np.random.default_rng(k).random(2000) for k in range(5)}
    assert len(strip_plot([Panel("Dice", values, 1.0)])) < 400_000


def test_empty_masks_are_told_in_words() -> None:
    from medseg.metrics.definitions import ClassSummary
    from medseg.metrics.page import _empties

    cell = _empties(ClassSummary("liver", {}, empty_both=0, empty_reference=2, empty_prediction=4))
    assert cell.text == "4 missed (prediction empty), 2 invented (reference empty)"
