"""Check a plan's structure before onnxruntime sees it, without the onnx package.

A signed plan comes from the coordinator; this guard is the second line, for a coordinator gone wrong. It
bounds what a graph may contain: onnxruntime itself would read a file of the working directory that is named
as external data, or run a loop of 2^62 turns. Memory and time of a legal graph are bounded elsewhere: by
:mod:`edge_agent.plan_session` and :mod:`edge_agent.plan_watchdog`.

The graphs are protobuf messages (onnx.proto3). Only the fields below are looked at; numbers are never reused.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from fedtide.wire.plan import MAX_GRAPH_BYTES, MAX_NODES, PLAN_OPERATORS, Plan, PlanManifest

MAX_INITIALIZER_BYTES: Final = 64 << 20
"""What the constants of one graph may take once loaded."""
MAX_TENSOR_ELEMENTS: Final = 1 << 28
"""What one tensor, injected or not, may have."""
MAX_STATE_PER_PARAMETER: Final = 8
MAX_OTHER_STATE: Final = 1 << 16
"""What an optimizer may keep: so many elements per parameter, and so many more."""
MAX_OPSET: Final = 20

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5
_NUMBER: Final = -1
_OPERATORS: Final = frozenset(name.encode() for name in PLAN_OPERATORS)
_DOMAINS: Final = frozenset({b"", b"ai.onnx"})

Field = tuple[int, int, int]
"""Of a message: the field's number, where its bytes begin and end; for a number, itself and ``_NUMBER``."""


class PlanRefused(Exception):
    """This device will not run the plan; the text says why."""


class Nodes(NamedTuple):
    """How many nodes the two graphs have."""

    train: int
    evaluation: int


@dataclass
class _Walk:
    """What has been seen of one graph."""

    data: bytes
    external_allowed: frozenset[str]
    nodes: int = 0
    initializer_bytes: int = 0
    external: set[str] = field(default_factory=set)
    harmless: set[bytes] = field(default_factory=set)
    """Attributes that hold no tensor: the same few over and over."""


def check(plan: Plan) -> Nodes:
    """Check both graphs of a plan. Takes milliseconds.

    Raises:
        PlanRefused: a graph is too large, malformed, or has something plans do not have.
    """
    nodes = Nodes(
        train=check_graph(plan.train, frozenset()),
        evaluation=check_graph(plan.evaluation, frozenset(plan.manifest.evaluation_state)),
    )
    known = {tensor.name for tensor in plan.manifest.schema.tensors}
    if strange := sorted(set(plan.manifest.evaluation_state) - known):
        raise PlanRefused(f"the evaluation graph wants parameters that the plan lacks: {strange[:8]}")
    _check_state(plan.manifest)
    return nodes


def _check_state(manifest: PlanManifest) -> None:
    """Optimizers keep one to three tensors per parameter, and a count of steps each."""
    kept, allowed = (
        sum(tensor.size for tensor in tensors)
        for tensors in ((*manifest.local_state, *manifest.local_buffers), manifest.schema.tensors)
    )
    allowed = MAX_STATE_PER_PARAMETER * allowed + MAX_OTHER_STATE
    if kept > allowed:
        raise PlanRefused(
            f"optimizer state and counters of {kept:,} elements; at most {allowed:,} are allowed"
        )


def check_graph(graph: bytes, external_allowed: frozenset[str]) -> int:
    """Check one serialized ONNX model.

    Args:
        graph: the bytes; anything at all is safe to pass.
        external_allowed: exactly these initializers must be, and only they may be, external data.

    Returns:
        The number of its nodes.

    Raises:
        PlanRefused: as for :func:`check`.
    """
    if len(graph) > MAX_GRAPH_BYTES:
        raise PlanRefused(f"a graph of {len(graph):,} bytes; at most {MAX_GRAPH_BYTES:,} are allowed")
    walk = _Walk(graph, external_allowed)
    try:
        _check_model(walk)
    except IndexError as error:  # all reading is by index, and nothing else is
        raise PlanRefused("not a protobuf message: it ends in a field") from error
    if walk.external != external_allowed:
        raise PlanRefused(
            f"parameters without a place in the graph: {sorted(external_allowed - walk.external)[:8]}"
        )
    return walk.nodes


def _check_model(walk: _Walk) -> None:
    graphs = 0
    for number, begin, end in _fields(walk.data, 0, len(walk.data)):
        match number:
            case 7:
                graphs += 1
                _check_graph(walk, begin, _message_end(end))
            case 8:
                _check_opset(walk.data, begin, _message_end(end))
            case 20 | 25 | 26:
                raise PlanRefused("the model has training information, functions or a device configuration")
    if graphs != 1:
        raise PlanRefused(f"the model has {graphs} graphs in place of one")


def _check_opset(data: bytes, begin: int, end: int) -> None:
    domain, version = b"", 0
    for number, start, stop in _fields(data, begin, end):
        if number == 1:
            domain = data[start : _message_end(stop)]
        elif number == 2:
            version = _number(start, stop)
    # The exporter names helper domains that it does not use; a node that used one is refused below.
    if domain in _DOMAINS and version > MAX_OPSET:
        raise PlanRefused(f"operator set {version}; at most {MAX_OPSET} is allowed")


def _check_graph(walk: _Walk, begin: int, end: int) -> None:
    for number, start, stop in _fields(walk.data, begin, end):
        match number:
            case 1:
                _check_node(walk, start, _message_end(stop))
            case 5:
                _check_tensor(walk, start, _message_end(stop))
            case 14 | 15:
                raise PlanRefused("the graph has quantization annotations or sparse initializers")


def _check_node(walk: _Walk, begin: int, end: int) -> None:
    walk.nodes += 1
    if walk.nodes > MAX_NODES:
        raise PlanRefused(f"more than {MAX_NODES:,} nodes")
    data, operator, domain = walk.data, b"", b""
    for number, start, stop in _fields(data, begin, end):
        if number < 4:  # names of inputs, outputs and the node: more than half of all fields
            continue
        if number == 4:
            operator = data[start : _message_end(stop)]
        elif number == 5:
            _check_attribute(walk, start, _message_end(stop))
        elif number == 7:
            domain = data[start : _message_end(stop)]
        elif number == 8 and start != _message_end(stop):
            raise PlanRefused(
                f"operator {_text(operator)[:80]!r} names an overload, which only functions have"
            )
    if domain not in _DOMAINS or operator not in _OPERATORS:
        name = domain + b"::" + operator if domain else operator
        raise PlanRefused(f"operator {_text(name)[:80]!r} is not one that plans use")


def _check_attribute(walk: _Walk, begin: int, end: int) -> None:
    attribute = walk.data[begin:end]
    if attribute in walk.harmless:
        return
    tensors = 0
    for number, start, stop in _fields(walk.data, begin, end):
        match number:
            case 5 | 10:
                tensors += 1
                _check_tensor(walk, start, _message_end(stop))
            case 6 | 11:
                raise PlanRefused("a node contains another graph")
            case 22 | 23:
                raise PlanRefused("a node contains a sparse tensor")
    if not tensors:  # every tensor counts
        walk.harmless.add(attribute)


def _check_tensor(walk: _Walk, begin: int, end: int) -> None:
    data, elements, external, name = walk.data, 1, False, b""
    for number, start, stop in _fields(data, begin, end):
        match number:
            case 1:
                elements = _times_axes(elements, data, start, stop)
            case 8:
                name = data[start : _message_end(stop)]
            case 13:
                external = True
            case 14:
                external = external or _number(start, stop) != 0
    if external:
        place = _text(name)
        if place not in walk.external_allowed or place in walk.external:
            raise PlanRefused(
                f"initializer {place[:80]!r} names a file; only the parameters may, and once each"
            )
        walk.external.add(place)
        return
    walk.initializer_bytes += 8 * elements
    if walk.initializer_bytes > MAX_INITIALIZER_BYTES:
        raise PlanRefused(f"constants of more than {MAX_INITIALIZER_BYTES:,} bytes")


def _times_axes(elements: int, data: bytes, begin: int, end: int) -> int:
    """The number of elements with these axes too. A negative axis reads as 2^64 less its size."""
    for axis in (begin,) if end == _NUMBER else _numbers(data, begin, end):
        elements *= axis
        if elements > MAX_TENSOR_ELEMENTS:
            raise PlanRefused(f"a tensor of more than {MAX_TENSOR_ELEMENTS:,} elements")
    return elements


# The protobuf wire format: https://protobuf.dev/programming-guides/encoding/


def _fields(data: bytes, begin: int, end: int) -> list[Field]:
    """Every field of the message between two positions.

    The guard spends its time here, so nothing is sliced, a number below 128 is read in place, and only the
    end of a field is compared with the message's end.

    Raises:
        PlanRefused: not a protobuf message.
        IndexError: the same, at the end of the data.
    """
    fields = []
    position = begin
    while position < end:
        key = data[position]
        position += 1
        if key > 127:
            key, position = _varint(data, position - 1)
        kind = key & 7
        if kind in {_BYTES, _VARINT}:
            size = data[position]
            position += 1
            if size > 127:
                size, position = _varint(data, position - 1)
            if kind == _VARINT:
                fields.append((key >> 3, size, _NUMBER))
                continue
        elif kind in {_FIXED64, _FIXED32}:
            size = 8 if kind == _FIXED64 else 4
        else:
            raise PlanRefused(f"not a protobuf message: wire type {kind}")
        start = position
        position += size
        fields.append((key >> 3, start, position))
        if position > end:
            break
    if position != end:
        raise PlanRefused("not a protobuf message: a field ends after its message")
    return fields


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """An unsigned number of at most ten bytes, and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise PlanRefused("not a protobuf message: a number that does not end")


def _message_end(end: int) -> int:
    if end == _NUMBER:
        raise PlanRefused("not an ONNX model: a number in place of a message")
    return end


def _number(begin: int, end: int) -> int:
    if end != _NUMBER:
        raise PlanRefused("not an ONNX model: a message in place of a number")
    return begin


def _numbers(data: bytes, position: int, end: int) -> Iterator[int]:
    """A packed repeated number."""
    while position < end:
        number, position = _varint(data, position)
        yield number
    if position != end:
        raise PlanRefused("not a protobuf message: a number ends after its message")


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise PlanRefused("not an ONNX model: a name that is not UTF-8") from error
