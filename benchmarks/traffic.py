"""Memory traffic of operations that torch calls one by one: bytes of their inputs and outputs on the device."""

import math
from typing import Any

from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = ("mm", "attention", "convolution")  # in the names of what a roofline counts by its operations


class Traffic(TorchDispatchMode):
    """Adds up bytes in `bytes` while it is active. Views cost nothing, repeated (expanded) elements count once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket._qualified_op_name
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not view and not any(word in name for word in _PRODUCTS) and not name.startswith("aten::empty"):
            self.bytes += size_of((args, kwargs, result))
        return result


def size_of(values: Any) -> int:
    """Bytes of the tensors on the device in any nest of values."""
    return sum(_size(x) for x in _pytree.tree_leaves(values) if isinstance(x, Tensor) and x.is_cuda)


def _size(x: Tensor) -> int:
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride()) if stride)
