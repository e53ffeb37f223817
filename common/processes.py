"""The ranks of a program: started by torchrun or accelerate, or this process alone.

What this module exchanges goes over gloo, on the CPU; `broadcast` alone takes the way of its tensors' device.
"""

import datetime
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from config import UserError

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=7)  # a rank may work for hours before it joins the others at a barrier


class Processes:
    """Rank, number of ranks and device of this process."""

    def __init__(self, device: str = "auto", patience: datetime.timedelta = PATIENCE) -> None:
        """Join the group if a launcher started several processes.

        Args:
            device: cpu, cuda, or auto (CUDA where there is a GPU).
            patience: how long an exchange may take before it is an error.

        Raises:
            UserError: cuda was asked for and torch sees no device.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build of torch"
            )
        self.device = torch.device("cpu")
        if device != "cpu" and torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=patience)

    @property
    def rank(self) -> int:
        return rank()

    @property
    def world(self) -> int:
        return world()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which reads, writes and reports for all."""
        return rank() == 0


def rank() -> int:
    """Rank of this process, from 0; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(value: T) -> T:
    """Rank 0's value, on every rank; the others' values are not used."""
    if world() == 1:
        return value
    content = [value]
    dist.broadcast_object_list(content, src=0, device=torch.device("cpu"))
    return content[0]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, contiguous and on this rank's device, with those of rank 0."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank; waits for the slowest."""
    if world() == 1:
        return [value]
    content: list[Any] = [None] * world()
    dist.all_gather_object(content, value)
    return content


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (N_r, ...) of all ranks, in order of rank, on rank 0; other ranks get their own back. CPU tensors."""
    if world() == 1:
        return rows
    counts = gather(len(rows))
    padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype)
    padded[: len(rows)] = rows
    pieces = [torch.zeros_like(padded) for _ in counts] if rank() == 0 else None
    dist.gather(padded, pieces)
    if pieces is None:
        return rows
    return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])


def on_first(action: Callable[[], T]) -> T | None:
    """Run `action` on rank 0 and return its result there, None elsewhere.

    A UserError of it ends every rank: rank 0 reports it, the others leave silently.
    """
    result, error = None, None
    if rank() == 0:
        try:
            result = action()
        except UserError as caught:
            error = caught
    if share(error is not None):
        if error is None:
            raise SystemExit(2)
        raise error
    return result


def from_first(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank; a UserError ends every rank, as in `on_first`."""
    return cast(T, share(on_first(action)))


def in_turn(load: Callable[[], T]) -> T:
    """Call `load` on rank 0 first, then on the others, so that one process fills the caches and downloads.

    A UserError of it on rank 0 ends every rank, as in `on_first`.
    """
    loaded = on_first(lambda: [load()])
    return loaded[0] if loaded else load()


def leave() -> None:
    """End this process's part in the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def already_reported(error: str | None = None, timeout: float = 5.0) -> bool:
    """Ask the launcher's store whether a rank has reported an error before; from now on this one counts as reported.

    Args:
        error: its text; None: any error.
        timeout: seconds to wait for the store. Without an answer the error counts as new: better twice than never.
    """
    run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout),
        )
        if error is None:
            return store.check([f"errors/{run}"])
        store.set(f"errors/{run}", "1")
        return store.add(f"errors/{run}/{error}", 1) > 1
    except (KeyError, RuntimeError, ValueError):
        return False
