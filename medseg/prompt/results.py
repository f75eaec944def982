"""One image, prompted: opened with options, pointed at, and written with names and provenance."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from medseg import log
from medseg.config import Config
from medseg.errors import ConfigError, DataError
from medseg.files import check_writable, write_text
from medseg.io import read
from medseg.io.formats import WRITERS, stem_of, suffix_of, write
from medseg.prompt.entries import Request, Unit
from medseg.prompt.journal import JOURNAL
from medseg.prompt.prompts import PLANES
from medseg.prompt.session import PromptSession, resolve_config
from medseg.prompt.state import Overlap, Settings
from medseg.types import PathLike
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.prompt.scene import Scene
    from medseg.prompt.slicewise import Models
    from medseg.prompt.workbench import Propagate


class Options(Config):
    """How an image is looked at and objects are found; what is not given is as the session has it.

    Attributes
    ----------
    coordinates : ``mm`` or ``voxel``
    window, modality, overlap, propagator, config : see :class:`medseg.prompt.state.Settings`
    channel : of an image with several, from 0
    """

    coordinates: Unit = "mm"
    window: str | tuple[float, float] | None = None
    modality: str | None = None
    overlap: Overlap | None = None
    propagator: str | None = None
    config: dict[str, Any] | None = None
    channel: int | None = Field(None, ge=0)


class Networks:
    """Makes the networks for one image after another; weights are loaded once.

    Parameters
    ----------
    given : files to use instead of downloads, by asset
    cache : for embeddings; None: in memory
    """

    def __init__(self, given: Mapping[str, PathLike] | None = None, cache: PathLike | None = None) -> None:
        self.given, self.cache = dict(given or {}), cache
        self._last: Models | None = None

    def __call__(self, scene: "Scene") -> "Models":
        """Return the networks for a scene."""
        from medseg.prompt.embeddings import EmbeddingCache
        from medseg.prompt.slicewise import Models

        if self._last is None:
            self._last = Models.open(scene, EmbeddingCache(self.cache), given=self.given)
        else:
            self._last = self._last.of(scene)
        return self._last

    @cached_property
    def hashes(self) -> frozenset[str]:
        """SHA-256 of the weights of every network, as they are given or published.

        Raises
        ------
        AssetError, BundleError
            A given file cannot be read.
        """
        from medseg.assets import ASSETS
        from medseg.prompt.provenance import describe_weights

        known = (describe_weights(name, self.given.get(name)) for name in {*ASSETS, *self.given})
        return frozenset(each["sha256"] for each in known if each is not None)


def find_image(name: PathLike) -> Path:
    """Return the file of an image, which may be a sample named by its asset.

    Raises
    ------
    AssetError
        The sample cannot be had.
    """
    from medseg.assets import ASSETS, find

    named = ASSETS.get(str(name))
    if named is None or Path(name).exists() or not suffix_of(named.filename):
        return Path(name)
    return find(named.name)


def open_image(
    image: PathLike | Volume,
    options: Options,
    folder: PathLike | None = None,
    networks: "Networks | None" = None,
    propagate: "Propagate | None" = None,
    overrides: Sequence[str] = (),
) -> PromptSession:
    """Begin a session about an image, or go on with the one in `folder`, with some options.

    `overrides`, ``key=value``, change the settings of the propagator: those of the session if it stays the
    same, else its defaults.
    """
    going_on = folder is not None and (Path(folder) / JOURNAL).exists()
    anew = options.propagator is not None or not going_on
    if overrides and anew:
        options = options.replace(config=_overridden(options.propagator, {}, overrides))
    elif options.propagator is not None and options.config is None:
        options = options.replace(config={})
    session = _open(image, options, folder, networks, propagate)
    if overrides and not anew:
        try:
            settings = session.state.settings
            session.change(config=_overridden(settings.propagator, settings.config, overrides))
        except BaseException:
            session.close()
            raise
    return session


def _overridden(
    propagator: str | None, config: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    from medseg.prompt import DEFAULT

    settings = Settings(propagator=propagator or DEFAULT, config=dict(config))
    return resolve_config(settings).with_overrides(overrides, "--set").to_dict()


def _open(
    image: PathLike | Volume,
    options: Options,
    folder: PathLike | None,
    networks: "Networks | None",
    propagate: "Propagate | None",
) -> PromptSession:
    volume = image if isinstance(image, Volume) else read(image)
    for note in (*volume.notes, *_not_finite(volume, options.channel)):
        log.logger.info("%s%s.", "" if isinstance(image, Volume) else f"{image}: ", note.rstrip("."))
    return PromptSession.open(
        volume,
        folder,
        window=options.window,
        modality=options.modality,
        overlap=options.overlap,
        propagator=options.propagator,
        config=options.config,
        channel=options.channel,
        models=networks,
        propagate=propagate,
    )


def point(session: PromptSession, requests: Sequence[Request], run: bool = True) -> None:
    """Point at objects, one after the other: each is one step of the session."""
    for request in log.progress(requests, "Objects"):
        session.add(request.name, *request.prompts, run=run, axis=request.axis, limits=request.limits)


def describe(session: PromptSession) -> list[dict[str, Any]]:
    """Return what is known of every object, as plain data: size, reach, confidence, where to look next."""
    rows = []
    for label, known in enumerate(session.state.objects, 1):
        region = session.mask(known.name)
        axis = 2 if known.axis is None else known.axis
        scores = [score for _, score in known.confidence]
        row: dict[str, Any] = {
            "name": known.name,
            "label": label,
            "voxels": region.voxels,
            "volume_ml": _millilitres(session, region.voxels),
            "plane": PLANES[axis],
            "slices": region.stop[axis] - region.start[axis],
            "confidence": round(float(np.mean(scores)), 4) if scores else None,
            "notes": list(known.notes),
        }
        looked = session.suggest(known.name)
        if looked is not None:
            place = [round(x, 2) for x in looked.position_mm]
            row["look_next"] = {"reason": looked.reason, "doubt": round(looked.doubt, 4), "position": place}
        rows.append(row)
    return rows


def check_output(image: Path, out: Path) -> None:
    """Refuse an output that cannot be written, or that would replace the image, before any work.

    Raises
    ------
    ConfigError
        medseg does not write this format, or it is the image itself.
    OutputError
        The place cannot be written.
    """
    if suffix_of(out) not in WRITERS:
        raise ConfigError(f"{out}: medseg does not write this format. Use one of {' '.join(WRITERS)}.")
    if out.resolve() == image.resolve():
        raise ConfigError(f"{out}: the label map would replace its image. Choose another output.")
    check_writable(out)


def report_path(out: Path) -> Path:
    """Return where names, provenance and figures of a label map are: beside it.

    >>> report_path(Path("liver.nii.gz")).name
    'liver.prompt.json'
    """
    return out.with_name(f"{stem_of(out)}.prompt.json")


def write_result(session: PromptSession, image: str, out: Path) -> list[dict[str, Any]]:
    """Write the label map, and beside it what its integers mean and how it came to be; return the rows.

    Raises
    ------
    DataError
        Objects share voxels, and nobody has said whose they are; or there is no object.
    """
    if not session.objects:
        raise DataError("there is no object to write. Point at one: --box, --point or --scribble.")
    segmentation = session.segmentation()
    rows = describe(session)
    content = {
        "input": image,
        "output": out.name,
        "labels": segmentation.labels.to_dict(),
        "objects": rows,
        "provenance": segmentation.provenance,
    }
    write(segmentation.volume, out)
    write_text(report_path(out), json.dumps(content, indent=1))
    return rows


def _millilitres(session: PromptSession, voxels: int) -> float:
    geometry = session.scene.source
    scale = 1e-12 if geometry.unit == "micron" else 1e-3
    return float(f"{voxels * geometry.voxel_volume * scale:.6g}")


def _not_finite(volume: Volume, channel: int | None) -> tuple[str, ...]:
    """Say that some voxels are not numbers; they are taken for the darkest."""
    array = volume.array if channel is None or channel >= volume.channels else volume.array[channel]
    if array.dtype.kind not in "fc":
        return ()
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    said = f"{bad:,} of {array.size:,} voxels are not numbers; they are taken for the darkest"
    return (said,) if 0 < bad < array.size else ()
