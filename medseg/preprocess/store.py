"""Preprocessed cases on disk: compressed chunks that are read patch by patch, named by their contents.

Each case is one folder ``CASE-KEY`` that appears whole, so a build that was interrupted goes on where it
stopped, and a change of the images or of the plan makes a new folder instead of silently reusing an old one.
``store.json`` says which folder each case name stands for.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medseg import log
from medseg.errors import DataError, MedsegError, ReadError
from medseg.files import atomic_folder, atomic_path, sha256_file, write_text
from medseg.io import Case, Dataset, read_image, read_label
from medseg.plan.objects import read_objects
from medseg.plan.schema import Plan
from medseg.preprocess.locations import class_locations, object_locations
from medseg.preprocess.pipeline import preprocess
from medseg.preprocess.record import Record
from medseg.types import Array, IntArray, PathLike, Shape
from medseg.volume import Volume

# Part of every key: raise it when preprocessing or the layout of a case folder changes.
STORE_VERSION = 1
INDEX = "store.json"

# nnU-Net's `comp_blosc2_params`: a block fits the L1/L2 cache, a chunk is at most 1.5 patches an axis.
MAX_BLOCK_BYTES = 128 << 10
MAX_CHUNK_BYTES = 6 << 20
CHUNK_PER_PATCH = 1.5

Precision = Literal["float32", "float16"]


@dataclass(frozen=True, eq=False)
class StoredCase:
    """One preprocessed case.

    Attributes
    ----------
    data : sliceable (c, a0, a1, a2), float32 or float16
        ``data[:, 3:40, 0:8, 5:9]`` reads only the chunks it touches.
    seg : sliceable (1, a0, a1, a2) int16, -1 outside the image; None without a label map
    locations : {entry name: (n, 3) int32}, see `class_locations`
    record : the way back to the source grid
    previous : sliceable (1, a0, a1, a2) labels of the previous stage, or None
    """

    data: Any
    seg: Any
    locations: Mapping[str, IntArray]
    record: Record
    previous: Any | None = None

    def in_memory(self) -> "StoredCase":
        """Return the same case with plain arrays, for data that fits in RAM."""
        data, seg, previous = (None if a is None else a[:] for a in (self.data, self.seg, self.previous))
        return StoredCase(data, seg, self.locations, self.record, previous)


class Store:
    """A folder of preprocessed cases.

    Parameters
    ----------
    folder : path that :func:`build_store` filled

    Raises
    ------
    DataError
        There is no store, or another version of medseg made it.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder)
        self._entries = _read_index(self.folder)
        if not self._entries:
            raise DataError(f"{self.folder}: no preprocessed cases here. Run build_store first.")

    @property
    def cases(self) -> tuple[str, ...]:
        """Case names, sorted."""
        return tuple(sorted(self._entries))

    @property
    def entries(self) -> tuple[str, ...]:
        """Folder names of the cases, for `clean`."""
        return tuple(sorted(self._entries.values()))

    def path(self, name: str) -> Path:
        """Return the folder of one case.

        Raises
        ------
        DataError
            There is no such case.
        """
        if name not in self._entries:
            raise DataError(
                f"{self.folder}: no case {name!r}; it has {len(self._entries)} others. Build again."
            )
        return self.folder / self._entries[name]

    def open(self, name: str) -> StoredCase:
        """Open one case; arrays stay on disk until they are sliced.

        Raises
        ------
        DataError
            There is no such case, or its folder is damaged.
        """
        folder = self.path(name)
        try:
            facts = json.loads((folder / "case.json").read_text(encoding="utf-8"))
            places = np.load(folder / "locations.npy", mmap_mode=None, allow_pickle=False)
            data, seg, previous = (
                _open_array(folder / f"{part}.b2nd") for part in ("data", "seg", "previous")
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{folder}: damaged ({error}). Delete this folder and build again.") from error
        if data is None:
            raise DataError(f"{folder}: data.b2nd is missing. Delete this folder and build again.")
        bounds = np.cumsum([0, *facts["locations"].values()])
        locations = {
            entry: places[start:stop]
            for entry, start, stop in zip(facts["locations"], bounds, bounds[1:], strict=False)
        }
        return StoredCase(data, seg, locations, Record.from_dict(facts["record"]), previous)

    def add_previous(self, name: str, labels: IntArray) -> None:
        """Store the label map of the previous stage of a cascade beside a case, replacing an older one.

        Parameters
        ----------
        name : case
        labels : (1, a0, a1, a2) integer, on the case's network grid

        Raises
        ------
        DataError
            There is no such case, or the map is not on its grid.
        """
        data = self.open(name).data
        if labels.shape != (1, *data.shape[1:]):
            raise DataError(f"{name}: previous labels {labels.shape} do not fit the case {data.shape}.")
        with atomic_path(self.path(name) / "previous.b2nd") as path:
            _save_array(path, labels, tuple(data.chunks[1:]))


def build_store(
    dataset: Dataset,
    plan: Plan,
    configuration: str,
    folder: PathLike,
    cases: Sequence[Case] | None = None,
    threads: int = 2,
    precision: Precision = "float32",
) -> Store:
    """Preprocess cases into a store; those that are there already are kept.

    Parameters
    ----------
    dataset : where the cases come from
    plan, configuration : how to preprocess
    folder : of the store; made if missing
    cases : which; all training cases by default
    threads : cases that are worked on at once (each holds one image in memory)
    precision : float16 halves disk and memory at an error of 5e-4 of a value

    Raises
    ------
    DataError
        Some cases could not be preprocessed; the message names them, the others are in the store.
    Cancelled
        On request; a later call goes on from there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = _recipe(plan, configuration, precision)
    cases = dataset.training if cases is None else cases

    def build(case: Case) -> str:
        entry = f"{case.name}-{_key(case, recipe)}"
        if not (folder / entry).is_dir():
            _build_case(case, plan, configuration, precision, folder / entry)
        return entry

    entries, failures = _run(build, cases, threads)
    if entries:
        index = {"version": STORE_VERSION, "cases": {**_read_index(folder), **entries}}
        write_text(folder / INDEX, json.dumps(index, indent=1))
    if failures:
        raise DataError(
            f"{len(failures)} of {len(cases)} cases could not be preprocessed; the others are done. "
            + " | ".join(f"{name}: {error}" for name, error in failures.items())
        )
    return Store(folder)


def clean(folder: PathLike, keep: Iterable[str] | None = None) -> tuple[str, ...]:
    """Remove what a store no longer needs: folders of older plans or images, leftovers of interrupted builds.

    Parameters
    ----------
    folder : of the store
    keep : entries (folder names) to keep; those of the store's index by default

    Returns
    -------
    tuple of str
        Names that were removed.
    """
    folder = Path(folder)
    index = _read_index(folder)
    wanted = set(index.values() if keep is None else keep)
    doomed = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in wanted]
    left = {name: entry for name, entry in index.items() if entry in wanted}
    if left != index:
        write_text(folder / INDEX, json.dumps({"version": STORE_VERSION, "cases": left}, indent=1))
    for path in doomed:
        shutil.rmtree(path)
    return tuple(path.name for path in doomed)


def _run(build: Any, cases: Sequence[Case], threads: int) -> tuple[dict[str, str], dict[str, MedsegError]]:
    """Build all cases; return their entries and the errors of those that failed."""
    entries: dict[str, str] = {}
    failures: dict[str, MedsegError] = {}
    with ThreadPoolExecutor(threads) as pool, log.task("Preprocessing", len(cases)) as running:
        waiting: dict[Future[str], Case] = {pool.submit(build, case): case for case in cases}
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    case = waiting.pop(future)
                    try:
                        entries[case.name] = future.result()
                    except DataError as error:
                        failures[case.name] = error
                    running.advance(note=case.name)
        finally:
            for future in waiting:
                future.cancel()
    return entries, failures


def _build_case(case: Case, plan: Plan, configuration: str, precision: Precision, folder: Path) -> None:
    label = None if case.label is None else _read_labels(case, plan, configuration)
    ready = preprocess(read_image(case), plan, configuration, label)
    locations = {} if ready.seg is None else _find_locations(ready.seg, plan, configuration)
    if label is not None and plan.configuration(configuration).detection is not None:
        _say_lost(case.name, label.array, sum(len(places) for places in locations.values()))
    chunks = chunk_shape(ready.data.shape[1:], plan.configuration(configuration).patch_size)
    with atomic_folder(folder) as place:
        _save_array(place / "data.b2nd", ready.data.astype(precision, copy=False), chunks)
        if ready.seg is not None:
            _save_array(place / "seg.b2nd", ready.seg, chunks)
        np.save(place / "locations.npy", np.concatenate([np.zeros((0, 3), np.int32), *locations.values()]))
        facts = {
            "record": ready.record.to_dict(),
            "locations": {name: len(places) for name, places in locations.items()},
        }
        (place / "case.json").write_text(json.dumps(facts), encoding="utf-8")


def _read_labels(case: Case, plan: Plan, configuration: str) -> Volume:
    detection = plan.configuration(configuration).detection
    return read_label(case) if detection is None else read_objects(case, plan.labels, detection.objects)


def _say_lost(name: str, labels: Array, left: int) -> None:
    """Tell of objects that nearest neighbours miss at the planned spacing."""
    lost = len(np.setdiff1d(labels, [0])) - left
    if lost > 0:
        log.logger.warning(
            "%s: %d objects are smaller than a voxel of the planned spacing, and are not learnt.", name, lost
        )


def _find_locations(seg: IntArray, plan: Plan, configuration: str) -> dict[str, IntArray]:
    if plan.configuration(configuration).detection is None:
        return class_locations(seg, plan.labels)
    return object_locations(seg, tuple(plan.labels.foreground))


def _recipe(plan: Plan, configuration: str, precision: Precision) -> dict[str, Any]:
    """Return what decides the bytes of a case, besides its files."""
    settings = plan.configuration(configuration).to_dict()
    fields = (
        "spacing",
        "normalization",
        "use_mask_for_norm",
        "order_data",
        "order_seg",
        "order_z",
        "patch_size",
    )
    detection = settings.get("detection")
    return {
        **({} if detection is None else {"objects": detection["objects"]}),
        "version": STORE_VERSION,
        "precision": precision,
        "transpose": plan.transpose_forward,
        "labels": plan.labels.to_dict(),
        "intensity": {name: stats.to_dict() for name, stats in plan.intensity.items()},
        **{name: settings[name] for name in fields},
    }


def _key(case: Case, recipe: dict[str, Any]) -> str:
    files = [*case.images, *([] if case.label is None else [case.label])]
    try:
        facts = {"recipe": recipe, "files": [sha256_file(file) for file in files]}
    except OSError as error:
        raise ReadError(f"{error.filename}: {error.strerror}. Check the file of case {case.name}.") from error
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.exists():
        return {}
    index = json.loads(path.read_text(encoding="utf-8"))
    if index.get("version") != STORE_VERSION:
        raise DataError(
            f"{path}: made by another version of medseg ({index.get('version')}, this one writes "
            f"{STORE_VERSION}). Delete the folder; it can be built again."
        )
    return dict(index["cases"])


def chunk_shape(shape: Shape, patch: Shape, max_bytes: int = MAX_CHUNK_BYTES, itemsize: int = 4) -> Shape:
    """Return the chunk for arrays of `shape` that are read in patches.

    At most 1.5 patches an axis; its longest axis is halved until it fits into `max_bytes`.

    >>> chunk_shape((300, 273, 273), (128, 128, 128))
    (96, 96, 96)
    """
    patch = (1,) * (len(shape) - len(patch)) + tuple(patch)
    chunk = [min(n, max(1, int(CHUNK_PER_PATCH * p))) for n, p in zip(shape, patch, strict=True)]
    return _halve(chunk, max_bytes, itemsize)


def _halve(size: Sequence[int], max_bytes: int, itemsize: int) -> Shape:
    size = list(size)
    while np.prod(size) * itemsize > max_bytes:
        longest = int(np.argmax(size))
        size[longest] = (size[longest] + 1) // 2
    return tuple(size)


def _save_array(path: Path, array: Array, chunks: Shape) -> None:
    blocks = (1, *_halve(chunks, MAX_BLOCK_BYTES, array.itemsize))
    import blosc2  # takes 0.3 s, and prediction does not need it

    # Against nnU-Net's LZ4HC level 5, on hippocampus images: a fifth of the time to write, files of 0.8 the
    # size, 1.9 instead of 1.2 ms to read a megabyte.
    parameters = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "nthreads": 1, "filters": [blosc2.Filter.SHUFFLE]}
    blosc2.asarray(
        np.ascontiguousarray(array),
        urlpath=str(path),
        mode="w",
        chunks=(1, *chunks),
        blocks=blocks,
        cparams=parameters,
    )


def _open_array(path: Path) -> Any | None:
    import blosc2

    if not path.exists():
        return None
    mapped = {} if os.name == "nt" else {"mmap_mode": "r"}
    return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **mapped)
