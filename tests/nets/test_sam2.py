"""SAM 2 without its weights: names of the original files, and each step beside transformers' own session."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from medseg.errors import BundleError, ConfigError
from medseg.nets import sam2
from medseg.nets.sam2 import SPECS, Memory, Recall, Sam2, Sam2Spec, load_sam2, prepare

pytest.importorskip("transformers")

SIZE = 64
# The heads are those of SAM 2, only the trunk is small.
SMALL = Sam2Spec("small-trunk", 8, 1, (1, 1, 2, 1), (3,), windows=(8, 4, 4, 2))
OLD = Sam2Spec("small-trunk-2.0", 8, 1, (1, 1, 2, 1), (3,), windows=(8, 4, 4, 2), pointers_in_time=False)


@cache
def filled(spec: Sam2Spec, size: int = SIZE, score: float | None = None) -> Sam2:
    """A network of random weights; with `score`, one that is sure whether the object is there."""
    network = sam2._build(spec, size)
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, weight in network.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:  # layers must let their input through, or nothing is compared
            weights[name] = 0.2 * noise + name.endswith("weight")
        elif weight.ndim > 1 and "embed" not in name:
            weights[name] = noise * 1.5 / weight[0].numel() ** 0.5
        else:
            weights[name] = noise * 0.5
    if score is not None:
        weights["mask_decoder.pred_obj_score_head.proj_out.weight"].zero_()
        weights["mask_decoder.pred_obj_score_head.proj_out.bias"].fill_(score)
    network.load_state_dict(weights, assign=True)
    return Sam2(network, spec, size)


@pytest.fixture(scope="module")
def model() -> Sam2:
    return filled(SMALL, score=3.0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


class Names(dict[str, tuple[int, ...]]):
    """Names and shapes of tensors, added module by module."""

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        self.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(self, name: str, channels: int) -> None:
        self.update({f"{name}.weight": (channels,), f"{name}.bias": (channels,)})

    def conv(self, name: str, first: int, second: int, side: int, bias: int) -> None:
        self.update({f"{name}.weight": (first, second, side, side), f"{name}.bias": (bias,)})

    def attention(self, name: str, inner: int, source: int = 256) -> None:
        self.linear(f"{name}.q_proj", 256, inner)
        self.linear(f"{name}.k_proj", source, inner)
        self.linear(f"{name}.v_proj", source, inner)
        self.linear(f"{name}.out_proj", inner, 256)

    def three_layers(self, name: str, outputs: int) -> None:
        self.linear(f"{name}.layers.0", 256, 256)
        self.linear(f"{name}.layers.1", 256, 256)
        self.linear(f"{name}.layers.2", 256, outputs)


def original_names(spec: Sam2Spec) -> dict[str, tuple[int, ...]]:
    """Tensors of a checkpoint as the modules of github.com/facebookresearch/sam2 register them.

    Written from sam2_base.py, hieradet.py, image_encoder.py, memory_attention.py, memory_encoder.py and
    sam/{prompt_encoder,mask_decoder,transformer}.py.
    """
    found = Names()
    add_trunk(found, spec)
    add_memory(found)
    add_prompts(found)
    add_decoder(found)
    if spec.pointers_in_time:
        found.linear("obj_ptr_tpos_proj", 256, 64)
        found["no_obj_embed_spatial"] = (1, 64)
    return found


def add_trunk(found: Names, spec: Sam2Spec) -> None:
    trunk, width = "image_encoder.trunk", spec.width
    found[f"{trunk}.pos_embed"] = (1, width, spec.background, spec.background)
    found[f"{trunk}.pos_embed_window"] = (1, width, spec.windows[0], spec.windows[0])
    found.conv(f"{trunk}.patch_embed.proj", width, 3, 7, bias=width)
    inputs = width
    stages = [stage for stage, blocks in enumerate(spec.blocks) for _ in range(blocks)]
    for block, stage in enumerate(stages):
        outputs, name = width * 2**stage, f"{trunk}.blocks.{block}"
        found.norm(f"{name}.norm1", inputs)
        found.linear(f"{name}.attn.qkv", inputs, 3 * outputs)
        found.linear(f"{name}.attn.proj", outputs, outputs)
        found.norm(f"{name}.norm2", outputs)
        found.linear(f"{name}.mlp.layers.0", outputs, 4 * outputs)
        found.linear(f"{name}.mlp.layers.1", 4 * outputs, outputs)
        if inputs != outputs:
            found.linear(f"{name}.proj", inputs, outputs)
        inputs = outputs
    for level in range(4):
        found.conv(f"image_encoder.neck.convs.{level}.conv", 256, width * 2 ** (3 - level), 1, bias=256)


def add_memory(found: Names) -> None:
    found.update({"maskmem_tpos_enc": (7, 1, 1, 64), "no_obj_ptr": (1, 256)})
    found.update({"no_mem_embed": (1, 1, 256), "no_mem_pos_enc": (1, 1, 256)})
    found.conv("mask_downsample", 1, 1, 4, bias=1)
    found.three_layers("obj_ptr_proj", 256)
    for layer in range(4):
        name = f"memory_attention.layers.{layer}"
        found.attention(f"{name}.self_attn", 256)
        found.attention(f"{name}.cross_attn_image", 256, source=64)
        found.linear(f"{name}.linear1", 256, 2048)
        found.linear(f"{name}.linear2", 2048, 256)
        for n in (1, 2, 3):
            found.norm(f"{name}.norm{n}", 256)
    found.norm("memory_attention.norm", 256)
    for n in range(4):
        name, outputs = "memory_encoder.mask_downsampler.encoder", 4 ** (n + 1)
        found.conv(f"{name}.{3 * n}", outputs, 4**n, 3, bias=outputs)
        found.norm(f"{name}.{3 * n + 1}", outputs)
    found.conv("memory_encoder.mask_downsampler.encoder.12", 256, 256, 1, bias=256)
    found.conv("memory_encoder.pix_feat_proj", 256, 256, 1, bias=256)
    found.conv("memory_encoder.out_proj", 64, 256, 1, bias=64)
    for layer in range(2):
        name = f"memory_encoder.fuser.layers.{layer}"
        found[f"{name}.gamma"] = (256,)
        found.conv(f"{name}.dwconv", 256, 1, 7, bias=256)
        found.norm(f"{name}.norm", 256)
        found.linear(f"{name}.pwconv1", 256, 1024)
        found.linear(f"{name}.pwconv2", 1024, 256)


def add_prompts(found: Names) -> None:
    prompts = "sam_prompt_encoder"
    found[f"{prompts}.pe_layer.positional_encoding_gaussian_matrix"] = (2, 128)
    for name in (*(f"point_embeddings.{n}" for n in range(4)), "not_a_point_embed", "no_mask_embed"):
        found[f"{prompts}.{name}.weight"] = (1, 256)
    found.conv(f"{prompts}.mask_downscaling.0", 4, 1, 2, bias=4)
    found.norm(f"{prompts}.mask_downscaling.1", 4)
    found.conv(f"{prompts}.mask_downscaling.3", 16, 4, 2, bias=16)
    found.norm(f"{prompts}.mask_downscaling.4", 16)
    found.conv(f"{prompts}.mask_downscaling.6", 256, 16, 1, bias=256)


def add_decoder(found: Names) -> None:
    decoder = "sam_mask_decoder"
    for name, count in (("iou_token", 1), ("mask_tokens", 4), ("obj_score_token", 1)):
        found[f"{decoder}.{name}.weight"] = (count, 256)
    for layer in range(2):
        name = f"{decoder}.transformer.layers.{layer}"
        found.attention(f"{name}.self_attn", 256)
        found.attention(f"{name}.cross_attn_token_to_image", 128)
        found.attention(f"{name}.cross_attn_image_to_token", 128)
        found.linear(f"{name}.mlp.layers.0", 256, 2048)
        found.linear(f"{name}.mlp.layers.1", 2048, 256)
        for n in (1, 2, 3, 4):
            found.norm(f"{name}.norm{n}", 256)
    found.attention(f"{decoder}.transformer.final_attn_token_to_image", 128)
    found.norm(f"{decoder}.transformer.norm_final_attn", 256)
    # Transposed convolutions: inputs first.
    found.conv(f"{decoder}.output_upscaling.0", 256, 64, 2, bias=64)
    found.norm(f"{decoder}.output_upscaling.1", 64)
    found.conv(f"{decoder}.output_upscaling.3", 64, 32, 2, bias=32)
    found.conv(f"{decoder}.conv_s0", 32, 256, 1, bias=32)
    found.conv(f"{decoder}.conv_s1", 64, 256, 1, bias=64)
    for n in range(4):
        found.three_layers(f"{decoder}.output_hypernetworks_mlps.{n}", 32)
    found.three_layers(f"{decoder}.iou_prediction_head", 4)
    found.three_layers(f"{decoder}.pred_obj_score_head", 1)


# Millions of parameters in the table of the README of facebookresearch/sam2, and tensors of each file.
PUBLISHED = {"tiny": (38.9, 471), "small": (46.0, 519), "base-plus": (80.8, 615), "large": (224.4, 903)}


@pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
def test_every_size_has_the_tensors_and_parameters_that_were_published(spec: Sam2Spec) -> None:
    with torch.device("meta"):
        weights = sam2._build(spec, 1024).state_dict()
    original = {name: tuple(tensor.shape) for name, tensor in sam2.to_original(weights).items()}
    assert original == original_names(spec)
    millions, tensors = PUBLISHED[spec.name]
    assert len(original) == tensors
    buffer = 256  # the positional matrix is no parameter
    count = sum(np.prod(shape, dtype=int) for shape in original.values()) - buffer
    assert abs(count / 1e6 - millions) < 0.1


def test_a_version_2_0_has_no_pointers_in_time() -> None:
    with torch.device("meta"):
        weights = sam2._build(OLD, SIZE).state_dict()
    assert set(sam2.to_original(weights)) == set(original_names(OLD))


def test_names_go_to_transformers_and_back() -> None:
    names = original_names(SPECS[0])
    there = [sam2.transformers_name(name) for name in names]
    assert len(set(there)) == len(names)
    assert [sam2.original_name(name) for name in there] == list(names)


def save(path: Path, model: Sam2, **changes: Tensor | None) -> Path:
    weights = {**sam2.to_original(model.network.state_dict()), **changes}
    torch.save({"model": {name: tensor for name, tensor in weights.items() if tensor is not None}}, path)
    return path


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sam2, "SPECS", (SMALL,))


@pytest.mark.usefixtures("known")
def test_an_original_checkpoint_gives_the_network_that_it_was_made_of(model: Sam2, tmp_path: Path) -> None:
    loaded = load_sam2(save(tmp_path / "a.pt", model), SIZE)
    for name, tensor in model.network.state_dict().items():
        if name != sam2._SHARED:  # in the original there is one matrix
            assert torch.equal(loaded.network.state_dict()[name], tensor), name
    assert loaded.spec == SMALL


@pytest.mark.usefixtures("known")
def test_the_file_of_transformers_gives_the_same_network(model: Sam2, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    loaded = load_sam2(tmp_path / "a.safetensors", SIZE)
    assert all(torch.equal(loaded.network.state_dict()[name], weights[name]) for name in weights)


@pytest.mark.usefixtures("known")
def test_version_2_0_is_told_from_2_1(tmp_path: Path) -> None:
    assert load_sam2(save(tmp_path / "old.pt", filled(OLD)), SIZE).spec.pointers_in_time is False


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"no_obj_ptr": None}, "lacks no_object_pointer"),
        ({"no_obj_ptr": torch.zeros(1, 7)}, "another shape of no_object_pointer"),
        ({"another": torch.zeros(1)}, "also holds another"),
        ({"image_encoder.trunk.pos_embed": torch.zeros(1, 9, 7, 7)}, "a size that nobody published"),
        ({"maskmem_tpos_enc": None}, "without its memory"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    changes: dict[str, Tensor | None], word: str, model: Sam2, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=word):
        load_sam2(save(tmp_path / "a.pt", model, **changes), SIZE)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("image_encoder.pos_embed", "SAM or MedSAM"),
        ("image_encoder.patch_embed.seq.0.c.weight", "MobileSAM or LiteMedSAM"),
        ("encoder.stages.0.weight", "holds no SAM 2"),
    ],
)
def test_another_model_is_named_in_the_refusal(name: str, word: str, tmp_path: Path) -> None:
    torch.save({name: torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(BundleError, match=word):
        load_sam2(tmp_path / "a.pth")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "hook": Path.mkdir}, tmp_path / "a.pt")
    with pytest.raises(BundleError, match="could run code"):
        load_sam2(tmp_path / "a.pt")


@pytest.mark.parametrize("size", [0, -32, 100, 33])
def test_a_size_that_the_strides_do_not_divide_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 32"):
        load_sam2("nowhere.pt", size)


def test_without_transformers_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BundleError, match=r"pip install 'medseg\[sam2\]'") as caught:
        sam2._build(SMALL, SIZE)
    assert "\n" not in str(caught.value)


# --- Preprocessing and positions ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(90, 70), (40, 200), (512, 512)])
def test_an_image_is_prepared_as_pillow_does(shape: tuple[int, int], rng: np.random.Generator) -> None:
    # Within these greys nothing is clipped: which axis goes first depends on the version of Pillow.
    grey = np.kron(rng.integers(50, 206, (shape[0] // 10 + 1, shape[1] // 10 + 1)), np.ones((10, 10)))
    grey = grey[: shape[0], : shape[1]].astype(np.uint8)
    expected = np.asarray(Image.fromarray(grey).convert("RGB").resize((SIZE, SIZE)), dtype=np.float64) / 255
    expected = (expected - sam2.MEAN) / sam2.STD
    found = prepare(grey.astype(np.float32), SIZE)[0].permute(1, 2, 0).numpy()
    grey_level = 1 / 255 / min(sam2.STD)
    assert np.abs(found - expected).max() < 1.5 * grey_level  # Pillow rounds after each pass


def test_positions_are_those_of_the_reference() -> None:
    from transformers.models.sam2_video.modeling_sam2_video import (
        Sam2VideoPositionEmbeddingSine,
        get_1d_sine_pe,
    )

    expected = Sam2VideoPositionEmbeddingSine(num_position_features=32, normalize=True)(
        torch.Size((1, 64, 4, 4)), "cpu", torch.float32
    )
    torch.testing.assert_close(sam2.sine_positions(4, 64), expected.flatten(2).permute(2, 0, 1))
    times = torch.tensor([0.0, 0.1, 1.0])
    torch.testing.assert_close(sam2.sine_times(times, 256), get_1d_sine_pe(times, 256))


# --- Beside transformers' own session -----------------------------------------------------------------

FRAMES = 9
BOX = np.array([[20.0, 12.0], [45.0, 40.0]])
CLICKS = np.array([[20.0, 12.0], [45.0, 40.0], [30.0, 20.0], [50.0, 50.0]])


def video(rng: np.random.Generator) -> Tensor:
    frames = [np.kron(rng.random((8, 8)) * 255, np.ones((8, 8))) for _ in range(FRAMES)]
    return torch.cat([prepare(frame.astype(np.float32), SIZE) for frame in frames])


def their_session(frames: Tensor, prompts: dict[int, tuple[np.ndarray, list[int]] | Tensor]):
    from transformers import Sam2VideoInferenceSession

    session = Sam2VideoInferenceSession(frames, SIZE, SIZE, dtype=torch.float32)
    index = session.obj_id_to_idx(1)
    for frame, prompt in prompts.items():
        if isinstance(prompt, Tensor):
            session.add_mask_inputs(index, frame, prompt[None, None])
        else:
            points, labels = prompt
            coords = torch.tensor(points, dtype=torch.float32)[None, None]
            signs = torch.tensor(labels, dtype=torch.int32)[None, None]
            session.add_point_inputs(index, frame, {"point_coords": coords, "point_labels": signs})
    return session


def theirs(
    model: Sam2, session, prompted: list[int], start: int, reverse: bool
) -> dict[int, tuple[Tensor, float]]:
    found = {}
    for frame in prompted:
        session.obj_with_new_inputs = [1]
        out = model.network(inference_session=session, frame_idx=frame)
        found[frame] = (out.pred_masks[0, 0], float(out.object_score_logits))
    for out in model.network.propagate_in_video_iterator(session, start_frame_idx=start, reverse=reverse):
        found[out.frame_idx] = (out.pred_masks[0, 0], float(out.object_score_logits))
    return found


def ours(
    model: Sam2,
    frames: Tensor,
    prompts: dict[int, tuple[np.ndarray, list[int]] | Tensor],
    order: range,
) -> dict[int, tuple[Tensor, float]]:
    """A plain transcription of the reference's choice of memories, without a bound."""
    step = order.step
    found, asked, seen = {}, {}, {}
    for index, prompt in prompts.items():
        features = model.encode(frames[index : index + 1])
        answer = (
            model.given(features, prompt) if isinstance(prompt, Tensor) else model.prompted(features, *prompt)
        )
        asked[index] = model.remember(features, answer, prompted=True)
        found[index] = (answer.logits, answer.score)
    for index in order:
        if index in asked:
            continue
        ago = {(index - other) * step: memory for other, memory in seen.items()}
        past = {
            (index - other) * step: memory for other, memory in asked.items() if (index - other) * step >= 0
        }
        recall = Recall(
            tuple((0, memory.features) for memory in asked.values())
            + tuple((n, ago[n].features) for n in range(6, 0, -1) if n in ago),
            tuple((n, memory.pointer) for n, memory in past.items())
            + tuple((n, ago[n].pointer) for n in range(1, 16) if n in ago),
            min(FRAMES, 16),
        )
        features = model.encode(frames[index : index + 1])
        answer = model.tracked(features, recall)
        seen[index] = model.remember(features, answer, prompted=False)
        found[index] = (answer.logits, answer.score)
    return found


def assert_same(found: dict[int, tuple[Tensor, float]], expected: dict[int, tuple[Tensor, float]]) -> None:
    assert set(found) == set(expected)
    for index, (logits, score) in expected.items():
        torch.testing.assert_close(found[index][0], logits, atol=2e-4, rtol=1e-4, msg=f"slice {index}")
        assert abs(found[index][1] - score) < 1e-3


@pytest.mark.parametrize(
    ("spec", "score", "reverse"),
    [(SMALL, 3.0, False), (SMALL, -3.0, True), (SMALL, None, True), (OLD, None, False), (OLD, -3.0, False)],
    ids=["2.1-present-up", "2.1-absent-down", "2.1-undecided-down", "2.0-undecided-up", "2.0-absent-up"],
)
def test_a_box_is_followed_as_in_transformers(
    spec: Sam2Spec, score: float | None, reverse: bool, rng: np.random.Generator
) -> None:
    model, frames = filled(spec, score=score), video(rng)
    start = FRAMES - 2 if reverse else 0
    prompts = {start: (BOX, [sam2.TOP_LEFT, sam2.BOTTOM_RIGHT])}
    expected = theirs(model, their_session(frames, prompts), [start], start, reverse)
    order = range(start, -1, -1) if reverse else range(start, FRAMES)
    assert_same(ours(model, frames, prompts, order), expected)


def test_clicks_and_a_mask_on_two_slices_are_followed_as_in_transformers(
    model: Sam2, rng: np.random.Generator
) -> None:
    frames = video(rng)
    mask = torch.zeros(SIZE, SIZE)
    mask[10:30, 20:50] = 1
    prompts = {1: (CLICKS, [sam2.TOP_LEFT, sam2.BOTTOM_RIGHT, 1, 0]), 5: mask}
    expected = theirs(model, their_session(frames, prompts), [1, 5], 1, reverse=False)
    assert_same(ours(model, frames, prompts, range(1, FRAMES)), expected)


def test_a_single_click_gives_the_best_of_three_masks_as_in_transformers(
    model: Sam2, rng: np.random.Generator
) -> None:
    frames = video(rng)
    prompts = {2: (CLICKS[2:3], [1])}
    expected = theirs(model, their_session(frames, prompts), [2], 2, reverse=False)
    assert_same(ours(model, frames, prompts, range(2, FRAMES)), expected)


def test_the_random_networks_of_these_tests_do_look_at_their_input(
    model: Sam2, rng: np.random.Generator
) -> None:
    frames = video(rng)
    corners = [sam2.TOP_LEFT, sam2.BOTTOM_RIGHT]
    one = ours(model, frames, {0: (BOX, corners)}, range(FRAMES))
    other = ours(model, frames, {0: (BOX + 6, corners)}, range(FRAMES))
    assert (one[FRAMES - 1][0] - other[FRAMES - 1][0]).abs().max() > 1e-2
    assert (one[1][0] - one[2][0]).abs().max() > 1e-2


# --- Sizes and precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 96])
def test_another_size_shares_the_weights_and_answers_as_a_network_of_that_size(
    model: Sam2, size: int
) -> None:
    other, fresh = model.sized(size), filled(SMALL, size, score=3.0)
    for name, tensor in model.network.state_dict().items():
        assert other.network.state_dict()[name].data_ptr() == tensor.data_ptr()
    image = prepare(np.linspace(0, 255, 400, dtype=np.float32).reshape(20, 20), size)
    answers = [m.prompted(m.encode(image), BOX / 2, [2, 3]) for m in (other, fresh)]
    assert torch.equal(answers[0].logits, answers[1].logits)
    assert answers[0].logits.shape == (size // 4, size // 4)
    with pytest.raises(ConfigError):
        model.sized(100)


def test_bf16_changes_little_and_keeps_prompts_exact(model: Sam2, rng: np.random.Generator) -> None:
    frames = video(rng)
    prompts = {0: (BOX, [2, 3])}
    exact = ours(model, frames, prompts, range(4))
    quick = ours(model.sized(SIZE, bf16=True), frames, prompts, range(4))
    for index, (logits, _) in exact.items():
        assert (quick[index][0] - logits).abs().mean() < 0.05 * logits.std()


def test_a_mask_that_is_given_is_the_answer(model: Sam2) -> None:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[16:48, 8:40] = True
    features = model.encode(prepare(np.zeros((20, 20), np.float32), SIZE))
    answer = model.given(features, mask)
    assert torch.equal(answer.logits > 0, mask[1::4, 1::4])
    assert answer.present and answer.iou == 1.0
    assert not model.given(features, torch.zeros(SIZE, SIZE)).present


def test_a_memory_is_small(model: Sam2) -> None:
    features = model.encode(prepare(np.zeros((20, 20), np.float32), SIZE))
    memory = model.remember(features, model.prompted(features, BOX, [2, 3]), prompted=True)
    assert isinstance(memory, Memory)
    assert memory.features.shape == ((SIZE // 16) ** 2, 1, 64)
    assert memory.features.dtype == torch.bfloat16
    # No view of something larger.
    assert memory.features.untyped_storage().nbytes() == memory.features.numel() * 2
