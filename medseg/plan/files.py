"""Plans on disk: medseg's readable YAML (or JSON), and nnU-Net's ``plans.json``."""

import json
from pathlib import Path

from medseg.config import dump_yaml, read_mapping
from medseg.errors import PlanError
from medseg.files import write_text
from medseg.plan.nnunet import from_nnunet, to_nnunet
from medseg.plan.schema import Plan
from medseg.types import PathLike

_HEADER = """\
# How medseg trains on {name}. `medseg info FILE` shows it, `medseg plan --explain` says why.
# Lists of one number an axis are in network order: the image array (i, j, k) reversed to (k, j, i),
# then permuted by transpose_forward {forward}. A 2d configuration leaves out the first axis.
"""


def save_plan(plan: Plan, path: PathLike) -> None:
    """Write a plan as YAML with a comment on its axes (JSON if `path` ends so), atomically."""
    if str(path).endswith(".json"):
        plan.save(path)
        return
    header = _HEADER.format(name=plan.dataset_name, forward=list(plan.transpose_forward))
    write_text(path, header + dump_yaml(plan.to_dict()))


def save_nnunet_plan(plan: Plan, path: PathLike) -> None:
    """Write nnU-Net's ``plans.json`` as nnU-Net does (indent 4, its key order), atomically."""
    write_text(path, json.dumps(to_nnunet(plan), indent=4))


def load_plan(path: PathLike) -> Plan:
    """Read a plan of medseg (YAML or JSON) or of nnU-Net (``plans.json`` with ``dataset.json`` beside it).

    Raises
    ------
    PlanError
        An nnU-Net plan has no ``dataset.json`` in its folder, or asks for what medseg cannot do.
    ConfigError
        The file is missing, does not parse, or is no plan.
    """
    values = read_mapping(path)
    if "image_reader_writer" not in values:
        return Plan.from_dict(values, str(path))
    dataset_json = Path(path).with_name("dataset.json")
    if not dataset_json.is_file():
        raise PlanError(
            f"{path}: an nnU-Net plan names no labels. Put its dataset.json beside it ({dataset_json})."
        )
    return from_nnunet(values, read_mapping(dataset_json))
