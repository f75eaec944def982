"""Golden nnU-Net model folders as bundles (test code: medseg itself never unpickles)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medseg.bundle import Bundle
from medseg.plan import from_nnunet

# The only globals in a checkpoint of nnU-Net 2.8.1 besides tensors.
ALLOWED = [np._core.multiarray.scalar, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8"))]


def load_golden(folder: Path, precision: str = "fp32") -> Bundle:
    plan = from_nnunet(
        json.loads((folder / "plans.json").read_text()), json.loads((folder / "dataset.json").read_text())
    )
    with torch.serialization.safe_globals(ALLOWED):
        checkpoint = torch.load(
            folder / "fold_0" / "checkpoint_final.pth", map_location="cpu", weights_only=True
        )
    weights = {
        name: value
        for name, value in checkpoint["network_weights"].items()
        if ".all_modules." not in name and not name.startswith("decoder.encoder.")
    }
    card: dict[str, Any] = {"precision": precision}
    return Bundle(
        plan,
        checkpoint["init_args"]["configuration"],
        {"0": lambda: weights},
        tuple(checkpoint["inference_allowed_mirroring_axes"] or ()),
        card,
    )
