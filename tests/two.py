"""What two processes must do together, run by torchrun; prints one line a check. See test_train_ranks.py."""

import os
import signal
import sys
from pathlib import Path

import torch

from common.processes import leave
from config import parse
from models.sit import SiT
from tests.tiny import FLAGS, log_lines
from train import TrainConfig, train
from training.launch import gather_row
from training.step import TrainStep


def settings(out: Path, data: str, name: str, *extra: str) -> TrainConfig:
    return parse(TrainConfig, "", [*FLAGS, "--data-dir", data, "--output-dir", str(out), "--exp-name", name, *extra])


def ending(config: TrainConfig) -> str:
    """How a run ends in this process: a message, "silent", or an exit status."""
    try:
        return f"status {train(config)}"
    except ValueError as error:
        return str(error)
    except SystemExit as stopped:
        return f"silent {stopped.code}"


def main() -> None:
    good, bad, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    rank = int(os.environ["RANK"])
    original = TrainStep.__call__

    # the second rank never makes weights: its own are overwritten by the first one's
    initialize = SiT.initialize_weights

    def initialize_on_first(self):
        assert rank == 0 or next(self.parameters()).is_meta
        initialize(self)

    SiT.initialize_weights = initialize_on_first

    # a signal to one process only: both finish the same step, save it and stop
    def step_with_signal(self, step, batches):
        if step == 0:  # the EMA of both is the first one's, too
            averages = gather_row(torch.stack([x.double().norm() for x in self.ema.average.state_dict().values()]))
            assert torch.equal(averages[0], averages[1])
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, batches)

    TrainStep.__call__ = step_with_signal
    end = ending(settings(out, good, "signal", "--max-train-steps", "50", "--checkpointing-steps", "1000"))
    saved = sorted(path.name for path in (out / "signal/checkpoints").iterdir())
    print(f"signal rank {rank}: {end}, saved {saved}", flush=True)

    # the same during a measurement: both give it up between batches and save
    measured = (
        "--eval-every",
        "2",
        "--eval-samples",
        "67",
        "--eval-features",
        f"timm:{sys.argv[4]}",
        "--preview-steps",
        "1",
    )
    reference = ("--eval-reference", str(out / "reference.npz"))
    end = ending(settings(out, good, "measured", "--max-train-steps", "50", *measured, *reference))
    saved = sorted(path.name for path in (out / "measured/checkpoints").iterdir())
    lines = [("fd" in line) for line in log_lines(out, "measured")]
    print(f"measured rank {rank}: {end}, saved {saved}, {lines}", flush=True)

    # weights that drift apart in one process are found at the next checkpoint
    def step_with_drift(self, step, batches):
        result = original(self, step, batches)
        if step == 2 and rank == 1:
            with torch.no_grad():
                self.network.blocks[1].mlp.fc1.bias[3] += 1e-7
        return result

    TrainStep.__call__ = step_with_drift
    start = ("--init-from", str(out / "signal"))  # read by the first alone
    end = ending(settings(out, good, "drift", "--max-train-steps", "8", "--checkpointing-steps", "2", *start))
    print(f"drift rank {rank}: {end}", flush=True)

    TrainStep.__call__ = original
    end = ending(settings(out, bad, "nan", "--max-train-steps", "8"))
    print(f"nan rank {rank}: {end}", flush=True)

    end = ending(settings(out, good, "indivisible", "--max-train-steps", "8", "--batch-size", "9"))
    print(f"indivisible rank {rank}: {end}", flush=True)
    leave()


if __name__ == "__main__":
    main()
