"""Passes of Inductor over the graphs of compiled regions on a GPU, which leave out memory traffic.

Sums per sample: autograd sums the gradient of a linear layer's output over all tokens of the batch at once, for its bias.
Inductor makes two passes of that sum, cut at places that fit no other loop, so that it reads the gradient anew. Summed over
the tokens of each sample first and over the samples then, it has the loops of the gradients of modulation and gates, and
joins the pass that writes the gradient; models/norm_kernel.py has summed it already.

Wide products: autocast casts each weight to half precision, so that its gradient is a product in half precision, cast to
float32 in a second pass. Products are summed in float32 anyway, and write that.
"""

import math
import operator
from typing import Any

import torch
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_HALF = (torch.bfloat16, torch.float16)


class Fusion(CustomGraphPass):
    """Both passes."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        sum_per_sample(graph)
        widen_products(graph)

    def uuid(self) -> Any:
        """Part of the key under which Inductor keeps compiled graphs."""
        return get_hash_for_files((__file__,))


def sum_per_sample(graph: torch.fx.Graph) -> None:
    """Replace sum(view of (N, T, ...) as (N T, D), 0) by sum(sum(it as (N, T, D), 1), 0)."""
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        view, dims = node.args[0], node.args[1]
        if list(dims) != [0] or view.op != "call_function" or view.target not in _VIEWS:
            continue
        source, rows = view.args[0], view.meta["val"].shape
        shape = source.meta["val"].shape
        if len(rows) != 2 or len(shape) < 3 or shape[0] * shape[1] != rows[0] or math.prod(shape[2:]) != rows[1]:
            continue
        with graph.inserting_before(node):
            tokens = _summed_by_kernel(graph, source)
            if tokens is None:
                samples = _call(graph, aten.reshape.default, source, [shape[0], shape[1], rows[1]])
                tokens = _call(graph, aten.sum.dim_IntList, samples, [1], **node.kwargs)
            total = _call(graph, aten.sum.dim_IntList, tokens, [0], *node.args[2:], **node.kwargs)
        node.replace_all_uses_with(total)
        graph.erase_node(node)


def _summed_by_kernel(graph: torch.fx.Graph, source: torch.fx.Node) -> torch.fx.Node | None:
    """If models/norm_kernel.py makes a gradient of a branch: its sums over parts of each sample's tokens, (N parts, D)."""
    kernel: Any = source.args[0] if source.target is operator.getitem else None
    if kernel is None or kernel.target is not triton_kernel_wrapper_functional or source.args[1] != "d_branch":
        return None
    made = {user.args[1]: user for user in kernel.users}
    sums = _call(graph, aten.select.int, made["sums"], 2, 3)  # (N, parts, D)
    return _call(graph, aten.reshape.default, sums, [-1, sums.meta["val"].shape[-1]])


def widen_products(graph: torch.fx.Graph) -> None:
    """Replace float32(product of half-precision matrices) by their product in float32."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default):
        product, dtype = node.args
        if product.target is not aten.mm.default or len(product.users) > 1 or dtype != torch.float32:
            continue
        if product.meta["val"].dtype in _HALF:
            with graph.inserting_before(node):
                node.replace_all_uses_with(_call(graph, aten.mm.dtype, *product.args, torch.float32))
            graph.erase_node(node)
            graph.erase_node(product)


def _call(graph: torch.fx.Graph, target: Any, source: torch.fx.Node, *args: Any, **kwargs: Any) -> torch.fx.Node:
    """A new node with the shape and type of its result."""
    node = graph.call_function(target, (source, *args), kwargs)
    values = [arg.meta["val"] if isinstance(arg, torch.fx.Node) else arg for arg in args]
    with source.meta["val"].fake_mode:
        node.meta["val"] = target(source.meta["val"], *values, **kwargs)
    return node
