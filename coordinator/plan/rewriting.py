"""What to change in a joint graph where a rule for one operator would see too little; all for speed.

Each function changes a graph in place and leaves what it computes as it was. They look for what torch's own
gradients leave behind: a gradient spread out before it is needed at that size, zeros added to zeros.
"""

import copy
from typing import Any, Final

import torch
from torch.fx import Graph, GraphModule, Node

_aten: Final = torch.ops.aten

_SHAPES: Final = frozenset(
    {
        _aten.view.default,
        _aten.expand.default,
        _aten.clone.default,
        _aten.alias.default,
        _aten.unsqueeze.default,
        _aten.squeeze.dims,
        _aten.permute.default,
    }
)
"""Operators that only change a tensor's shape."""
_PRODUCTS: Final = frozenset({_aten.bmm.default, _aten.mm.default})
_BY_SCALAR: Final = frozenset(
    {_aten.div.Scalar, _aten.mul.Scalar, _aten.neg.default, _aten.alias.default, _aten.squeeze.dims}
)
"""Operators that give the same for a tensor of repeated values as for the values once."""
_BROADCASTING: Final = frozenset(
    {
        _aten.add.Tensor,
        _aten.sub.Tensor,
        _aten.mul.Tensor,
        _aten.div.Tensor,
        _aten.threshold_backward.default,
        _aten.hardtanh_backward.default,
    }
)
"""Operators that repeat values themselves where another operand has the full shape."""
_REPLACED: Final = frozenset({_aten.add.Tensor, _aten.expand.default, _aten.select_backward.default})
"""Operators of which a change leaves some unused."""


def rewritten(module: GraphModule) -> GraphModule:
    """A copy of a joint graph with every change of this module made."""
    graph = copy.deepcopy(module.graph)
    skip_safe_softmax(graph)
    stack_selections(graph)
    drop_expansions(graph)
    graph.eliminate_dead_code(lambda node: node.target not in _REPLACED)
    return GraphModule(module, graph)


def skip_safe_softmax(graph: Graph) -> None:
    """Plain softmax for attention without a mask.

    The safe one gives zeros, not NaN, in a row that a mask has filled with −∞; scores without a mask are
    plain products, which have no such rows.
    """
    for node in graph.find_nodes(op="call_function", target=_aten._safe_softmax.default):  # noqa: SLF001
        scores, axis = node.args[0], node.args[1]
        if len(node.args) > 2 or node.kwargs or not _is_product(scores):
            continue
        node.target = _aten._softmax.default  # noqa: SLF001  (an operator's name)
        node.args = (scores, axis, False)


def _is_product(value: Any) -> bool:
    while isinstance(value, Node) and value.target in _SHAPES:
        value = value.args[0]
    return isinstance(value, Node) and value.target in _PRODUCTS


def stack_selections(graph: Graph) -> None:
    """One stack for the gradient of a tensor that was taken apart along an axis.

    Torch fills each part up with zeros to the size of the whole, and adds.
    """
    for node in reversed(graph.find_nodes(op="call_function", target=_aten.add.Tensor)):
        parts = _parts(node)
        by_index = {part.args[3]: part.args[0] for part in parts}
        if not parts or len({(str(part.args[1]), part.args[2]) for part in parts}) > 1:
            continue
        shape, axis = parts[0].args[1:3]
        assert isinstance(shape, list | tuple)
        assert isinstance(axis, int)
        indices = range(len(parts))
        if shape[axis] == len(parts) and set(by_index) == set(indices):
            with graph.inserting_before(node):
                selected = [by_index[index] for index in indices]
                stacked = graph.call_function(_aten.stack.default, (selected, axis))
            stacked.meta = dict(node.meta)
            node.replace_all_uses_with(stacked)


def _parts(node: Any, *, inner: bool = False) -> list[Node]:
    """The selections' gradients of which a value is the sum; none if it is the sum of anything else too."""
    if not isinstance(node, Node) or (inner and len(node.users) > 1):
        return []
    if node.target is _aten.select_backward.default:
        return [node]
    if node.target is not _aten.add.Tensor or node.kwargs:
        return []
    left, right = (_parts(operand, inner=True) for operand in node.args[:2])
    return [*left, *right] if left and right else []


def drop_expansions(graph: Graph) -> None:
    """Leave a mean's gradient at the size of the mean if everything that reads it broadcasts."""
    narrow: set[Node] = set()
    for node in graph.find_nodes(op="call_function", target=_aten.expand.default):
        source = node.args[0]
        assert isinstance(source, Node)
        with_it = {*narrow, node}
        if source.meta["val"].dim() == node.meta["val"].dim() and _all_broadcast(node, with_it):
            node.replace_all_uses_with(source)
            narrow = with_it


def _all_broadcast(node: Node, narrow: set[Node]) -> bool:
    """Whether a value may stand once for many wherever it is read; adds to ``narrow`` what then does too."""
    return all(_broadcasts(user, narrow) for user in node.users)


def _broadcasts(user: Node, narrow: set[Node]) -> bool:
    if user.target in _BY_SCALAR:
        narrow.add(user)
        return _all_broadcast(user, narrow)
    return user.target in _BROADCASTING and any(
        isinstance(operand, Node) and operand not in narrow and _shape(operand) == _shape(user)
        for operand in user.args
    )


def _shape(node: Node) -> str:
    """As text: to compare symbolic sizes as numbers would make assumptions on them."""
    return str(getattr(node.meta.get("val"), "shape", None))
