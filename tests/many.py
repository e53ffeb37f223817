"""Several training runs one after the other in one process group: torchrun -m tests.many RUNS.json (lists of flags)."""

import json
import sys
from pathlib import Path

import torch

from common.processes import leave
from config import parse
from train import TrainConfig, train


def main() -> None:
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        status = train(parse(TrainConfig, "", flags))
        if status:
            raise SystemExit(status)
    print(f"processes: {torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1}")
    leave()


if __name__ == "__main__":
    main()
