import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg.errors import BundleError
from medseg.nets.sam import ENCODERS, SPECS, Sam, build_sam, load_sam
from medseg.nets.sam_checkpoint import read_weights, recognise
from medseg.nets.sam_decoder import MaskDecoder, PromptEncoder
from medseg.nets.sam_vit import SIZES, ImageEncoderViT, VitSize
from medseg.nets.tinyvit import MBConv, TinyViT, fold
from tests.nets.peer_sam import SAMPLES, SMALL_VIT, check_image, fill, layout

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sam.json").read_text())
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
DEVIATION = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def lite(lite_medsam_path: Path) -> tuple[Sam, Tensor]:
    """LiteMedSAM and its embedding of the check image."""
    sam = load_sam(lite_medsam_path)
    with torch.no_grad():
        return sam, sam.encode(torch.from_numpy(check_image(256)).expand(1, 3, 256, 256))


@pytest.fixture(scope="module")
def mobile(mobile_sam_path: Path) -> tuple[Sam, Tensor]:
    """MobileSAM and its embedding of the check image."""
    sam = load_sam(mobile_sam_path)
    image = (255 * torch.from_numpy(check_image(1024)).expand(1, 3, 1024, 1024) - MEAN) / DEVIATION
    with torch.no_grad():
        return sam, sam.encode(image)


def assert_embedding(embedding: Tensor, golden: dict[str, Any]) -> None:
    flat = embedding.double().flatten()
    at = np.linspace(0, flat.numel() - 1, SAMPLES).astype(int)
    assert abs(float(flat.mean()) - golden["mean"]) < 1e-6
    assert abs(float(flat.std()) - golden["std"]) < 1e-5
    np.testing.assert_allclose(flat[torch.from_numpy(at)], golden["values"], atol=1e-4)


def assert_answer(answer: tuple[Tensor, Tensor], golden: dict[str, Any]) -> None:
    logits, scores = answer
    assert float(logits.mean()) == pytest.approx(golden["mean"], abs=2e-3)
    # A pixel or two of 8000 may lie on the very border.
    np.testing.assert_allclose((logits > 0).sum((-1, -2))[0], golden["pixels"], rtol=5e-4, atol=2)
    np.testing.assert_allclose(scores[0], golden["scores"], atol=1e-4)


def boxes(*corners: float) -> Tensor:
    return torch.tensor([corners])


def test_lite_medsam_is_recognised_and_gives_the_embedding_of_its_package(lite: tuple[Sam, Tensor]) -> None:
    sam, embedding = lite
    assert (sam.spec.name, tuple(embedding.shape)) == ("lite-medsam", (1, 256, 64, 64))
    assert "point" not in sam.spec.understands
    assert_embedding(embedding, GOLDEN["lite-medsam"]["embedding"])


def test_lite_medsam_answers_a_box_as_its_package(lite: tuple[Sam, Tensor]) -> None:
    sam, embedding = lite
    logits, scores = sam.decode(embedding, box=boxes(70, 70, 186, 186))
    assert_answer((logits, scores), GOLDEN["lite-medsam"]["box"])
    again = sam.decode(embedding, box=boxes(70, 70, 186, 186), mask=logits)
    assert_answer(again, GOLDEN["lite-medsam"]["box and mask"])


def test_mobile_sam_is_recognised_and_gives_the_embedding_of_its_package(mobile: tuple[Sam, Tensor]) -> None:
    sam, embedding = mobile
    assert (sam.spec.name, tuple(embedding.shape)) == ("mobile-sam", (1, 256, 64, 64))
    assert_embedding(embedding, GOLDEN["mobile-sam"]["embedding"])


def test_mobile_sam_answers_every_kind_of_prompt_as_its_package(mobile: tuple[Sam, Tensor]) -> None:
    sam, embedding = mobile
    golden = GOLDEN["mobile-sam"]
    box = boxes(280, 280, 744, 744)
    click = {"points": torch.tensor([[[512.0, 512.0]]]), "signs": torch.tensor([[1]])}
    corner = {"points": torch.tensor([[[300.0, 300.0]]]), "signs": torch.tensor([[0]])}
    answer = sam.decode(embedding, box=box)
    assert_answer(answer, golden["box"])
    assert_answer(sam.decode(embedding, **click, multimask=True), golden["click"])
    assert_answer(sam.decode(embedding, box=box, **corner), golden["box and negative click"])
    assert_answer(sam.decode(embedding, mask=answer[0]), golden["mask"])
    assert_answer(sam.decode(embedding, box=box, mask=answer[0], **click), golden["click, box and mask"])


def test_several_prompts_at_once_are_answered_as_one_by_one(mobile: tuple[Sam, Tensor]) -> None:
    sam, embedding = mobile
    box = torch.tensor([[280.0, 280, 744, 744], [100, 300, 500, 900]])
    together, scores = sam.decode(embedding, box=box)
    for each in range(2):
        alone, score = sam.decode(embedding, box=box[each : each + 1])
        torch.testing.assert_close(together[each], alone[0], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(scores[each], score[0], atol=1e-4, rtol=1e-4)


def test_a_padding_point_is_no_click(mobile: tuple[Sam, Tensor]) -> None:
    sam, embedding = mobile
    points, signs = torch.tensor([[[512.0, 512.0], [3.0, 900.0]]]), torch.tensor([[1, -1]])
    moved = torch.tensor([[[512.0, 512.0], [800.0, 2.0]]])
    first = sam.decode(embedding, points=points, signs=signs)
    second = sam.decode(embedding, points=moved, signs=signs)
    assert torch.equal(first[0], second[0])


def test_an_encoder_takes_other_sizes_and_a_folded_one_says_the_same(mobile: tuple[Sam, Tensor]) -> None:
    sam, _ = mobile
    image = torch.from_numpy(check_image(256)).expand(1, 3, 256, 256) * 4 - 2
    plain = sam.encode(image)
    assert plain.shape == (1, 256, 16, 16)
    torch.testing.assert_close(fold(sam.image_encoder)(image), plain, atol=1e-4, rtol=1e-4)
    assert sam.image_encoder.state_dict().keys() == build_sam("mobile-sam").image_encoder.state_dict().keys()


def test_strips_of_a_convolution_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    block = MBConv(64).eval()
    x = torch.randn(1, 64, 37, 16, generator=torch.Generator().manual_seed(0))
    whole = block(x)
    for rows in (1, 5, 36):
        monkeypatch.setattr("medseg.nets.tinyvit._STRIP", rows * 16)
        torch.testing.assert_close(block(x), whole, atol=1e-5, rtol=1e-5)


def test_a_vit_gives_the_embedding_of_the_authors_code() -> None:
    width, depth, heads, everywhere, grid = SMALL_VIT
    encoder = ImageEncoderViT(VitSize(width, depth, heads, everywhere), grid).eval()
    encoder.load_state_dict(fill(encoder.state_dict()))
    image = torch.from_numpy(check_image(16 * grid)).expand(1, 3, 16 * grid, 16 * grid)
    assert_embedding(encoder(image), GOLDEN["vit"]["embedding"])


def test_a_vit_takes_images_of_other_sizes() -> None:
    encoder = ImageEncoderViT(VitSize(32, 2, 2, (1,)), grid=16).eval()
    assert encoder(torch.zeros(1, 3, 128, 96)).shape == (1, 256, 8, 6)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gives_an_embedding_at_its_stride(name: str) -> None:
    with torch.device("meta"):  # shapes without numbers: ViT-H costs nothing
        encoder = ENCODERS[name]()
        embedding = encoder(torch.zeros(1, 3, 64, 128))
    assert embedding.shape == (1, 256, 64 // encoder.stride, 128 // encoder.stride)


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_of_a_vit_are_those_of_the_published_files(size: str) -> None:
    with torch.device("meta"):
        state = build_sam(f"sam-{size}").state_dict()
    assert layout(state) == GOLDEN["vit"][size.replace("-", "_")]


def test_names_of_transformers_are_translated(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    width, depth, heads, everywhere, grid = SMALL_VIT
    side = 16 * grid
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "image_size": side,
            "global_attn_indexes": list(everywhere),
            "mlp_dim": 4 * width,
        },
        prompt_encoder_config={"image_size": side},
    )
    peer = transformers.SamModel(config).eval()
    peer.load_state_dict(fill(peer.state_dict()))
    path = tmp_path / "model.safetensors"
    safetensors.save_file({name: value.clone() for name, value in peer.state_dict().items()}, path)
    encoder = ImageEncoderViT(VitSize(width, depth, heads, everywhere), grid)
    ours = Sam(SPECS["sam-vit-b"], encoder, PromptEncoder(), MaskDecoder()).eval()
    weights = read_weights(path)
    ours.load_state_dict({name: weights[name] for name in ours.state_dict()})
    image = torch.from_numpy(check_image(side)).expand(1, 3, side, side)
    embedding = ours.encode(image)
    torch.testing.assert_close(embedding, peer.get_image_embeddings(image), atol=1e-4, rtol=0)
    points, signs = torch.tensor([[[120.0, 90.0], [30.0, 200.0]]]), torch.tensor([[1, 0]])
    logits, scores = ours.decode(embedding, points=points, signs=signs, multimask=True)
    theirs = peer(
        image_embeddings=embedding, input_points=points[None], input_labels=signs[None], multimask_output=True
    )
    torch.testing.assert_close(logits, theirs.pred_masks[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores, theirs.iou_scores[0], atol=1e-4, rtol=1e-4)


def flat_weights(kind: str) -> dict[str, Tensor]:
    """Weights of the right names and shapes in a file of a few kilobytes."""
    with torch.device("meta"):
        state = build_sam(kind).state_dict()
    return {name: torch.zeros(()).expand(value.shape) for name, value in state.items()}


def test_a_vit_b_is_medsam_where_its_name_says_so(tmp_path: Path) -> None:
    weights = flat_weights("sam-vit-b")
    assert recognise(weights, "sam_vit_b_01ec64.pth") == "sam-vit-b"
    assert recognise(weights, "MedSAM/medsam_vit_b.pth") == "medsam-vit-b"
    torch.save(weights, tmp_path / "vit.pth")
    sam = load_sam(tmp_path / "vit.pth", "medsam-vit-b")
    assert (sam.spec.resize, sam.stride) == ("squash", 16)


def test_weights_within_a_training_checkpoint_are_found(tmp_path: Path) -> None:
    weights = {f"module.{name}": value for name, value in build_sam("mobile-sam").state_dict().items()}
    torch.save({"model": weights, "epoch": 3, "optimizer": {}}, tmp_path / "last.pth")
    assert load_sam(tmp_path / "last.pth").spec.name == "mobile-sam"


def refused(path: Path, kind: str | None = None) -> str:
    with pytest.raises(BundleError) as caught:
        load_sam(path, kind)
    text = str(caught.value)
    assert text.startswith(str(path)), text
    assert text.endswith("."), text
    return text


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"sam_mask_decoder.transformer.x": 1, "memory_encoder.y": 1}, "holds a SAM 2"),
        ({"mask_decoder.transformer.x": 1, "mask_decoder.hf_token.weight": 1}, "holds a SAM-HQ"),
        ({"layer1.0.conv1.weight": 1}, "another network"),
        ({"mask_decoder.transformer.x": 1}, "image encoder that medseg does not know"),
        ({"mask_decoder.transformer.x": 1, "image_encoder.patch_embed.seq.0.c.weight": 4}, "missing"),
        ({}, "no weights"),
    ],
)
def test_the_file_of_another_network_is_refused_by_name(
    tmp_path: Path, weights: dict[str, int], words: str
) -> None:
    path = tmp_path / "w.pth"
    torch.save({name: torch.zeros([1] * size) for name, size in weights.items()}, path)
    assert words in refused(path)


def test_a_kind_that_the_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(flat_weights("mobile-sam"), path)
    assert "holds mobile-sam, not lite-medsam" in refused(path, "lite-medsam")
    with pytest.raises(BundleError, match="unknown"):
        load_sam(path, "sam-3")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/medseg-must-not-exist"),))


def test_a_file_that_names_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": Bomb()}, path)
    assert "could run code" in refused(path)
    assert not Path("/tmp/medseg-must-not-exist").exists()


def test_damaged_files_are_refused(tmp_path: Path, mobile_sam_path: Path) -> None:
    whole = mobile_sam_path.read_bytes()
    path = tmp_path / "w.pt"
    for content in (b"", b"no weights", whole[: len(whole) // 2], pickle.dumps([1])):
        path.write_bytes(content)
        refused(path)
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\xff" * 100)
    refused(path)
    refused(tmp_path / "missing.pth")


def test_a_file_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("w/data.pkl", "w") as member,
    ):
        for _ in range(80):
            member.write(bytes(2**20))
    assert "unpacks" in refused(path)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    weights = flat_weights("mobile-sam")
    weights["mask_decoder.iou_token.weight"] = torch.full((1, 256), torch.nan)
    path = tmp_path / "w.pth"
    torch.save(weights, path)
    assert "mask_decoder.iou_token.weight is not finite" in refused(path)


def test_a_tiny_vit_can_be_trained() -> None:
    encoder = TinyViT().train()
    with torch.enable_grad():
        encoder(torch.rand(2, 3, 64, 64)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
