"""The whole optimiser step as one CUDA graph (--cuda-graph): captured once, then each step is one launch of the host."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from config import UserError
from dataset import Batch, each_tensor
from loss import LossTerms
from training.step import StepResult, TrainStep

WARM_UP = 3  # steps before the capture: they compile, tune kernels and create handles, workspaces and AdamW's state
_AHEAD = 2  # steps that the host may be ahead: more would only fill memory with batches that wait for their turn


def check(precision: str, world: int, device: torch.device | None) -> None:
    """Refuse --cuda-graph where a step cannot be captured.

    Args:
        precision: "fp32", "fp16", "bf16", or "auto" where it is not known yet.
        world: processes.
        device: that trains; None where it is not known yet.

    Raises:
        UserError: the message says what to change.
    """
    otherwise = "or leave --cuda-graph out"
    if device is not None and device.type != "cuda":
        raise UserError(
            f"--cuda-graph needs a GPU, and this run is on the {device.type.upper()}: leave --cuda-graph out"
        )
    if world > 1:
        raise UserError(f"--cuda-graph captures the step of one process, and there are {world}: start one, {otherwise}")
    if precision == "fp16":
        raise UserError(
            "--cuda-graph does not hold the loss scaler of --mixed-precision fp16: give --mixed-precision bf16 or fp32, "
            f"{otherwise}"
        )


class GraphedStep(TrainStep):
    """TrainStep whose steps, after a few ordinary ones on a side stream, are replays of one CUDA graph.

    The graph holds everything from the draws to the EMA, over all micro-batches. What differs between steps is copied into
    tensors that it reads: the batch, the step's number, and the learning rate, which therefore is a float32 here. Losses,
    weights and EMA are those of TrainStep with that learning rate. All batches have the same shapes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments as of TrainStep, on a GPU and without a scaler."""
        super().__init__(*args, **kwargs)
        if self.scaler is not None:
            raise ValueError("a CUDA graph does not hold a gradient scaler")
        self._rates = [torch.zeros((), device=self.device) for _ in self.optimizer.param_groups]
        self._inputs: list[tuple[Batch, Tensor]] = []
        self._warm = 0  # steps taken before the capture
        self._side: torch.cuda.Stream | None = None  # for these
        self._captured: tuple[Callable[[], None], StepResult] | None = None
        self._ends: list[torch.cuda.Event] = []  # of the newest steps

    def __call__(self, step: int, batches: Sequence[tuple[Batch, Tensor]]) -> StepResult:
        """Take one step; arguments as of TrainStep.

        Raises:
            UserError: the step cannot be captured, or the GPU's memory does not suffice for the graph.
        """
        self.begin(step)
        if self._warm < WARM_UP:
            self._warm += 1
            self._side = self._side or torch.cuda.Stream()
            return beside(self._side, lambda: self.take(self._number, batches))
        self._copy_in(batches)
        if self._captured is None:
            self._captured = capture(lambda: self.take(self._number, self._inputs))
        replay, result = self._captured
        replay()
        self._stay_near()
        return StepResult(
            LossTerms(*map(torch.clone, result.terms)), result.grad_norm.clone(), result.gradient_norms.clone()
        )

    def begin(self, step: int) -> None:
        """Write the number and the learning rate of a step where `take` reads them: in tensors."""
        super().begin(step)
        for rate, group in zip(self._rates, self.optimizer.param_groups):
            rate.fill_(group["lr"])

    def take(self, step: int | Tensor, batches: Sequence[tuple[Batch, Tensor]]) -> StepResult:
        """As of TrainStep, with AdamW reading the learning rate from the device."""
        with self._rates_on_the_device():
            return super().take(step, batches)

    @contextmanager
    def _rates_on_the_device(self) -> Iterator[None]:
        """AdamW's groups hold tensors in this block alone: what checkpoints hold is the same with and without a graph."""
        groups = self.optimizer.param_groups
        before = [{"lr": group["lr"], "capturable": group["capturable"]} for group in groups]
        for rate, group in zip(self._rates, groups):
            group.update(lr=rate, capturable=True)
        try:
            yield
        finally:
            for group, values in zip(groups, before):
                group.update(values)

    def _copy_in(self, batches: Sequence[tuple[Batch, Tensor]]) -> None:
        """Copy the batches into the tensors that the graph reads, made at the first call."""
        if not self._inputs:
            self._inputs = [(each_tensor(batch, torch.clone), positions.clone()) for batch, positions in batches]
            return
        given, static = _tensors(batches), _tensors(self._inputs)
        if [x.shape for x in given] != [x.shape for x in static]:
            raise ValueError("a CUDA graph takes batches of one shape")
        for source, target in zip(given, static):
            target.copy_(source)

    def _stay_near(self) -> None:
        """Wait for the end of the step before the newest ones, while the device has work left."""
        end = torch.cuda.Event(blocking=True)
        end.record()
        self._ends.append(end)
        if len(self._ends) > _AHEAD:
            self._ends.pop(0).synchronize()


def beside(side: torch.cuda.Stream, function: Callable[[], StepResult]) -> StepResult:
    """Run on another stream than the current one, as all that a CUDA graph will hold has to be run first."""
    main = torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = function()
    main.wait_stream(side)
    return result


def capture(function: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
    """A CUDA graph of what the function does on the device.

    Args:
        function: reads and writes tensors that stay where they are; nothing is executed.

    Returns:
        What replays it, and the result that each replay overwrites.

    Raises:
        UserError: it cannot be captured, or the GPU's memory does not suffice.
    """
    gc.collect()  # tensors in cycles would keep their memory, and be freed in the midst of the capture
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: the threads that read batches allocate page-locked memory meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function()
    except RuntimeError as error:
        raise _refused(error) from error
    return graph.replay, result


def _refused(error: BaseException | None) -> UserError:
    """What to say about a failed capture, by its first error: the end of a broken capture raises another one."""
    errors = []
    while error is not None:
        errors.append(error)
        error = error.__context__
    if any(isinstance(error, torch.OutOfMemoryError) for error in errors):
        return UserError(
            "the GPU's memory does not suffice for the CUDA graph of a step: give a larger --gradient-accumulation-steps or "
            "--gradient-checkpointing, or leave --cuda-graph out"
        )
    said = str(errors[-1]).strip().splitlines() or [type(errors[-1]).__name__]
    return UserError(f"the step cannot be captured as a CUDA graph ({said[0].rstrip('.')}): leave --cuda-graph out")


def _tensors(batches: Sequence[tuple[Batch, Tensor]]) -> list[Tensor]:
    """All tensors of some micro-batches, in order."""
    found: list[Tensor] = []
    for batch, positions in batches:
        each_tensor(batch, found.append)
        found.append(positions)
    return found
