"""Parameter names of the published checkpoints, and back."""

import re

from torch import Tensor

_TO_PUBLISHED = (  # ours => published; applied in this order
    (r"^class_token_embedder\.proj\.", "cls_projectors2."),
    (r"^class_token_embedder\.norm\.", "wg_norm."),
    (r"^final_layer\.class_token_linear\.", "final_layer.linear_cls."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
)
_FROM_PUBLISHED = (
    (r"^cls_projectors2\.", "class_token_embedder.proj."),
    (r"^wg_norm\.", "class_token_embedder.norm."),
    (r"^final_layer\.linear_cls\.", "final_layer.class_token_linear."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
)


def from_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of a published state dict to ours; tensors are untouched."""
    return {_rename(name, _FROM_PUBLISHED): tensor for name, tensor in state_dict.items()}


def to_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_published`."""
    return {_rename(name, _TO_PUBLISHED): tensor for name, tensor in state_dict.items()}


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name
