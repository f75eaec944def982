"""Runs in the peer's Python, which has nnU-Net 2.8.1 and not medseg: make trained models, and predict.

    PEERS/bin/python nnunet_peer.py JOBS.json

JOBS is a list of the arguments of :func:`train` and :func:`predict`, each with ``"do"``. The weights are
fitted by a short loop of our own on nnU-Net's network and nnU-Net's preprocessing, because its trainer wants
a preprocessed dataset on disk; the checkpoint has all keys of nnU-Net's, of the types that it writes.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import (
    convert_labelmap_to_one_hot,
    determine_num_input_channels,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def train(
    folder, configuration, fold, images, labels, previous=None, steps=60, mirror_axes=(0, 1, 2), seed=0
):
    """Fit a network to a folder of cases and write fold_FOLD/checkpoint_final.pth."""
    torch.manual_seed(seed)
    folder = Path(folder)
    plans, dataset = (json.loads((folder / name).read_text()) for name in ("plans.json", "dataset.json"))
    manager = PlansManager(json.loads(json.dumps(plans)))  # it edits old plans in place
    settings, labelling = manager.get_configuration(configuration), manager.get_label_manager(dataset)
    network = nnUNetTrainer.build_network_architecture(
        manager,
        settings,
        determine_num_input_channels(manager, settings, dataset),
        labelling.num_segmentation_heads,
        enable_deep_supervision=False,
    )
    cases = _preprocessed(manager, settings, dataset, images, labels, previous)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    rng = np.random.default_rng(seed)
    losses = [_step(network, optimizer, cases, settings.patch_size, labelling, rng) for _ in range(steps)]
    print(configuration, fold, "loss", round(losses[0], 3), "->", round(float(np.mean(losses[-5:])), 3))
    (folder / f"fold_{fold}").mkdir()
    torch.save(
        {
            "network_weights": network.state_dict(),
            "optimizer_state": optimizer.state_dict(),
            "grad_scaler_state": None,
            "logging": {
                "mean_fg_dice": [np.float32(0.5)],
                "dice_per_class_or_region": [[np.float64(0.5), np.float64("nan")]],
                "train_losses": [np.float32(loss) for loss in losses],
                "epoch_start_timestamps": [time.time()],
            },
            "_best_ema": np.float64(0.5),
            "current_epoch": 1,
            "init_args": {
                "plans": plans,
                "configuration": configuration,
                "fold": fold,
                "dataset_json": dataset,
                "device": torch.device("cpu"),
            },
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": None if mirror_axes is None else tuple(mirror_axes),
        },
        folder / f"fold_{fold}" / "checkpoint_final.pth",
    )


def _preprocessed(manager, settings, dataset, images, labels, previous):
    """Return (network input, labels) of every case."""
    preprocessor = settings.preprocessor_class(verbose=False)
    ending, found = dataset["file_ending"], []
    for label in sorted(Path(labels).glob(f"*{ending}")):
        case = label.name.removesuffix(ending)
        files = [str(file) for file in sorted(Path(images).glob(f"{case}_*{ending}"))]
        data, seg, _ = preprocessor.run_case(files, str(label), manager, settings, dataset)
        if previous is not None:
            file = str(Path(previous) / label.name)
            data, first, _ = preprocessor.run_case(files, file, manager, settings, dataset)
            foreground = manager.get_label_manager(dataset).foreground_labels
            data = np.vstack((data, convert_labelmap_to_one_hot(first[0], foreground, data.dtype)))
        found.append((torch.from_numpy(data).float(), torch.from_numpy(seg).long().clamp(min=0)))
    return found


def _step(network, optimizer, cases, patch, labelling, rng):
    data, seg = cases[rng.integers(len(cases))]
    if len(patch) < 3:
        row = rng.integers(data.shape[1])
        data, seg = data[:, row], seg[:, row]
    pad = []
    for size, want in zip(reversed(data.shape[1:]), reversed(patch), strict=True):
        pad += [0, max(0, want - size)]
    data, seg = torch.nn.functional.pad(data, pad), torch.nn.functional.pad(seg, pad)
    corner = [rng.integers(size - want + 1) for size, want in zip(data.shape[1:], patch, strict=True)]
    window = (slice(None), *(slice(c, c + want) for c, want in zip(corner, patch, strict=True)))
    logits, target = network(data[window][None]), seg[window][None, 0]
    if labelling.has_regions:
        regions = [torch.isin(target, torch.tensor(np.atleast_1d(r))) for r in labelling.foreground_regions]
        weight = torch.full((len(regions), *[1] * len(patch)), 4.0)  # regions are small
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.stack(regions, 1).float(), pos_weight=weight
        )
    else:
        loss = torch.nn.functional.cross_entropy(logits, target)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
    optimizer.step()
    return loss.item()


def predict(folder, images, out, mirror, folds=None, previous=None, checkpoint="checkpoint_final.pth"):
    """Predict as ``nnUNetv2_predict_from_modelfolder --save_probabilities`` does, without workers."""
    Path(out).mkdir(parents=True)
    predictor = nnUNetPredictor(
        use_mirroring=mirror, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(folder, folds, checkpoint)
    predictor.predict_from_files_sequential(images, out, True, folder_with_segs_from_prev_stage=previous)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        {"train": train, "predict": predict}[job.pop("do")](**job)
