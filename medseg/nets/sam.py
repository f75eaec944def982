"""SAM, Segment Anything: LiteMedSAM, MobileSAM, the original SAM and MedSAM, from their published files.

Kirillov et al., "Segment Anything", ICCV 2023; Ma et al., "Segment anything in medical images", Nature
Communications 2024; Zhang et al., "Faster Segment Anything: Towards Lightweight SAM for Mobile Applications",
2023. Inside this module positions are (x, y) = (column, row) in pixels of the encoder's input, whose middle
of the first pixel is (0, 0). Preprocessing of slices is in :mod:`medseg.prompt.segmenter`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

from torch import Tensor, nn

from medseg.errors import BundleError
from medseg.nets.sam_bundle import is_tuned, read_tuned
from medseg.nets.sam_checkpoint import read_weights, recognise
from medseg.nets.sam_decoder import MaskDecoder, PromptEncoder
from medseg.nets.sam_vit import SIZES, ImageEncoderViT
from medseg.nets.tinyvit import TinyViT
from medseg.types import PathLike

Understands = Literal["point", "box", "mask"]
_EVERY: frozenset[Understands] = frozenset({"point", "box", "mask"})


@dataclass(frozen=True)
class SamSpec:
    """What a checkpoint was trained with, and so needs.

    Attributes
    ----------
    name : of the model
    encoder : tinyvit, tinyvit-full (LiteMedSAM's, whose stem keeps the resolution), or vit-b, vit-l, vit-h
    size : side of the square input in pixels
    resize : area: longest side to `size`, mean of the covered pixels; longest: longest side to `size`,
        bilinear with antialiasing; squash: both sides to `size`, cubic
    normalise : minmax: of the slice, to 0..1; imagenet: mean and deviation of colours of photographs
    understands : kinds of prompt that it answers; a model of boxes shrinks or loses its mask at clicks
    """

    name: str
    encoder: str
    size: int
    resize: Literal["area", "longest", "squash"]
    normalise: Literal["minmax", "imagenet"]
    understands: frozenset[Understands] = _EVERY


_BOXES: frozenset[Understands] = frozenset({"box"})
SPECS = {
    spec.name: spec
    for spec in (
        # LiteMedSAM's tokens for clicks were never trained.
        SamSpec("lite-medsam", "tinyvit-full", 256, "area", "minmax", _BOXES),
        SamSpec("mobile-sam", "tinyvit", 1024, "longest", "imagenet"),
        SamSpec("sam-vit-b", "vit-b", 1024, "longest", "imagenet"),
        SamSpec("sam-vit-l", "vit-l", 1024, "longest", "imagenet"),
        SamSpec("sam-vit-h", "vit-h", 1024, "longest", "imagenet"),
        SamSpec("medsam-vit-b", "vit-b", 1024, "squash", "minmax", _BOXES),
    )
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "tinyvit": partial(TinyViT, stem_stride=2),
    "tinyvit-full": partial(TinyViT, stem_stride=1),
    **{name: partial(ImageEncoderViT, size) for name, size in SIZES.items()},
}


class Sam(nn.Module):
    """The three parts of a promptable network, injected.

    >>> import torch
    >>> sam = build_sam("mobile-sam")
    >>> embedding = sam.encode(torch.zeros(1, 3, 64, 64))
    >>> logits, iou = sam.decode(embedding, points=torch.tensor([[[32.0, 32.0]]]), signs=torch.tensor([[1]]))
    >>> tuple(embedding.shape), tuple(logits.shape), tuple(iou.shape)
    ((1, 256, 4, 4), (1, 1, 16, 16), (1, 1))
    """

    def __init__(
        self,
        spec: SamSpec,
        image_encoder: nn.Module,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder

    @property
    def stride(self) -> int:
        """Pixels of the input, along each axis, to one of the embedding."""
        return cast(int, self.image_encoder.stride)

    def encode(self, image: Tensor) -> Tensor:
        """Return the embedding (n, 256, H / stride, W / stride) of prepared images (n, 3, H, W).

        `spec.size` is what the network was trained at; other multiples of the stride are allowed.
        """
        return cast(Tensor, self.image_encoder(image))

    def decode(
        self,
        embedding: Tensor,
        *,
        points: Tensor | None = None,
        signs: Tensor | None = None,
        box: Tensor | None = None,
        mask: Tensor | None = None,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Answer n prompts on one embedding, or one on each of n embeddings.

        Parameters
        ----------
        embedding : (1 or n, 256, h, w)
        points : (n, points, 2) x, y
        signs : (n, points), 1 inside, 0 outside, -1 no click (fills up a shorter list)
        box : (n, 4) x, y of the first corner, x, y of the last
        mask : (n, 1, 4 h, 4 w) logits, as `decode` returns them
        multimask : return the three masks for an ambiguous prompt instead of the one

        Returns
        -------
        logits : (n, 1 or 3, 4 h, 4 w)
        iou : (n, 1 or 3) that the network expects of each; may exceed 1
        """
        h, w = embedding.shape[-2:]
        size = (h * self.stride, w * self.stride)
        if points is None and box is None:
            count = 1 if mask is None else mask.shape[0]
            sparse = embedding.new_zeros((count, 0, embedding.shape[1]))
        else:
            sparse = self.prompt_encoder.sparse(size, points, signs, box)
        return cast(
            tuple[Tensor, Tensor],
            self.mask_decoder(
                embedding,
                self.prompt_encoder.pe_layer.grid(h, w),
                sparse,
                self.prompt_encoder.dense(mask, h, w),
                slice(1, None) if multimask else slice(0, 1),
            ),
        )


def build_sam(kind: str) -> Sam:
    """Return a network of `SPECS` with random weights, in evaluation.

    Raises
    ------
    BundleError
        The kind is unknown.
    """
    if kind not in SPECS:
        raise BundleError(f"promptable network {kind!r} is unknown. Use one of {', '.join(SPECS)}.")
    spec = SPECS[kind]
    return Sam(spec, ENCODERS[spec.encoder](), PromptEncoder(), MaskDecoder()).eval()


def load_sam(path: PathLike, kind: str | None = None) -> Sam:
    """Read a published checkpoint, of torch or safetensors, or a fine-tuned bundle; nothing in it is run.

    Parameters
    ----------
    path : ``.pth``, ``.pt``, ``.bin`` or ``.safetensors``, or what ``medseg train --task promptable`` wrote
    kind : name in `SPECS`; found from names and shapes of the weights if not given. MedSAM and SAM ViT-B
        do not differ in these: a file is MedSAM's if its name says so.

    Raises
    ------
    BundleError
        The file is damaged, names code, or holds another network: which is said.
    """
    if is_tuned(path):
        weights, found = read_tuned(path)
    else:
        weights = read_weights(path)
        found = recognise(weights, path)
    if kind is None:
        kind = found
    sam = build_sam(kind)
    if found not in SPECS or sam.spec.encoder != SPECS[found].encoder:
        raise BundleError(
            f"{path}: holds {found}, not {kind}. Pass the file of {kind}, or leave the kind out."
        )
    wanted = sam.state_dict()
    missing = [name for name in wanted if name not in weights]
    wrong = [name for name in wanted if name not in missing and weights[name].shape != wanted[name].shape]
    if missing or wrong:
        raise BundleError(
            f"{path}: looks like {found}, but {len(missing)} of its weights are missing and {len(wrong)} "
            f"have another shape (first: {(missing + wrong)[0]}). Download it again."
        )
    sam.load_state_dict({name: weights[name] for name in wanted})
    return sam
