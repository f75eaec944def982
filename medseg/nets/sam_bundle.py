"""A fine-tuned SAM on disk: one folder or one ``.medseg`` zip, checked by its hash, never unpickled.

::

    promptable.json       Card: what it is, from which weights, under which licence, how good
    weights.safetensors   all weights, by the names of the authors of SAM; LoRA is merged
    README.md             the card for people (not hashed: it may be edited)
"""

import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

import medseg
from medseg.archive import Files, Limits, hash_member, open_files, read_member
from medseg.config import Config, parse_mapping
from medseg.errors import BundleError, ConfigError
from medseg.files import atomic_folder, recover_folder, sha256_file
from medseg.types import PathLike

CARD, WEIGHTS = "promptable.json", "weights.safetensors"
LIMITS = Limits(
    members=re.compile(rf"{re.escape(CARD)}|{re.escape(WEIGHTS)}|README\.md"),
    weights=re.compile(re.escape(WEIGHTS)),
)


class Card(Config):
    """The content of ``promptable.json``.

    Attributes
    ----------
    medseg : str
        Version that wrote it.
    base : str
        Network that was fine-tuned, a name of :data:`medseg.nets.sam.SPECS`.
    base_sha256, licence : str
        Of the weights that training started from.
    size : int
        Side of the input that it was fine-tuned at; ask it at the same.
    dataset : str
    labels : tuple of str
        Objects that were pointed at in training.
    trained : tuple of str
        Parts that were changed.
    metrics : mapping
        Dice on held-out cases, before and after.
    recipe : mapping
        All settings of the training.
    provenance : mapping
        Versions, cases, steps: plain data.
    sha256 : str
        Of the weights.
    """

    schema_version: Literal[1] = 1
    medseg: str = medseg.__version__
    base: str
    base_sha256: str
    licence: str
    size: int
    dataset: str = ""
    labels: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    metrics: dict[str, Any] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
    sha256: str = ""


def is_tuned(path: PathLike) -> bool:
    """Return whether `path` is a fine-tuned SAM, or the run folder of one; nothing is verified yet."""
    path = Path(path)
    if path.is_dir():
        return (path / CARD).is_file() or (path / "bundle" / CARD).is_file()
    try:
        with zipfile.ZipFile(path) as archive:
            return CARD in archive.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def read_card(path: PathLike) -> Card:
    """Return what is known about a fine-tuned SAM: the network that it replaces, its licence and input size.

    Raises
    ------
    BundleError
        It is none, or a file in it is missing, does not belong there, or has another schema.
    """
    return _card(_open(path))


def read_tuned(path: PathLike) -> tuple[dict[str, Tensor], str]:
    """Return verified weights, by the names of the authors of SAM, and the name of their network.

    Raises
    ------
    BundleError
        As for :func:`read_card`, or the weights are not those of the card.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    files = _open(path)
    card = _card(files)
    if hash_member(files, WEIGHTS) != card.sha256:
        raise BundleError(
            f"{files.path}: {WEIGHTS} was changed or damaged: its SHA-256 is not that in {CARD}. "
            "Copy it again."
        )
    local = files.local(WEIGHTS)
    try:
        weights = load(read_member(files, WEIGHTS)) if local is None else load_file(local)
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"{files.path}: {WEIGHTS} cannot be read. Export the model again.") from error
    return dict(weights), card.base


def hash_card(path: PathLike) -> str:
    """Return the SHA-256 of the card, which holds that of the weights."""
    return hashlib.sha256(read_member(_open(path), CARD)).hexdigest()


def save_tuned(folder: PathLike, network: nn.Module, card: Card) -> None:
    """Write a bundle, all or nothing; what is at `folder` is replaced."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
        (temporary / WEIGHTS).chmod(0o644)
        card = card.replace(sha256=sha256_file(temporary / WEIGHTS))
        card.save(temporary / CARD)
        (temporary / "README.md").write_text(_text(card), encoding="utf-8")


def _open(path: PathLike) -> Files:
    path = Path(path)
    recover_folder(path)
    if path.is_dir() and not (path / CARD).is_file() and (path / "bundle" / CARD).is_file():
        path = path / "bundle"
    if not path.exists() or (path.is_dir() and not (path / CARD).is_file()):
        raise BundleError(
            f"{path}: no {CARD}, so this is no fine-tuned SAM. Pass the bundle or the run folder of "
            "medseg train --task promptable."
        )
    files = open_files(path, LIMITS)
    for name in (CARD, WEIGHTS):
        if name not in files.names():
            raise BundleError(f"{path}: {name} is missing. Copy or export the bundle again.")
    return files


def _card(files: Files) -> Card:
    where = f"{files.path}, {CARD}"
    try:
        values = parse_mapping(read_member(files, CARD).decode(), where)
        version = values.get("schema_version")
        if isinstance(version, int) and version > 1:
            raise BundleError(f"{where}: has schema {version}, newer than this medseg. Update medseg.")
        return Card.from_dict(values, where)
    except (ConfigError, UnicodeDecodeError) as error:
        raise BundleError(str(error)) from error


def _text(card: Card) -> str:
    """Return the README."""
    lines = [
        f"# {card.base}, fine-tuned on {card.dataset or 'a dataset'}",
        "",
        f"Answers boxes and clicks. It was shown {', '.join(card.labels) or 'objects'} at {card.size} px.",
        "",
        f"- changed: {', '.join(card.trained)}",
        f"- licence of the weights that it began with: {card.licence} (SHA-256 {card.base_sha256})",
        f"- made by medseg {card.medseg}",
        *(f"- {name}: {value}" for name, value in card.metrics.items() if isinstance(value, int | float)),
        "",
        f"Use with `medseg prompt VOLUME --weights {card.base}=THIS_FOLDER ...`.",
        "",
    ]
    return "\n".join(lines)
