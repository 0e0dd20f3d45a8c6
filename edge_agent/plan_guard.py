"""Check a plan's structure before onnxruntime sees it, without the onnx package.

A signed plan comes from the coordinator; this guard is the second line, for a coordinator gone wrong. It
bounds what a graph may contain: onnxruntime itself would read a file of the working directory that is named
as external data, or run a loop of 2^62 turns. Memory and time of a legal graph are bounded elsewhere: by the
process's memory limit and the step deadline.

The graphs are protobuf messages (onnx.proto3). Only the fields below are looked at; numbers are never reused.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from fedtide.wire.plan import MAX_GRAPH_BYTES, PLAN_OPERATORS, Plan

MAX_NODES: Final = 20_000
"""A GRU over 24 time steps has 1,400."""
MAX_INITIALIZER_BYTES: Final = 64 << 20
"""What the constants of one graph may take once loaded."""
MAX_TENSOR_ELEMENTS: Final = 1 << 28
"""What one tensor, injected or not, may have."""
MAX_OPSET: Final = 20

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5

Value = int | memoryview
"""A protobuf field: a number, or bytes that may be a message."""


class PlanRefused(Exception):
    """This device will not run the plan; the text says why."""


@dataclass
class _Walk:
    """What has been seen of one graph."""

    external_allowed: frozenset[str]
    nodes: int = 0
    initializer_bytes: int = 0
    external: set[str] = field(default_factory=set)


def check(plan: Plan) -> None:
    """Check both graphs of a plan. Takes milliseconds.

    Raises:
        PlanRefused: a graph is too large, malformed, or has something plans do not have.
    """
    check_graph(plan.train, frozenset())
    check_graph(plan.evaluation, frozenset(plan.manifest.evaluation_state))
    known = {tensor.name for tensor in plan.manifest.schema.tensors}
    if strange := sorted(set(plan.manifest.evaluation_state) - known):
        raise PlanRefused(f"the evaluation graph wants parameters that the plan lacks: {strange[:8]}")


def check_graph(graph: bytes, external_allowed: frozenset[str]) -> None:
    """Check one serialized ONNX model.

    Args:
        graph: the bytes; anything at all is safe to pass.
        external_allowed: exactly these initializers must be, and only they may be, external data.

    Raises:
        PlanRefused: as for :func:`check`.
    """
    if len(graph) > MAX_GRAPH_BYTES:
        raise PlanRefused(f"a graph of {len(graph):,} bytes; at most {MAX_GRAPH_BYTES:,} are allowed")
    walk = _Walk(external_allowed)
    graphs = 0
    for number, value in _fields(memoryview(graph)):
        match number:
            case 7:
                graphs += 1
                _check_graph(walk, _message(value))
            case 8:
                _check_opset(_message(value))
            case 20 | 25 | 26:
                raise PlanRefused("the model has training information, functions or a device configuration")
    if graphs != 1:
        raise PlanRefused(f"the model has {graphs} graphs in place of one")
    if walk.external != external_allowed:
        raise PlanRefused(
            f"parameters without a place in the graph: {sorted(external_allowed - walk.external)[:8]}"
        )


def _check_opset(opset: memoryview) -> None:
    domain, version = "", 0
    for number, value in _fields(opset):
        if number == 1:
            domain = _text(value)
        elif number == 2:
            version = _number(value)
    # The exporter names helper domains that it does not use; a node that used one is refused below.
    if domain in {"", "ai.onnx"} and version > MAX_OPSET:
        raise PlanRefused(f"operator set {version}; at most {MAX_OPSET} is allowed")


def _check_graph(walk: _Walk, graph: memoryview) -> None:
    for number, value in _fields(graph):
        match number:
            case 1:
                _check_node(walk, _message(value))
            case 5:
                _check_tensor(walk, _message(value))
            case 14 | 15:
                raise PlanRefused("the graph has quantization annotations or sparse initializers")


def _check_node(walk: _Walk, node: memoryview) -> None:
    walk.nodes += 1
    if walk.nodes > MAX_NODES:
        raise PlanRefused(f"more than {MAX_NODES:,} nodes")
    operator = domain = ""
    for number, value in _fields(node):
        match number:
            case 4:
                operator = _text(value)
            case 5:
                _check_attribute(walk, _message(value))
            case 7:
                domain = _text(value)
            case 8 if len(_message(value)):
                raise PlanRefused(f"operator {operator[:80]!r} names an overload, which only functions have")
    if domain not in {"", "ai.onnx"} or operator not in PLAN_OPERATORS:
        name = f"{domain}::{operator}" if domain else operator
        raise PlanRefused(f"operator {name[:80]!r} is not one that plans use")


def _check_attribute(walk: _Walk, attribute: memoryview) -> None:
    for number, value in _fields(attribute):
        match number:
            case 5 | 10:
                _check_tensor(walk, _message(value))
            case 6 | 11:
                raise PlanRefused("a node contains another graph")
            case 22 | 23:
                raise PlanRefused("a node contains a sparse tensor")


def _check_tensor(walk: _Walk, tensor: memoryview) -> None:
    elements, external, name = 1, False, ""
    for number, value in _fields(tensor):
        match number:
            case 1:
                elements = _times_axes(elements, value)
            case 8:
                name = _text(value)
            case 13:
                external = True
            case 14:
                external = external or _number(value) != 0
    if external:
        if name not in walk.external_allowed or name in walk.external:
            raise PlanRefused(
                f"initializer {name[:80]!r} names a file; only the parameters may, and once each"
            )
        walk.external.add(name)
        return
    walk.initializer_bytes += 8 * elements
    if walk.initializer_bytes > MAX_INITIALIZER_BYTES:
        raise PlanRefused(f"constants of more than {MAX_INITIALIZER_BYTES:,} bytes")


def _times_axes(elements: int, axes: Value) -> int:
    """The number of elements with these axes too. A negative axis reads as 2^64 less its size."""
    for axis in _numbers(axes):
        elements *= axis
        if elements > MAX_TENSOR_ELEMENTS:
            raise PlanRefused(f"a tensor of more than {MAX_TENSOR_ELEMENTS:,} elements")
    return elements


# The protobuf wire format: https://protobuf.dev/programming-guides/encoding/


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Every field of a message: its number and value."""
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        kind = key & 7
        if kind == _VARINT:
            number, position = _varint(message, position)
            yield key >> 3, number
            continue
        if kind == _BYTES:
            size, position = _varint(message, position)
        elif kind in {_FIXED64, _FIXED32}:
            size = 8 if kind == _FIXED64 else 4
        else:
            raise PlanRefused(f"not a protobuf message: wire type {kind}")
        if size > end - position:
            raise PlanRefused("not a protobuf message: a field ends after its message")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """An unsigned number of at most ten bytes, and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise PlanRefused("not a protobuf message: a number that does not end")


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise PlanRefused("not an ONNX model: a number in place of a message")
    return value


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise PlanRefused("not an ONNX model: a message in place of a number")
    return value


def _numbers(value: Value) -> Iterator[int]:
    """A repeated number, packed or not."""
    if isinstance(value, int):
        yield value
        return
    position = 0
    while position < len(value):
        number, position = _varint(value, position)
        yield number


def _text(value: Value) -> str:
    try:
        return str(_message(value), "utf-8")
    except UnicodeDecodeError as error:
        raise PlanRefused("not an ONNX model: a name that is not UTF-8") from error
