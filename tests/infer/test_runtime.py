"""Which device and number format a network runs on."""

import pytest
import torch

from medseg.errors import ConfigError
from medseg.infer import choose_device


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
