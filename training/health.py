"""Numbers that are not finite, and weights that differ between processes: found, named, and kept off the disk."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from config import UserError
from dataset import PackedDataset, StepSampler
from models.ema import EMA
from training.launch import Processes
from training.tracking import Fault


def describe(fault: Fault, dataset: PackedDataset, batch_size: int, seed: int, parameters: Sequence[str]) -> str:
    """One sentence: step, process, tensor and record at fault. Reads the record to see whether it came so from the disk."""
    where = f"step {fault.step + 1}, process {fault.rank}"
    if fault.position is None:
        name = "an unknown parameter" if fault.parameter is None else parameters[fault.parameter]
        return f"{where}: the gradient of {name} is not finite, though every loss is"
    record = int(StepSampler(len(dataset), batch_size, seed=seed).indices(fault.step, 0)[fault.position])
    batch = dataset[[record]]
    stored = {"moments": batch.moments}
    stored |= {f"class_token.{k}": token for k, token in enumerate(batch.class_token)}
    stored |= {f"patch_tokens.{k}": tokens for k, tokens in enumerate(batch.patch_tokens)}
    bad = [name for name, tensor in stored.items() if not tensor.isfinite().all()]
    if bad:
        return f"{where}: {bad[0]} of record {record} are not finite in the dataset; pack it again"
    return f"{where}: the {fault.term} loss of record {record} is not finite, though what is stored of the record is"


def check_weights(processes: Processes, network: nn.Module, ema: EMA, step: int) -> None:
    """Before a save: weights and EMA finite, weights bit for bit the same in every process. Raises UserError if not."""
    for kind, module in (("weights", network), ("EMA weights", ema.average)):
        flags = torch.stack([t.isfinite().all() for t in module.state_dict().values()])
        flags = processes.gather(flags.to(processes.device)).all(0)
        if not flags.all():
            name = list(network.state_dict())[int((~flags).int().argmax())]
            raise UserError(
                f"step {step}: the {kind} {name} are not finite; nothing is saved, the last checkpoint stands"
            )
    rows = processes.gather(_checksums(network))
    differing = (rows != rows[0]).any(0)
    if differing.any():
        name = list(network.state_dict())[int(differing.int().argmax())]
        rank = int((rows != rows[0]).any(1).int().argmax())
        raise UserError(f"step {step}: parameter {name} differs between processes 0 and {rank}; nothing is saved")


def _checksums(network: nn.Module) -> Tensor:
    """(tensors,) int64: sum of the bit patterns of each tensor of a state dict of float32."""
    return torch.stack([t.detach().view(torch.int32).sum(dtype=torch.int64) for t in network.state_dict().values()])
