"""Checkpoints of the original SiT, whose t runs from noise to data: detection, and conversion to the convention of REPA."""

import math
from typing import Any

import torch
from torch import Tensor

from config import UserError


def is_original_sit(state_dict: dict[str, Tensor], settings: dict[str, Any], family: str | None) -> bool:
    """Whether a checkpoint has the convention of the original SiT: t from noise to data.

    Its output layer is twice as wide as others', unless it was trained without learn_sigma; then nothing but settings of
    REPA or REG, or a projector or class token of theirs, tells them apart.

    Args:
        state_dict: published names.
        settings: the args of the file, or {}.
        family: value of --family, "sit" or "repa"; None: decided by the file.

    Raises:
        UserError: the file does not tell and the user did not say, or both contradict each other.
    """
    patch = state_dict["x_embedder.proj.weight"]
    double = len(state_dict["final_layer.linear.weight"]) == 2 * patch.shape[1] * patch.shape[2] ** 2
    theirs = "cls_projectors2.weight" in state_dict or any(name.startswith("projectors.") for name in state_dict)
    theirs = theirs or "encoder_depth" in settings  # of every checkpoint of REPA and REG, of none of SiT
    if (double and family == "repa") or (theirs and family == "sit"):
        raise UserError(f"--family {family} contradicts the file: it is one of {'SiT' if double else 'REPA or REG'}")
    if double or theirs or family:
        return double or family == "sit"
    raise UserError(
        "it may be of REPA or of the original SiT (trained without learn_sigma), whose t runs the other way: convert it "
        "with `python convert.py` and --family repa or --family sit"
    )


def unify_sit(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring a checkpoint of the original SiT to the convention of REPA and REG.

    SiT's t runs from noise to data, and its network may also predict a variance that is not used. The same network in the
    other convention gives the negative of SiT's velocity, with t counted from the other end. With frequencies w, the
    features of the mirrored time are those of t turned by the angle w, so the turn moves into the first linear map of the
    time embedding; the sign and the unused half go into the last linear map.
    """
    patch = state_dict["x_embedder.proj.weight"]
    channels, patch_area = patch.shape[1], patch.shape[2] ** 2
    weight, bias = state_dict["final_layer.linear.weight"], state_dict["final_layer.linear.bias"]
    kinds = len(weight) // (channels * patch_area)  # 2 with a variance
    first = state_dict["t_embedder.mlp.0.weight"].double()  # (D, 2F), cosines then sines
    half = first.shape[1] // 2
    w = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).double()
    cos, sin = first.split(half, dim=1)
    turned = torch.cat([cos * w.cos() + sin * w.sin(), cos * w.sin() - sin * w.cos()], dim=1)
    return {
        **state_dict,
        "t_embedder.mlp.0.weight": turned.to(weight.dtype),
        "final_layer.linear.weight": -weight.view(patch_area, kinds, channels, -1)[:, 0].reshape(
            patch_area * channels, -1
        ),
        "final_layer.linear.bias": -bias.view(patch_area, kinds, channels)[:, 0].reshape(-1),
    }
