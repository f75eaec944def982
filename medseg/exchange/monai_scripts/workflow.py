"""Which files are a case, and the loop over them."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
logger = logging.getLogger(__name__)


def find_cases(folder: str, channels: int) -> list[dict[str, Any]]:
    """Return the cases of a folder: ``CASE.nii.gz``, or ``CASE_0000.nii.gz`` and so on, a file a channel.

    A single file of several channels has them on its fourth axis.
    """
    cases: dict[str, list[str]] = {}
    for path in sorted(Path(folder).iterdir()):
        ending = next((each for each in ENDINGS if path.name.endswith(each)), None)
        if ending is not None:
            name = path.name.removesuffix(ending)
            match = re.fullmatch(r"(.+)_\d{4}", name)
            cases.setdefault(match[1] if match else name, []).append(str(path))
    for name, files in cases.items():
        if len(files) not in (1, channels):
            raise ValueError(f"{folder}: case {name} has {len(files)} files; expected {channels}.")
    if not cases:
        raise ValueError(f"{folder}: no image here. Expected names ending in {', '.join(ENDINGS)}.")
    return [{"image": files[0] if len(files) == 1 else files, "name": name} for name, files in cases.items()]


class Evaluator:
    """Predict every item of a dataset; with nothing but torch and MONAI."""

    def __init__(
        self,
        dataset: Sequence[Mapping[str, Any]],
        network: Any,
        inferer: Any,
        postprocessing: Any,
        device: torch.device,
        amp: bool = False,
    ) -> None:
        self.dataset, self.network, self.inferer = dataset, network, inferer
        self.postprocessing, self.device, self.amp = postprocessing, device, amp

    def run(self) -> None:
        """Write a label map for each case."""
        for number in range(len(self.dataset)):
            item = dict(self.dataset[number])
            logger.info("case %d of %d: %s", number + 1, len(self.dataset), item.get("name", ""))
            with torch.inference_mode(), torch.autocast(self.device.type, enabled=self.amp):
                item["pred"] = self.inferer(item["image"][None].to(self.device), self.network)[0]
            item["image"] = item["image"].cpu()
            self.postprocessing(item)
