"""The one HTML page that every report of medseg uses, and the drawings that go into it.

A page is one file: style, script, plots (SVG) and pictures (PNG) are inside, so it can be mailed, printed
and read offline. Colours are those of Okabe & Ito (2008), distinguishable with any colour vision.

>>> report = HtmlReport("Hippocampus", facts={"Dice": "0.89"})
>>> report.add_table("Summary", ["class", "Dice"], [["anterior", 0.894]]).render().count("<table")
1
"""

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import quote

import numpy as np

from medseg.files import write_text
from medseg.types import Array, BoolArray, FloatArray, PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008) without black, ordered so that neighbours differ most on a grey image.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#0072B2")
_INK, _MUTED, _GRID = "#1c2430", "#5a6675", "#dfe4ea"
# Quartiles of fewer values say nothing that the points do not show.
_BOX_FROM = 5
# Values that span more than this factor are drawn on a logarithmic axis.
_LOG_FROM = 30
# More points than this are drawn as an image inside the SVG, which keeps a page small.
_MANY_POINTS = 3000
_STYLE = {
    "font.size": 9.0,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "medseg",
}

Tone = Literal["", "warn", "bad"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes
    ----------
    text : what is shown
    value : what the column is sorted by; a number also aligns right. None: sorted as text, last if empty
    note : small text under it; a line break makes a further line
    tone : ``"warn"`` or ``"bad"`` marks the cell
    part : length of a bar under the text, in [0, 1]
    link : name of a file beside the page, which a click on the text opens
    """

    text: str
    value: float | None = None
    note: str = ""
    tone: Tone = ""
    part: float | None = None
    link: str = ""


CellLike = Cell | str | float | int | None


@dataclass(frozen=True)
class Picture:
    """A PNG and what is to be seen on it; a click opens `link`, the name of a file beside the page."""

    png: bytes
    caption: str
    note: str = ""
    link: str = ""


class HtmlReport:
    """A page that is built section by section; every ``add_*`` returns the report.

    Parameters
    ----------
    title : heading of the page
    subtitle : a line under it
    facts : the few numbers a reader looks for first, shown as tiles
    """

    def __init__(self, title: str, subtitle: str = "", facts: Mapping[str, str] | None = None) -> None:
        self.title = title
        self.subtitle = subtitle
        self.facts = dict(facts or {})
        self.sections: list[dict[str, Any]] = []

    def add_text(self, title: str, *paragraphs: str) -> Self:
        """Add plain paragraphs."""
        return self._add("text", title, paragraphs=paragraphs)

    def add_facts(self, title: str, facts: Mapping[str, object]) -> Self:
        """Add names and values, such as settings and versions, as a compact list."""
        return self._add("facts", title, facts={name: str(value) for name, value in facts.items()})

    def add_table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[CellLike]],
        note: str = "",
        sortable: bool = False,
        total: bool = False,
    ) -> Self:
        """Add a table; a float shows three digits, None a dash.

        `sortable`: by a click on a heading. `total`: the last row sums up the others and stands out.
        """
        cells = [[_cell(item) for item in row] for row in rows]
        numeric = [any(row[k].value is not None for row in cells) for k in range(len(columns))]
        return self._add(
            "table",
            title,
            columns=list(zip(columns, numeric, strict=True)),
            rows=cells,
            note=note,
            sortable=sortable,
            total=total,
        )

    def add_figure(self, title: str, drawing: str | bytes, caption: str = "") -> Self:
        """Add a drawing: SVG text from this module, or the bytes of a PNG."""
        svg = drawing if isinstance(drawing, str) else ""
        png = _base64(drawing) if isinstance(drawing, bytes) else ""
        return self._add("figure", title, svg=svg, png=png, caption=caption)

    def add_pictures(
        self,
        title: str,
        pictures: Iterable[Picture],
        note: str = "",
        legend: Mapping[str, str] | None = None,
    ) -> Self:
        """Add a grid of pictures; `legend` maps a class to its colour."""
        items = [
            {"png": _base64(p.png), "caption": p.caption, "note": p.note, "link": p.link} for p in pictures
        ]
        return self._add("pictures", title, pictures=items, note=note, legend=dict(legend or {}))

    def render(self) -> str:
        """Return the page."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        environment = Environment(
            loader=PackageLoader("medseg.metrics", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["beside"] = lambda name: f"./{quote(name, safe='')}"
        return environment.get_template("report.html").render(report=self)

    def write(self, path: PathLike) -> None:
        """Write the page, atomically."""
        write_text(path, self.render())

    def _add(self, kind: str, title: str, **content: object) -> Self:
        defaults = {"note": "", "sortable": False, "total": False}
        self.sections.append({**defaults, "kind": kind, "title": title, **content})
        return self


def class_colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each class, by order; the seven of PALETTE come round again."""
    return {name: PALETTE[k % len(PALETTE)] for k, name in enumerate(names)}


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    size: tuple[float, float] = (7.2, 3.0),
) -> str:
    """Draw lines, each named at its right end, as SVG.

    Parameters
    ----------
    series : mapping of name to (x, y)
        NaN leaves a gap.
    x_label, y_label : axis titles with their units
    log_y : logarithmic y axis
    size : inches
    """
    with _figure(size) as (figure, draw):
        axes = figure.add_subplot()
        for (name, (x, y)), colour in zip(series.items(), _cycle(len(series)), strict=True):
            axes.plot(x, y, color=colour, linewidth=1.6, label=name, marker="o" if len(x) == 1 else "")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=_GRID, linewidth=0.7)
        if log_y:
            axes.set_yscale("log")
        if len(series) > 1:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return draw()


def histogram(values: FloatArray, x_label: str, y_label: str, size: tuple[float, float] = (7.2, 2.6)) -> str:
    """Draw how many values lie where, with a line at the median, as SVG.

    Parameters
    ----------
    values : (n,), n > 0
        Finite.
    x_label, y_label : axis titles with their units
    size : inches
    """
    edges, log = histogram_edges(values)
    middle = float(np.median(values))
    with _figure(size) as (figure, draw):
        axes = figure.add_subplot()
        axes.hist(values, edges.tolist(), color=PALETTE[1], edgecolor="#ffffff", linewidth=0.6)
        axes.axvline(middle, color=_INK, linewidth=1.2, linestyle="--", label=f"median {middle:.4g}")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.locator_params(axis="y", integer=True)
        axes.grid(axis="y", color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(frameon=False)
        return draw()


def histogram_edges(values: FloatArray) -> tuple[FloatArray, bool]:
    """Return where bars begin and end, and whether the axis is logarithmic.

    It is where positive values span more than a factor of 30. There are twice as many bars as the cube root
    of the number of values (Rice's rule), 5 to 60.

    Examples
    --------
    >>> histogram_edges(np.array([0.0, 10.0]))
    (array([ 0.,  2.,  4.,  6.,  8., 10.]), False)
    """
    low, high = float(values.min()), float(values.max())
    count = int(np.clip(np.ceil(2 * len(values) ** (1 / 3)), 5, 60))
    log = low > 0 and high / low > _LOG_FROM
    if log:
        edges = np.geomspace(low, high, count + 1)
    elif high - low > 1e-9 * max(abs(low), abs(high)):
        edges = np.linspace(low, high, count + 1)
    else:  # as good as equal: one bar as wide as its value, so that it can be seen
        wide = abs(high) / 2 or 0.5
        edges = np.array([low - wide, high + wide])
    if len(edges) > 2:
        edges[[0, -1]] = low, high  # which rounding would leave out
    return edges, log


@dataclass(frozen=True)
class Panel:
    """One metric of :func:`strip_plot`: values per class, and the value of a perfect result."""

    title: str
    values: Mapping[str, FloatArray]
    best: float


def strip_plot(panels: Sequence[Panel], width: float = 10.0) -> str:
    """Draw every case as a point and each class as a box (quartiles, whiskers 1.5 IQR), panels side by side.

    Not finite values are left out of the drawing; tell their number elsewhere. Returns SVG.
    """
    names = list(panels[0].values)
    with _figure((width, 0.75 + 0.42 * len(names))) as (figure, draw):
        rows: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False)
        for axes, panel in zip(rows[0], panels, strict=True):
            _draw_strips(axes, panel, class_colours(names))
        return draw()


def slice_picture(
    image: Array | None,
    reference: Array,
    prediction: Array,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    codes: str = "RAS",
    axis: int | None = None,
    index: int | None = None,
    colours: Mapping[int, str] | None = None,
    size: float = 4.0,
    letters: bool = True,
) -> bytes:
    """Draw one slice: reference as solid outline, prediction as tinted area with a dashed outline.

    What is tinted outside of the outline is a false positive, what is untinted inside is a miss.

    Parameters
    ----------
    image : (i, j, k), optional
        Drawn in grey, between its 1st and 99th percentile; without it the ground is dark.
    reference, prediction : (i, j, k) int or bool
        Label maps on one grid.
    spacing : three numbers
        Voxel size along i, j, k.
    codes : three letters
        Where i, j, k increase to (``geometry.orient.axis_codes``). The slice is turned to the radiologist's
        view: patient's left on the right, anterior or head up.
    axis, index : int, optional
        The slice. By default the axis of the thickest slices, and there the slice where the two maps differ
        most (where they agree everywhere: with the largest object).
    colours : mapping of label value to colour, optional
        By default PALETTE by value.
    size : inches
        Longer side of the picture, at 110 dots an inch.
    letters : bool
        Whether the sides of the patient are written on the borders.

    Returns
    -------
    bytes
        A PNG.
    """
    axis = _slice_axis(spacing, codes) if axis is None else axis
    index = worst_slice(reference, prediction, axis) if index is None else index
    view = _view(axis, codes, spacing)
    truth, guess = view.take(reference, index), view.take(prediction, index)
    ground = None if image is None else view.take(image, index)
    window, steps = _window((truth != 0) | (guess != 0), view.steps), view.steps
    height, width = ((s.stop - s.start) * step for s, step in zip(window, steps, strict=True))
    scale = size / max(height, width)
    with _figure((max(width * scale, 1.2), max(height * scale, 1.2))) as (figure, _):
        figure.set_layout_engine("none")
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        if ground is not None:
            _draw_ground(axes, ground, window, steps)
        for value in sorted((set(np.unique(truth)) | set(np.unique(guess))) - {0}):
            colour = (colours or {}).get(int(value)) or PALETTE[(int(value) - 1) % len(PALETTE)]
            _draw_label(axes, truth == value, guess == value, colour, steps)
        _finish_slice(axes, window, steps, view.letters if letters else ("",) * 4)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=110, facecolor="#11151b", metadata={"Software": None})
        return stream.getvalue()


def worst_slice(reference: Array, prediction: Array, axis: int) -> int:
    """Return the index along `axis` where most voxels differ, or with the largest object if none does."""
    others = tuple(a for a in range(reference.ndim) if a != axis)
    errors = (reference != prediction).sum(axis=others)
    return int(np.argmax(errors if errors.any() else (reference != 0).sum(axis=others)))


@dataclass(frozen=True)
class _View:
    """How a slice across `axis` is turned: rows go down, columns go right."""

    axis: int
    rows: int
    flips: tuple[bool, bool]
    steps: tuple[float, float]
    letters: tuple[str, str, str, str]  # left, right, top, bottom

    def take(self, array: Array, index: int) -> Array:
        plane = np.asarray(array).take(index, axis=self.axis)
        first = 0 if self.axis else 1
        if self.rows != first:
            plane = plane.T
        return np.ascontiguousarray(plane[:: -1 if self.flips[0] else 1, :: -1 if self.flips[1] else 1])


_OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))


def _view(axis: int, codes: str, spacing: Sequence[float]) -> _View:
    rest = [a for a in range(3) if a != axis]
    upright = [a for a in rest if codes[a] in "SI"] or [a for a in rest if codes[a] in "AP"]
    rows = upright[0]
    columns = next(a for a in rest if a != rows)
    top = "S" if codes[rows] in "SI" else "A"
    right = "L" if codes[columns] in "RL" else "P"
    return _View(
        axis,
        rows,
        (codes[rows] == top, codes[columns] != right),
        (float(spacing[rows]), float(spacing[columns])),
        (_OPPOSITE[right], right, top, _OPPOSITE[top]),
    )


def _slice_axis(spacing: Sequence[float], codes: str) -> int:
    """Return the axis of thick slices; where voxels are nearly cubes, the one from feet to head."""
    if max(spacing) > 1.3 * min(spacing):
        return int(np.argmax(spacing))
    return next(a for a in range(3) if codes[a] in "SI")


def _window(mask: BoolArray, steps: tuple[float, float]) -> tuple[slice, slice]:
    """Return rows and columns around the objects, with a margin of 30 % and at least 8 voxels."""
    window = []
    for side in range(2):
        hit = np.flatnonzero(mask.any(axis=1 - side))
        n = mask.shape[side]
        low, high = (int(hit[0]), int(hit[-1]) + 1) if hit.size else (0, n)
        window.append((low, high, n))
    longest = max((high - low) * step for (low, high, _), step in zip(window, steps, strict=True))
    cut = []
    for (low, high, n), step in zip(window, steps, strict=True):
        margin = max(8, round(0.3 * longest / step), round((0.8 * longest / step - (high - low)) / 2))
        cut.append(slice(max(0, low - margin), min(n, high + margin)))
    return cut[0], cut[1]


def _draw_ground(
    axes: "Axes", ground: Array, window: tuple[slice, slice], steps: tuple[float, float]
) -> None:
    seen = ground[window].astype(np.float64)
    seen = seen[np.isfinite(seen)]
    low, high = np.percentile(seen, (1, 99)) if seen.size else (0.0, 1.0)
    height, width = ground.shape
    axes.imshow(
        ground.astype(np.float64),
        cmap="gray",
        vmin=low,
        vmax=max(high, low + 1e-6),
        extent=(0.0, width * steps[1], height * steps[0], 0.0),
        interpolation="bilinear",
    )


def _draw_label(
    axes: "Axes", truth: BoolArray, guess: BoolArray, colour: str, steps: tuple[float, float]
) -> None:
    rows, columns = ((np.arange(-1, n + 1) + 0.5) * s for n, s in zip(truth.shape, steps, strict=True))
    drawn = [np.pad(mask, 1).astype(np.float64) for mask in (guess, truth)]
    if guess.any():
        axes.contourf(columns, rows, drawn[0], levels=(0.5, 1.5), colors=[colour], alpha=0.32)
        axes.contour(columns, rows, drawn[0], levels=(0.5,), colors=[colour], linewidths=1.1, linestyles="--")
    if truth.any():
        axes.contour(columns, rows, drawn[1], levels=(0.5,), colors=["#11151b"], linewidths=3.0, alpha=0.6)
        axes.contour(columns, rows, drawn[1], levels=(0.5,), colors=[colour], linewidths=1.7)


def _finish_slice(
    axes: "Axes",
    window: tuple[slice, slice],
    steps: tuple[float, float],
    letters: tuple[str, str, str, str],
) -> None:
    from matplotlib.patheffects import withStroke

    axes.set_xlim(window[1].start * steps[1], window[1].stop * steps[1])
    axes.set_ylim(window[0].stop * steps[0], window[0].start * steps[0])
    axes.set_axis_off()
    places = (
        (0.02, 0.5, "left", "center"),
        (0.98, 0.5, "right", "center"),
        (0.5, 0.98, "center", "top"),
        (0.5, 0.02, "center", "bottom"),
    )
    for letter, (x, y, across, along) in zip(letters, places, strict=True):
        axes.text(
            x,
            y,
            letter,
            transform=axes.transAxes,
            ha=across,
            va=along,
            color="#ffffff",
            fontsize=9,
            path_effects=[withStroke(linewidth=2.5, foreground="#11151b")],
        )


def _draw_strips(axes: "Axes", panel: Panel, colours: Mapping[str, str]) -> None:
    generator = np.random.default_rng(0)  # only spreads points that would hide each other
    many = sum(len(v) for v in panel.values.values()) > _MANY_POINTS
    for row, (name, values) in enumerate(panel.values.items()):
        values = values[np.isfinite(values)]
        spread = row + generator.uniform(-0.26, 0.26, len(values))
        axes.scatter(
            values, spread, s=20, color=colours[name], alpha=0.7, linewidths=0, rasterized=many, zorder=2
        )
        if len(values) >= _BOX_FROM:
            _draw_box(axes, row, values)
    axes.axvline(panel.best, color=_MUTED, linewidth=0.9, linestyle=":", zorder=1)
    axes.set_title(panel.title, fontsize=9.5, loc="left", color=_INK)
    axes.set_yticks(range(len(panel.values)), list(panel.values))
    axes.set_ylim(len(panel.values) - 0.5, -0.5)
    axes.grid(axis="x", color=_GRID, linewidth=0.7, zorder=0)
    axes.tick_params(axis="y", length=0)


def _draw_box(axes: "Axes", row: int, values: FloatArray) -> None:
    line: dict[str, Any] = {"color": _INK, "linewidth": 1.0}
    axes.boxplot(
        [values],
        positions=[row],
        orientation="horizontal",
        widths=0.5,
        showfliers=False,
        manage_ticks=False,
        zorder=3,
        boxprops=line,
        whiskerprops=line,
        capprops=line,
        medianprops={"color": _INK, "linewidth": 2.2},
    )


class _figure:  # noqa: N801 - reads as a statement: with _figure(size) as (figure, draw)
    """A matplotlib figure in the style of the page; no window system, no global state left behind."""

    def __init__(self, size: tuple[float, float]) -> None:
        self.size = size

    def __enter__(self) -> "tuple[Figure, Callable[[], str]]":
        import matplotlib
        from matplotlib.figure import Figure

        self.context = matplotlib.rc_context(_STYLE)
        self.context.__enter__()
        self.figure = Figure(figsize=self.size, layout="constrained")
        return self.figure, self.svg

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(None, None, None)

    def svg(self) -> str:
        """Return the drawing as an SVG element that scales with the page."""
        stream = io.StringIO()
        self.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = stream.getvalue()
        text = text[text.index("<svg") :].replace("'DejaVu Sans', ", "")
        return re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', text, count=1)


def _cycle(n: int) -> list[str]:
    strong = [colour for colour in PALETTE if colour != "#F0E442"]  # yellow lines vanish on white
    return [strong[k % len(strong)] for k in range(n)]


def _cell(item: CellLike) -> Cell:
    if isinstance(item, Cell):
        return item
    if item is None:
        return Cell("–")
    if isinstance(item, str):
        return Cell(item)
    if isinstance(item, float):
        return Cell(f"{item:.3f}" if math.isfinite(item) else "–", item if not math.isnan(item) else None)
    return Cell(str(item), float(item))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
