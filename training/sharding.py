"""Weights, gradients, optimiser and EMA in shards over the processes (FSDP2), for models that outgrow a GPU.

What is written to disk is whole: a run may continue with or without shards. For whole tensors all functions here are the
identity, so that their callers need not ask.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from config import UserError
from models.checkpoint import blank_network
from models.sit import SiT


def shard(network: SiT, device: torch.device) -> None:
    """Give each process a part of every tensor, on its device; a block is gathered when it is needed. In place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    reshard = reshard_after_forward(os.environ)
    for block in network.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(network, mesh=mesh, reshard_after_forward=reshard)


def check(precision: str, ema_device: str) -> None:
    """Raise UserError for settings that shards exclude, of train.py (resolved precision, --ema-device) or of accelerate."""
    if precision == "fp16":
        raise UserError("--mixed-precision fp16 and FSDP do not go together: use bf16")
    if ema_device == "cpu":
        raise UserError("--ema-device cpu and FSDP do not go together: each process has a part of the average alone")
    reshard_after_forward(os.environ)


def reshard_after_forward(environment: Mapping[str, str]) -> bool:
    """What accelerate's FSDP settings ask for: whether a block's weights are freed between its passes (less memory, more
    exchange). Raises UserError for settings that are not followed here; how to wrap and save is this module's own affair."""
    for name, instead in (("OFFLOAD_PARAMS", "more processes"), ("ACTIVATION_CHECKPOINTING", "--gradient-checkpointing")):
        if environment.get(f"FSDP_{name}", "false").lower() == "true":
            raise UserError(f"accelerate's fsdp_{name.lower()} is not supported: use {instead}")
    if environment.get("FSDP_VERSION", "2") == "1":
        name, answers = "FSDP_SHARDING_STRATEGY", {"full_shard": True, "1": True, "shard_grad_op": False, "2": False}
    else:
        name, answers = "FSDP_RESHARD_AFTER_FORWARD", {"true": True, "false": False}
    value = environment.get(name, next(iter(answers)))
    if value.lower() not in answers:
        raise UserError(f"accelerate's {name.lower()} {value!r} is not supported: choose from {', '.join(answers)}")
    return answers[value.lower()]


def local(tensor: Tensor) -> Tensor:
    """This process's part of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, in every process; a collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def leaves(network: nn.Module) -> list[Tensor]:
    """What the optimiser updates: the parameters, or plain tensors that share the memory of their parts."""
    return [p if local(p) is p else local(p).detach() for p in network.parameters()]


def whole_weights(network: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The state dict of whole tensors, in every process that wants to keep it; a collective. Sharded ones go to the CPU."""
    kept = {}
    for name, tensor in network.state_dict().items():
        gathered = whole(tensor)
        if keep:
            kept[name] = gathered if gathered is tensor else gathered.cpu()
    return kept


def whole_optimizer(optimizer: torch.optim.Optimizer, network: nn.Module, *, keep: bool) -> dict[str, Any]:
    """The optimiser's state dict with whole moments; a collective."""
    content = optimizer.state_dict()
    parameters = list(network.parameters())
    if not any(local(p) is not p for p in parameters):
        return content
    from torch.distributed.tensor import DTensor

    entries = {}
    for number, entry in content["state"].items():
        p = parameters[number]
        entries[number] = {}
        for key, value in entry.items():
            if value.ndim:
                parts = DTensor.from_local(value, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                value = parts.full_tensor()
            if keep:
                entries[number][key] = value.cpu()
    return {**content, "state": entries}


def load_optimizer(optimizer: torch.optim.Optimizer, network: nn.Module, content: dict[str, Any]) -> None:
    """The inverse of `whole_optimizer`: every process takes its parts."""
    from torch.distributed.tensor import distribute_tensor

    parameters = list(network.parameters())
    entries = {}
    for number, entry in content["state"].items():
        p = parameters[number]
        entries[number] = {
            key: distribute_tensor(value.to(p.device), p.device_mesh, p.placements).to_local()
            if value.ndim and local(p) is not p else value
            for key, value in entry.items()
        }  # fmt: skip
    optimizer.load_state_dict({**content, "state": entries})


@contextmanager
def gathered(network: SiT, device: torch.device, *, keep: bool) -> Iterator[SiT | None]:
    """A network of whole weights on the device, for sampling: itself if it is that; None where not kept. A collective."""
    if all(local(p) is p and p.device.type == device.type for p in network.parameters()):
        yield network if keep else None
        return
    weights = whole_weights(network, keep=keep)
    if not keep:
        yield None
        return
    copy = blank_network(network.config, device)
    copy.load_state_dict(weights)
    yield copy.eval().requires_grad_(False)
