"""Sampling settings by name, and what training's previews share with them. Nothing here imports torch."""

from types import MappingProxyType
from typing import Any

# Guidance in the paper's evaluation (REG, arXiv 2507.01467, sampling settings of the guided results): this scale for
# the latent and for the class token, for t from 0 to GUIDANCE_HIGH; t = 1 is noise.
GUIDANCE_SCALE = 2.3
GUIDANCE_HIGH = 0.85

# Values of generate.py's settings for each --preset. cfg_scale None: GUIDANCE_SCALE where the model can be guided. The
# class token's scale and interval are left out: unset they follow the latent's, also when a flag changes those.
PRESETS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "preview": {
            "num_fid_samples": 16,
            "labels": ("spread",),
            "mode": "sde",
            "solver": "euler",
            "num_steps": 50,
            "cfg_scale": None,
            "guidance_low": 0.0,
            "guidance_high": GUIDANCE_HIGH,
            "dtype": "auto",
        },
        "paper": {
            "num_fid_samples": 50_000,
            "mode": "sde",
            "solver": "euler",
            "num_steps": 250,
            "cfg_scale": GUIDANCE_SCALE,
            "guidance_low": 0.0,
            "guidance_high": GUIDANCE_HIGH,
            "dtype": "fp32",
            "tf32": True,
        },
    }
)


def spread_labels(num_classes: int, count: int) -> list[int]:
    """Labels of a few samples: spread evenly over all classes, or the classes in turn where there are fewer of them."""
    return [i * num_classes // count if num_classes > count else i % num_classes for i in range(count)]
