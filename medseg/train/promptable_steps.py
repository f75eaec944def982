"""One step of fine-tuning: a simulated user points, is answered, clicks into errors; then the loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medseg.nets.sam import Sam
from medseg.prompt.frame import Frame, prepare
from medseg.prompt.rasterise import SURE
from medseg.prompt.segmenter import SlicePrompts
from medseg.prompt.simulate import draw_box, next_click
from medseg.prompt.slicewise import Zoom, enlarged
from medseg.train.promptable_config import LossWeights, PromptableConfig
from medseg.train.promptable_samples import Sample
from medseg.types import BoolArray, FloatArray


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples as the network takes them.

    Attributes
    ----------
    samples : several Sample
    frames : how each lies in the input
    embeddings : (n, 256, h, w)
    """

    samples: Sequence[Sample]
    frames: Sequence[Frame]
    embeddings: Tensor


def make_batch(model: Sam, samples: Sequence[Sample], size: int, device: torch.device) -> Batch:
    """Stack embeddings, or compute them where samples hold images."""
    frames = [Frame.of(model.spec, (s.mask.shape[0], s.mask.shape[1]), size) for s in samples]
    if samples[0].features.ndim == 3:
        embeddings = torch.stack([sample.features for sample in samples]).to(device, torch.float32)
        return Batch(samples, frames, embeddings)
    images = [
        prepare(sample.features.numpy(), model.spec, frame)
        for sample, frame in zip(samples, frames, strict=True)
    ]
    return Batch(samples, frames, model.encode(torch.cat(images).to(device)))


def first_prompts(
    samples: Sequence[Sample], config: PromptableConfig, generator: np.random.Generator
) -> list[SlicePrompts]:
    """Draw how the user begins; the same way for all samples, so that they are decoded together."""
    weights = np.array([config.start.box, config.start.click, config.start.neighbour])
    way = int(generator.choice(3, p=weights / weights.sum()))
    if way == 1:
        return [_with_click(SlicePrompts(), sample, None, config, generator) for sample in samples]
    if way == 2:
        return [_following(sample) for sample in samples]
    return [SlicePrompts(box=draw_box(sample.mask, config.box_jitter, generator)) for sample in samples]


def _following(sample: Sample) -> SlicePrompts:
    """Return what is shown when an object is followed from the slice beside this one."""
    logits = np.where(sample.near, SURE, -SURE).astype(np.float32)
    return SlicePrompts(box=enlarged(sample.near, Zoom()), mask=logits)


def _with_click(
    prompts: SlicePrompts,
    sample: Sample,
    prediction: BoolArray | None,
    config: PromptableConfig,
    generator: np.random.Generator,
) -> SlicePrompts:
    """Add a click into the largest error; into the object where there is none."""
    nothing = np.zeros_like(sample.mask)
    for guess in (nothing if prediction is None else prediction, nothing):
        click = next_click(
            sample.mask[..., None],
            guess[..., None],
            generator=generator,
            jitter=config.click_jitter_mm,
            spacing=(*sample.spacing, 1.0),
        )
        if click is not None:
            break
    assert click is not None  # a sample holds an object
    points = np.concatenate([prompts.points, [click.voxel[:2]]])
    return replace(prompts, points=points, positive=np.append(prompts.positive, click.positive))


def decode(
    model: Sam, batch: Batch, prompts: Sequence[SlicePrompts], multimask: bool
) -> tuple[Tensor, Tensor]:
    """Ask one question of each sample: logits (n, masks, s, s) and the IoU expected (n, masks)."""
    device, side = batch.embeddings.device, 4 * batch.embeddings.shape[-1]
    points = signs = box = mask = None
    frames = batch.frames
    if len(prompts[0].points):
        points = _stack([frame.points(each.points) for frame, each in zip(frames, prompts, strict=True)])
        signs = _stack([each.positive.astype(np.float32) for each in prompts])
    if prompts[0].box is not None:
        box = _stack(
            [frame.box(each.box) for frame, each in zip(frames, prompts, strict=True) if each.box is not None]
        )
    if prompts[0].mask is not None:
        shown = zip(frames, prompts, strict=True)
        mask = torch.cat([frame.mask(each.mask, side) for frame, each in shown if each.mask is not None])
    moved = [None if value is None else value.to(device) for value in (points, signs, box, mask)]
    return model.decode(
        batch.embeddings, points=moved[0], signs=moved[1], box=moved[2], mask=moved[3], multimask=multimask
    )


def _stack(values: Sequence[FloatArray]) -> Tensor:
    return torch.as_tensor(np.stack(values), dtype=torch.float32)


def answer(
    model: Sam, batch: Batch, config: PromptableConfig, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Let a user point and click, and return the last answer, with gradients.

    Answers before it only make clicks. So the network sees every stage of a correction, at the cost of one.
    One click alone is answered by one mask or, half of the times, by three: both are in use.
    """
    prompts = first_prompts(batch.samples, config, generator)
    rounds = int(generator.integers(1, config.clicks + 1)) if config.clicks else 0
    rounds = rounds if generator.random() < config.click_share else 0
    three = generator.random() < 0.5
    for _ in range(rounds):
        with torch.no_grad():
            low, scores = decode(model, _detached(batch), prompts, three and _is_ambiguous(prompts))
        chosen = low[torch.arange(len(low)), scores.argmax(1)].cpu()
        logits = [frame.logits(each[None])[0] for frame, each in zip(batch.frames, chosen, strict=True)]
        prompts = [
            _with_click(replace(each, mask=mask), sample, mask > 0, config, generator)
            for each, mask, sample in zip(prompts, logits, batch.samples, strict=True)
        ]
    return decode(model, batch, prompts, three and _is_ambiguous(prompts))


def _detached(batch: Batch) -> Batch:
    return replace(batch, embeddings=batch.embeddings.detach())


def _is_ambiguous(prompts: Sequence[SlicePrompts]) -> bool:
    """Return whether it is one click alone."""
    first = prompts[0]
    return len(first.points) == 1 and first.box is None and first.mask is None


def targets(batch: Batch, side: int) -> tuple[Tensor, Tensor]:
    """Return the part of each low-resolution pixel that is object, and which pixels show the image.

    Both are (n, side, side) float32.
    """
    wanted = torch.zeros(len(batch.samples), side, side)
    valid = torch.zeros(len(batch.samples), side, side)
    for n, (sample, frame) in enumerate(zip(batch.samples, batch.frames, strict=True)):
        rows, columns = (max(1, round(size * side / frame.size)) for size in frame.new)
        mask = torch.from_numpy(sample.mask.astype(np.float32))[None, None]
        wanted[n, :rows, :columns] = F.interpolate(
            mask, (rows, columns), mode="bilinear", align_corners=False, antialias=True
        )[0, 0]
        valid[n, :rows, :columns] = 1
    return wanted, valid


def loss_of(logits: Tensor, expected: Tensor, wanted: Tensor, valid: Tensor, weights: LossWeights) -> Tensor:
    """Return soft Dice plus cross entropy of the best mask, and the squared error of the expected IoU of all.

    Parameters
    ----------
    logits : (n, masks, s, s)
    expected : (n, masks) IoU
    wanted, valid : (n, s, s)
    """
    wanted, valid = wanted[:, None], valid[:, None]
    probability = torch.sigmoid(logits) * valid
    both = (probability * wanted).sum((2, 3))
    dice = 1 - (2 * both + 1) / (probability.sum((2, 3)) + wanted.sum((2, 3)) + 1)
    goal = wanted.expand_as(logits)
    pixel = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    if weights.focal_gamma:
        missed = (goal - torch.sigmoid(logits)).abs()
        pixel = pixel * missed**weights.focal_gamma
    entropy = (pixel * valid).sum((2, 3)) / valid.sum((2, 3))
    best = (weights.dice * dice + weights.pixel * entropy).min(1).values
    with torch.no_grad():
        found, true = (logits > 0) & (valid > 0), goal > 0.5
        union = (found | true).sum((2, 3)).clamp(min=1)
        iou = (found & true).sum((2, 3)) / union
    return best.mean() + weights.iou * ((expected - iou) ** 2).mean()
