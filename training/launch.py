"""The processes of a training run and the settings of accelerate's launcher."""

import datetime
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from common import processes
from config import UserError
from models.acceleration import best_precision
from models.cost import GPUS, named_gpu


def asked_precision(precision: str, environment: Mapping[str, str] = os.environ) -> str:
    """The precision asked for by --mixed-precision or by accelerate's launcher: "auto", "fp32", "fp16" or "bf16".

    Raises:
        UserError: the two contradict each other, or the launcher asks for fp8.
    """
    # The launcher also sets "no" when nobody chose a precision, so "no" decides nothing.
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
    """Refuse settings of accelerate's launcher that would have no effect here.

    Args:
        accumulation: micro-batches per step, as train.py's flag says.
        environment: where the launcher leaves its settings.

    Raises:
        UserError: the message names the setting and the flag to use.
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


# Longer than rank 0 takes for a download or a checkpoint; a broken link between GPUs must not hold a node for days.
_PATIENCE = datetime.timedelta(hours=2)


class Processes(processes.Processes):
    """The ranks of a training run: also precision ("fp32", "fp16" or "bf16") and gradient exchange, over accelerate."""

    def __init__(self, precision: str) -> None:
        """Join the group if a launcher started several processes.

        Args:
            precision: as for --mixed-precision.

        Raises:
            UserError: settings of the launcher cannot be followed.
        """
        from accelerate import Accelerator, DistributedDataParallelKwargs

        asked = asked_precision(precision)
        cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
        super().__init__("cpu" if cpu else "auto", _PATIENCE)
        self.precision = best_precision(self.device) if asked == "auto" else asked
        # Autocast and the gradient scaler are the training step's own. No static_graph: torch's reducer fails where the
        # first backward pass exchanges nothing, as with accumulation. Another bucket_cap_mb would change the last bits on
        # three ranks or more.
        self._accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network inside DDP; itself for one process."""
        with warnings.catch_warnings():  # newer torch renames broadcast_buffers
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
            self._wrapped = self._accelerator.prepare(network)
        return self._wrapped

    def no_sync(self) -> AbstractContextManager:
        """Inside it a backward pass adds up gradients without exchanging them."""
        return self._accelerator.no_sync(self._wrapped)

    def utilization(self, flops_per_second: float) -> float | None:
        """Model FLOP utilisation: the share of the GPUs' dense peak; None for hardware whose peak is not in the table."""
        if self.device.type != "cuda":
            return None
        name = named_gpu(torch.cuda.get_device_name(self.device))
        if name is None:
            return None
        peak = GPUS[name].tflops * (0.5 if self.precision == "fp32" else 1)  # TF32: half
        return flops_per_second / (peak * 1e12 * self.world)


def gpu_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None for the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def gather_row(row: Tensor) -> Tensor:
    """(K,) of each rank => (world, K) on the CPU of every rank."""
    return torch.stack(processes.gather(row.cpu()))
