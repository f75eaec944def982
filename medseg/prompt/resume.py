"""What the result of a case was made from, and whether it is whole: what a stopped batch need not do again.

A case is sealed last: its report (``NAME.prompt.json``) then holds the SHA-256 of the files that it came
from, of what was asked, and of the files that were written. What a kill leaves at any moment before is a
report without this, or one beside other files, and is done again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from medseg.errors import ReadError
from medseg.files import sha256_file, write_text
from medseg.io.formats import suffix_of
from medseg.io.itk import data_files
from medseg.prompt.entries import ObjectEntry, split_value
from medseg.prompt.results import Options, report_path
from medseg.prompt.session import resolve_config
from medseg.prompt.state import Settings

ORIGIN = "made_from"
# Headers that may name other files with the voxels.
_DETACHED = (".mhd", ".nhdr")


def find_origin(
    image: Path, objects: Sequence[ObjectEntry], options: Options, folder: Path, own: bool = False
) -> dict[str, Any]:
    """Return all that a result depends on but the weights, as hashes.

    Parameters
    ----------
    image : of the case
    objects : what is said about them
    options : of the case
    folder : where the paths of masks begin
    own : the propagator is one of the caller's

    Raises
    ------
    ConfigError
        A setting is wrong.
    """
    texts = sorted({each.mask for known in objects for each in known.prompts if each.mask is not None})
    masks = [split_value(text, folder)[0] for text in texts]
    asked = {"objects": [each.to_dict() for each in objects], "settings": _resolved(options, own)}
    return {
        "image": _hash_image(image),
        "masks": [_hash_image(path) for path in masks],
        "prompts": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
    }


def seal(out: Path, origin: Mapping[str, Any], written: Iterable[Path]) -> None:
    """Say in the report of a label map what it was made from: from now on, the case is done."""
    path = report_path(out)
    report = json.loads(path.read_text(encoding="utf-8"))
    report[ORIGIN] = {**origin, "files": {each.name: sha256_file(each) for each in written}}
    write_text(path, json.dumps(report, indent=1))


def find_finished(
    out: Path, origin: Mapping[str, Any], weights: frozenset[str], written: Iterable[Path]
) -> tuple[dict[str, Any], ...] | None:
    """Return what is known of the objects of a case that is done; None if it has to be done.

    Parameters
    ----------
    out : label map
    origin : what it would be made from now
    weights : hashes of all weights that would be used now
    written : files that belong to the result
    """
    try:
        report = json.loads(report_path(out).read_text(encoding="utf-8"))
        before = dict(report[ORIGIN])
        files = before.pop("files")
        used = {str(model["sha256"]) for model in report["provenance"]["models"]}
        rows = tuple(
            {**row, "name": str(row["name"]), "volume_ml": float(row["volume_ml"])}
            for row in report["objects"]
        )
        same = before == json.loads(json.dumps(origin)) and used <= weights
        whole = same and all(sha256_file(path) == files[path.name] for path in written)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return rows if whole else None


def _resolved(options: Options, own: bool) -> dict[str, Any]:
    """Return all settings of a case: what is not said is as it is by default."""
    from medseg.prompt import DEFAULT
    from medseg.prompt.looks import WEIGHTS

    rest = ("coordinates", "channel")
    said = {
        name: value for name, value in options.to_dict().items() if value is not None and name not in rest
    }
    settings = Settings.from_dict({"propagator": DEFAULT, **said}, "options")
    found = {**settings.to_dict(), "coordinates": options.coordinates, "channel": options.channel}
    if own:
        return found
    if settings.propagator == "volume":  # has weights of its own, which come with medseg
        found["refiner"] = sha256_file(WEIGHTS)
    return {**found, "config": resolve_config(settings).to_dict()}


def _hash_image(path: Path) -> str | None:
    """Return the SHA-256 of an image with all its files; None where one cannot be read."""
    with suppress(OSError, ReadError):
        parts = [sha256_file(path)]
        if suffix_of(path) in _DETACHED:
            parts += [sha256_file(each) for each in data_files(path)]
        return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()
    return None
