"""A trained model on disk: one folder or one ``.medseg`` zip, checked by hashes, never unpickled.

::

    bundle.yaml                  Manifest: what the weights are for, and the SHA-256 of every file below
    plan.yaml                    the plan, labels included
    weights/fold_N.safetensors   one file a fold
    README.md                    the card for people (not hashed: it may be edited)
    previous/                    a bundle of its own: the first stage of a cascade
"""

import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

import medseg
from medseg.archive import Files, Limits, hash_member, open_files, read_member
from medseg.config import Config, dump_yaml, parse_mapping
from medseg.errors import BundleError, ConfigError, PlanError
from medseg.files import atomic_folder, atomic_path, recover_folder, sha256_file
from medseg.labels import LabelSet
from medseg.plan.schema import Configuration, Plan
from medseg.types import PathLike

if TYPE_CHECKING:
    from torch import Tensor, nn

ZIP_SUFFIX = ".medseg"
_WEIGHTS = r"(previous/)*weights/fold_[\w-]+\.safetensors"
LIMITS = Limits(
    members=re.compile(rf"{_WEIGHTS}|(previous/)*(bundle\.yaml|plan\.yaml|README\.md)"),
    weights=re.compile(_WEIGHTS),
)

MODELS = (
    "a bundle of medseg (folder, .medseg file or run folder), a model of nnU-Net (results folder or exported "
    "zip) or a MONAI bundle (folder or zip)"
)
"""What `medseg.load_model` opens, in words for errors."""

# What models of other programs have: nnU-Net's and MONAI's.
_FOREIGN = re.compile(r"(?:.*/)?(?:plans\.json|configs/(?:metadata|inference)\.(?:json|ya?ml))")

StateDict = Mapping[str, "Tensor"]
C = TypeVar("C", bound=Config)


class Manifest(Config):
    """The content of ``bundle.yaml``.

    Attributes
    ----------
    configuration : of the plan, that the weights belong to
    folds : names of the weight files, in the order they are averaged
    mirror_axes : patch axes that may be flipped at prediction
    card : what is known about the training; plain data
    postprocessing : settings of `medseg.postprocess`, chosen by cross-validation; plain data
    previous : whether a first stage is inside
    sha256 : of every file by its name in the bundle
    """

    schema_version: Literal[1] = 1
    medseg: str
    configuration: str
    folds: tuple[str, ...]
    mirror_axes: tuple[int, ...] = ()
    card: dict[str, Any] = Field(default_factory=dict)
    postprocessing: dict[str, Any] | None = None
    previous: bool = False
    sha256: dict[str, str]


@dataclass(frozen=True)
class Bundle:
    """A trained model, ready to predict.

    Attributes
    ----------
    plan, configuration : what the network is and how images become its input
    weights : by fold, a function that loads the state dict (nothing is read before it is called)
    mirror_axes : patch axes that may be flipped
    card : what is known about the training; ``precision`` and ``mirroring`` are the defaults at prediction
        (``mirroring: all`` flips along left-right even if labels have sides, as the model was trained)
    postprocessing : plain data for `medseg.postprocess`
    previous : first stage of a cascade
    path, digest : where it came from, and the SHA-256 of its manifest, which covers all its files
    """

    plan: Plan
    configuration: str
    weights: Mapping[str, Callable[[], StateDict]]
    mirror_axes: tuple[int, ...] = ()
    card: Mapping[str, Any] = field(default_factory=dict)
    postprocessing: dict[str, Any] | None = None
    previous: "Bundle | None" = None
    path: Path | None = None
    digest: str = ""

    @property
    def folds(self) -> tuple[str, ...]:
        """Names of the folds."""
        return tuple(self.weights)

    @property
    def settings(self) -> Configuration:
        """The configuration that the weights belong to."""
        return self.plan.configuration(self.configuration)

    @property
    def labels(self) -> LabelSet:
        """Meaning of the outputs."""
        return self.plan.labels

    @property
    def keeps_sides(self) -> bool:
        """Whether a case must not be flipped along its left-right axis, because labels say left or right."""
        return bool(self.labels.sided) and self.card.get("mirroring") != "all"

    @property
    def in_channels(self) -> int:
        """Channels of the network: of the image, and one a label of the first stage in a cascade."""
        extra = len(self.labels.foreground_values) if self.settings.previous_stage else 0
        return len(self.plan.channels) + extra

    @property
    def task(self) -> str:
        """What the outputs mean: ``segment`` (labels), or ``centre-offset`` (objects by their centres)."""
        return str(self.card.get("task", "segment"))

    @property
    def n_outputs(self) -> int:
        """Channels of the network's output."""
        if self.task == "segment":
            return self.labels.n_outputs
        from medseg.nets.centre_heads import CentreHeads

        return CentreHeads(self.labels.n_outputs, self.settings.dimensions).channels

    def state_dict(self, fold: str) -> StateDict:
        """Return the weights of one fold.

        Raises
        ------
        BundleError
            There is no such fold.
        """
        if fold not in self.weights:
            raise BundleError(f"{self}: no fold {fold!r}. It has {', '.join(self.folds)}.")
        return self.weights[fold]()

    def network(self, fold: str) -> "nn.Module":
        """Return the network with the weights of one fold, for prediction.

        Raises
        ------
        BundleError
            There is no such fold, or its weights do not fit the planned network.
        """
        weights = self.state_dict(fold)
        network = self._build()
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            first = str(error).split("\n")[1 if "\n" in str(error) else 0].strip()
            raise BundleError(
                f"{self}, fold {fold}: the weights do not fit the {self.settings.architecture.network} "
                f"of its plan ({first}). Export the model again."
            ) from error
        return network.eval()

    def _build(self) -> "nn.Module":
        architecture, detection = self.settings.architecture, self.settings.detection
        if detection is not None:
            from medseg.nets.maskrcnn import MaskRCNN

            return MaskRCNN(architecture, detection, self.in_channels)
        from medseg.nets import build_network

        return build_network(architecture, self.in_channels, self.n_outputs, deep_supervision=False)

    def __str__(self) -> str:
        return str(self.path) if self.path else f"model of {self.plan.dataset_name}"


def load_bundle(path: PathLike) -> Bundle:
    """Open a bundle and verify every file against its hash.

    Parameters
    ----------
    path : bundle folder, ``.medseg`` zip, or run folder of ``medseg train``

    Raises
    ------
    BundleError
        There is none, a file is missing, damaged, linked, misplaced or too large, or the schema is newer.
        Models of other programs are opened by `medseg.load_model`.
    """
    path = Path(path)
    recover_folder(path)
    if path.is_dir() and not (path / "bundle.yaml").exists():
        recover_folder(path / "bundle")
    if path.is_dir() and not (path / "bundle.yaml").exists() and (path / "bundle").is_dir():
        path = path / "bundle"
    if not path.exists():
        raise BundleError(
            f"{path}: no such bundle. Pass a bundle folder, a {ZIP_SUFFIX} file or a run folder."
        )
    # Whatever else this is, it is not walked through.
    if not (path / "bundle.yaml").exists() if path.is_dir() else _is_foreign_zip(path):
        raise BundleError(
            f"{path}: no bundle.yaml, so this is not a bundle. Check the path; a model of nnU-Net or MONAI "
            "opens with medseg.load_model."
        )
    files = open_files(path, LIMITS)
    return _open_at(files, files.names(), path, "")


def _is_foreign_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError):
        return False  # opening it says why
    return "bundle.yaml" not in names and any(_FOREIGN.fullmatch(name) for name in names)


def no_such_model(path: PathLike) -> str:
    """Return what to say where there is nothing: it is the same whoever looked."""
    return f"{path}: no such model. Pass {MODELS}."


def save_bundle(
    path: PathLike,
    plan: Plan,
    configuration: str,
    weights: Mapping[str, StateDict],
    mirror_axes: tuple[int, ...],
    card: Mapping[str, Any],
    postprocessing: dict[str, Any] | None = None,
    previous: Bundle | None = None,
) -> None:
    """Write a bundle, or add and replace folds of one that exists; all or nothing.

    Folds that are already there stay, and so do post-processing and first stage where not given. Flips
    that any fold was trained without are not allowed any more.

    Parameters
    ----------
    path : folder, or file ending in ``.medseg``
    weights : by fold name, the state dict; may be empty to change only the rest
    card : plain data for people and for the defaults of prediction

    Raises
    ------
    BundleError
        The bundle at `path` belongs to another plan or configuration.
    """
    path = Path(path)
    plan.configuration(configuration)
    if odd := [name for name in weights if not re.fullmatch(r"[\w-]+", name)]:
        raise BundleError(f"{path}: fold {odd[0]!r} is no name for a file. Use letters, digits, _ and -.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        recover_folder(path)
        existing = load_bundle(path) if path.exists() else None
        if existing is not None:
            if existing.plan != plan or existing.configuration != configuration:
                raise BundleError(
                    f"{path}: holds a {existing.configuration} model of another plan. Choose another name."
                )
            mirror_axes = tuple(axis for axis in mirror_axes if axis in existing.mirror_axes)
            postprocessing = existing.postprocessing if postprocessing is None else postprocessing
            previous = previous or existing.previous
        merged = Bundle(
            plan,
            configuration,
            {**(existing.weights if existing else {}), **{name: _given(w) for name, w in weights.items()}},
            mirror_axes,
            card,
            postprocessing,
            previous,
        )
        write_bundle(path, merged)


def _given(weights: StateDict) -> Callable[[], StateDict]:
    return lambda: weights


def write_bundle(path: PathLike, bundle: Bundle) -> None:
    """Write a bundle as it is, all or nothing; what is at `path` is replaced.

    Weights are loaded one fold at a time.

    Parameters
    ----------
    path : folder, or file ending in ``.medseg``
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ZIP_SUFFIX:
        with atomic_folder(path) as folder:
            _write_folder(folder, bundle)
        return
    with atomic_path(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as parts:
        _write_folder(Path(parts), bundle)
        _zip_folder(Path(parts), temporary)


def _write_folder(folder: Path, bundle: Bundle) -> None:
    (folder / "plan.yaml").write_text(dump_yaml(bundle.plan.to_dict()), encoding="utf-8")
    (folder / "weights").mkdir()
    for fold in bundle.folds:
        _save_weights(folder / "weights" / f"fold_{fold}.safetensors", bundle.state_dict(fold))
    if bundle.previous is not None:
        (folder / "previous").mkdir()
        _write_folder(folder / "previous", bundle.previous)
    names = sorted(str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file())
    manifest = Manifest(
        medseg=medseg.__version__,
        configuration=bundle.configuration,
        folds=bundle.folds,
        mirror_axes=bundle.mirror_axes,
        card=dict(bundle.card),
        postprocessing=bundle.postprocessing,
        previous=bundle.previous is not None,
        sha256={name: sha256_file(folder / name) for name in names if not name.endswith("README.md")},
    )
    (folder / "bundle.yaml").write_text(dump_yaml(manifest.to_dict()), encoding="utf-8")
    (folder / "README.md").write_text(_card_text(bundle), encoding="utf-8")


def _save_weights(path: Path, weights: StateDict) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.detach().to("cpu").contiguous() for name, value in weights.items()}
    save_file(tensors, path)
    path.chmod(0o644)


def _zip_folder(folder: Path, target: Path) -> None:
    """Weights go in as they are (they do not compress), text deflated."""
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            weights = file.suffix == ".safetensors"
            method = zipfile.ZIP_STORED if weights else zipfile.ZIP_DEFLATED
            archive.write(file, file.relative_to(folder).as_posix(), compress_type=method)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time change a bundle: folds may finish together."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where folds are trained one after the other
        yield
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _open_at(files: Files, names: set[str], where: Path, prefix: str) -> Bundle:
    """Build the bundle whose files start with `prefix`."""
    if prefix + "bundle.yaml" not in names:
        raise BundleError(f"{where}: no {prefix}bundle.yaml, so this is not a bundle. Check the path.")
    text = read_member(files, prefix + "bundle.yaml")
    manifest = _parse(text, where, prefix + "bundle.yaml", Manifest)
    _verify(files, names, where, prefix, manifest)
    plan = _parse(read_member(files, prefix + "plan.yaml"), where, prefix + "plan.yaml", Plan)
    try:
        plan.configuration(manifest.configuration)
    except PlanError as error:
        raise BundleError(f"{where}: {error}") from error
    return Bundle(
        plan=plan,
        configuration=manifest.configuration,
        weights={fold: _loader(files, prefix + _weight_file(fold), where) for fold in manifest.folds},
        mirror_axes=manifest.mirror_axes,
        card=manifest.card,
        postprocessing=manifest.postprocessing,
        previous=_open_at(files, names, where, prefix + "previous/") if manifest.previous else None,
        path=where,
        digest=hashlib.sha256(text).hexdigest(),
    )


def _weight_file(fold: str) -> str:
    return f"weights/fold_{fold}.safetensors"


def _verify(files: Files, names: set[str], where: Path, prefix: str, manifest: Manifest) -> None:
    needed = {"plan.yaml", *(_weight_file(fold) for fold in manifest.folds)}
    if manifest.previous:
        needed.add("previous/bundle.yaml")
    for name in sorted(needed):
        if prefix + name not in names:
            raise BundleError(f"{where}: {prefix}{name} is missing. Copy or export the bundle again.")
        if hash_member(files, prefix + name) != manifest.sha256.get(name):
            raise BundleError(
                f"{where}: {prefix}{name} was changed or damaged: its SHA-256 is not that in bundle.yaml. "
                "Copy or export the bundle again."
            )


def _parse(text: bytes, where: Path, name: str, model: type[C]) -> C:
    try:
        values = parse_mapping(text.decode(), f"{where}, {name}")
        version = values.get("schema_version")
        if isinstance(version, int) and version > 1:
            raise BundleError(f"{where}: {name} has schema {version}, newer than this medseg. Update medseg.")
        return model.from_dict(values, f"{where}, {name}")
    except (ConfigError, UnicodeDecodeError) as error:
        raise BundleError(str(error)) from error


def _loader(files: Files, name: str, where: Path) -> Callable[[], StateDict]:
    def load() -> StateDict:
        from safetensors import SafetensorError

        try:
            return _load_weights(files, name)
        except (SafetensorError, OSError) as error:
            raise BundleError(
                f"{where}: {name} cannot be read ({error}). Export the bundle again."
            ) from error

    return load


def _load_weights(files: Files, name: str) -> StateDict:
    from safetensors.torch import load, load_file

    local = files.local(name)
    if local is not None:
        return dict(load_file(local))
    return dict(load(read_member(files, name)))


def _card_text(bundle: Bundle) -> str:
    """Return the README: what the model segments, from what, and how it was trained."""
    plan, settings = bundle.plan, bundle.settings
    spacing = " x ".join(f"{size:g}" for size in settings.spacing)
    patch = " x ".join(str(size) for size in settings.patch_size)
    lines = [
        f"# {plan.dataset_name}: {bundle.configuration}",
        "",
        f"Segments {', '.join(plan.labels.foreground)} in images with channels {', '.join(plan.channels)}.",
        "",
        f"- network: {settings.architecture.network}, patch {patch}, spacing {spacing} (network axis order)",
        f"- folds: {', '.join(bundle.folds)}",
        f"- mirrored axes at prediction: {', '.join(map(str, bundle.mirror_axes)) or 'none'}",
        f"- made by medseg {medseg.__version__}",
    ]
    lines += [
        f"- {name}: {value}" for name, value in bundle.card.items() if isinstance(value, str | int | float)
    ]
    lines += ["", "Predict with `medseg predict INPUT -m THIS_FOLDER -o OUTPUT`.", ""]
    return "\n".join(lines)
