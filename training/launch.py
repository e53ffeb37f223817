"""The processes of a run and the launcher's settings, over accelerate: DDP, or FSDP after its launcher's --use_fsdp."""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from config import UserError
from models.acceleration import best_precision
from models.cost import GPUS, named_gpu

T = TypeVar("T")


def asked_precision(precision: str, environment: Mapping[str, str] = os.environ) -> str:
    """The precision asked for by --mixed-precision or by accelerate's launcher: "auto", "fp32", "fp16" or "bf16".

    Raises UserError where the two contradict each other, and for fp8.
    """
    # The launcher sets "no" when nobody chose a precision, so "no" cannot be told from silence and decides nothing.
    launcher = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launcher == "no":
        return precision
    if launcher not in ("fp16", "bf16"):
        raise UserError(f"accelerate's mixed precision {launcher} is not supported: choose bf16, fp16 or no")
    if precision not in ("auto", launcher):
        raise UserError(
            f"--mixed-precision {precision} contradicts accelerate's mixed precision {launcher} (its --mixed_precision, "
            "its config file or ACCELERATE_MIXED_PRECISION): set one of them, or both alike"
        )
    return launcher


def check_launcher(accumulation: int, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse settings of accelerate's launcher that would have no effect here. accumulation: micro-batches per step.

    Raises UserError naming the setting and the flag to use.
    """
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise UserError(
            f"accelerate's dynamo_backend {backend} is not followed: set it to no and give train.py --compile"
        )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(accumulation))
    if steps not in ("1", "auto", str(accumulation)):  # 1 is accelerate's default
        raise UserError(
            f"accelerate's gradient_accumulation_steps {steps} is not followed: give train.py "
            f"--gradient-accumulation-steps {steps}"
        )
    others = {
        "FSDP": "FSDP",
        "DEEPSPEED": "DeepSpeed",
        "MEGATRON_LM": "Megatron-LM",
        "PARALLELISM_CONFIG": "parallelism",
    }
    for name, words in others.items():
        if environment.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(
                f"accelerate's {words} settings are not supported (the training state of XL/2 is 12.8 GiB): use accelerate "
                "launch --multi_gpu"
            )


class Processes:
    """Rank, device, precision ("fp32", "fp16" or "bf16") and the few things processes do together. On CUDA where there is a
    GPU, else (or after `accelerate launch --cpu`) on the CPU."""

    def __init__(self, precision: str) -> None:
        """precision: as for --mixed-precision. Raises UserError for settings of the launcher that cannot be followed."""
        from accelerate import Accelerator, DistributedDataParallelKwargs

        cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
        asked = asked_precision(precision)
        self.precision = best_precision("cpu" if cpu else "cuda") if asked == "auto" else asked
        # Autocast and the gradient scaler are the training step's own; accelerate places, wraps and talks.
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.is_main = self.rank == 0
        self._wrapped: nn.Module | None = None

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network inside DDP; itself for one process."""
        with warnings.catch_warnings():  # newer torch renames broadcast_buffers
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
            self._wrapped = self.accelerator.prepare(network)
        return self._wrapped

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside it a backward pass adds up gradients without exchanging them."""
        with self.accelerator.no_sync(self._wrapped):
            yield

    def gather(self, row: Tensor) -> Tensor:
        """(K,) of each process => (world, K), in every process."""
        if self.world == 1:
            return row[None]
        rows = [torch.empty_like(row) for _ in range(self.world)]
        torch.distributed.all_gather(rows, row)
        return torch.stack(rows)

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Run `action` in the main process and give its result there, None elsewhere.

        A ValueError or OSError in it ends all processes: as UserError in the main one, silently in the others.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except (ValueError, OSError) as caught:
                error = caught
        if self.share(error is not None):
            if error is None:
                raise SystemExit(2)
            raise UserError(str(error)) from error
        return result

    def share(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.world == 1:
            return value
        content = [value]
        torch.distributed.broadcast_object_list(content, src=0)
        return content[0]

    def utilization(self, flops_per_second: float) -> float | None:
        """MFU: share of the GPUs' dense peak; None for hardware whose peak is not in the table."""
        if self.device.type != "cuda":
            return None
        name = named_gpu(torch.cuda.get_device_name(self.device))
        if name is None:
            return None
        peak = GPUS[name].tflops * (0.5 if self.precision == "fp32" else 1)  # TF32: half
        return flops_per_second / (peak * 1e12 * self.world)


@contextmanager
def once() -> Iterator[None]:
    """A user's mistake that every process finds is told by the first one alone; the others leave after it."""
    try:
        yield
    except (ValueError, FileNotFoundError):
        if int(os.environ.get("RANK", 0)) == 0:
            raise
        time.sleep(1)  # a launcher ends all processes with the first one that fails: let that be the one that speaks
        raise SystemExit(2) from None


def leave() -> None:
    """End this process's part in the group, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
