"""How objects came to be, as plain data that goes with every result: no file, no folder, no patient."""

from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from medseg.prompt.journal import key_of
from medseg.prompt.prompts import Mask, Prompt
from medseg.prompt.scene import Scene
from medseg.prompt.state import MaskOf, ObjectState, State
from medseg.types import PathLike


def describe_state(scene: Scene, state: State, voxels: Mapping[str, int]) -> dict[str, Any]:
    """Return versions, models, settings, and the prompts and window of each object.

    Parameters
    ----------
    voxels : size of each object's mask
    """
    models = {tuple(sorted(model.items())): dict(model) for each in state.objects for model in each.models}
    return {
        **{name: metadata.version(name) for name in ("medseg", "torch", "numpy")},
        "image": scene.digest,
        "models": [models[key] for key in sorted(models)],
        "settings": state.settings.to_dict(),
        "objects": [
            {"label": label, "voxels": voxels[each.name], **_describe(each)}
            for label, each in enumerate(state.objects, 1)
        ],
    }


def models_at_work(models: Any) -> Iterator[dict[str, str]]:
    """Yield name, licence and SHA-256 of the networks of a :class:`~medseg.prompt.slicewise.Models`."""
    given: Mapping[str, PathLike] = getattr(models, "given", {})
    for name in sorted(getattr(models, "used", ())):
        known = describe_weights(name, given.get(name))
        if known is not None:
            yield known


def describe_weights(asset: str, path: PathLike | None = None) -> dict[str, str] | None:
    """Return name, licence and SHA-256 of the weights of an asset, or of the file or bundle in their place.

    None where nothing is known: no file is given, and none is published under this name and with a hash.
    """
    from medseg import assets
    from medseg.files import sha256_file
    from medseg.nets.sam_bundle import hash_card, is_tuned, read_card

    if path is not None and is_tuned(path):
        card = read_card(path)
        title = f"{card.base} fine-tuned on {card.dataset}"
        return {"name": title, "licence": card.licence, "sha256": hash_card(path)}
    known = assets.ASSETS.get(asset)
    if known is not None and (path is not None or known.sha256 is not None):
        return assets.provenance(asset, path)
    return None if path is None else {"name": asset, "licence": "unknown", "sha256": sha256_file(path)}


def _describe(known: ObjectState) -> dict[str, Any]:
    return {
        "name": known.name,
        "axis": known.axis,
        "limits": None if known.limits is None else list(known.limits),
        "window": None if known.window is None else known.window.to_dict(),
        "prompts": [_describe_prompt(prompt) for prompt in known.prompts],
        "prompts_not_yet_run": known.pending,
        "propagator": known.propagator,
        "config": dict(known.config),
        "notes": list(known.notes),
    }


def _describe_prompt(prompt: Prompt | MaskOf) -> dict[str, Any]:
    if isinstance(prompt, MaskOf):
        return {"kind": "object", "object": prompt.object, "sha256": prompt.mask}
    if isinstance(prompt, Mask):  # without its voxels, which may be a volume
        region = prompt.region()
        named = {"plane": prompt.plane, "sha256": key_of(region), "voxels": region.voxels}
        return {"kind": "mask", **named}
    return prompt.to_dict()
