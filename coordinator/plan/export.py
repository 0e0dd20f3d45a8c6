"""From a torch function to a small ONNX graph that carries nothing but operators."""

import contextlib
import copy
import functools
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import onnx
import onnx_ir
import onnx_ir.passes.common as passes
import torch
from onnx import ModelProto
from onnxscript.optimizer import fold_constants_ir
from onnxscript.version_converter import convert_version
from torch._decomp import core_aten_decompositions
from torch.onnx._internal.exporter._core import exported_program_to_ir  # tests/plan pins both signatures
from torch.onnx._internal.exporter._registration import ONNXRegistry

from coordinator.plan.joint_graph import quiet_export
from coordinator.plan.recurrent_graph import RECURRENT_TRANSLATIONS
from coordinator.plan.rejection import PlanRejected, explain

OPSET: Final = 20
MAX_FOLDED_ELEMENTS: Final = 8192
"""Constants up to this size are computed at build time; larger ones would make the plan larger."""
MIN_ONNXRUNTIME: Final = "1.31"
"""Opset 20 needs 1.17; older than 1.31 is not tested, and does not bound what constant folding takes."""


def to_onnx(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    input_names: list[str],
    output_names: list[str],
    *,
    decompose: bool = False,
) -> ModelProto:
    """Export a functional module with named inputs and outputs.

    ``decompose`` splits composite operators by torch's rules first: the exporter's own form of
    ``cross_entropy`` drops its label smoothing.

    Raises:
        PlanRejected: it has an operator that ONNX lacks, or torch cannot trace it.
    """
    try:
        # The exporter prints its progress; people who build a plan did not ask for that.
        with quiet_export(), contextlib.redirect_stdout(io.StringIO()):
            program = torch.export.export(module, arguments, dynamic_shapes=dynamic_shapes, strict=False)
            exported = exported_program_to_ir(program, registry=_core() if decompose else _translations())
    except Exception as error:
        raise explain(error, "write the graph") from error
    convert_version(exported, OPSET, fallback=True)
    _name(exported.graph.inputs, input_names)
    _name(exported.graph.outputs, output_names)
    _simplify(exported)
    model = onnx_ir.to_proto(exported)
    if model.functions:
        raise PlanRejected(
            f"The graph needs ONNX function {model.functions[0].name}, which devices do not run."
        )
    _strip(model)
    _shorten_names(model)
    return model


@functools.cache
def _translations() -> ONNXRegistry:
    """How torch's operators become ONNX's, and ours; ``torch.onnx.export`` would read them anew each time."""
    registry = ONNXRegistry.from_torchlib(opset_version=OPSET)
    for operator, translation in RECURRENT_TRANSLATIONS.items():
        registry.register_op(operator, translation)
    return registry


@functools.cache
def _core() -> ONNXRegistry:
    """The same without the operators that torch can split: the exporter splits what has no translation."""
    registry = copy.copy(_translations())
    split = {operator.name() for operator in core_aten_decompositions()}
    registry.functions = {
        name: translation
        for name, translation in registry.functions.items()
        if name not in split or str(name).startswith("aten::sym_")  # sizes have rules, but are never split
    }
    return registry


def _name(values: Sequence[onnx_ir.Value], names: list[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name


def _simplify(model: onnx_ir.Model) -> None:
    """Fold constants, drop what is unused or computed twice, and make constants initializers.

    Not the exporter's own optimization: its rules take every constant within 1e-8 of zero for zero and within
    1e-5 of one for one, and so remove the epsilon of RMSprop and Adagrad, or a decay of 0.999999, silently.
    """
    passes.InlinePass()(model)
    fold_constants_ir(model, input_size_limit=MAX_FOLDED_ELEMENTS, output_size_limit=MAX_FOLDED_ELEMENTS)
    onnx_ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)


def with_outputs(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """A copy of the graph with only these outputs and the nodes they need."""
    kept = ModelProto()
    kept.CopyFrom(model)
    wanted = set(names)
    outputs = [output for output in model.graph.output if output.name in wanted]
    del kept.graph.output[:]
    kept.graph.output.extend(outputs)
    needed = {output.name for output in outputs}
    nodes = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    del kept.graph.node[:]
    kept.graph.node.extend(reversed(nodes))
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del kept.graph.initializer[:]
    kept.graph.initializer.extend(initializers)
    return kept


def operators(*models: ModelProto) -> tuple[str, ...]:
    """The operators of these graphs, sorted, those outside ONNX's own domain as ``domain::name``."""
    return tuple(sorted({_operator(node) for model in models for node in _nodes(model.graph)}))


def _operator(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else str(node.op_type)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _strip(model: ModelProto) -> None:
    """Remove the exporter's stack traces and descriptions: most of the bytes, and the owner's file names."""
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    graph.name = "plan"
    for described in (model, graph):
        del described.metadata_props[:]
    del graph.value_info[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = node.name = ""
    for named in (*graph.input, *graph.output, *graph.initializer):
        del named.metadata_props[:]
        named.doc_string = ""


def _shorten_names(model: ModelProto) -> None:
    """Give every inner value a short name; inputs and outputs keep theirs."""
    graph = model.graph
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return  # names of an outer scope may be used inside
    short = {value.name: value.name for value in (*graph.input, *graph.output)} | {"": ""}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [short.setdefault(name, f"_{len(short)}") for name in names]
    for tensor in graph.initializer:
        tensor.name = short.setdefault(tensor.name, f"_{len(short)}")
