"""One program over one large CT without its convolutions; run by ``large_ct_vs_nnunet.py``.

The network is replaced by logits that cost next to nothing, the very same in both programs. Everything else
is the program's own code, from the file to the label map. Beside the label map it leaves ``stages.json``: CPU
seconds of each stage, of start-up (imports) and of the replaced network itself.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Of torch, medseg and nnunetv2 only what is needed is imported, by the functions below: start-up is measured.

CONFIGURATION = "3d_fullres"
# Coarse grid of the random logits, and their standard deviation.
COARSE = 6
SPREAD = 4.0


class Stages:
    """CPU seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, which adds the time of its thread to a stage."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.thread_time() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + taken

        return call

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Time a function of a module or a method of a class from now on."""
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))


def stand_in(classes: int, patch: tuple[int, ...], kind: str, stages: Stages) -> Any:
    """Return a module that answers any tile with the same logits.

    Parameters
    ----------
    kind : "constant", one number a class; or "competing", smooth random fields, so that every class wins
        somewhere in every part of the volume, which leaves nothing to skip
    """
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)

    def field(*axes: int) -> Any:
        coarse = SPREAD * torch.randn((classes, 1, *[COARSE] * len(axes)), generator=generator)
        mode = {1: "linear", 2: "bilinear"}[len(axes)]
        return nn.functional.interpolate(coarse, axes, mode=mode, align_corners=True)[:, 0]

    if kind == "constant":
        plane = torch.randn((classes, 1, 1, 1), generator=generator).expand(classes, *patch[:2], 1)
        line = torch.zeros((classes, 1, 1, patch[2]))
    else:
        plane, line = field(*patch[:2])[..., None], field(patch[2])[:, None, None]

    class StandIn(nn.Module):
        """Answers with a new tensor at each call, as a network does: both programs write into it."""

        answered = 0

        def forward(self, batch: Any) -> Any:
            self.answered += len(batch)
            logits = torch.empty((len(batch), classes, *patch))
            for sample in logits:
                torch.add(plane, line, out=sample)
            return logits

        def settle(self) -> None:
            """Count to the network what it takes to give its answers back to the system, measured on one."""
            logits = self.forward([None])
            start = time.thread_time()
            del logits
            stages.seconds["network"] += self.answered * (time.thread_time() - start)

    network = StandIn()
    network.forward = stages.timed("network", network.forward)  # type: ignore[method-assign]
    return network


def predict_medseg(folder: Path, output: Path, classes: int, kind: str, stages: Stages) -> None:
    """Segment with what ``medseg predict --threads 1 --no-mirror`` calls."""
    from medseg import pipeline
    from medseg.bundle import load_bundle
    from medseg.infer import Options, Predictor

    bundle = load_bundle(folder / f"bundle_{classes}")
    options = Options(mirror=False, device="cpu", precision="fp32", threads=1, runtime="torch")
    predictor = Predictor(bundle, options)
    network = stand_in(classes, bundle.settings.patch_size, kind, stages)
    predictor.models[0].networks["0"] = network
    stages.wrap(pipeline, "read_image", "load")
    stages.wrap(Predictor, "prepare", "preprocess")
    stages.wrap(pipeline, "write", "write")
    stages.seconds["start-up"] = time.process_time()
    (done,) = pipeline.predict_folder(folder / "images", predictor, output)
    assert done.status == "done", done.error
    assert network.answered, "medseg ran a network of its own"
    network.settle()


def predict_nnunet(folder: Path, output: Path, classes: int, kind: str, stages: Stages) -> None:
    """Segment with nnU-Net's predictor, in one process: the cheapest of its ways."""
    import torch
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference import export_prediction
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset = json.loads((folder / f"dataset_{classes}.json").read_text())
    plans = PlansManager(json.loads((folder / "plans.json").read_text()))
    settings = plans.get_configuration(CONFIGURATION)
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    network = stand_in(classes, tuple(settings.patch_size), kind, stages)
    predictor.manual_initialization(network, plans, settings, [{}], dataset, "nnUNetTrainer", None)
    stages.wrap(SimpleITKIO, "read_images", "load")
    stages.wrap(DefaultPreprocessor, "run_case_npy", "preprocess")
    stages.wrap(nnUNetPredictor, "predict_logits_from_preprocessed_data", "tiles")
    stages.wrap(export_prediction, "convert_predicted_logits_to_segmentation_with_correct_shape", "restore")
    stages.wrap(SimpleITKIO, "write_seg", "write")
    stages.seconds["start-up"] = time.process_time()
    predictor.predict_from_files_sequential(str(folder / "images"), str(output))
    network.settle()
    stages.seconds["tiles"] -= stages.seconds["network"]


def preprocess_medseg(folder: Path, output: Path, classes: int, kind: str, stages: Stages) -> None:
    """Read and preprocess; the network's input is kept for comparison."""
    import numpy as np

    from medseg.bundle import load_bundle
    from medseg.io import list_cases, read_image
    from medseg.preprocess import preprocess

    plan = load_bundle(folder / f"bundle_{classes}").plan
    (case,) = list_cases(folder / "images", 1)
    stages.seconds["start-up"] = time.process_time()
    volume = stages.timed("load", read_image)(case)
    data = stages.timed("preprocess", preprocess)(volume, plan, CONFIGURATION).data
    np.save(output / "data.npy", data)


def preprocess_nnunet(folder: Path, output: Path, classes: int, kind: str, stages: Stages) -> None:
    """Read and preprocess with nnU-Net's ``DefaultPreprocessor.run_case``."""
    import numpy as np
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset = json.loads((folder / f"dataset_{classes}.json").read_text())
    plans = PlansManager(json.loads((folder / "plans.json").read_text()))
    (image,) = (folder / "images").iterdir()
    stages.wrap(SimpleITKIO, "read_images", "load")
    stages.wrap(DefaultPreprocessor, "run_case_npy", "preprocess")
    preprocessor = DefaultPreprocessor(verbose=False)
    stages.seconds["start-up"] = time.process_time()
    settings = plans.get_configuration(CONFIGURATION)
    data, _, _ = preprocessor.run_case([str(image)], None, plans, settings, dataset)
    np.save(output / "data.npy", data)


TASKS = {
    ("medseg", "predict"): predict_medseg,
    ("nnunet", "predict"): predict_nnunet,
    ("medseg", "preprocess"): preprocess_medseg,
    ("nnunet", "preprocess"): preprocess_nnunet,
}


def main() -> None:
    """Do one task and write its stages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("program", choices=["medseg", "nnunet"])
    parser.add_argument("task", choices=["predict", "preprocess"])
    parser.add_argument("folder", type=Path, help="made by large_ct_vs_nnunet.py")
    parser.add_argument("output", type=Path)
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--kind", choices=["competing", "constant"], default="competing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    TASKS[options.program, options.task](
        options.folder, options.output, options.classes, options.kind, stages
    )
    # What no stage claims; in medseg, where tiles and restoring go hand in hand, these two.
    stages.seconds["rest"] = time.process_time() - sum(stages.seconds.values())
    (options.output / "stages.json").write_text(json.dumps(stages.seconds))


if __name__ == "__main__":
    main()
