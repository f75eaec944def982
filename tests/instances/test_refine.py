"""Objects drawn anew: which drawings are accepted, whose a pixel is, and what is listed."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from medseg.cli import app
from medseg.errors import ConfigError, GeometryError
from medseg.instances.finders import REFINERS, open_refiner
from medseg.instances.refine import (
    COVERED,
    NO_MASK,
    Candidate,
    Notes,
    RefineConfig,
    Refiner,
    Section,
    fields_of,
    list_gone,
    sections_of,
    settle,
)
from medseg.volume import Geometry, Volume
from tests.instances.test_count import MIDDLES, nuclei, volume

CONFIG = RefineConfig()


def square(label: int, top: int, left: int, side: int = 6) -> Section:
    return Section(label, (top, left, top + side, left + side), np.ones((side, side), bool))


def drawn(section: Section, shift: int = 0, height: float = 5.0, score: float = 0.9) -> Candidate:
    """Return a candidate on the section's surroundings whose mask is the section, moved to the right."""
    top, left, bottom, _ = section.box
    side = bottom - top
    logits = np.full((3 * side, 3 * side), -9.0, np.float32)
    logits[side : 2 * side, side + shift : 2 * side + shift] = height
    return Candidate(section, (top - side, left - side), logits, score)


def flat(*sections: Section) -> np.ndarray:
    labels = np.zeros((40, 60), np.int32)
    for section in sections:
        labels[section.box[0] : section.box[2], section.box[1] : section.box[3]] = section.label
    return labels


def test_an_accepted_drawing_takes_the_place_of_its_section() -> None:
    section, notes = square(3, 10, 20), Notes()
    result = settle(flat(section), iter([drawn(section, shift=1)]), CONFIG, notes)
    expected = np.zeros((40, 60), np.int32)
    expected[10:16, 21:27] = 3
    np.testing.assert_array_equal(result, expected)
    assert notes.accepted == 1 and notes.listed() == ()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"shift": 3}, "IoU with the old section below 0.5"),
        ({"height": 0.5}, "stability below 0.8"),
        ({"score": 0.4}, "expected IoU below 0.5"),
        ({"height": -5.0}, NO_MASK),
    ],
)
def test_what_is_not_accepted_stays_as_it_was_and_is_listed(change: dict[str, float], rule: str) -> None:
    section, notes = square(3, 10, 20), Notes()
    result = settle(flat(section), iter([drawn(section, **change)]), CONFIG, notes)  # type: ignore[arg-type]
    np.testing.assert_array_equal(result, flat(section))
    assert notes.accepted == 0
    assert [(each.rule, each.count, each.voxels) for each in notes.listed()] == [(rule, 1, 36)]


def test_a_pixel_in_dispute_goes_to_the_higher_logit_and_a_tie_to_the_lower_number_in_any_order() -> None:
    left, right = square(1, 10, 20), square(2, 10, 25)
    for first, second, owner in ((5.0, 6.0, 2), (6.0, 5.0, 1), (5.0, 5.0, 1)):
        answers = [drawn(left, shift=0, height=first), drawn(right, shift=0, height=second)]
        results = [
            settle(flat(left, right), iter(some), CONFIG, Notes()) for some in (answers, answers[::-1])
        ]
        np.testing.assert_array_equal(results[0], results[1])
        assert (results[0][10:16, 25] == owner).all()


def test_a_section_that_stays_keeps_its_pixels_from_all_drawings() -> None:
    stays, grows = square(2, 10, 26), square(1, 10, 20)
    wide = drawn(grows, shift=1, height=9.0)
    result = settle(flat(stays, grows), iter([wide, drawn(stays, score=0.1)]), CONFIG, Notes())
    assert (result[10:16, 26:32] == 2).all() and (result[10:16, 21:26] == 1).all()


def test_sections_are_looked_at_in_fields_that_hold_them_whole() -> None:
    rng = np.random.default_rng(0)
    shape = (200, 300)
    sections = [square(n, int(rng.integers(194)), int(rng.integers(294))) for n in range(1, 60)]
    sections.append(square(99, 20, 30, 120))
    found = fields_of(sections, shape, CONFIG)
    assert sorted(s.label for group in found.values() for s in group) == [*range(1, 60), 99]
    for area, group in found.items():
        for each in group:
            assert area[0] <= each.box[0] and area[1] <= each.box[1]
            assert each.box[2] <= area[2] <= shape[0] and each.box[3] <= area[3] <= shape[1]
    assert found[0, 0, *shape] == [sections[-1]] and fields_of([], shape, CONFIG) == {}


def test_sections_are_the_objects_of_a_slice_with_gaps_in_their_numbers() -> None:
    labels = np.zeros((8, 9), np.int32)
    labels[1:3, 2:5], labels[5, 5] = 7, 2
    assert [(s.label, s.box, int(s.mask.sum())) for s in sections_of(labels)] == [
        (2, (5, 5, 6, 6), 1),
        (7, (1, 2, 3, 5), 6),
    ]
    assert sections_of(np.zeros((4, 4), np.int32)) == []


def truth() -> np.ndarray:
    rows, columns = np.indices((110, 120))
    labels = np.zeros((110, 120), np.int32)
    for number, (i, j) in enumerate(MIDDLES, 1):
        labels[np.hypot(rows - i, columns - j) < 8] = number
    return labels


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean IoU of equal numbers."""
    numbers = np.unique(first[first > 0])
    shared = [((first == n) & (second == n)).sum() / ((first == n) | (second == n)).sum() for n in numbers]
    return float(np.mean(shared))


def test_poor_sections_of_discs_become_better_by_a_network_of_boxes(lite_medsam_path: Path) -> None:
    exact = truth()
    poor = np.where(np.roll(exact, 2, axis=1) == exact, exact, 0)  # the left 2 pixels of each are missing
    config = RefineConfig(margin=0.1)  # the box of what is too small is too small
    refiner = Refiner("lite-medsam", {"lite-medsam": lite_medsam_path}, 1, config)
    result = refiner.refine(volume(nuclei()), poor.T)
    assert result.accepted == len(MIDDLES) and result.dropped == ()
    assert overlap(exact, result.labels.T) > overlap(exact, poor) + 0.03
    again = refiner.refine(volume(nuclei()), poor.T)
    np.testing.assert_array_equal(again.labels, result.labels)


def test_slices_of_a_volume_are_refined_one_by_one_in_any_orientation(mobile_sam_path: Path) -> None:
    exact = np.zeros((110, 120, 3), np.int32)
    exact[..., 1] = exact[..., 2] = truth()
    image = np.stack([nuclei(noise=3.0)] * 3, axis=-1).astype(np.float32)
    image[..., 0] = 20
    refiner = Refiner("mobile-sam", {"mobile-sam": mobile_sam_path}, 1, RefineConfig(size=256))
    first = refiner.refine(Volume(image[None], Geometry(image.shape, np.diag([1.0, 1, 2, 1]))), exact)
    assert first.labels.shape == exact.shape and not first.labels[..., 0].any()
    assert first.accepted + sum(each.count for each in first.stayed) == 2 * len(MIDDLES)
    assert overlap(exact, first.labels) > 0.75
    mirrored = Volume(image[None, ::-1], Geometry(image.shape, np.diag([-1.0, 1, 2, 1])))
    second = refiner.refine(mirrored, exact[::-1])
    np.testing.assert_array_equal(second.labels[::-1], first.labels)


def test_an_object_that_its_neighbours_cover_is_listed() -> None:
    large, small = square(1, 14, 20, 12), square(2, 18, 32, 2)
    labels = flat(large, small)
    wide, faint = drawn(large, shift=2, height=9.0), drawn(small, height=2.0)
    result = settle(labels, iter([wide, faint]), CONFIG, Notes())
    assert not (result == 2).any()
    assert [(d.rule, d.count, d.voxels) for d in list_gone(labels, result)] == [(COVERED, 1, 4)]


def test_other_shapes_and_unknown_networks_are_refused() -> None:
    with pytest.raises(GeometryError, match="resample"):
        Refiner("lite-medsam").refine(volume(nuclei()), np.zeros((5, 6), np.int32))
    with pytest.raises(ConfigError, match="Use one of lite-medsam"):
        open_refiner("nuclei2d")
    assert {open_refiner(name).name for name in REFINERS} == set(REFINERS)


def test_a_label_map_of_another_program_is_refined_and_measured(
    lite_medsam_path: Path, tmp_path: Path
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", nuclei())
    tifffile.imwrite(tmp_path / "masks.tif", truth().astype(np.uint16) * 3)
    command = ["count", str(tmp_path / "a.tif"), "-o", str(tmp_path / "out"), "--pixel-size", "0.5 micron"]
    command += ["--model", f"labels:{tmp_path / 'masks.tif'}", "--threads", "1"]
    plain = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    (row,) = json.loads(plain.stdout)["images"]
    assert row["objects"] == len(MIDDLES) and row["refined"] is None
    assert row["size"]["median"] == pytest.approx(np.pi * 4**2, rel=0.05)
    refine = ["--refine", "lite-medsam", "--weights", f"lite-medsam={lite_medsam_path}"]
    told = CliRunner().invoke(app, [*command, *refine], catch_exceptions=False).stdout
    assert "sections drawn anew" in told
    qc = json.loads((tmp_path / "out" / "a_qc.json").read_text())["provenance"]["refined"]
    left = sum(each["sections"] for each in qc["sections_as_before"])
    assert qc["network"] == "lite-medsam" and qc["sections_accepted"] + left == len(MIDDLES)
