"""A recording of the optimiser step: 20 steps of a small network, so that no refactor changes the numbers unseen.

python -m tests.trace tests/data/trace.json     # records anew; a commit that does so says why
"""

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset import Batch
from loss import Objective
from models.autoencoder import LatentNormalization
from models.ema import EMA
from models.interpolant import Interpolant
from models.sit import SiT, SiTConfig
from training.step import TrainStep

STEPS = 20
CONFIG = SiTConfig(
    depth=3,
    hidden_size=64,
    num_heads=4,
    input_size=8,
    num_classes=5,
    class_token_dim=24,
    align_dims=(24,),
    align_depth=2,
    projector_dim=48,
)


def environment() -> dict[str, str]:
    """What decides about the last bits: the processor, torch and the number of threads."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "torch": torch.__version__.split("+")[0], "threads": str(torch.get_num_threads())}


def batch(step: int, micro_step: int, size: int) -> Batch:
    """Records made of arithmetic alone: the same on every machine."""
    first = (2 * step + micro_step) * size
    rng = np.random.RandomState(1234 + first)
    moments = rng.standard_normal((size, 8, 8, 8)).astype(np.float32)
    moments[:, 4:] = np.abs(moments[:, 4:]) * 100
    tokens = rng.standard_normal((size, 17, 24)).astype(np.float16)
    return Batch(
        torch.from_numpy(moments.astype(np.float16)),
        torch.from_numpy(rng.randint(0, 5, size)),
        torch.arange(first, first + size),
        None,
        (torch.from_numpy(tokens[:, 0].copy()),),
        (torch.from_numpy(tokens[:, 1:].copy()),),
    )


def trace() -> dict[str, Any]:
    """Losses, gradient norms and a digest of the weights of 20 steps of 2 micro-batches each."""
    rng = np.random.RandomState(7)
    network = SiT(CONFIG)
    with torch.no_grad():  # not torch's generator, whose numbers may change between versions; no layer is zero
        for parameter in network.parameters():
            parameter.copy_(torch.from_numpy((rng.standard_normal(parameter.shape) * 0.05).astype(np.float32)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    ema = EMA(network, SiT(CONFIG), 0.9)
    objective = Objective(Interpolant("linear"), "uniform", 0.03, 0.5, 0.1)
    step = TrainStep(network, objective, optimizer, ema, LatentNormalization((0.5,)), seed=11, max_grad_norm=1.0)
    size, rows = 4, []
    for number in range(STEPS):
        batches = [(batch(number, m, size), torch.arange(m * size, (m + 1) * size)) for m in range(2)]
        result = step(number, batches)
        terms = {
            name: getattr(result.terms, name).mean().item() for name in ("velocity", "class_velocity", "alignment")
        }
        rows.append({**terms, "grad_norm": result.grad_norm.item()})
    digests = {}
    for name, module in (("weights", network), ("ema", ema.average)):
        digest = hashlib.sha256()
        for tensor in module.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        digests[name] = digest.hexdigest()
        digests[f"{name}_norm"] = torch.cat([p.double().flatten() for p in module.parameters()]).norm().item()
    return {"environment": environment(), "steps": rows, **digests}


if __name__ == "__main__":
    torch.manual_seed(0)
    Path(sys.argv[1]).write_text(json.dumps(trace(), indent=1) + "\n")
