"""Trained models of nnU-Net v2: its results folder and its exported zip in, a results folder out.

::

    DatasetXXX_Name/                             or the folder above it, or the exported zip
        Trainer__Plans__configuration/           or any other name
            plans.json  dataset.json  dataset_fingerprint.json
            fold_0/checkpoint_final.pth  ...     fold_all where there is nothing else
            crossval_results_folds_.../postprocessing.json

Source: nnunetv2 2.8.1, ``inference/predict_from_raw_data.py`` and ``model_sharing/model_export.py``. As
there, prediction does not post-process: what cross-validation chose is named in the card only.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import medseg
from medseg.archive import Files, Limits, hash_member, open_files, read_member
from medseg.bundle import Bundle, StateDict, no_such_model
from medseg.errors import BundleError, MedsegError
from medseg.files import atomic_folder
from medseg.labels import LabelSet
from medseg.log import logger
from medseg.plan import Plan, from_nnunet, to_nnunet
from medseg.types import PathLike

if TYPE_CHECKING:
    from medseg.exchange.checkpoint import Checkpoint

# Of a fold the best that is there, unless another is asked for.
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth")
# nnU-Net's prediction builds this trainer's network; any trainer that fits the plan would do.
TRAINER = "nnUNetTrainer"

# Tells our folders, which may be replaced, from those that somebody trained.
_EXPORTED = "Exported by medseg"

_FOLD = r"fold_(?:\d+|all)"
_WEIGHTS = re.compile(rf"(?:[^/]+/)*{_FOLD}/checkpoint_(?:final|best|latest)\.pth")
_TEXTS = r"(?:[^/]+/)*(?:plans|dataset|dataset_fingerprint|postprocessing)\.json"
LIMITS = Limits(
    members=re.compile(rf"{_WEIGHTS.pattern}|{_TEXTS}"),
    weights=_WEIGHTS,
    strangers=True,  # logs, figures, validation results: never opened
    links=True,  # a folder is the user's own disk, and results are often linked together
    depth=4,
    kind="an nnU-Net model",
)


@dataclass(frozen=True)
class Place:
    """Where one trained configuration lies in a folder or zip; `prefix` is empty or ends with ``/``."""

    files: Files
    prefix: str

    def __str__(self) -> str:
        return str(self.files.path / self.prefix.rstrip("/"))

    @property
    def configuration(self) -> str:
        """As nnU-Net's naming of folders has it, or the folder's name."""
        return str(self).replace("\\", "/").rsplit("/", 1)[-1].rsplit("__", 1)[-1]

    def json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file, whose top level must be a mapping.

        Raises
        ------
        BundleError
            It is missing or is none.
        """
        if self.prefix + name not in self.files.names():
            raise BundleError(f"{self}: {name} is missing. Copy the whole folder that nnU-Net wrote.")
        try:
            content = json.loads(read_member(self.files, self.prefix + name))
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:120]
            raise BundleError(f"{self}: {name} is not readable as JSON ({reason}). Copy it again.") from error
        if not isinstance(content, dict):
            raise BundleError(f"{self}: {name} holds a {type(content).__name__}; expected a mapping.")
        return content

    def checkpoints(self) -> dict[str, list[str]]:
        """Return the checkpoint files of each fold, folds in the order in which nnU-Net adds them."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.files.names()):
            inner = name.removeprefix(self.prefix) if name.startswith(self.prefix) else ""
            if match := re.fullmatch(rf"({_FOLD})/(checkpoint_\w+\.pth)", inner):
                found.setdefault(match.group(1).removeprefix("fold_"), []).append(match.group(2))
        return found


def is_nnunet_model(path: PathLike) -> bool:
    """Return whether a folder, zip, or a place inside a zip looks like a trained model of nnU-Net v2."""
    outer = _split(Path(path))[0]
    try:
        return outer.exists() and any(_places(open_files(outer, LIMITS)))
    except BundleError:
        return outer.is_file() and outer.suffix == ".zip"  # loading it says why it is refused
    except OSError:
        return False


def load_nnunet(path: PathLike, previous: PathLike | None = None, checkpoint: str | None = None) -> Bundle:
    """Open a trained model of nnU-Net v2; every checkpoint is checked now, and loaded when needed.

    Parameters
    ----------
    path : folder or exported zip
        That of one trained configuration, or one above it that holds a single model (of a cascade the last
        stage counts). A path may go on inside a zip: ``export.zip/3d_fullres``.
    previous : model of a cascade's first stage
        By default it is looked for beside: ``Trainer__Plans__STAGE``, else a neighbour of that configuration.
        Without one, prediction needs the first stage's label maps.
    checkpoint : ``final``, ``best`` or ``latest``
        By default the first of these that is there.

    Raises
    ------
    BundleError
        There is no such model or several, a file is missing, damaged or refused, the plan asks for what
        medseg does not do, or weights do not fit it.
    """
    place = _locate(Path(path))
    bundle = _open(place, _file_of(checkpoint, place))
    return _with_previous(place, bundle, previous)


def _file_of(checkpoint: str | None, place: Place) -> str | None:
    if checkpoint is None:
        return None
    name = checkpoint if checkpoint.endswith(".pth") else f"checkpoint_{checkpoint}.pth"
    if name not in CHECKPOINTS:
        raise BundleError(f"{place}: checkpoint {checkpoint!r} is none of final, best, latest.")
    return name


def _split(path: Path) -> tuple[Path, str]:
    """Return the folder or file that exists, and the rest of a path that goes on inside a zip."""
    for outer in (path, *path.parents):
        if outer.exists():
            inside = outer.is_file() and outer != path
            return (outer, path.relative_to(outer).as_posix()) if inside else (path, "")
    return path, ""


def _places(files: Files) -> Iterator[Place]:
    """Find plans.json with checkpoints, or at least with dataset.json: the folds are missing then."""
    names = files.names()
    for name in sorted(name for name in names if name.rsplit("/", 1)[-1] == "plans.json"):
        place = Place(files, name.removesuffix("plans.json"))
        if place.prefix + "dataset.json" in names or place.checkpoints():
            yield place


def _locate(path: Path) -> Place:
    outer, inner = _split(path)
    if not outer.exists():
        raise BundleError(no_such_model(path))
    found = list(_places(open_files(outer, LIMITS)))
    if inner:
        found = [place for place in found if _is_meant(place, inner)]
    elif any(not place.prefix for place in found):
        found = [place for place in found if not place.prefix]
    trained = [place for place in found if place.checkpoints()]
    last = _last_stages(trained or found)
    if len(last) == 1:
        return last[0]
    if not last:
        raise BundleError(
            f"{path}: holds no model of nnU-Net v2. Expected plans.json, dataset.json and "
            "fold_0/checkpoint_final.pth in it or in a folder below."
        )
    raise BundleError(f"{path}: holds {len(last)} models. Pass one of them: {_choices(last, outer)}.")


def _is_meant(place: Place, inner: str) -> bool:
    prefix = place.prefix.rstrip("/")
    return inner == place.configuration or f"/{prefix}".endswith(f"/{inner}")


def _last_stages(places: Sequence[Place]) -> list[Place]:
    """Leave out models that only feed another one of the same trainer and plans."""
    if len(places) < 2:
        return list(places)
    feeding = set()
    for place in places:
        stage = _previous_stage(place)
        feeding |= {other.prefix for other in places if stage and other.prefix == _neighbour(place, stage)}
    return [place for place in places if place.prefix not in feeding]


def _previous_stage(place: Place) -> str | None:
    configurations = place.json("plans.json").get("configurations")
    settings = configurations.get(place.configuration) if isinstance(configurations, dict) else None
    stage = settings.get("previous_stage") if isinstance(settings, dict) else None
    return stage if isinstance(stage, str) else None


def _neighbour(place: Place, stage: str) -> str:
    """Return the prefix that the same trainer and plans have for another configuration."""
    return place.prefix.rstrip("/").rpartition("__")[0] + f"__{stage}/"


def _choices(places: Sequence[Place], outer: Path) -> str:
    if outer.is_dir():
        return ", ".join(map(str, places))
    names = [place.configuration for place in places]
    short = len(set(names)) == len(names)
    return ", ".join(
        str(outer / (name if short else place.prefix.rstrip("/")))
        for name, place in zip(names, places, strict=True)
    )


def _open(place: Place, checkpoint: str | None = None) -> Bundle:
    plans, dataset = place.json("plans.json"), place.json("dataset.json")
    chosen = _choose_checkpoints(place, checkpoint)
    folds = {fold: _read_fold(place, fold, file) for fold, file in chosen.items()}
    first = _agree(place, folds)
    if not first.trainer.startswith(TRAINER):
        logger.warning(
            "%s: was trained by %s, which medseg does not know: only its weights and its plan are used.",
            place,
            " ".join(first.trainer.split())[:100],
        )
    plan = _plan(place, plans, dataset, first.configuration)
    bundle = Bundle(
        plan,
        first.configuration,
        {fold: _loader(place, f"fold_{fold}/{file}") for fold, file in chosen.items()},
        first.mirror_axes,
        _card(place, first, chosen),
        path=Path(str(place)),
        digest=_digest(place, chosen),
    )
    for fold, content in folds.items():
        _check_fit(place, fold, content, bundle)
    return bundle


def _choose_checkpoints(place: Place, wanted: str | None) -> dict[str, str]:
    """Return the checkpoint file of every fold that has it; fold_all only where it is the only one."""
    available = place.checkpoints()
    if len(available) > 1:
        available.pop("all", None)
    if not available:
        raise BundleError(
            f"{place}: has no trained fold. Expected fold_0/checkpoint_final.pth; copy the folds as well."
        )
    offered = [wanted] if wanted else list(CHECKPOINTS)
    name = next((name for name in offered if any(name in files for files in available.values())), None)
    if name is None:
        found = ", ".join(sorted({file for files in available.values() for file in files}))
        raise BundleError(f"{place}: has no {wanted} in any fold. It has {found}.")
    if wanted is None and name != CHECKPOINTS[0]:
        logger.warning("%s: no %s, so %s is used.", place, CHECKPOINTS[0], name)
    if without := [fold for fold, files in available.items() if name not in files]:
        logger.warning("%s: no %s in fold %s, which is left out.", place, name, ", ".join(without))
    return {fold: name for fold, files in available.items() if name in files}


def _read_fold(place: Place, fold: str, file: str) -> "Checkpoint":
    from medseg.exchange.checkpoint import read_checkpoint

    name = f"{place.prefix}fold_{fold}/{file}"
    source = place.files.local(name) or read_member(place.files, name)
    return read_checkpoint(source, f"{place}/fold_{fold}/{file}")


def _loader(place: Place, name: str) -> Callable[[], StateDict]:
    fold, file = name.removeprefix("fold_").split("/")
    return lambda: _read_fold(place, fold, file).weights


def _agree(place: Place, folds: "Mapping[str, Checkpoint]") -> "Checkpoint":
    """Return the first fold, which speaks for all as in nnU-Net; they must be of one configuration."""
    first, *others = folds.values()
    for fold, other in zip(list(folds)[1:], others, strict=True):
        if other.configuration != first.configuration:
            raise BundleError(
                f"{place}: fold {fold} is a {other.configuration} model, the first {first.configuration}. "
                "Keep the folds of one configuration."
            )
    return first


def _plan(place: Place, plans: dict[str, Any], dataset: dict[str, Any], configuration: str) -> Plan:
    try:
        plan = from_nnunet(plans, dataset, configuration)
        plan.configuration(configuration)
    except MedsegError as error:
        raise BundleError(f"{place}: {error}") from error
    return plan


def _check_fit(place: Place, fold: str, content: "Checkpoint", bundle: Bundle) -> None:
    from medseg.exchange.checkpoint import first_misfit, first_not_finite

    settings = bundle.settings
    misfit = first_misfit(content.weights, settings.architecture, bundle.in_channels, bundle.labels.n_outputs)
    if misfit is None and any(axis >= settings.dimensions for axis in content.mirror_axes):
        misfit = f"it mirrors axes {content.mirror_axes} of a patch of {settings.dimensions}"
    if misfit is not None:
        raise BundleError(
            f"{place}, fold {fold}: what {content.trainer} trained does not fit the "
            f"{settings.architecture.network} of {bundle.configuration} in plans.json ({misfit}). Pass the "
            "plans.json and dataset.json it was trained with; other networks are not supported."
        )
    if name := first_not_finite(content.weights):
        raise BundleError(
            f"{place}, fold {fold}: {name} holds NaN or infinity, so the training diverged or the file is "
            "damaged. Take another checkpoint (--checkpoint best), or copy it again."
        )


def _card(place: Place, first: "Checkpoint", chosen: Mapping[str, str]) -> dict[str, Any]:
    card: dict[str, Any] = {
        "source": "nnU-Net v2",
        "trainer": first.trainer,
        "checkpoint": next(iter(chosen.values())),
        "precision": "fp32",
        "mirroring": "all",  # nnU-Net flips whatever the checkpoint allows
    }
    if first.epochs is not None:
        card["epochs"] = first.epochs
    if notes := [name for name in sorted(place.files.names()) if _is_postprocessing(name, place.prefix)]:
        card["note"] = (
            f"nnU-Net chose post-processing ({notes[0].removeprefix(place.prefix)}); like nnUNetv2_predict, "
            "medseg does not apply it unless asked: medseg bundle import --postprocessing FILE."
        )
    return card


def _is_postprocessing(name: str, prefix: str) -> bool:
    inner = name.removeprefix(prefix) if name.startswith(prefix) else ""
    return re.fullmatch(r"(?:crossval_results_\w+/)?postprocessing\.json", inner) is not None


def _digest(place: Place, chosen: Mapping[str, str]) -> str:
    """Return the SHA-256 of the hashes of all that decides a prediction."""
    names = ["plans.json", "dataset.json", *(f"fold_{fold}/{file}" for fold, file in chosen.items())]
    sha = hashlib.sha256()
    for name in names:
        sha.update(f"{name} {hash_member(place.files, place.prefix + name)}\n".encode())
    return sha.hexdigest()


def _with_previous(place: Place, bundle: Bundle, previous: PathLike | None) -> Bundle:
    """Add a cascade's first stage: the one that was given, else the one that lies beside."""
    from medseg.exchange import with_previous

    stage = bundle.settings.previous_stage
    found = previous if previous is not None or not stage else _find_previous(place, bundle, stage)
    return bundle if found is None else with_previous(bundle, found)


def _find_previous(place: Place, bundle: Bundle, stage: str) -> Bundle | None:
    named, others = _neighbours(place, stage)
    for candidates in (named, others):
        fitting = [each for each in (_first_stage(c, bundle, stage) for c in candidates) if each is not None]
        if len(fitting) > 1:
            raise BundleError(
                f"{place}: {len(fitting)} models beside it could be its first stage {stage} "
                f"({', '.join(map(str, fitting))}). Choose one with --previous MODEL."
            )
        if fitting:
            return fitting[0]
    return None


def _neighbours(place: Place, stage: str) -> tuple[list[Place], list[Place]]:
    """Return the models beside this one: named as the stage of this trainer and plans, and the rest."""
    if place.prefix:
        parent = place.prefix.rstrip("/").rpartition("/")[0]
        inside = [p for p in _places(place.files) if p.prefix.rstrip("/").rpartition("/")[0] == parent]
        beside = [p for p in inside if p.prefix != place.prefix]
        wanted = _neighbour(place, stage).rstrip("/").rpartition("/")[2]
    else:
        root = place.files.path.resolve()
        folders = sorted(p for p in root.parent.iterdir() if p != root and (p / "plans.json").is_file())
        beside = [Place(open_files(folder, LIMITS), "") for folder in folders]
        wanted = root.name.rpartition("__")[0] + f"__{stage}"
    named = [p for p in beside if str(p).replace("\\", "/").rsplit("/", 1)[-1] == wanted]
    return named, [p for p in beside if p not in named]


def _first_stage(place: Place, cascade: Bundle, stage: str) -> Bundle | None:
    """Return a neighbour if it is what the cascade continues."""
    try:
        known = place.json("plans.json").get("configurations", {})
        if place.configuration in known and place.configuration != stage:
            return None
        bundle = _open(place)
    except MedsegError as error:
        logger.info("%s: is not the first stage (%s)", place, error)
        return None
    same = bundle.plan.dataset_name == cascade.plan.dataset_name and bundle.labels == cascade.labels
    return bundle if same and bundle.configuration == stage else None


def export_nnunet(bundle: Bundle, out: Path, fold: str | None = None) -> None:
    """Write a model as nnU-Net v2's results folder, with which nnU-Net predicts.

    A cascade's first stage goes beside `out`, under the name that nnU-Net gives it or ``OUT_STAGE``.

    Parameters
    ----------
    out : folder; an older export is replaced, anything else is left alone
    fold : the only one to write; None writes all

    Raises
    ------
    PlanError
        The network does not exist in nnU-Net.
    BundleError
        There is no such fold.
    OutputError
        The folder holds something else, or cannot be written.
    """
    from medseg.exchange.graph import check_replaceable

    out = Path(out)
    folds = bundle.folds if fold is None else (fold,)
    plans, dataset = to_nnunet(bundle.plan), _dataset_json(bundle)
    check_replaceable(out, "dataset.json", _EXPORTED)
    if bundle.previous is not None:
        export_nnunet(bundle.previous, first_stage_folder(bundle, out))
    with atomic_folder(out) as folder:
        _write_json(folder / "plans.json", plans)
        _write_json(folder / "dataset.json", dataset)
        for number, name in enumerate(folds):
            inner = folder / f"fold_{_fold_name(name, number, folds)}"
            inner.mkdir()
            _save_checkpoint(inner / CHECKPOINTS[0], bundle, name, plans, dataset)


def first_stage_folder(bundle: Bundle, out: Path) -> Path:
    """Return where :func:`export_nnunet` puts the first stage of a cascade that goes to `out`."""
    assert bundle.previous is not None
    stage, ending = bundle.previous.configuration, f"__{bundle.configuration}"
    stem = out.name.removesuffix(ending)
    return out.with_name(f"{stem}__{stage}" if out.name.endswith(ending) else f"{out.name}_{stage}")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def _fold_name(name: str, number: int, folds: Sequence[str]) -> str:
    """Return a fold's name if nnU-Net finds it by itself: all are numbers, or the only one is ``all``."""
    known = all(each.isdecimal() for each in folds) or folds == ("all",)
    return name if known else str(number)


def _dataset_json(bundle: Bundle) -> dict[str, Any]:
    labels: LabelSet = bundle.labels
    cases = bundle.card.get("cases", 0)
    content: dict[str, Any] = {
        "description": f"{_EXPORTED} {medseg.__version__}",
        "channel_names": {str(number): name for number, name in enumerate(bundle.plan.channels)},
        "labels": {
            name: list(value) if isinstance(value, tuple) else value for name, value in labels.entries.items()
        },
        "numTraining": cases if isinstance(cases, int) else 0,
        "file_ending": bundle.plan.file_ending,
    }
    if labels.regions_class_order is not None:
        content["regions_class_order"] = list(labels.regions_class_order)
    return content


def _save_checkpoint(
    path: Path, bundle: Bundle, fold: str, plans: Mapping[str, Any], dataset: Mapping[str, Any]
) -> None:
    """Write the keys that nnU-Net's trainer and predictor read; only tensors and plain containers."""
    import torch

    epochs = bundle.card.get("epochs", 0)
    content = {
        "network_weights": with_aliases(bundle.state_dict(fold)),
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": epochs if isinstance(epochs, int) else 0,
        "init_args": {
            "plans": dict(plans),
            "configuration": bundle.configuration,
            "fold": int(fold) if fold.isdecimal() else fold,
            "dataset_json": dict(dataset),
        },
        "trainer_name": TRAINER,
        "inference_allowed_mirroring_axes": tuple(bundle.mirror_axes) or None,
    }
    torch.save(content, path)


def with_aliases(weights: StateDict) -> dict[str, Any]:
    """Return the weights under every name that nnU-Net's network gives them, in its order.

    Each block of convolution and norm lists both a second time, and the decoder keeps the encoder.
    """
    encoder = _list_blocks({n: w for n, w in weights.items() if n.startswith("encoder.")})
    decoder = _list_blocks({n: w for n, w in weights.items() if not n.startswith("encoder.")})
    return encoder | {f"decoder.{name}": value for name, value in encoder.items()} | decoder


def _list_blocks(weights: StateDict) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for block, names in groupby(weights, _block_of):
        members = {name: weights[name].detach().to("cpu").contiguous() for name in names}
        result |= members
        if block:
            result |= {_alias(name, block): value for name, value in members.items()}
    return result


def _block_of(name: str) -> str:
    match = re.fullmatch(r"(.+)\.(?:conv|norm)\.(?:weight|bias)", name)
    return match.group(1) if match else ""


def _alias(name: str, block: str) -> str:
    part, kind = name.removeprefix(f"{block}.").split(".")
    return f"{block}.all_modules.{0 if part == 'conv' else 1}.{kind}"
