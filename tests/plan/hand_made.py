"""Plans written by hand, node by node: small enough to compute what they give on paper.

``line_plan`` steps with g, the mean of the batch's rows:

    g     = mean(x0) [* mean(class_weights[y])] [+ mu * (w - a)]
    o.m'  = o.m / 2 + g
    p.w'  = p.w - learning_rate * o.m'
    b.mean' = b.mean / 2 + mean(x0) / 2          b.count' = b.count + 1
    loss  = mean of g's elements                 out = x0 * p.w + b.mean
"""

import hashlib

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fedtide.wire.parameters import Schema, TensorSpec
from fedtide.wire.plan import Limits, Plan, PlanManifest, Verified
from fedtide.wire.training import Training

ONNX_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
WEIGHT = TensorSpec(name="p.w", dtype="float32", shape=(2,))
MEAN = TensorSpec(name="b.mean", dtype="float32", shape=(2,))
COUNT = TensorSpec(name="b.count", dtype="int64", shape=())
MOMENTUM = TensorSpec(name="o.m", dtype="float32", shape=(2,))
X = TensorSpec(name="x0", dtype="float32", shape=(None, 2))
Y = TensorSpec(name="y", dtype="int64", shape=(None,))
CLASS_WEIGHTS = TensorSpec(name="class_weights", dtype="float32", shape=(3,))


def node(text: str, **attributes: object) -> NodeProto:
    """``"Op a b -> c d"`` as a node."""
    left, right = text.split(" -> ")
    operator, *inputs = left.split()
    return helper.make_node(operator, inputs, right.split(), **attributes)


def constant(name: str, value: object, dtype: type = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def serialized(
    nodes: list[NodeProto],
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
    initializers: list[TensorProto],
) -> bytes:
    def info(tensor: TensorSpec):
        return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[tensor.dtype], tensor.shape)

    graph = helper.make_graph(nodes, "plan", [*map(info, inputs)], [*map(info, outputs)], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 9
    return model.SerializeToString()


def parameter(tensor: TensorSpec) -> TensorProto:
    """A place that the current parameters are put into."""
    proto = TensorProto(
        name=tensor.name,
        data_type=TensorProto.FLOAT,
        dims=tensor.shape,
        data_location=TensorProto.EXTERNAL,
    )
    proto.external_data.add(key="location", value="parameters")
    return proto


def scalar(name: str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=())


def line_plan(
    *,
    proximal: bool = False,
    class_weights: bool = False,
    local: bool = False,
    limits: Limits | None = None,
    before: list[NodeProto] | None = None,
    before_evaluation: list[NodeProto] | None = None,
    constants: list[TensorProto] | None = None,
) -> Plan:
    """The plan above.

    ``before``: nodes that turn ``x0`` and constants into ``x``, which is used in its place;
    ``before_evaluation`` does so in the evaluation graph.
    """
    state = [WEIGHT, MEAN, COUNT, MOMENTUM]
    inputs = [*state, X, Y, scalar("learning_rate")]
    initializers = [
        constant("half", 0.5),
        constant("one", 1, np.int64),
        constant("rows", [0], np.int64),
        *(constants or []),
    ]
    nodes = [
        *(before or [node("Identity x0 -> x")]),
        node("ReduceMean x rows -> rows_mean", keepdims=0),
    ]
    gradient = "rows_mean"
    if class_weights:
        inputs.append(CLASS_WEIGHTS)
        nodes += [
            node("Gather class_weights y -> of_rows"),
            node("ReduceMean of_rows rows -> factor", keepdims=0),
            node(f"Mul {gradient} factor -> weighted"),
        ]
        gradient = "weighted"
    if proximal:
        inputs += [scalar("mu"), TensorSpec(name="a.w", dtype="float32", shape=(2,))]
        nodes += [
            node("Sub p.w a.w -> away"),
            node("Mul mu away -> pull"),
            node(f"Add {gradient} pull -> pulled"),
        ]
        gradient = "pulled"
    nodes += [
        node("Mul o.m half -> m_half"),
        node(f"Add m_half {gradient} -> o.m'"),
        node("Mul learning_rate o.m' -> change"),
        node("Sub p.w change -> p.w'"),
        node("Mul b.mean half -> mean_half"),
        node("Mul rows_mean half -> rows_half"),
        node("Add mean_half rows_half -> b.mean'"),
        node("Add b.count one -> b.count'"),
        node(f"ReduceMean {gradient} rows -> loss", keepdims=0),
    ]
    outputs = [
        *(TensorSpec(name=f"{t.name}'", dtype=t.dtype, shape=t.shape) for t in state),
        scalar("loss"),
    ]
    train = serialized(nodes, inputs, outputs, initializers)
    evaluation = serialized(
        [
            *(before_evaluation or [node("Identity x0 -> x")]),
            node("Mul x p.w -> scaled"),
            node("Add scaled b.mean -> out"),
            node("ReduceMean out all -> loss", keepdims=0),
        ],
        [X],
        [X.__class__(name="out", dtype="float32", shape=(None, 2)), scalar("loss")],
        [parameter(WEIGHT), parameter(MEAN), constant("all", [0, 1], np.int64), *(constants or [])],
    )
    manifest = PlanManifest(
        format=1,
        name="line",
        opset=20,
        producer="by hand",
        min_onnxruntime="1.23",
        schema=Schema(tensors=(WEIGHT, MEAN)),
        local_state=(MOMENTUM,),
        local_buffers=(COUNT,),
        inputs=(X,),
        targets=Y,
        learning_rate_input="learning_rate",
        min_batch=1,
        train_outputs=tuple(output.name for output in outputs),
        evaluation_state=("p.w", "b.mean"),
        metric=None,
        optimizer="SGD",
        operators=(),
        training=Training(),
        limits=limits or Limits(),
        buffers="local" if local else "averaged",
        proximal_input="mu" if proximal else None,
        class_weights=CLASS_WEIGHTS if class_weights else None,
        verified=Verified(
            steps=1, median_gradient_error=0.0, max_gradient_error=0.0, torch_float32_max_error=0.0
        ),
        train_sha256=hashlib.sha256(train).digest(),
        evaluation_sha256=hashlib.sha256(evaluation).digest(),
    )
    return Plan(manifest, train, evaluation)
