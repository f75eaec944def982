"""The HTML pages of ``medseg count``: of one image what was counted and dropped, of many an index."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import medseg
from medseg.instances.export.overlay import draw_views, read_thumbnail
from medseg.instances.export.qc import describe_qc
from medseg.io.grids import FLAT_NOTE, NO_SCALE_NOTE
from medseg.metrics.report import Cell, CellLike, HtmlReport, Picture, histogram
from medseg.types import FloatArray

if TYPE_CHECKING:
    from medseg.instances.count import Counted

# Of a table a page shows so many objects, the largest; of a folder so many pictures.
_LISTED, _PICTURES = 200, 60
# Fewer images have no distribution.
_HISTOGRAM_FROM = 5
_UNITS = {"mm": "mm", "um": "µm", "px": "px", "ml": "ml"}
_POWERS = {"2": "²", "3": "³"}
# What is summed up, by the stem of the column; the others are places and names.
_MEASURES = {
    "area": "area",
    "volume": "volume",
    "equivalent_diameter": "diameter of equal size",
    "perimeter": "perimeter",
    "surface": "surface",
    "circularity": "circularity",
    "sphericity": "sphericity",
    "elongation": "elongation",
    "recist_longest": "longest diameter in plane",
    "recist_perp": "diameter across it",
    "nearest_neighbour": "distance to the nearest other",
    "neighbours": "touching neighbours",
    "intensity_mean": "mean intensity",
    "score": "score",
}
_LIST = ("area", "volume", "equivalent_diameter", "circularity", "sphericity", "intensity_mean", "score")
_FILES = {
    "labels": "label map: every object has a number, 0 is background",
    "table": "all objects with all their measurements",
    "overlay": "the picture in full",
    "qc": "what was dropped, and what deserves a look",
    "regions": "counts in regions",
    "geojson": "outlines, for QuPath and other programs",
    "roi": "outlines, for ImageJ",
    "parquet": "the table, for data frames",
}


def build_page(counted: "Counted", name: str, files: Mapping[str, Path]) -> HtmlReport:
    """Return the page of one image.

    Parameters
    ----------
    counted : Counted
    name : of the image, as the reader knows it
    files : what was written, by kind; only their names are shown
    """
    sizes = size_column(counted)
    found = describe_qc(counted.instances, in_pixels=counted.in_pixels)
    report = HtmlReport(name, _subtitle(counted), _tiles(counted, sizes, found))
    views = draw_views(counted.instances, counted.image)
    note = "Each object has an outline in a colour of its own."
    if len(views) == 1:
        report.add_figure("Objects", views[0].png, note)
    else:
        report.add_pictures("Objects", [Picture(view.png, view.caption) for view in views], note)
    if sizes is None:
        report.add_text("Nothing was found", "The image holds no object that the model knows. " + _WHAT_NOW)
    else:
        drawing = histogram(counted.table[sizes], titled(sizes), "objects")
        report.add_figure(
            "Sizes", drawing, "Objects at the border of the image are cut, so they are smaller."
        )
        _add_measures(report, counted)
    _add_classes(report, counted)
    if counted.regions is not None:
        _add_regions(report, counted)
    _add_dropped(report, found)
    if sizes is not None:
        _add_objects(report, counted, sizes, files)
    report.add_facts("How it was counted", _settings(counted))
    return report.add_facts("Files", {path.name: _FILES[kind] for kind, path in files.items()})


_WHAT_NOW = (
    "If there are objects, they may be of another size than was looked for: give it (--diameter). Or they "
    "look unlike what the model was trained on: take another model (--model)."
)


def build_index(rows: Sequence[Mapping[str, Any]], failures: Mapping[str, str]) -> HtmlReport:
    """Return the page of several images.

    Parameters
    ----------
    rows : what :func:`medseg.instances.count.describe_counted` says of each, and its name as ``image``
    failures : why, by name of the image
    """
    counts = np.array([row["objects"] for row in rows], np.float64)
    dropped = sum(map(_dropped, rows))
    spread = f"{counts.min():,.0f} to {counts.max():,.0f}"
    tiles = {
        "Images": str(len(rows)),
        "Objects": f"{int(counts.sum()):,}",
        "Objects in an image": f"{np.median(counts):,g}\nmedian; {spread}",
        "Dropped": f"{dropped:,}\nthe page of each image says why",
    }
    if failures:
        tiles["Images failed"] = str(len(failures))
    report = HtmlReport("Counted objects", f"{len(rows)} images", tiles)
    if failures:
        why = [(Cell(name, tone="bad"), error) for name, error in failures.items()]
        report.add_table("Images that were not counted", ["image", "why"], why)
    if len(rows) >= _HISTOGRAM_FROM:
        report.add_figure("Objects in an image", histogram(counts, "objects", "images"))
    report.add_table(
        "Images", _INDEX_COLUMNS, map(_index_row, rows), "Click a heading to sort.", sortable=True
    )
    shown = rows[:_PICTURES]
    pictures = [
        Picture(read_thumbnail(row["files"]["overlay"]), row["image"], _words(row), _page_of(row))
        for row in shown
    ]
    more = f" The first {len(shown)} of {len(rows)} images are shown." if len(rows) > len(shown) else ""
    report.add_pictures("Pictures", pictures, f"Click a picture for its page.{more}")
    return report.add_facts("How they were counted", {"medseg": medseg.__version__})


_INDEX_COLUMNS = ["image", "objects", "median size", "unit", "at the border", "dropped", "diameter", "model"]


def _index_row(row: Mapping[str, Any]) -> list[CellLike]:
    size = row["size"]
    median = Cell("–") if size is None else Cell(number(size["median"]), size["median"])
    diameter = Cell(number(row["diameter"]), row["diameter"]) if row["diameter"] else Cell("–")
    return [
        Cell(row["image"], link=_page_of(row)),
        row["objects"],
        median,
        "–" if size is None else unit_of(size["column"]),
        row["touching_border"],
        Cell(f"{_dropped(row):,}", float(_dropped(row)), tone="warn" if _dropped(row) else ""),
        diameter,
        row["model"],
    ]


def _dropped(row: Mapping[str, Any]) -> int:
    return sum(int(each["count"]) for each in row["dropped"])


def _words(row: Mapping[str, Any]) -> str:
    return f"{row['objects']:,} object{'' if row['objects'] == 1 else 's'}"


def _page_of(row: Mapping[str, Any]) -> str:
    return Path(row["files"]["page"]).name


def size_column(counted: "Counted") -> str | None:
    """Return the name of the column of areas or volumes, None where there is no object."""
    names = (name for name in counted.table.columns if stem_of_column(name) in ("area", "volume"))
    return next(names, None) if len(counted.instances) else None


def stem_of_column(name: str) -> str:
    """Return a column's name without its unit.

    >>> stem_of_column("equivalent_diameter_um"), stem_of_column("touches_border")
    ('equivalent_diameter', 'touches_border')
    """
    stem, _, unit = name.rpartition("_")
    return stem if unit.rstrip("23") in _UNITS else name


def unit_of(name: str) -> str:
    """Return the unit of a column as it is written.

    >>> unit_of("area_um2"), unit_of("volume_px3"), unit_of("score")
    ('µm²', 'px³', '')
    """
    unit = name.rpartition("_")[2]
    plain = unit.rstrip("23")
    return _UNITS[plain] + _POWERS.get(unit[len(plain) :], "") if plain in _UNITS else ""


def titled(name: str) -> str:
    """Return a column's name for people, with its unit.

    >>> titled("nearest_neighbour_um")
    'distance to the nearest other (µm)'
    """
    stem, unit = stem_of_column(name), unit_of(name)
    title = _MEASURES.get(stem, stem.replace("_", " "))
    return f"{title} ({unit})" if unit else title


def number(value: float) -> str:
    """Return a number to read: four digits, thousands set apart, a dash for what is not defined.

    >>> number(1234567.0), number(0.123456), number(float("nan"))
    ('1,234,567', '0.1235', '–')
    """
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def _subtitle(counted: "Counted") -> str:
    instances = counted.instances
    shape = " × ".join(map(str, instances.labels.shape))
    noun = "pixels" if instances.ndim == 2 else "voxels"
    if counted.in_pixels:
        return f"{shape} {noun}, measured in {noun} (px)"
    sizes = " × ".join(f"{s:.4g}" for s in instances.geometry.spacing[: instances.ndim])
    return f"{shape} {noun} of {sizes} {_UNITS[_short(counted)]}"


def _short(counted: "Counted") -> str:
    return "px" if counted.in_pixels else {"mm": "mm", "micron": "um"}[counted.instances.unit]


def _tiles(counted: "Counted", sizes: str | None, found: Mapping[str, Any]) -> dict[str, str]:
    tiles = {"Objects": f"{len(counted.instances):,}"}
    if sizes is not None:
        values = counted.table[sizes]
        spread = " to ".join(number(float(q)) for q in np.percentile(values, (25, 75)))
        middle = number(float(np.median(values)))
        tiles[f"Median {stem_of_column(sizes)}"] = f"{middle} {unit_of(sizes)}\nhalf are {spread}"
    tiles["At the border"] = f"{len(found['touch_border']):,}\ncut by the edge of the image"
    tiles["Dropped"] = f"{found['dropped_objects']:,}\nof {found['found_objects']:,} found; see below"
    return tiles


def _add_measures(report: HtmlReport, counted: "Counted") -> None:
    rows: list[list[CellLike]] = []
    for name, column in counted.table.columns.items():
        if stem_of_column(name) not in _MEASURES or column.dtype.kind not in "iuf":
            continue
        values = column[np.isfinite(column)].astype(np.float64)
        if values.size and not name.endswith("_ml"):
            rows.append([titled(name), *_summed_up(values), len(values)])
    order = {titled_stem: n for n, titled_stem in enumerate(_MEASURES.values())}
    rows.sort(key=lambda row: order[str(row[0]).partition(" (")[0]])
    columns = ["", "least", "lower quarter", "median", "upper quarter", "largest", "mean", "objects"]
    note = "A quarter of the objects lie below the lower quarter, a quarter above the upper one."
    report.add_table("Measurements", columns, rows, note)


def _summed_up(values: FloatArray) -> list[Cell]:
    shown = [*np.percentile(values, (0, 25, 50, 75, 100)).tolist(), float(values.mean())]
    return [Cell(number(value), value) for value in shown]


def _add_classes(report: HtmlReport, counted: "Counted") -> None:
    classes, counts = np.unique(counted.instances.classes, return_counts=True)
    if len(classes) > 1:
        rows = [(counted.instances.class_name(c), int(n)) for c, n in zip(classes, counts, strict=True)]
        report.add_table("Classes", ["class", "objects"], rows)


def _add_regions(report: HtmlReport, counted: "Counted") -> None:
    assert counted.regions is not None
    names = [name for name in counted.regions.columns if name != "region_name"]
    rows = []
    for row in counted.regions.rows():
        shown: list[CellLike] = [Cell(row["region_name"] or str(row["region"]))]
        rows.append(shown + [Cell(number(float(row[name])), float(row[name])) for name in names[1:]])
    columns = ["region", *(titled(name) for name in names[1:])]
    report.add_table("Regions", columns, rows, "An object is counted where most of its voxels lie.")


def _add_dropped(report: HtmlReport, found: Mapping[str, Any]) -> None:
    title = "Dropped, and what deserves a look"
    if not found["dropped"] and not found["one_voxel"]:
        report.add_text(title, "Nothing was dropped.")
        return
    size = next((name for each in found["dropped"] for name in each if "_" in name), "size")
    rows: list[list[CellLike]] = [
        [each["rule"], each["count"], each["voxels"], Cell(number(each[size]), each[size])]
        for each in found["dropped"]
    ]
    if found["one_voxel"]:
        labels = ", ".join(map(str, found["one_voxel"][:8]))
        more = ", …" if len(found["one_voxel"]) > 8 else ""
        rows.append(
            [f"kept, but of a single voxel (labels {labels}{more})", len(found["one_voxel"]), None, None]
        )
    report.add_table(title, ["why", "objects", "voxels", titled(size)], rows)


def _add_objects(report: HtmlReport, counted: "Counted", sizes: str, files: Mapping[str, Path]) -> None:
    table, total = counted.table, len(counted.instances)
    order = np.argsort(-table[sizes], kind="stable")[:_LISTED]
    names = [name for name in table.columns if stem_of_column(name) in _LIST and not name.endswith("_ml")]
    names = [name for name in names if np.isfinite(table[name]).any()]
    several = len(np.unique(counted.instances.classes)) > 1
    rows = []
    for at in order.tolist():
        values = [float(table[name][at]) for name in names]
        row: list[CellLike] = [at + 1, *([str(table["class_name"][at])] if several else [])]
        row += [Cell(number(v), None if math.isnan(v) else v) for v in values]
        rows.append([*row, "yes" if table["touches_border"][at] else ""])
    columns = ["label", *(["class"] if several else []), *map(titled, names), "at the border"]
    which = f"The {len(rows)} largest of {total:,}" if len(rows) < total else "All"
    note = f"{which}. {files['table'].name} has every column. Click a heading to sort."
    report.add_table("Objects, the largest first", columns, rows, note, sortable=True)


def _settings(counted: "Counted") -> dict[str, object]:
    facts = dict(counted.instances.provenance)
    unit = _UNITS[_short(counted)]
    diameter, version = facts.pop("diameter", None), facts.pop("medseg", medseg.__version__)
    shown: dict[str, object] = {"model": facts.pop("model", "")}
    if diameter:
        shown["diameter looked for"] = f"{number(diameter)} {unit}"
    refined = facts.pop("refined", None)
    if refined is not None:
        stayed = sum(each["sections"] for each in refined["sections_as_before"])
        drawn = f"{refined['sections_accepted']} sections, {stayed} left as they were"
        shown["drawn anew"] = f"by {refined['network']}: {drawn}"
    if "notes" in facts:
        shown["notes on the objects"] = "; ".join(facts.pop("notes"))
    notes = [note for note in counted.image.notes if note not in (FLAT_NOTE, NO_SCALE_NOTE)]
    if notes:
        shown["notes on the image"] = "; ".join(notes)
    return {**shown, **facts, "medseg": version}
