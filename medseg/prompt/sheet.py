"""A contact sheet of prompted objects: one picture that tells at a glance whether a mask can be trusted.

For every object: the whole slice in three planes where it is largest, slices through it from end to end with
what was pointed at, and how confident the network was along the way. Slices are in the radiologist's view
(patient's left on the right, front or head up) and in the aspect of the body.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.files import atomic_path
from medseg.metrics.report import PALETTE
from medseg.prompt.overlap import union
from medseg.prompt.prompts import PLANES, Box, Lasso, Point, Prompt, Scribble
from medseg.prompt.regions import Region
from medseg.prompt.scene import Scene
from medseg.types import BoolArray, FloatArray, PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from medseg.prompt.session import PromptSession

# Inches of the whole, of its parts, and dots an inch.
_WIDTH, _MARGIN, _GAP = 12.0, 0.3, 0.09
_HEAD, _PLANE, _STRIP, _BETWEEN = 0.62, 3.7, 0.95, 0.34
_DPI = 110
_COLUMNS, _ROWS = 6, 2
_GROUND, _PANEL, _INK, _MUTED, _LINE = "#11151b", "#000000", "#f2f5f8", "#9aa7b5", "#2a323c"
_INSIDE, _OUTSIDE = "#7CFC8A", "#FF6B6B"
# More objects than this are shown together: a sheet is looked at, not scrolled through.
MOST_BLOCKS = 6
# Names that the legend of many objects has room for.
_MOST_NAMES = 24
# A prompted slice is shown in place of the largest if the object is nearly as large there.
_NEARLY = 0.7
# For each plane: what is on the left, right, top and bottom of the picture.
_LETTERS = {"sagittal": tuple("APSI"), "coronal": tuple("RLSI"), "axial": tuple("RLAP")}
_EDGES = (
    *((0.03, 0.5, "left", "center"), (0.97, 0.5, "right", "center")),
    *((0.5, 0.965, "center", "top"), (0.5, 0.035, "center", "bottom")),
)


@dataclass(frozen=True, eq=False)
class Shown:
    """One object of a sheet.

    Attributes
    ----------
    name : str
    region : Region
        On the turned grid of the scene.
    axis : int
        Across which slices were taken.
    prompts : tuple of Prompt
    confidence : mapping of slice to 0..1
    window : (float, float)
        Values drawn black and white; None: those of the scene.
    note : str
        Under the name.
    """

    name: str
    region: Region
    axis: int = 2
    prompts: tuple[Prompt, ...] = ()
    confidence: Mapping[int, float] = field(default_factory=dict)
    window: tuple[float, float] | None = None
    note: str = ""


def write_sheet(session: "PromptSession", path: PathLike, title: str = "") -> None:
    """Draw all objects of a session and write the picture (PNG).

    Raises
    ------
    OutputError, ResourceError
        It cannot be written.
    """
    png = draw_sheet(session.scene, shown_of(session), title)
    with atomic_path(path) as temporary:
        temporary.write_bytes(png)


def shown_of(session: "PromptSession") -> list[Shown]:
    """Return what a sheet shows of every object of a session."""
    found = []
    for known in session.state.objects:
        region = session.mask(known.name)
        axis = 2 if known.axis is None else known.axis
        geometry = session.scene.geometry
        millilitres = region.voxels * geometry.voxel_volume * (1e-12 if geometry.unit == "micron" else 1e-3)
        scores = [score for _, score in known.confidence]
        words = [
            f"{millilitres:,.4g} ml",
            _count(region.stop[axis] - region.start[axis], f"{PLANES[axis]} slice"),
            _count(len(known.prompts), "prompt"),
        ]
        if scores:
            words.append(f"confidence {np.mean(scores):.2f}")
        if known.window is not None:
            words.append(f"window {known.window.name} ({known.window.low:.5g} to {known.window.high:.5g})")
        words.append(f"propagator {known.propagator or session.state.settings.propagator}")
        prompts = tuple(each for each in known.prompts if isinstance(each, Point | Box | Scribble | Lasso))
        window = None if known.window is None else known.window.values
        note = "  ·  ".join(words)
        found.append(Shown(known.name, region, axis, prompts, dict(known.confidence), window, note))
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def draw_sheet(scene: Scene, objects: Sequence[Shown], title: str = "", together: bool = False) -> bytes:
    """Draw objects of one image.

    Parameters
    ----------
    scene : the image
    objects : a block each; more than :data:`MOST_BLOCKS` are drawn into one
    title : of the whole
    together : draw them into one block, however few they are

    Returns
    -------
    bytes
        A PNG.
    """
    from matplotlib.figure import Figure

    colours = {each.name: PALETTE[n % len(PALETTE)] for n, each in enumerate(objects)}
    together = bool(objects) and (together or len(objects) > MOST_BLOCKS)
    blocks = _together(scene, objects) if together else list(objects)
    heights = [_block_height(scene, block) for block in blocks]
    top = 0.55 if title else 0.15
    height = top + sum(heights) + _BETWEEN * max(0, len(blocks) - 1) + _MARGIN
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor=_GROUND)
    page = _Page(figure, scene, () if together else objects, objects if together else (), colours, height)
    if title:
        page.text(_MARGIN, 0.38, title, size=15, weight="bold")
    for block, size in zip(blocks, heights, strict=True):
        page.draw(block, top)
        top += size + _BETWEEN
    if not blocks:
        page.text(_MARGIN, top + 0.1, "no objects", size=11, colour=_MUTED)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, facecolor=_GROUND, metadata={"Software": None})
    return stream.getvalue()


def _together(scene: Scene, objects: Sequence[Shown]) -> list[Shown]:
    """Return one block that stands for all objects."""
    whole = union(*(each.region for each in objects))
    prompts = tuple(prompt for each in objects for prompt in each.prompts)
    names = [each.name for each in objects[:_MOST_NAMES]]
    more = f" and {len(objects) - len(names)} more" if len(objects) > len(names) else ""
    note = f"{len(objects)} objects: {', '.join(names)}{more}"
    return [Shown("All objects", whole, objects[0].axis, prompts, {}, objects[0].window, note)]


def _block_height(scene: Scene, block: Shown) -> float:
    if not block.region.voxels:
        return _HEAD
    cell = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) / _COLUMNS
    rows = -(-len(_slices_of(scene, block)) // _COLUMNS)
    strip = _STRIP + _GAP if block.confidence else 0.0
    return _HEAD + _PLANE + _GAP + rows * (cell + _GAP) + strip


def _slices_of(scene: Scene, block: Shown) -> list[int]:
    """Return the slices of the montage, from the first of the object to the last, evenly.

    Those on which the user has pointed, and the least confident one, take the place of their neighbours.
    """
    low, stop = block.region.start[block.axis], block.region.stop[block.axis]
    count = min(_COLUMNS * _ROWS, stop - low)
    chosen = sorted({round(float(x)) for x in np.linspace(low, stop - 1, count)})
    wanted = list(dict.fromkeys(k for k in _prompted(scene, block) if low <= k < stop))
    known = [k for k in block.confidence if low <= k < stop]
    if known:
        wanted.append(min(known, key=lambda k: block.confidence[k]))
    kept: set[int] = set()
    for index in wanted[: count - 2]:
        free = [k for k in chosen if k not in kept]
        if index not in chosen and free:
            chosen.remove(min(free, key=lambda k: abs(k - index)))
            chosen.append(index)
        kept.add(index)
    return sorted(chosen)


class _Page:
    """A figure in inches from the top left, and what is drawn on it."""

    def __init__(
        self,
        figure: "Figure",
        scene: Scene,
        objects: Sequence[Shown],
        tinted: Sequence[Shown],
        colours: Mapping[str, str],
        height: float,
    ) -> None:
        self.figure, self.scene, self.objects, self.colours = figure, scene, objects, colours
        self.tinted = tinted
        self.height = height

    def text(
        self, x: float, y: float, words: str, size: float = 9, weight: str = "normal", colour: str = _INK
    ) -> None:
        self.figure.text(
            x / _WIDTH,
            1 - y / self.height,
            words,
            fontsize=size,
            fontweight=weight,
            color=colour,
            va="center",
        )

    def axes(self, x: float, y: float, width: float, height: float) -> "Axes":
        place = (x / _WIDTH, 1 - (y + height) / self.height, width / _WIDTH, height / self.height)
        return self.figure.add_axes(place, facecolor=_PANEL)

    def draw(self, block: Shown, top: float) -> None:
        """Draw a block."""
        colour = self.colours.get(block.name, _INK)
        self.figure.patches.append(self._bar(_MARGIN, top + 0.03, 0.07, _HEAD - 0.17, colour))
        self.text(_MARGIN + 0.2, top + 0.13, block.name, size=13, weight="bold")
        note = block.note if block.region.voxels else f"{block.note}  ·  nothing was found"
        self.text(_MARGIN + 0.2, top + 0.38, _clipped(note), size=9, colour=_MUTED)
        if not block.region.voxels:
            return
        y = self._planes(block, top + _HEAD)
        y = self._montage(block, y)
        if block.confidence:
            self._strip(block, y, colour)

    def _bar(self, x: float, y: float, width: float, height: float, colour: str) -> Any:
        from matplotlib.patches import Rectangle

        place = (x / _WIDTH, 1 - (y + height) / self.height)
        transform = self.figure.transFigure
        return Rectangle(place, width / _WIDTH, height / self.height, color=colour, transform=transform)

    def _planes(self, block: Shown, top: float) -> float:
        """Draw the whole slice where the object is largest, in three planes."""
        width = (_WIDTH - 2 * _MARGIN - 2 * _GAP) / 3
        order = [block.axis, *(axis for axis in (2, 1, 0) if axis != block.axis)]
        for n, axis in enumerate(order):
            index = _largest(block, axis, self.scene)
            axes = self.axes(_MARGIN + n * (width + _GAP), top, width, _PLANE)
            self._slice(axes, block, axis, index, self._whole(axis, width / _PLANE), letters=True)
        return top + _PLANE + _GAP

    def _montage(self, block: Shown, top: float) -> float:
        """Draw slices through the object from end to end, in a crop around all of it."""
        cell = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) / _COLUMNS
        view = self._around(block)
        chosen, pointed = _slices_of(self.scene, block), set(_prompted(self.scene, block))
        for n, index in enumerate(chosen):
            row, column = divmod(n, _COLUMNS)
            axes = self.axes(_MARGIN + column * (cell + _GAP), top + row * (cell + _GAP), cell, cell)
            self._slice(axes, block, block.axis, index, view, letters=False)
            if index in pointed:
                axes.spines[:].set(color=_INSIDE, linewidth=1.2)
        return top + -(-len(chosen) // _COLUMNS) * (cell + _GAP)

    def _slice(
        self, axes: "Axes", block: Shown, axis: int, index: int, view: FloatArray, letters: bool
    ) -> None:
        """Draw one slice with every object, and with the prompts of this block."""
        across, up = _others(axis)
        steps = self.scene.spacing
        array = self.scene.array.take(index, axis)
        low, high = block.window or self.scene.window
        size = [array.shape[0] * steps[across], array.shape[1] * steps[up]]
        axes.imshow(
            array.T,
            cmap="gray",
            vmin=low,
            vmax=max(high, low + 1e-6),
            origin="lower",
            extent=(0.0, size[0], 0.0, size[1]),
            interpolation="bilinear",
            aspect="auto",
        )
        if self.tinted:
            self._tint(axes, axis, index, size)
        for each in self.objects:
            mask = each.region.plane(axis, index)
            if mask.any():
                strong = each.name == block.name
                _outline(axes, mask, (steps[across], steps[up]), self.colours[each.name], strong)
        for prompt in block.prompts:
            _mark(axes, self.scene, prompt, axis, index)
        axes.set_xlim(view[0, 1], view[0, 0])  # patient's left (or back) on the right
        axes.set_ylim(view[1, 0], view[1, 1])
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(_LINE)
        self._caption(axes, block, axis, index, letters)

    def _tint(self, axes: "Axes", axis: int, index: int, size: Sequence[float]) -> None:
        """Draw many objects at once: each with its colour, stronger along its edge."""
        from matplotlib.colors import to_rgb

        across, up = _others(axis)
        labels = np.zeros((self.scene.shape[across], self.scene.shape[up]), dtype=np.int32)
        for n, each in enumerate(self.tinted, 1):
            if each.region.start[axis] <= index < each.region.stop[axis]:
                rows, columns = (each.region.slices[a] for a in (across, up))
                part = each.region.array.take(index - each.region.start[axis], axis)
                labels[rows, columns][part] = n
        edge = np.zeros(labels.shape, dtype=bool)
        for a in range(2):
            differ = np.diff(labels, axis=a) != 0
            edge[tuple(slice(0, -1) if b == a else slice(None) for b in range(2))] |= differ
            edge[tuple(slice(1, None) if b == a else slice(None) for b in range(2))] |= differ
        table = np.array([(0.0, 0.0, 0.0), *(to_rgb(self.colours[each.name]) for each in self.tinted)])
        alpha = np.where(labels > 0, np.where(edge, 0.9, 0.3), 0.0)
        picture = np.concatenate([table[labels], alpha[..., None]], axis=-1).swapaxes(0, 1)
        extent = (0.0, size[0], 0.0, size[1])
        axes.imshow(picture, origin="lower", extent=extent, interpolation="nearest", aspect="auto")

    def _caption(self, axes: "Axes", block: Shown, axis: int, index: int, letters: bool) -> None:
        where = _height_mm(self.scene, axis, index)
        unit = "µm" if self.scene.geometry.unit == "micron" else "mm"
        words = f"{PLANES[axis]} {where:+.1f} {unit}" if letters else f"{where:+.1f} {unit}"
        _say(axes, 0.03, 0.965, words, "left", "top", 8.5 if letters else 7.5)
        if axis == block.axis and index in block.confidence:
            score = block.confidence[index]
            _say(axes, 0.97, 0.965, f"{score:.2f}", "right", "top", 7.5, _tone(score))
        if letters:
            for letter, (x, y, across, along) in zip(_LETTERS[PLANES[axis]], _EDGES, strict=True):
                _say(axes, x, y, letter, across, along, 9)

    def _whole(self, axis: int, aspect: float) -> FloatArray:
        """Return the view, [[left, right], [bottom, top]] in mm, of a whole slice in a panel."""
        across, up = _others(axis)
        size = [self.scene.shape[a] * self.scene.spacing[a] for a in (across, up)]
        return _fitted(np.array([[0.0, size[0]], [0.0, size[1]]]), aspect)

    def _around(self, block: Shown) -> FloatArray:
        """Return the square view around an object and what it was pointed at with."""
        sides = list(_others(block.axis))
        step = np.array(self.scene.spacing)[sides]
        low, high = (np.array(ends, dtype=float)[sides] for ends in (block.region.start, block.region.stop))
        for prompt in block.prompts:
            first, last = _span(self.scene, prompt)
            low, high = np.minimum(low, first[sides] + 0.5), np.maximum(high, last[sides] + 0.5)
        view = np.stack([low * step, high * step], axis=1)
        side = max(float(np.ptp(view, axis=1).max()) * 1.3, 12 * min(self.scene.spacing))
        return np.stack([view.mean(axis=1) - side / 2, view.mean(axis=1) + side / 2], axis=1)

    def _strip(self, block: Shown, top: float, colour: str) -> None:
        """Draw confidence and area along the axis."""
        axes = self.axes(_MARGIN + 0.42, top + 0.08, _WIDTH - 2 * _MARGIN - 0.42, _STRIP - 0.38)
        axes.set_facecolor(_GROUND)
        region, axis = block.region, block.axis
        low, stop = region.start[axis], region.stop[axis]
        known = sorted(k for k in block.confidence if low <= k < stop)
        others = tuple(a for a in range(3) if a != axis)
        areas = np.count_nonzero(region.array, axis=others)
        axes.fill_between(
            np.arange(low, stop),
            areas / max(1, areas.max()),
            step="mid",
            color=colour,
            alpha=0.22,
            linewidth=0,
        )
        scores = np.array([block.confidence[k] for k in known])
        axes.plot(known, scores, color=_INK, linewidth=1.2)
        axes.scatter(known, scores, c=[_tone(s) for s in scores], s=14, zorder=3, linewidths=0)
        for index in sorted(set(_prompted(self.scene, block))):
            axes.axvline(index, color=_INSIDE, linewidth=1.0, linestyle=(0, (3, 2)))
        axes.set_xlim(low - 0.7, stop - 0.3)
        axes.set_ylim(0, 1.08)
        axes.set_yticks([0, 0.5, 1])
        ticks = sorted({round(float(x)) for x in np.linspace(low, stop - 1, min(9, stop - low))})
        axes.set_xticks(ticks, [f"{_height_mm(self.scene, axis, k):+.0f}" for k in ticks])
        axes.tick_params(colors=_MUTED, labelsize=7.5, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_LINE)
        words = "confidence (line) and area (shade) along the axis; dashes, green frames: where you pointed"
        axes.set_xlabel(words, color=_MUTED, fontsize=7.5, loc="left", labelpad=1)


def _clipped(text: str, most: int = 165) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _others(axis: int) -> tuple[int, int]:
    """Return the axes that go across and up in a picture of a slice."""
    across, up = (a for a in range(3) if a != axis)
    return across, up


def _fitted(view: FloatArray, aspect: float) -> FloatArray:
    """Return a view grown to the aspect (width over height) of its panel, around its middle."""
    width, height = np.ptp(view, axis=1)
    width, height = max(width, height * aspect), max(height, width / aspect)
    half = np.array([width, height]) / 2
    return np.stack([view.mean(axis=1) - half, view.mean(axis=1) + half], axis=1)


def _largest(block: Shown, axis: int, scene: Scene) -> int:
    """Return the slice where the object is largest, or a prompted one on which it is nearly as large."""
    others = tuple(a for a in range(3) if a != axis)
    areas = np.count_nonzero(block.region.array, axis=others)
    best, start = int(np.argmax(areas)), block.region.start[axis]
    if axis == block.axis:
        for index in _prompted(scene, block):
            if 0 <= index - start < len(areas) and areas[index - start] >= _NEARLY * areas[best]:
                return index
    return start + best


def _prompted(scene: Scene, block: Shown) -> Iterator[int]:
    """Yield the slices across the block's axis on which prompts lie, in their order."""
    for prompt in block.prompts:
        low, high = _span(scene, prompt)
        if high[block.axis] - low[block.axis] < 1.5:
            yield round(float((low[block.axis] + high[block.axis]) / 2))


def _span(scene: Scene, prompt: Prompt) -> tuple[FloatArray, FloatArray]:
    """Return the lowest and highest voxel position of a prompt; a flat one is one slice."""
    if isinstance(prompt, Point):
        points = scene.to_voxel(np.array([prompt.position_mm]))
    elif isinstance(prompt, Box):
        points = scene.to_voxel(np.array([prompt.corner_mm, prompt.opposite_mm]))
    else:
        assert isinstance(prompt, Scribble | Lasso)
        points = scene.to_voxel(np.array(prompt.points_mm))
    low, high = points.min(axis=0), points.max(axis=0)
    plane = getattr(prompt, "plane", None)
    if plane is not None and not isinstance(prompt, Point):
        axis = PLANES.index(plane)
        low[axis] = high[axis] = np.ceil((low[axis] + high[axis]) / 2 - 0.5 - 1e-6)
    return low, high


def _mark(axes: "Axes", scene: Scene, prompt: Prompt, axis: int, index: int) -> None:
    """Draw a prompt where it crosses a slice."""
    low, high = _span(scene, prompt)
    if not low[axis] - 0.5 <= index <= high[axis] + 0.5:
        return
    across, up = _others(axis)
    steps = np.array([scene.spacing[across], scene.spacing[up]])
    colour = _INSIDE if getattr(prompt, "positive", True) else _OUTSIDE
    if isinstance(prompt, Box):
        first = (low[[across, up]] + 0.5) * steps
        last = (high[[across, up]] + 0.5) * steps
        _rectangle(axes, first, last, colour)
        return
    if isinstance(prompt, Point):
        points = scene.to_voxel(np.array([prompt.position_mm]))
    else:
        assert isinstance(prompt, Scribble | Lasso)
        points = scene.to_voxel(np.array(prompt.points_mm))
        if isinstance(prompt, Scribble):
            points = points[np.abs(points[:, axis] - index) <= max(0.5, np.ptp(points[:, axis]))]
    places = (points[:, [across, up]] + 0.5) * steps
    if isinstance(prompt, Lasso) and PLANES.index(prompt.plane) == axis:
        places = np.concatenate((places, places[:1]))
    _line(axes, places, colour, cross=isinstance(prompt, Point), positive=colour == _INSIDE)


def _rectangle(axes: "Axes", first: FloatArray, last: FloatArray, colour: str) -> None:
    from matplotlib.patches import Rectangle

    size = last - first
    for ink, width, alpha in ((_GROUND, 2.6, 0.7), (colour, 1.2, 1.0)):
        axes.add_patch(
            Rectangle(
                (float(first[0]), float(first[1])),
                float(size[0]),
                float(size[1]),
                fill=False,
                edgecolor=ink,
                linewidth=width,
                alpha=alpha,
                linestyle=(0, (4, 2)) if ink == colour else "-",
            )
        )


def _line(axes: "Axes", places: FloatArray, colour: str, cross: bool, positive: bool) -> None:
    from matplotlib.patheffects import withStroke

    effect = [withStroke(linewidth=3.2, foreground=_GROUND)]
    if cross:
        marker = "+" if positive else "x"
        axes.plot(
            places[:, 0],
            places[:, 1],
            marker,
            color=colour,
            markersize=9,
            markeredgewidth=1.8,
            path_effects=effect,
        )
    else:
        axes.plot(places[:, 0], places[:, 1], color=colour, linewidth=1.4, path_effects=effect)


def _outline(axes: "Axes", mask: BoolArray, steps: tuple[float, float], colour: str, strong: bool) -> None:
    """Draw a mask of (across, up) as a tint and a line around it."""
    from medseg.geometry.crop import bounding_box

    (left, right), (low, high) = bounding_box(mask)
    part = np.pad(mask[left:right, low:high], 1).astype(np.float64).T
    x = (np.arange(left - 1, right + 1) + 0.5) * steps[0]
    y = (np.arange(low - 1, high + 1) + 0.5) * steps[1]
    if strong:
        axes.contourf(x, y, part, levels=(0.5, 1.5), colors=[colour], alpha=0.2)
        axes.contour(x, y, part, levels=(0.5,), colors=[_GROUND], linewidths=2.6, alpha=0.55)
    axes.contour(x, y, part, levels=(0.5,), colors=[colour], linewidths=1.5 if strong else 0.8)


def _say(
    axes: "Axes",
    x: float,
    y: float,
    words: str,
    across: str,
    along: str,
    size: float,
    colour: str = _INK,
) -> None:
    from matplotlib.patheffects import withStroke

    axes.text(
        x,
        y,
        words,
        transform=axes.transAxes,
        ha=across,
        va=along,
        fontsize=size,
        color=colour,
        path_effects=[withStroke(linewidth=2.2, foreground=_GROUND)],
    )


def _tone(score: float) -> str:
    """Return green for a confident slice, amber for a doubtful one, red for one to look at."""
    return _INSIDE if score >= 0.8 else "#FFC857" if score >= 0.6 else _OUTSIDE


def _height_mm(scene: Scene, axis: int, index: int) -> float:
    """Return the world coordinate of a slice along its axis, in the middle of the volume."""
    voxel = (np.array(scene.shape) - 1) / 2
    voxel[axis] = index
    return float(scene.to_world(voxel)[axis])
