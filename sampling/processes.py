"""The processes of one sampling job: torchrun's, or this one alone."""

import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from config import UserError


class Process(NamedTuple):
    """This process: its number, how many there are, its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start(device: str) -> Process:
    """Join the other processes, if torchrun started several. device: cpu, cuda, or auto. Raises ValueError without CUDA."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build of torch")
    cuda = device != "cpu" and torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = torch.device("cpu")
    if cuda:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(place)
    if world > 1:
        # the others wait while rank 0 downloads and converts weights: many gigabytes, over any network
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=1))
    return Process(rank, world, place)


def broadcast(value: Any) -> Any:
    """What rank 0 has; the others' value does not matter."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
