"""SAM 2, SAM 2.1 and MedSAM2: the modules of transformers under our own preprocessing and memory.

The network sees one image at a time and a memory of others (Ravi et al., SAM 2: Segment Anything in Images
and Videos, 2024). :class:`Sam2` has no state between calls: what is remembered of a slice is a
:class:`Memory` value, and the caller chooses which of them a slice may see. So a long volume costs no more
memory than a short one, and the same calls give the same masks.

Inside, x = column and y = row, in pixels of the square that the network sees; pixel centres are whole
numbers. `S` is the side of that square, `T` = (S / 16)**2 the places of its coarsest features.
"""

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.errors import BundleError, ConfigError
from medseg.nets.sam_checkpoint import read_weights
from medseg.types import FloatArray, PathLike

# ImageNet's, of RGB / 255 (sam2/utils/transforms.py and medsam2_infer_3D_CT.py).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Logits of a pixel where the object is absent (``NO_OBJ_SCORE`` in sam2_base.py).
ABSENT = -1024.0
# Labels of the points that a box is (SAM 2 encodes a box as two points before the clicks) and of padding.
TOP_LEFT, BOTTOM_RIGHT, PADDING = 2, 3, -1
# A mask that is given stands for logits of +10 inside and -10 outside; the memory encoder sees
# probabilities in the same range (``_use_mask_as_output`` and sigmoid_{scale,bias}_for_mem_enc).
_SCALE, _BIAS = 20.0, -10.0
# Logits that go back in as a prompt are clamped to this (sam2_video_predictor.py).
_LARGEST_LOGIT = 32.0
# Multimask output for at most so many points (multimask_max_pt_num); a box counts as two.
_FEW_POINTS = 1
# The coarsest stage of Hiera has stride 32.
_STRIDE = 32

REMEDY = "Run `pip install 'medseg[sam2]'`."


@dataclass(frozen=True)
class Sam2Spec:
    """One trained size of SAM 2, as in the ``sam2/configs/sam2.1/*.yaml`` of its repository.

    Attributes
    ----------
    name : str
    width, heads : int
        Channels and attention heads of the first stage of the Hiera trunk; both double with each stage.
    blocks : tuple of int
        Of each stage.
    global_blocks : tuple of int
        Blocks, counted over all stages, that attend to the whole image and not to windows.
    background : int
        Side of the positional embedding that is stretched over the image.
    windows : tuple of int
        Side of the windows of each stage.
    pointers_in_time : bool
        SAM 2.1: object pointers know how far away they are, and memories whether the object was absent.
    """

    name: str
    width: int
    heads: int
    blocks: tuple[int, ...]
    global_blocks: tuple[int, ...]
    background: int = 7
    windows: tuple[int, ...] = (8, 4, 14, 7)
    pointers_in_time: bool = True


SPECS = (
    Sam2Spec("tiny", 96, 1, (1, 2, 7, 2), (5, 7, 9)),
    Sam2Spec("small", 96, 1, (1, 2, 11, 2), (7, 10, 13)),
    Sam2Spec("base-plus", 112, 2, (2, 3, 16, 3), (12, 16, 20), background=14),
    Sam2Spec("large", 144, 2, (2, 6, 36, 4), (23, 33, 43), windows=(8, 4, 16, 8)),
)


@dataclass(frozen=True, eq=False)
class Features:
    """What the image encoder says of one image.

    Attributes
    ----------
    coarse : (1, 256, S/16, S/16) float32
    middle : (1, 64, S/8, S/8) float32
    fine : (1, 32, S/4, S/4) float32
    """

    coarse: Tensor
    middle: Tensor
    fine: Tensor


@dataclass(frozen=True, eq=False)
class Answer:
    """What the network says of the object on one image.

    Attributes
    ----------
    logits : (S/4, S/4) float32
        > 0 inside the object; :data:`ABSENT` everywhere if it is absent.
    iou : float
        The network's estimate of the IoU of its mask, 0..1.
    score : float
        Logit of the object being there; <= 0 means absent.
    full : (1, 1, S, S) float32
        Logits as the memory encoder sees them.
    pointer : (1, 256) float32
        The object's token, for the images to come.
    """

    logits: Tensor
    iou: float
    score: float
    full: Tensor
    pointer: Tensor

    @property
    def present(self) -> bool:
        """Whether the object is on this image."""
        return self.score > 0


@dataclass(frozen=True, eq=False)
class Memory:
    """What is kept of an image: (T, 1, 64) bfloat16, as in the reference, and the pointer (1, 256)."""

    features: Tensor
    pointer: Tensor


@dataclass(frozen=True, eq=False)
class Recall:
    """What an image may see of others.

    Attributes
    ----------
    memories : tuple of (int, Tensor)
        How many slices ago (0 for every prompted slice, 1..6 for the recent ones) and
        :attr:`Memory.features`.
    pointers : tuple of (int, Tensor)
        How many slices ago, in the direction of travel, and :attr:`Memory.pointer`.
    span : int
        Pointers that are kept at most; distances are divided by one less (``max_obj_ptrs_in_encoder``).
    """

    memories: tuple[tuple[int, Tensor], ...]
    pointers: tuple[tuple[int, Tensor], ...]
    span: int = 16


class Sam2(nn.Module):
    """SAM 2 for images of side `size`.

    Parameters
    ----------
    network : transformers' ``Sam2VideoModel``
    spec : Sam2Spec
    size : int
        Side of the square that the network sees.
    bf16 : bool
        Compute the image encoder and the memory in bfloat16 by autocast (casting the weights hurts:
        transformers issue 46493); prompts and masks stay float32, since bfloat16 cannot tell neighbouring
        pixels of a prompt apart.
    """

    def __init__(self, network: Any, spec: Sam2Spec, size: int, bf16: bool = False) -> None:
        super().__init__()
        self.network: Any = network.eval().requires_grad_(False)
        self.spec = spec
        self.size = size
        self.bf16 = bf16
        side = size // 16
        self._positions = nn.Buffer(
            sine_positions(side, network.no_memory_embedding.shape[-1]), persistent=False
        )
        channels = network.memory_temporal_positional_encoding.shape[-1]
        self._memory_positions = nn.Buffer(sine_positions(side, channels), persistent=False)

    @property
    def recent(self) -> int:
        """How many recent memories the network was trained to see, beside the prompted ones."""
        return len(self.network.memory_temporal_positional_encoding) - 1

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self._positions.device
        return device

    def sized(self, size: int, bf16: bool | None = None) -> "Sam2":
        """Return the same network, sharing its weights, for images of another side.

        Raises
        ------
        ConfigError
            The size does not suit the network.
        """
        _check_size(size)
        network = _build(self.spec, size)
        network.load_state_dict(self.network.state_dict(), assign=True)
        return Sam2(network, self.spec, size, self.bf16 if bf16 is None else bf16).to(self.device)

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Features:
        """Run the image encoder.

        Parameters
        ----------
        image : (1, 3, S, S)
            As :func:`prepare` gives it.
        """
        net = self.network
        with self._fast():
            levels = net.vision_encoder(image.to(self.device)).fpn_hidden_states
            fine, middle = net.mask_decoder.conv_s0(levels[0]), net.mask_decoder.conv_s1(levels[1])
        return Features(levels[2].float(), middle.float(), fine.float())

    @torch.inference_mode()
    def prompted(
        self, features: Features, points: FloatArray, labels: Iterable[int], logits: Tensor | None = None
    ) -> Answer:
        """Answer prompts on an image by themselves, without memory.

        Parameters
        ----------
        features : Features
        points : (n, 2) float
            (x, y); those of a box first.
        labels : n of int
            1 inside, 0 outside, :data:`TOP_LEFT` and :data:`BOTTOM_RIGHT` of a box.
        logits : (S/4, S/4), optional
            What is known of the mask, such as an earlier answer.
        """
        coarse = features.coarse + self.network.no_memory_embedding.reshape(1, -1, 1, 1)
        return self._decode(features, coarse, points, list(labels), logits)

    @torch.inference_mode()
    def given(self, features: Features, mask: Tensor) -> Answer:
        """Take a mask for the answer, and make its pointer.

        Parameters
        ----------
        mask : (rows, columns) bool or float
            Of the image, at any resolution.
        """
        net, side = self.network, self.size
        full = _resize(mask.to(self.device, torch.float32)[None, None], side)
        known = net.mask_downsample(full)
        found = self._decode(features, features.coarse, np.zeros((0, 2)), [], known[0, 0])
        seen = float(bool((mask > 0).any()))
        pointer = seen * found.pointer + (1 - seen) * net.no_object_pointer
        full = full * _SCALE + _BIAS
        return Answer(_resize(full, side // 4)[0, 0], 1.0, _SCALE * seen + _BIAS, full, pointer)

    @torch.inference_mode()
    def tracked(self, features: Features, recall: Recall) -> Answer:
        """Find the object by what is remembered of other images."""
        net = self.network
        channels = features.coarse.shape[1]
        now = features.coarse.flatten(2).permute(2, 0, 1)
        memory, positions, pointers = self._remembered(recall)
        with self._fast():
            seen = net.memory_attention(now, memory, self._positions, positions, pointers)
        coarse = seen.float().reshape(1, -1, channels).transpose(1, 2).reshape(features.coarse.shape)
        return self._decode(features, coarse, np.zeros((0, 2)), [], None)

    @torch.inference_mode()
    def remember(self, features: Features, answer: Answer, prompted: bool) -> Memory:
        """Return what later images may see of this one.

        Parameters
        ----------
        prompted : bool
            Whether the user has said something about this image: its mask is then taken for certain
            (``binarize_mask_from_pts_for_mem_enc``).
        """
        net = self.network
        mask = (answer.full > 0).float() if prompted else answer.full.sigmoid()
        with self._fast():
            memory, _ = net.memory_encoder(features.coarse, mask * _SCALE + _BIAS)
        if net.occlusion_spatial_embedding_parameter is not None and not answer.present:
            memory = memory + net.occlusion_spatial_embedding_parameter[..., None, None]
        return Memory(memory.to(torch.bfloat16).flatten(2).permute(2, 0, 1).contiguous(), answer.pointer)

    def _fast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _remembered(self, recall: Recall) -> tuple[Tensor, Tensor, int]:
        """Return memories and pointers as tokens (n, 1, 64), their positions, and how many are pointers."""
        times = self.network.memory_temporal_positional_encoding  # [-1] of a prompted slice, [n - 1] of n ago
        memories = [memory.float() for _, memory in recall.memories]
        positions = [self._memory_positions + times[ago - 1] for ago, _ in recall.memories]
        if recall.pointers:
            tokens, places = self._pointer_tokens(recall)
            memories.append(tokens)
            positions.append(places)
        return torch.cat(memories), torch.cat(positions), len(tokens) if recall.pointers else 0

    def _pointer_tokens(self, recall: Recall) -> tuple[Tensor, Tensor]:
        pointers = torch.stack([pointer for _, pointer in recall.pointers])  # (n, 1, 256)
        size = self._memory_positions.shape[-1]
        parts = pointers.shape[-1] // size
        if self.spec.pointers_in_time:
            ago = torch.tensor([float(n) for n, _ in recall.pointers], device=self.device)
            places = sine_times(ago / max(1, recall.span - 1), pointers.shape[-1])
            places = self.network.temporal_positional_encoding_projection_layer(places)[:, None]
        else:
            places = pointers.new_zeros(len(pointers), 1, size)
        tokens = pointers.reshape(len(pointers), 1, parts, size).permute(0, 2, 1, 3).flatten(0, 1)
        return tokens, places.repeat_interleave(parts, dim=0)

    def _decode(
        self, features: Features, coarse: Tensor, points: FloatArray, labels: list[int], logits: Tensor | None
    ) -> Answer:
        net = self.network
        several = len(labels) <= _FEW_POINTS
        sparse, dense = self._encode_prompts(points, labels, logits)
        masks, ious, tokens, score = net.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=net.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=several,
            high_resolution_features=[features.fine, features.middle],
        )
        best = int(ious[0, 0].argmax()) if several else 0
        present = float(score) > 0
        mask = masks[:, 0, best : best + 1] if present else torch.full_like(masks[:, 0, :1], ABSENT)
        pointer = net.object_pointer_proj(tokens[:, 0, best]) if present else net.no_object_pointer
        full = functional.interpolate(mask, (self.size, self.size), mode="bilinear", align_corners=False)
        return Answer(mask[0, 0], float(ious[0, 0, best]), float(score), full, pointer)

    def _encode_prompts(
        self, points: FloatArray, labels: list[int], logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not labels:  # an empty point stands for none; the encoder adds a second one itself
            points, labels = np.zeros((1, 2)), [PADDING]
        places = torch.as_tensor(np.ascontiguousarray(points), dtype=torch.float32, device=self.device)
        signs = torch.tensor(labels, dtype=torch.int32, device=self.device)
        known = None
        if logits is not None:
            known = logits.to(self.device, torch.float32).clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)[None, None]
        sparse, dense = self.network.prompt_encoder(places[None, None], signs[None, None], None, known)
        return sparse, dense


def prepare(image: FloatArray, size: int) -> Tensor:
    """Return (1, 3, size, size) of a grey image (rows, columns), 0 black to 255 white.

    As the reference reads its frames: squashed to a square (the aspect is not kept) by Pillow's default,
    antialiased bicubic, filter, along rows, then along columns, each clipped; then normalised as ImageNet.
    Values are not rounded to whole grey levels.
    """
    square = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None, None]
    for sides in ((image.shape[0], size), (size, size)):
        square = functional.interpolate(square, sides, mode="bicubic", align_corners=False, antialias=True)
        square = square.clamp(0, 255)
    colour = square.expand(1, 3, size, size) / 255
    return (colour - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)


def _resize(image: Tensor, side: int) -> Tensor:
    if tuple(image.shape[-2:]) == (side, side):
        return image
    return functional.interpolate(image, (side, side), mode="bilinear", align_corners=False, antialias=True)


def sine_positions(side: int, channels: int) -> Tensor:
    """Return (side**2, 1, channels): sines of y, then of x, 1..side scaled to a turn (DETR, appendix A.4)."""
    steps = torch.arange(1, side + 1, dtype=torch.float32) / (side + 1e-6) * 2 * math.pi
    half = channels // 2
    rates = 10000.0 ** (2 * (torch.arange(half) // 2) / half)
    angles = steps[:, None] / rates
    waves = torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=2).flatten(1)
    y, x = waves[:, None].expand(side, side, half), waves[None].expand(side, side, half)
    return torch.cat((y, x), dim=2).reshape(side * side, 1, channels)


def sine_times(times: Tensor, channels: int) -> Tensor:
    """Return (n, channels): sines, then cosines, of (n,) times (``get_1d_sine_pe``)."""
    half = channels // 2
    rates = 10000.0 ** (2 * (torch.arange(half, device=times.device) // 2) / half)
    angles = times[:, None] / rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def load_sam2(path: PathLike, size: int = 1024, bf16: bool = False) -> Sam2:
    """Load a checkpoint of SAM 2, SAM 2.1 or MedSAM2; which size it is, is found from its weights.

    Parameters
    ----------
    path : the original ``.pt``, or ``.safetensors`` with the names of transformers
    size : int
        Side of the square that the network sees, a multiple of 32: 1024 as SAM 2 was trained, 512 as MedSAM2
        was; 256 suits a CPU.

    Raises
    ------
    BundleError
        The file is damaged or holds the weights of another model, or transformers is missing.
    ConfigError
        The size does not suit the network.
    """
    _check_size(size)
    weights = read_weights(path)
    if "image_encoder.trunk.pos_embed" in weights:
        weights = to_transformers(weights)
    spec = find_spec(weights, str(path))
    network = _build(spec, size)
    _fill(network, weights, str(path), spec.name)
    return Sam2(network, spec, size, bf16)


def _check_size(size: int) -> None:
    if size < _STRIDE or size % _STRIDE:
        raise ConfigError(
            f"SAM 2 cannot see images of side {size}. Use a multiple of {_STRIDE}: 256, 512 or 1024."
        )


def find_spec(weights: Mapping[str, Tensor], where: str) -> Sam2Spec:
    """Return what network the weights, under the names of transformers, belong to.

    Raises
    ------
    BundleError
        They are of another model; the message names it.
    """
    trunk = "vision_encoder.backbone."
    embedding = weights.get(f"{trunk}pos_embed")
    if embedding is None or "memory_temporal_positional_encoding" not in weights:
        raise BundleError(f"{where}: {_what_else(weights)}. Pass a checkpoint of SAM 2, SAM 2.1 or MedSAM2.")
    numbers = {int(n) for n in re.findall(rf"^{re.escape(trunk)}blocks\.(\d+)\.", "\n".join(weights), re.M)}
    for spec in SPECS:
        if (spec.width, sum(spec.blocks)) == (embedding.shape[1], len(numbers)):
            return replace(spec, pointers_in_time="occlusion_spatial_embedding_parameter" in weights)
    raise BundleError(
        f"{where}: is a SAM 2 of {len(numbers)} blocks and {embedding.shape[1]} channels, a size that nobody "
        f"published. Pass one of {', '.join(spec.name for spec in SPECS)}."
    )


def _what_else(weights: Mapping[str, Tensor]) -> str:
    if "image_encoder.pos_embed" in weights:
        return "holds SAM or MedSAM with a ViT image encoder, which is no SAM 2"
    if "image_encoder.patch_embed.seq.0.c.weight" in weights:
        return "holds MobileSAM or LiteMedSAM, which is no SAM 2"
    if "vision_encoder.backbone.pos_embed" in weights:
        return "holds the image part of SAM 2 without its memory"
    return f"holds no SAM 2 (found {', '.join(list(weights)[:3]) or 'nothing'})"


def _fill(network: nn.Module, weights: Mapping[str, Tensor], where: str, name: str) -> None:
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in weights]
    extra = [key for key in weights if key not in wanted]
    wrong = [key for key in wanted if key in weights and weights[key].shape != wanted[key].shape]
    for problem, keys in (("lacks", missing), ("also holds", extra), ("has another shape of", wrong)):
        if keys:
            raise BundleError(
                f"{where}: is not the SAM 2 ({name}) that it looks like, since it {problem} {keys[0]}"
                f"{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}. Copy or convert it again."
            )
    network.load_state_dict({key: weights[key].to(wanted[key].dtype) for key in wanted}, assign=True)


def _build(spec: Sam2Spec, size: int) -> Any:
    transformers = _transformers()
    widths = [spec.width * 2**stage for stage in range(4)]
    trunk = transformers.Sam2HieraDetConfig(
        hidden_size=spec.width,
        num_attention_heads=spec.heads,
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[spec.heads * 2**stage for stage in range(4)],
        blocks_per_stage=list(spec.blocks),
        global_attention_blocks=list(spec.global_blocks),
        window_positional_embedding_background_size=[spec.background] * 2,
        window_size_per_stage=list(spec.windows),
        image_size=[size, size],
    )
    image = transformers.Sam2VisionConfig(
        backbone_config=trunk,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[size // stride] * 2 for stride in (4, 8, 16)],
    )
    config = transformers.Sam2VideoConfig(
        vision_config=image,
        prompt_encoder_config=transformers.Sam2VideoPromptEncoderConfig(image_size=size),
        image_size=size,
        memory_attention_rope_feat_sizes=[size // 16] * 2,
        enable_temporal_pos_encoding_for_object_pointers=spec.pointers_in_time,
        enable_occlusion_spatial_embedding=spec.pointers_in_time,
    )
    with torch.device("meta"):  # weights are assigned; random ones for 224 million would take seconds
        network = transformers.Sam2VideoModel(config)
    _place_buffers(network, transformers)
    return network


def _place_buffers(network: Any, transformers: Any) -> None:
    """Give the tables that no checkpoint holds, of rotary positions, their values."""
    config = transformers.Sam2VideoConfig.from_dict(
        {**network.config.to_dict(), "memory_attention_num_layers": 0}
    )
    attention = network.memory_attention
    for name, table in type(attention)(config).named_buffers():
        *steps, last = name.split(".")
        setattr(attention.get_submodule(".".join(steps)), last, table)


def _transformers() -> Any:
    try:
        import transformers

        transformers.Sam2VideoModel  # noqa: B018  resolved lazily: an old transformers fails here
    except (ImportError, AttributeError) as error:
        raise BundleError(
            f"SAM 2 and MedSAM2 need transformers 5, which is not installed. {REMEDY}"
        ) from error
    return transformers


# --- Names in the original .pt, and in transformers ---------------------------------------------------
# Applied one after another to every name; `#` is any number. Backwards they are applied in the other
# order, so each must be undone by exchanging its two sides.

_THREE_LAYERS = (
    "iou_prediction_head",
    "pred_obj_score_head",
    "output_hypernetworks_mlps.#",
    "object_pointer_proj",
)
_RENAMES: tuple[tuple[str, str], ...] = (
    ("maskmem_tpos_enc", "memory_temporal_positional_encoding"),
    ("no_mem_embed", "no_memory_embedding"),
    ("no_mem_pos_enc", "no_memory_positional_encoding"),
    ("no_obj_ptr", "no_object_pointer"),
    ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
    ("obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer"),
    ("obj_ptr_proj", "object_pointer_proj"),
    ("image_encoder.trunk", "vision_encoder.backbone"),
    ("image_encoder.neck.convs.#.conv", "vision_encoder.neck.convs.#"),
    ("patch_embed.proj", "patch_embed.projection"),
    ("sam_prompt_encoder", "prompt_encoder"),
    ("sam_mask_decoder", "mask_decoder"),
    ("pe_layer.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    ("mask_downscaling.0", "mask_embed.conv1"),
    ("mask_downscaling.1", "mask_embed.norm1"),
    ("mask_downscaling.3", "mask_embed.conv2"),
    ("mask_downscaling.4", "mask_embed.norm2"),
    ("mask_downscaling.6", "mask_embed.conv3"),
    ("output_upscaling.0", "upscale_conv1"),
    ("output_upscaling.1", "upscale_layer_norm"),
    ("output_upscaling.3", "upscale_conv2"),
    *(
        (
            f"memory_encoder.mask_downsampler.encoder.{3 * n + part}",
            f"memory_encoder.mask_downsampler.layers.{n}.{name}",
        )
        for n in range(4)
        for part, name in enumerate(("conv", "norm"))
    ),
    ("memory_encoder.mask_downsampler.encoder.12", "memory_encoder.mask_downsampler.final_conv"),
    ("memory_encoder.pix_feat_proj", "memory_encoder.feature_projection"),
    ("memory_encoder.out_proj", "memory_encoder.projection"),
    ("memory_encoder.fuser.layers.#.gamma", "memory_encoder.fuser.layers.#.scale"),
    ("memory_encoder.fuser", "memory_encoder.memory_fuser"),
    ("dwconv", "depthwise_conv"),
    ("pwconv1", "pointwise_conv1"),
    ("pwconv2", "pointwise_conv2"),
    ("blocks.#.mlp.layers.0", "blocks.#.mlp.proj_in"),
    ("blocks.#.mlp.layers.1", "blocks.#.mlp.proj_out"),
    ("transformer.layers.#.mlp.layers.0", "transformer.layers.#.mlp.proj_in"),
    ("transformer.layers.#.mlp.layers.1", "transformer.layers.#.mlp.proj_out"),
    *(
        (f"{head}.{before}", f"{head}.{after}")
        for head in _THREE_LAYERS
        for before, after in (("layers.0", "proj_in"), ("layers.1", "layers.0"), ("layers.2", "proj_out"))
    ),
    ("out_proj", "o_proj"),
    ("norm", "layer_norm"),
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("norm3", "layer_norm3"),
    ("norm4", "layer_norm4"),
    ("norm_final_attn", "layer_norm_final_attn"),
)
_POINTS = "point_embeddings"
_SHARED = "shared_image_embedding.positional_embedding"
_OF_PROMPTS = "prompt_encoder.shared_embedding.positional_embedding"


def _rename(name: str, before: str, after: str) -> str:
    """Replace whole steps of a dotted name."""
    pattern = r"(?<![^.])" + re.escape(before).replace(r"\#", r"(\d+)") + r"(?![^.])"
    return re.sub(pattern, after.replace("#", r"\1"), name)


def transformers_name(name: str) -> str:
    """Return what transformers calls a tensor of the original checkpoint.

    >>> transformers_name("sam_mask_decoder.iou_prediction_head.layers.2.bias")
    'mask_decoder.iou_prediction_head.proj_out.bias'
    """
    for before, after in _RENAMES:
        name = _rename(name, before, after)
    return name


def original_name(name: str) -> str:
    """Return what the original checkpoint calls a tensor of transformers.

    >>> original_name("memory_attention.layers.0.self_attn.o_proj.weight")
    'memory_attention.layers.0.self_attn.out_proj.weight'
    """
    for before, after in reversed(_RENAMES):
        name = _rename(name, after, before)
    return name


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of an original checkpoint under the names of transformers.

    The embeddings of the four kinds of points become one table, and the positional matrix is there twice.
    """
    renamed = {transformers_name(name): tensor for name, tensor in weights.items()}
    rows = [f"prompt_encoder.{_POINTS}.{n}.weight" for n in range(4)]
    if all(row in renamed for row in rows):
        renamed["prompt_encoder.point_embed.weight"] = torch.cat([renamed.pop(row) for row in rows])
    if _OF_PROMPTS in renamed:
        renamed[_SHARED] = renamed[_OF_PROMPTS]
    return renamed


def to_original(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of transformers as the original checkpoint has them; undoes :func:`to_transformers`."""
    rest = {name: tensor for name, tensor in weights.items() if name != _SHARED}
    table = rest.pop("prompt_encoder.point_embed.weight")
    renamed = {original_name(name): tensor for name, tensor in rest.items()}
    return renamed | {f"sam_prompt_encoder.{_POINTS}.{n}.weight": table[n : n + 1] for n in range(4)}
