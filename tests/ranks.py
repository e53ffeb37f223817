"""What two ranks do and how they fail: `torchrun -m tests.ranks CASE`, run by test_processes.py."""

import sys

import torch

from common import processes
from common.processes import Processes
from common.reporting import run, say
from config import UserError


def together() -> None:
    """Every exchange of common/processes.py; rank 0 prints what it found."""
    here = Processes("cpu")
    shared = processes.share(f"of rank {here.rank}")
    gathered = processes.gather((here.rank, here.world))
    rows = processes.gather_rows(torch.full((here.rank + 1, 2), float(here.rank)))
    loaded = processes.in_turn(lambda: here.rank)
    first = processes.on_first(lambda: "done")
    found = processes.gather([shared, gathered, rows.tolist(), loaded, first])
    say(f"{here.first} {found}")


def alone() -> None:
    """Rank 1 has a bad disk; rank 0 waits for it."""
    here = Processes("cpu")
    if here.rank == 1:
        raise UserError("the disk of this machine is full")
    processes.share(None)
    processes.gather(None)


def all_ranks() -> None:
    Processes("cpu")
    raise UserError("--width 0 must be at least 1")


def first() -> None:
    """Rank 0 alone looks, on behalf of all."""
    Processes("cpu")

    def look() -> None:
        raise UserError("no file here")

    processes.on_first(look)


def bug() -> None:
    here = Processes("cpu")
    if here.rank == 1:
        raise AssertionError("a bug of rank 1")
    processes.gather(None)


if __name__ == "__main__":
    run(globals()[sys.argv[1]])
