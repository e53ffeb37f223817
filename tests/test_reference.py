"""The code computes what the published code and the ADM evaluator were recorded to compute."""

from pathlib import Path

import numpy as np
import pytest

from tests.reference import check_folder, compare

SHIPPED = Path(__file__).parent / "data"
ALL = Path(__file__).parents[2] / "shared" / "reference"


def run(folder: Path) -> None:
    deviations = list(check_folder(folder))
    for d in deviations:
        print(f"{d.name:58s} max abs {d.max_abs:.2e}  max rel {d.max_rel:.2e}")
    failed = [d for d in deviations if not d.passed]
    assert deviations and not failed, failed


def test_shipped_recordings_are_reproduced():
    """Network, loss terms, SDE and ODE trajectories with and without guidance, metrics: within their limits."""
    run(SHIPPED)


@pytest.mark.skipif(not ALL.is_dir(), reason="the full set of recordings is not on this machine")
def test_all_recordings_are_reproduced():
    """The same for every recorded config, qk_norm included."""
    run(ALL)


def test_a_changed_recording_is_noticed(tmp_path):
    """One weight off by a hundredth exceeds the limit, so agreement is not for want of looking."""
    with np.load(SHIPPED / "model_tiny.npz") as stream:
        arrays = dict(stream)
    arrays["weight/blocks.1.mlp.fc1.weight"] = arrays["weight/blocks.1.mlp.fc1.weight"] + 0.01
    np.savez(tmp_path / "model_tiny.npz", **arrays)
    assert not all(d.passed for d in check_folder(tmp_path))


@pytest.mark.parametrize("missing", ["velocity", "weight/wg_norm.bias", "config"])
def test_an_incomplete_recording_is_refused(tmp_path, missing):
    """A file without its expected entries is an error, never a pass."""
    with np.load(SHIPPED / "model_tiny.npz") as stream:
        np.savez(tmp_path / "model_tiny.npz", **{k: v for k, v in stream.items() if k != missing})
    with pytest.raises((ValueError, RuntimeError), match=r"entry|Missing"):
        list(check_folder(tmp_path))


def test_an_empty_folder_is_refused(tmp_path):
    """No recordings is an error, never a pass."""
    with pytest.raises(ValueError, match="holds no model_"):
        list(check_folder(tmp_path))


def test_large_values_are_judged_relative_to_their_size():
    """float32 has 1e-5 at values of 100; below 1 the limit is absolute."""
    assert compare("x", np.array([100.001]), np.array([100.0])).passed
    assert not compare("x", np.array([0.01 + 1e-4]), np.array([0.01])).passed


def test_nan_never_passes():
    assert not compare("x", np.array([float("nan")]), np.array([1.0])).passed
