"""Which device, number format and backend a network runs on, and how much memory it may take."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.infer import choice, choose_device, choose_runtime
from medseg.infer.choice import fastest
from medseg.infer.runtime import _compiled, is_out_of_memory, tile_batch, tiles_at_once
from medseg.nets.fused import fold
from tests.nets.test_fused import ISOTROPIC, make

PATCH = (8, 16, 16)
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed"
)


def test_a_device_that_is_not_there_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"'cuda': this machine .* has none. Use auto or cpu"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="'gpu': expected auto, cpu"):
        choose_device("gpu")


def test_devices_are_counted_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ConfigError, match="'cuda:1': this machine has 1, counted from 0"):
        choose_device("cuda:1")


class Watched(nn.Module):
    """Counts calls; both backends run it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def settle(folder: Path, work_voxels: int | None = None, precision: str = "fp32", threads: int = 1) -> str:
    choice._known.clear()
    runtime = choose_runtime("cpu", precision, "auto")
    return fastest(runtime, Watched().eval(), PATCH, 2, threads, work_voxels, folder).backend


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds that each backend takes; a test changes them. `runs` counts the measurements."""
    seconds = {"torch": 2.0, "openvino": 1.0, "runs": 0}

    def alternate(calls: dict[str, Any], tile: torch.Tensor) -> Any:
        seconds["runs"] += 1
        logits = {name: call(tile) for name, call in calls.items()}
        return {name: seconds[name] for name in calls}, logits

    monkeypatch.setattr(choice, "_alternate", alternate)
    monkeypatch.setattr(choice, "cpu_has_bf16", lambda: True)
    return seconds


@needs_openvino
def test_the_faster_one_is_measured_once_and_remembered(timed: dict[str, float], tmp_path: Path) -> None:
    assert settle(tmp_path) == "openvino"
    assert settle(tmp_path) == "openvino"
    timed.update(torch=0.5)
    assert settle(tmp_path) == "openvino"
    assert timed["runs"] == 1
    # Another number of threads or precision is another question.
    assert settle(tmp_path, threads=2) == settle(tmp_path, precision="bf16") == "torch"
    assert timed["runs"] == 3
    entries = json.loads((tmp_path / choice.FILE).read_text())
    assert {entry["backend"] for entry in entries.values()} == {"torch", "openvino"}
    assert len(entries) == 3


@needs_openvino
def test_little_work_is_not_measured_but_an_old_choice_is_used(
    timed: dict[str, float], tmp_path: Path
) -> None:
    assert settle(tmp_path, work_voxels=1000) == "torch"
    assert timed["runs"] == 0
    assert settle(tmp_path, work_voxels=10**12) == "openvino"
    assert settle(tmp_path, work_voxels=1000) == "openvino"
    assert timed["runs"] == 1


@needs_openvino
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"x": 3}', "[" * 100_000, '{"KEY": {"backend": "cuda"}}', "\udcff"]
)
def test_a_damaged_memory_is_ignored_and_written_anew(
    timed: dict[str, float], tmp_path: Path, content: str
) -> None:
    (tmp_path / choice.FILE).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert settle(tmp_path) == "openvino"
    assert settle(tmp_path) == "openvino"
    assert timed["runs"] == 1


@needs_openvino
def test_a_place_that_cannot_be_written_is_no_error(timed: dict[str, float], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert settle(tmp_path / "file") == "openvino"
    assert settle(tmp_path / "file") == "openvino"
    assert timed["runs"] == 2  # nothing was remembered


@needs_openvino
def test_wrong_logits_are_not_chosen_however_fast(
    timed: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice.OpenVinoNetwork, "__call__", lambda self, batch: batch.new_zeros(1, 3, *PATCH))
    assert settle(tmp_path) == "torch"


def test_without_openvino_auto_is_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert settle(tmp_path) == "torch"


def test_bf16_is_not_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "cpu_has_bf16", lambda: False)
    runtime = fastest(choose_runtime("cpu", "bf16", "auto"), Watched(), PATCH, 2, 1, 1000, tmp_path)
    assert runtime.precision == "fp32"
    assert choose_runtime("cpu", "bf16", "torch").precision == "bf16"


def test_a_real_measurement_ends_in_a_runtime_with_the_same_logits(tmp_path: Path) -> None:
    network = make("unet", ISOTROPIC)
    choice._known.clear()
    ready = choose_runtime("cpu", "fp32", "auto").prepare(network, PATCH, 2, 1, cache=tmp_path)
    assert ready.runtime.backend in ("torch", "openvino")
    batch = torch.randn(2, 2, *PATCH)
    with torch.inference_mode():
        torch.testing.assert_close(ready(batch), network(batch), rtol=1e-3, atol=1e-3)


def test_work_is_estimated_from_the_products_of_a_tile() -> None:
    network = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ConvTranspose3d(4, 1, 2, 2))
    products = 8 * 16 * 16 * (2 * 4 * 27 + 4 * 8)
    estimate = choice.estimate_seconds(network, PATCH, 2, 10 * 8 * 16 * 16)
    assert estimate == pytest.approx(10 * products / choice._PRODUCTS_PER_SECOND)
    assert not network[0]._forward_hooks
    assert choice.estimate_seconds(network, PATCH, 2, None) == float("inf")

    class Peeking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.sum().item()

    assert choice.estimate_seconds(Peeking(), PATCH, 2, 100) == float("inf")


def test_the_measured_tile_is_smaller_than_the_patch_and_still_fits_the_network() -> None:
    network = fold(make("unet", ISOTROPIC))
    assert choice._measured_size(network, (128, 128, 128)) == (64, 64, 64)
    assert choice._measured_size(network, (4, 512, 508)) == (4, 256, 508)
    assert choice._measured_size(network, (40, 56, 40)) == (40, 56, 40)
    assert choice._measured_size(nn.Conv3d(1, 1, 3), (128, 128, 128)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("Exception from src/inference: std::bad_alloc"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory lane"), False),
        (None, False),
    ],
)
def test_lack_of_memory_is_told_from_other_errors(error: BaseException | None, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    wrapped = RuntimeError("the tile failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) is expected


def test_a_batch_of_tiles_fits_into_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tile_batch(torch.device("cpu"), 1) == 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 24 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    cuda = torch.device("cuda")
    assert tile_batch(cuda, 2 << 30) == 3  # of 10 GiB, six tenths
    assert tile_batch(cuda, 100 << 30) == 1
    assert tile_batch(cuda, 1 << 20) == 16


def test_large_tiles_run_one_by_one() -> None:
    assert tiles_at_once(128**3, 5, threads=8) == 1
    assert tiles_at_once(40 * 56 * 40, 3, threads=8) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cpu", "fp16", "torch"), "a CPU does not compute in it"),
        (("cpu", "fp64", "torch"), "'fp64': expected auto, fp32, bf16, fp16"),
        (("cpu", "fp32", "tvm"), "'tvm': expected auto, torch, openvino"),
    ],
)
def test_what_is_not_possible_is_refused(arguments: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_runtime(*arguments)


def test_openvino_is_refused_on_a_gpu_where_auto_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"runs on a CPU, not on cuda\. Use device cpu"):
        choose_runtime("cuda", "auto", "openvino")
    runtime = choose_runtime("cuda", "auto", "auto")
    assert (runtime.backend, runtime.precision) == ("torch", "fp16")


def test_a_failed_compilation_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(network: nn.Module) -> Any:
        def call(batch: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    network = Watched()
    batch = torch.randn(1, 2, *PATCH)
    torch.testing.assert_close(_compiled(network)(batch), network(batch))


def test_an_nnunet_model_is_opened_and_its_work_estimated_without_torchs_compiler(golden_dir: Path) -> None:
    model = golden_dir / "inference" / "h_2d_aniso_ct" / "model"
    script = (
        "import sys\nfrom medseg.exchange import load_model\nfrom medseg.infer import choice\n"
        "from medseg.nets.fused import fold\n"
        f"bundle = load_model({str(model)!r})\nnetwork = fold(bundle.network('0')).eval()\n"
        "assert 0 < choice.estimate_seconds(network, bundle.settings.patch_size, 1, 1 << 20) < 30\n"
        "print([name for name in ('torch._dynamo', 'sympy', 'monai') if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "[]", found.stderr
