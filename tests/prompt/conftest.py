"""Fixtures of the tests of prompting."""

import pytest


@pytest.fixture(autouse=True)
def sam2_stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the registry's tests ask a stand-in for SAM 2, whose weights are published on a hub only."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("name") == "memory":
        from medseg.prompt import memory
        from tests.prompt.bright_memory import BrightMemory

        stand_in = BrightMemory()
        monkeypatch.setattr(memory, "network", lambda models, config: stand_in)
