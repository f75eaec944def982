"""Networks run by OpenVINO as by torch, by several threads, without a word to anybody."""

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.infer import openvino
from medseg.infer.openvino import OpenVinoNetwork, convert
from medseg.infer.runtime import choose_runtime
from medseg.nets import NETS
from tests.nets.test_fused import FLAT, ISOTROPIC, SLICES, make

pytest.importorskip("openvino")
PATCH = (8, 16, 16)


def assert_same(network, patch, **options):
    runner = OpenVinoNetwork(network, patch, 2, **options)
    batch = torch.randn(3, 2, *patch)
    with torch.inference_mode():
        expected = network(batch)
        torch.testing.assert_close(runner(batch), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(runner(batch.flip(2)), network(batch.flip(2)), rtol=1e-3, atol=1e-3)
    return runner


@pytest.mark.parametrize("network", NETS)
def test_every_network_gives_the_same_logits(network):
    # Swin UNETR halves five times, and its norms refuse a single voxel.
    assert_same(make(network, ISOTROPIC), (64, 32, 32) if network == "swin-unetr" else PATCH)


@pytest.mark.parametrize("layout", [FLAT, SLICES])
@pytest.mark.parametrize("network", ["unet", "resenc-unet"])
def test_flat_kernels_and_slices_give_the_same_logits(network, layout):
    assert_same(make(network, layout), PATCH[-len(layout["strides"][0]) :])


def test_bf16_rounds_and_fp32_does_not():
    network = make("unet", ISOTROPIC)
    batch = torch.randn(1, 2, *PATCH)
    with torch.inference_mode():
        expected = network(batch)
        errors = [
            (OpenVinoNetwork(network, PATCH, 2, precision)(batch) - expected).abs().max()
            for precision in ("fp32", "bf16")
        ]
    assert errors[0] < 1e-3 < errors[1] < 0.2 * expected.abs().max()


def test_norms_of_large_tiles_are_as_exact_as_torchs():
    network = make("unet", {**FLAT, "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2))}, features=(4, 4, 4))
    patch = (96, 96, 96)
    batch = 3 + torch.randn(1, 2, *patch)
    with torch.inference_mode():
        expected = network(batch)
        error = (OpenVinoNetwork(network, patch, 2)(batch) - expected).abs().max()
        assert error < 5e-5 * expected.abs().max()  # with OpenVINO's own norm 2e-4


def test_threads_get_their_own_results():
    network = make("unet", ISOTROPIC)
    runner = OpenVinoNetwork(network, PATCH, 2, threads=2, at_once=2)
    batches = [torch.randn(1, 2, *PATCH) for _ in range(24)]
    with torch.inference_mode():
        expected = [runner(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(runner, batches))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert 1 <= len(runner.idle) <= 4  # a request is used again


def test_the_network_may_be_dropped_or_changed_after_it_was_compiled():
    network = make("unet", ISOTROPIC)
    runner = OpenVinoNetwork(network, PATCH, 2)
    batch = torch.randn(1, 2, *PATCH)
    before = runner(batch)
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()
    torch.testing.assert_close(runner(batch), before, rtol=0, atol=0)


def test_a_missing_package_is_one_sentence_with_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not openvino.is_installed()
    with pytest.raises(ConfigError, match=r"not installed. pip install 'medseg\[openvino\]'"):
        choose_runtime("cpu", "fp32", "openvino")
    with pytest.raises(ConfigError, match="not installed"):
        convert(nn.Conv3d(2, 2, 3), PATCH, 2)


def test_a_network_that_it_cannot_run_is_refused_by_name():
    class Strange(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    runtime = choose_runtime("cpu", "fp32", "openvino")
    with pytest.raises(ConfigError, match=r"runtime openvino: cannot run Strange .* Use runtime torch"):
        runtime.prepare(Strange(), PATCH, 2, 1)


def test_nothing_is_sent_anywhere(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert_same(make("unet", ISOTROPIC), PATCH)
    sent = sys.modules.get("openvino_telemetry.main")
    assert sent is None or getattr(sent.Telemetry, "instance", None) is None


def test_it_is_not_imported_before_it_is_asked_for():
    code = """
import sys, torch
from medseg.infer.runtime import choose_runtime
choose_runtime("cpu", "fp32", "auto").prepare(torch.nn.Conv3d(1, 2, 3), (8, 8, 8), 1, 1, work_voxels=512)
assert "openvino" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
