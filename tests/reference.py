"""Compare the code with recorded inputs and outputs of the published one: `python -m tests.reference DIR`.

Runs every model_*.npz, loss_*.npz, sde_*.npz and ode_*.npz of a folder, and the files of activations and metrics of the
ADM evaluator. Prints one line for each file and run with the largest absolute and relative deviation; exits with status 1
if one exceeds its limit or a file lacks what its kind must hold.

loss_X_PATH.npz, sde_X_PATH.npz and ode_X.npz belong to the network of model_X.npz in the same folder.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loss import Draws, Objective
from models.choices import PATHS
from models.guidance import Guidance, network_velocity
from models.interpolant import Interpolant
from models.published import from_published
from models.samplers import ode_times, sde_times
from models.sit import SiT, SiTConfig
from models.solvers import euler, euler_maruyama, heun
from models.state import State

LIMIT = 2e-5  # of max_rel; the published code moves by 5e-6 between fp32 and fp64


class Deviation(NamedTuple):
    """Largest |ours - recorded|, and that over the largest |recorded|, which for what a network computes counts as at least
    1. The limit is on the latter."""

    name: str
    max_abs: float
    max_rel: float
    limit: float = LIMIT

    @property
    def passed(self) -> bool:
        return self.max_rel <= self.limit


def compare(name: str, ours: Tensor | np.ndarray | float, recorded: np.ndarray, limit: float = LIMIT) -> Deviation:
    ours, recorded = np.asarray(ours, dtype=np.float64), np.asarray(recorded, dtype=np.float64)
    if ours.shape != recorded.shape:
        raise ValueError(f"{name}: ours has shape {ours.shape}, the recording {recorded.shape}")
    if ours.size == 0 or not np.isfinite(ours).all():
        return Deviation(name, float("inf"), float("inf"), limit)
    max_abs = float(np.abs(ours - recorded).max())
    return Deviation(name, max_abs, max_abs / max(1.0, float(np.abs(recorded).max())), limit)


class Recording:
    """An npz of recordings: array access as tensors, with a sentence for what is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with np.load(path, allow_pickle=False) as stream:
            self.arrays = dict(stream)

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.array(name))

    def array(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise ValueError(f"{self.path.name} has no entry {name!r}")
        return self.arrays[name]

    def json(self, name: str) -> dict:
        return json.loads(str(self.array(name)))

    def runs(self) -> list[str]:
        """The names before the slash of `run/settings` entries; at least one."""
        names = sorted(name.removesuffix("/settings") for name in self.arrays if name.endswith("/settings"))
        if not names:
            raise ValueError(f"{self.path.name} holds no run (no entry RUN/settings)")
        return names


def load_network(recording: Recording) -> SiT:
    """Build the recorded network; strict, so that a missing or extra weight fails."""
    c = recording.json("config")
    config = SiTConfig(
        depth=c["depth"],
        hidden_size=c["hidden_size"],
        num_heads=c["num_heads"],
        input_size=c["input_size"],
        patch_size=c["patch_size"],
        in_channels=c["in_channels"],
        num_classes=c["num_classes"],
        qk_norm=c["qk_norm"],
        class_token_dim=c["z_dims"][0],
        align_dims=c["z_dims"],
        align_depth=c["encoder_depth"],
        projector_dim=c["projector_dim"],
    )
    weights = {name.removeprefix("weight/"): recording[name] for name in recording.arrays if name.startswith("weight/")}
    network = SiT(config).eval()
    network.load_state_dict(from_published(weights), strict=True)
    return network


def check_model(recording: Recording, network: SiT) -> Iterator[Deviation]:
    with torch.no_grad():
        output = network(recording["x"], recording["t"], recording["y"], recording["cls"], project=True)
    name = recording.path.stem
    yield compare(f"{name} velocity", output.velocity, recording.array("velocity"))
    yield compare(f"{name} class velocity", output.class_velocity, recording.array("cls_velocity"))
    yield compare(f"{name} projections", output.projections[0], recording.array("projected"))


def check_loss(recording: Recording, network: SiT, path: str) -> Iterator[Deviation]:
    x, t, label = recording["x"], recording["t"], recording["y"]
    draws = Draws(torch.zeros_like(x), State(recording["noise"], recording["cls_noise"]), t, torch.ones_like(t))
    outputs = []

    def listening_network(*args, **kwargs):
        outputs.append(network(*args, **kwargs))
        return outputs[-1]

    null, clean = network.config.num_classes, State(x, recording["cls"])
    with torch.no_grad():
        terms = Objective(Interpolant(path))(listening_network, clean, label, [recording["z"]], draws, null_label=null)
    name = recording.path.stem
    yield compare(f"{name} velocity", terms.velocity, recording.array("loss"))
    if path == "linear":
        yield compare(f"{name} class velocity", terms.class_velocity, recording.array("cls_loss"))
    else:
        published = _broadcast_class_loss(outputs[0].class_velocity, draws.noise, clean, path, t)
        yield compare(f"{name} class velocity, broadcast as published", published, recording.array("cls_loss"))
    yield compare(f"{name} alignment", terms.alignment.mean(), recording.array("align_loss"))


def _broadcast_class_loss(prediction: Tensor, noise: State, clean: State, path: str, t: Tensor) -> Tensor:
    """The published class-token loss off the linear path, whose derivatives have shape (N, 1, 1, 1) there and broadcast:
    sample i compares every prediction of the batch with targets taken at t_i. Ours takes each target at its own time;
    on the linear path, where the derivatives are constant, both are the same."""
    c = Interpolant(path).coefficients(t)
    target = c.d_alpha[:, None, None] * clean.class_token + c.d_sigma[:, None, None] * noise.class_token  # (N, N, E)
    return (prediction - target).square().flatten(1).mean(1)


def check_sampler(recording: Recording, network: SiT, path: str | None) -> Iterator[Deviation]:
    """path: the interpolant of an SDE recording; None for the ODE, which needs none."""
    start, steps = State(recording["x"], recording["cls"]), int(recording.array("num_steps"))
    for run in recording.runs():
        s = recording.json(f"{run}/settings")
        # The published sampler reads cls_cfg_scale 0 as: the class token is not guided, which is scale 1.
        guidance = Guidance(s["cfg_scale"], s["cls_cfg_scale"] or 1.0, s["guidance_low"], s["guidance_high"])
        velocity = network_velocity(network, recording["y"], guidance)
        with torch.no_grad():
            if path is not None:
                latent, token = recording[f"{run}/noise"], recording[f"{run}/cls_noise"]
                noise = [State(*parts) for parts in zip(latent, token, strict=True)]
                end = euler_maruyama(
                    velocity, start, sde_times(steps), Interpolant(path), lambda i, noise=noise: noise[i]
                )
            else:
                end = (heun if s["heun"] else euler)(velocity, start, ode_times(steps))
        yield compare(f"{recording.path.stem} {run}", end.latent, recording.array(f"{run}/out"))
        if f"{run}/cls_out" in recording.arrays:
            yield compare(
                f"{recording.path.stem} {run} class token", end.class_token, recording.array(f"{run}/cls_out")
            )


def check_folder(folder: Path) -> Iterator[Deviation]:
    """All recordings of a folder. Raises ValueError when there is none or one is incomplete."""
    files = sorted(folder.glob("*.npz"))
    known = [
        file for file in files if file.name.split("_")[0].split(".")[0] in ("model", "loss", "sde", "ode", "metrics")
    ]
    if not known:
        raise ValueError(f"{folder} holds no model_*, loss_*, sde_*, ode_* or metrics*.npz")
    networks = {
        file.stem.removeprefix("model_"): load_network(Recording(file)) for file in known if _kind(file) == "model"
    }
    for file in known:
        kind, rest = _kind(file), file.stem.partition("_")[2]
        if kind == "metrics":
            from tests.reference_metrics import check as check_metrics

            yield from (Deviation(*line) for line in check_metrics(file))
            continue
        path = next((p for p in PATHS if rest.endswith("_" + p)), None)
        owner = rest.removesuffix(f"_{path}") if path else rest
        if owner not in networks:
            raise ValueError(f"{file.name} needs model_{owner}.npz beside it")
        if kind in ("loss", "sde") and path is None:
            raise ValueError(f"{file.name}: the name must end in the interpolant, _linear or _cosine")
        recording = Recording(file)
        if kind == "model":
            yield from check_model(recording, networks[owner])
        elif kind == "loss":
            yield from check_loss(recording, networks[owner], path)
        else:
            yield from check_sampler(recording, networks[owner], path if kind == "sde" else None)


def _kind(file: Path) -> str:
    return file.stem.partition("_")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder
    failed = 0
    try:
        for deviation in check_folder(folder):
            failed += not deviation.passed
            print(
                f"{'ok  ' if deviation.passed else 'FAIL'} {deviation.name:58s} max abs {deviation.max_abs:.2e}  "
                f"max rel {deviation.max_rel:.2e}  limit {deviation.limit:.0e}"
            )
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if failed:
        print(f"{failed} deviations above the limit", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
