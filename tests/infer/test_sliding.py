"""Laws of the sliding window."""

import logging
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import BundleError, Cancelled, ConfigError
from medseg.infer import sliding, sliding_window, stream
from medseg.infer.runtime import choose_runtime, count_threads
from medseg.infer.workers import in_order
from medseg.log import Listener, listening


def noise(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same(batch):
    return batch


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    patch=st.tuples(*[st.integers(2, 8)] * 3),
    step=st.sampled_from([0.3, 0.5, 1.0]),
)
def test_a_network_that_returns_its_input_gives_the_volume_back(shape, patch, step):
    data = noise((2, *shape))
    result = sliding_window(same, data, patch, 2, (0, 2), step, compatible=False, threads=1)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, data, atol=1e-4)


def test_compatible_sums_are_float16_and_exact_to_its_precision_away_from_the_corners():
    data = noise((1, 20, 20, 20))
    result = sliding_window(same, data, (16, 16, 16), 1, threads=1)
    assert result.dtype == np.float16
    inner = (0, *(slice(6, 14),) * 3)
    np.testing.assert_allclose(result[inner].astype(np.float32), data[inner], atol=0.01)


@pytest.mark.parametrize("mirror", [(), (0, 1)])
def test_a_2d_network_sees_every_slice_of_the_first_axis(mirror):
    seen = []

    def network(batch):
        seen.append(batch.shape)
        return batch

    data = noise((1, 5, 9, 7))
    result = sliding_window(network, data, (6, 6), 1, mirror, compatible=False, threads=1)
    np.testing.assert_allclose(result, data, atol=1e-5)
    assert all(shape[1:] == (1, 6, 6) for shape in seen)
    assert sum(shape[0] for shape in seen) == 5 * 2 * 2 * 2 ** len(mirror)


def test_flips_are_undone_and_averaged():
    ramp = torch.arange(4.0)[:, None, None].expand(4, 4, 4)
    data = np.zeros((1, 4, 4, 4), np.float32)
    plain = sliding_window(lambda x: x + ramp, data, (4, 4, 4), 1, (), threads=1)
    flipped = sliding_window(lambda x: x + ramp, data, (4, 4, 4), 1, (0,), compatible=False, threads=1)
    np.testing.assert_allclose(plain[0, :, 0, 0], [0, 1, 2, 3])
    np.testing.assert_allclose(flipped[0, :, 0, 0], [1.5] * 4, rtol=1e-6)


def test_overlapping_tiles_are_weighted_towards_their_centres(monkeypatch):
    monkeypatch.setattr(sliding, "BATCH_VOXELS", 1)
    values = iter([0.0, 1.0])
    result = sliding_window(
        lambda x: torch.full_like(x, next(values)), noise((1, 12, 8, 8)), (8, 8, 8), 1, threads=1
    )
    profile = result[0, :, 4, 4].astype(float)
    assert profile[0] == 0 and profile[-1] == 1
    assert (np.diff(profile) >= 0).all() and 0 < profile[6] < 1


@pytest.mark.parametrize("compatible", [True, False])
def test_threads_do_not_change_a_bit(compatible):
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 3, 3, padding=1)
    data = noise((1, 20, 17, 12))
    one = sliding_window(network, data, (8, 8, 8), 3, (0, 1), 0.5, compatible, threads=1)
    four = sliding_window(network, data, (8, 8, 8), 3, (0, 1), 0.5, compatible, threads=4)
    assert (one == four).all()


def test_the_callers_number_of_torch_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    sliding_window(same, noise((1, 9, 9, 9)), (4, 4, 4), 1, threads=3)
    assert torch.get_num_threads() == before


def test_logits_too_many_for_memory_are_kept_in_a_file(monkeypatch):
    data = noise((1, 9, 9, 9))
    in_memory = sliding_window(same, data, (4, 4, 4), 1, threads=1)
    monkeypatch.setattr(stream, "MEMORY_BYTES", 100)
    on_disk = sliding_window(same, data, (4, 4, 4), 1, threads=1)
    assert (in_memory == on_disk).all()


def test_logits_beyond_float16_are_summed_in_float32(caplog):
    data = np.full((1, 6, 6, 6), 60000, np.float32)
    with caplog.at_level(logging.WARNING, "medseg"):
        result = sliding_window(same, data, (4, 4, 4), 1, threads=1)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, data, rtol=1e-5)
    assert "again with 32 bits" in caplog.text


def test_a_network_that_returns_nan_is_a_bundle_error():
    with pytest.raises(BundleError, match="not finite"):
        sliding_window(lambda x: x * float("nan"), noise((1, 4, 4, 4)), (4, 4, 4), 1, threads=1)


def test_deep_supervision_outputs_are_ignored_but_the_first():
    data = noise((1, 4, 4, 4))
    result = sliding_window(lambda x: [x, x[..., ::2]], data, (4, 4, 4), 1, compatible=False, threads=1)
    np.testing.assert_allclose(result, data, rtol=1e-6)


def test_prediction_stops_on_request_between_tiles(monkeypatch):
    monkeypatch.setattr(sliding, "BATCH_VOXELS", 1)
    calls = []

    class Stop(Listener):
        def cancelled(self):
            return len(calls) >= 3

    with listening(Stop()), pytest.raises(Cancelled):
        sliding_window(lambda x: calls.append(1) or x, noise((1, 40, 4, 4)), (4, 4, 4), 1, threads=1)
    assert len(calls) == 3


def test_in_order_keeps_the_order_and_a_bound_on_what_runs_ahead():
    running, most, lock = 0, 0, threading.Lock()

    def work(n):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        with lock:
            running -= 1
        return n * n

    assert list(in_order(work, range(50), workers=3)) == [n * n for n in range(50)]
    assert most <= 3


def test_an_error_in_a_worker_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda n: 1 // (n - 2), range(10), workers=2))


def busy_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("medseg ")]


def test_no_worker_is_alive_once_all_is_done_or_the_iterator_is_closed():
    assert list(in_order(lambda n: n, range(9), workers=3)) == list(range(9)) and not busy_threads()
    some = in_order(lambda n: n, range(9), workers=3)
    assert next(some) == 0 and len(busy_threads()) == 3
    some.close()
    assert not busy_threads()


def test_a_worker_that_is_stuck_is_not_waited_for():
    release, began = threading.Event(), time.monotonic()
    some = in_order(lambda n: release.wait(60) if n else n, [0, 1, 1], workers=2)
    assert next(some) == 0
    some.close()
    assert time.monotonic() - began < 20 and busy_threads()
    release.set()
    deadline = time.monotonic() + 20
    while busy_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not busy_threads()


def test_no_worker_outlives_a_volume(monkeypatch):
    monkeypatch.setattr(sliding, "tiles_at_once", lambda *_: 2)
    monkeypatch.setattr(sliding, "BATCH_VOXELS", 1)
    alive = set()

    def network(tile):
        alive.update(busy_threads())
        return tile

    sliding_window(network, noise((1, 16, 8, 8)), (8, 8, 8), 1, threads=2)
    assert alive == {"medseg tiles 0", "medseg tiles 1"} and not busy_threads()


@pytest.mark.parametrize(
    ("device", "precision", "says"),
    [
        ("cpu", "fp16", "bf16"),
        ("cpu", "fp64", "expected"),
        ("gpu", "fp32", "expected"),
        ("mps", "fp32", "none"),
    ],
)
def test_a_runtime_that_is_not_there_is_a_config_error(device, precision, says):
    with pytest.raises(ConfigError, match=says):
        choose_runtime(device, precision)


def test_threads_below_one_are_refused():
    assert count_threads(3) == 3
    assert count_threads(None) >= 1
    with pytest.raises(ConfigError, match="at least 1"):
        count_threads(0)


def test_a_process_ends_while_a_tile_is_still_being_computed():
    script = (
        "import time\nfrom medseg.infer.workers import in_order\n"
        "next(in_order(lambda n: time.sleep(60 * n) or n, [0, 1, 1], 2))"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", script], check=True, timeout=50)
    assert time.monotonic() - began < 50
