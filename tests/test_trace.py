"""The optimiser step gives the recorded numbers."""

import json
from pathlib import Path

import pytest

from tests.trace import trace

RECORDED = Path(__file__).parent / "data" / "trace.json"


def test_twenty_steps_are_those_recorded():
    """Losses and norms to 1e-5 on any processor; on the recorded one, with its torch, every bit of weights and EMA."""
    recorded, found = json.loads(RECORDED.read_text()), trace()
    assert len(found["steps"]) == len(recorded["steps"]) == 20
    for number, (now, then) in enumerate(zip(found["steps"], recorded["steps"], strict=True)):
        for name, value in then.items():
            assert now[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (number, name)
    for name in ("weights", "ema"):
        assert found[f"{name}_norm"] == pytest.approx(recorded[f"{name}_norm"], rel=1e-6)
        if found["environment"] == recorded["environment"]:
            assert found[name] == recorded[name], name
