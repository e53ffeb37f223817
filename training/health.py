"""Numbers that are not finite, and weights that differ between ranks: found, named, and kept off the disk."""

import torch
from torch import Tensor, nn

from common.reporting import say
from config import UserError
from dataset import PackedDataset, StepSampler
from models.ema import EMA
from training.launch import gather_row
from training.settings import TrainConfig
from training.step import TrainStep
from training.tracking import TERMS, Fault, first_fault


def check_window(rows: Tensor, train_step: TrainStep, dataset: PackedDataset, settings: TrainConfig) -> None:
    """Stop at losses and gradients that were not finite, or report them, as --on-nonfinite says.

    Args:
        rows: (world, WINDOW) log windows of all ranks.
        train_step: has the network and the gradient scaler.
        dataset: has the record at fault.
        settings: of the run.

    Raises:
        UserError: something was not finite and --on-nonfinite is stop.
    """
    fault, scaler = first_fault(rows), train_step.scaler
    if fault is None or (fault.position is None and scaler is not None and scaler.get_scale() >= 1):
        return  # fp16 skips steps while its loss scale is too high; that is how it finds the right one
    text = _describe(fault, train_step.network, dataset, settings)
    if settings.on_nonfinite == "stop":
        raise UserError(f"{text}; the weights are unaffected (--on-nonfinite skip leaves such steps out)")
    say(f"left out: {text}")


def _describe(fault: Fault, network: nn.Module, dataset: PackedDataset, settings: TrainConfig) -> str:
    """One sentence: step, process, tensor and record. Reads the record to see whether the fault is in the dataset."""
    where = f"step {fault.step + 1}, process {fault.rank}"
    if fault.position is None:
        names = [name for name, p in network.named_parameters() if p.requires_grad]
        name = "an unknown parameter" if fault.parameter is None else names[fault.parameter]
        return f"{where}: the gradient of {name} is not finite, though every loss is"
    order = StepSampler(len(dataset), settings.batch_size, seed=settings.seed)
    record = int(order.indices(fault.step, 0)[fault.position])
    batch = dataset[[record]]
    stored = {"moments": batch.moments}
    stored |= {f"class_token.{k}": token for k, token in enumerate(batch.class_token)}
    stored |= {f"patch_tokens.{k}": tokens for k, tokens in enumerate(batch.patch_tokens)}
    bad = [name for name, tensor in stored.items() if not tensor.isfinite().all()]
    if bad:
        return f"{where}: {bad[0]} of record {record} are not finite in the dataset; pack it again"
    term = "" if fault.term is None else TERMS[fault.term]
    return f"{where}: the {term} loss of record {record} is not finite, though what is stored of the record is"


def check_weights(network: nn.Module, ema: EMA, step: int) -> None:
    """Check before a save that weights and EMA are finite and that the weights are the same, bit for bit, on every rank.

    Raises:
        UserError: they are not; the message names the first parameter.
    """
    for kind, module in (("weights", network), ("EMA weights", ema.average)):
        flags = torch.stack([t.isfinite().all() for t in module.state_dict().values()])
        flags = gather_row(flags).all(0)
        if not flags.all():
            name = list(network.state_dict())[int((~flags).int().argmax())]
            raise UserError(
                f"step {step}: the {kind} {name} are not finite; nothing is saved, the last checkpoint is intact"
            )
    rows = gather_row(_checksums(network))
    differing = (rows != rows[0]).any(0)
    if differing.any():
        name = list(network.state_dict())[int(differing.int().argmax())]
        rank = int((rows != rows[0]).any(1).int().argmax())
        raise UserError(f"step {step}: parameter {name} differs between processes 0 and {rank}; nothing is saved")


def _checksums(network: nn.Module) -> Tensor:
    """(tensors,) int64: sum of the bit patterns of each tensor of a state dict of float32."""
    return torch.stack([t.detach().view(torch.int32).sum(dtype=torch.int64) for t in network.state_dict().values()])
