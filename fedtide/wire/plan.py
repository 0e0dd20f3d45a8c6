"""Training plans as they travel: a manifest and two ONNX graphs, signed by the coordinator.

The manifest says all that a device needs to run the graphs and to refuse them; see ``edge_agent.plan_guard``.
"""

import hashlib
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import msgpack

from fedtide.wire import frame
from fedtide.wire.errors import BlobMismatch, FrameTooLarge, MalformedFrame
from fedtide.wire.frame import Message
from fedtide.wire.ids import PlanId, plan_id
from fedtide.wire.parameters import Schema, TensorSpec
from fedtide.wire.signatures import PLAN_DOMAIN, PublicKey, SigningKey
from fedtide.wire.training import Training

MAX_PLAN_BYTES: Final = 1 << 20
"""A plan has 2 to 16 KB, a recurrent one of many steps up to 64; a megabyte leaves room and bounds memory."""
MAX_GRAPH_BYTES: Final = 8 << 20
"""An inflated graph; the largest seen is 60 KB."""
MAX_NODES: Final = 20_000
"""Of one graph. An LSTM over 64 time steps has 660, a loop over 24 steps that a model's owner wrote 1,400."""


PLAN_OPERATORS: Final = frozenset(
    """
    Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast CastLike Ceil Clip Concat Constant
    ConstantOfShape Conv ConvTranspose Cos CumSum Div Elu Equal Erf Exp Expand Flatten Floor Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool GRU Greater GreaterOrEqual HardSigmoid HardSwish
    Identity InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    LSTM MatMul Max MaxPool Mean Min Mish Mod Mul Neg Not OneHot Or PRelu Pad Pow RandomUniformLike Range
    Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Size
    Slice Softmax SoftmaxCrossEntropyLoss Softplus Softsign Split Sqrt Squeeze Sub Sum Tan Tanh Tile
    Transpose Trilu Unsqueeze Where Xor
    """.split()  # noqa: SIM905  (one word per operator reads better than eighty quoted lines)
)
"""The ONNX operators a plan may use: arithmetic on tensors. No control flow (a small graph could then run for
ever), no functions, no other domain. One added here may be used once the devices are updated."""


class Limits(Message, frozen=True, kw_only=True):
    """What one plan may take on a device.

    Attributes:
        step_deadline_s: wall seconds one step may take before it is stopped and reported.
        memory_bytes: working memory of the graphs, beyond which a step is stopped and reported.
    """

    step_deadline_s: float = 30.0
    memory_bytes: int = 256 << 20


class Verified(Message, frozen=True, kw_only=True):
    """Evidence from build time: the teacher-forced gradient test against float64 torch.

    Errors are the largest absolute difference of any gradient divided by the largest absolute gradient.
    """

    steps: int
    median_gradient_error: float
    max_gradient_error: float
    torch_float32_max_error: float


class PlanManifest(Message, frozen=True, kw_only=True):
    """What a training plan is.

    Attributes:
        format: version of this manifest.
        name: for people.
        opset: the ONNX operator set both graphs use.
        producer: what built it, for example ``torch 2.13.0``.
        min_onnxruntime: the oldest onnxruntime version it was built for.
        schema: the aggregated tensors, ``p.<name>`` parameters, then averaged ``b.<name>`` buffers; float32.
        local_state: further tensors of the train graph that stay on the device and start at zero each time:
            optimizer state ``o.<name>``.
        local_buffers: non-aggregated buffers ``b.<name>`` (counters), starting at the listed zeros.
        inputs: model inputs ``x0`` …, the first axis None for the batch.
        targets: the ``y`` input, or None when the loss takes the input itself.
        learning_rate_input: name of the train graph's scalar float32 learning-rate input.
        min_batch: smallest batch the train graph accepts (2 with batch normalisation).
        train_outputs: names in order; ``name'`` replaces the state tensor ``name``; then ``loss``; then, if
            any, ``metric``.
        evaluation_state: names that the evaluation graph takes as external initializers.
        metric: name of the metric, or None. It is a mean over the batch's examples.
        optimizer: name of the torch optimizer the graph contains.
        operators: the ONNX operators used by both graphs.
        training: how devices train.
        limits: what it may take.
        buffers: ``averaged``: float buffers (batch normalisation's statistics) are aggregated like
            parameters; ``local``: each device keeps its own, which start from the schema's initial values
            and never leave it (Li et al., FedBN, ICLR 2021).
        proximal_input: name of the train graph's scalar float32 input for FedProx's μ, or None. With it, the
            graph takes ``a.<name>`` for every parameter ``p.<name>``: where local training started.
        class_weights: the train graph's float32 input of one weight per class, or None.
        clip_norm: the norm to which a step's gradients are clipped in the graph, or None.
        verified: the evidence it was accepted on.
        train_sha256: of the train graph's bytes.
        evaluation_sha256: of the evaluation graph's bytes.
    """

    format: int
    name: str
    opset: int
    producer: str
    min_onnxruntime: str
    schema: Schema
    local_state: tuple[TensorSpec, ...]
    local_buffers: tuple[TensorSpec, ...]
    inputs: tuple[TensorSpec, ...]
    targets: TensorSpec | None
    learning_rate_input: str
    min_batch: int
    train_outputs: tuple[str, ...]
    evaluation_state: tuple[str, ...]
    metric: str | None
    optimizer: str
    operators: tuple[str, ...]
    training: Training
    limits: Limits
    buffers: Literal["averaged", "local"] = "averaged"
    proximal_input: str | None = None
    class_weights: TensorSpec | None = None
    clip_norm: float | None = None
    verified: Verified
    train_sha256: bytes
    evaluation_sha256: bytes


@dataclass(frozen=True)
class Plan:
    """A manifest with its two graphs.

    ``train``: one optimizer step. Inputs: the state tensors, ``x0`` …, ``y``, the learning rate; outputs as
    the manifest lists. ``evaluation``: inputs ``x0`` …, ``y`` (zeros will do for inference); outputs ``out``,
    ``loss`` and, if any, ``metric``; the current parameters are injected as initializers.
    """

    manifest: PlanManifest
    train: bytes
    evaluation: bytes

    @cached_property
    def id(self) -> PlanId:
        """Names the plan by its manifest, which holds the hashes of both graphs."""
        return plan_id(hashlib.sha256(frame.pack(self.manifest)).digest())


def seal_plan(plan: Plan, key: SigningKey) -> bytes:
    """The signed plan as a blob: version byte, then [manifest, signature, train graph, evaluation graph].

    All but the signature are compressed; the signature is over the manifest as it was before.
    """
    manifest = frame.pack(plan.manifest)
    parts = [
        zlib.compress(manifest, 9),
        key.sign(PLAN_DOMAIN, manifest),
        zlib.compress(plan.train, 9),
        zlib.compress(plan.evaluation, 9),
    ]
    return bytes((frame.PROTOCOL_VERSION,)) + bytes(msgpack.packb(parts, use_bin_type=True))


def open_plan(blob: bytes, key: PublicKey, max_bytes: int = MAX_PLAN_BYTES) -> Plan:
    """Check a plan blob's bounds, signature and hashes.

    Raises:
        WireError: too large, malformed, not signed by ``key``, or a graph that is not the one signed for.
    """
    content = frame.strip_version(blob, max_bytes)
    try:
        compressed, signature, train, evaluation = frame.unpack_byte_strings(
            content, tuple[bytes, bytes, bytes, bytes]
        )
    except MalformedFrame as error:
        raise MalformedFrame(
            f"a plan is four byte strings, manifest, signature, train graph, evaluation graph: {error}"
        ) from error
    packed = _inflate(compressed, MAX_PLAN_BYTES, "manifest")
    key.verify(PLAN_DOMAIN, packed, signature)
    manifest = frame.unpack(packed, PlanManifest)
    return Plan(
        manifest,
        inflate_graph(train, manifest.train_sha256, "train"),
        inflate_graph(evaluation, manifest.evaluation_sha256, "evaluation"),
    )


def inflate_graph(compressed: bytes, sha256: bytes, name: str) -> bytes:
    """Inflate a graph of a plan within :data:`MAX_GRAPH_BYTES` and check its hash; ``name`` is for the error.

    Raises:
        WireError: it does not inflate, is too large, or is not the graph of that hash.
    """
    graph = _inflate(compressed, MAX_GRAPH_BYTES, f"{name} graph")
    if hashlib.sha256(graph).digest() != sha256:
        raise BlobMismatch(f"the {name} graph is not the one its manifest was signed for")
    return graph


def _inflate(compressed: bytes, max_bytes: int, name: str) -> bytes:
    inflate = zlib.decompressobj()
    try:
        content = inflate.decompress(compressed, max_bytes + 1)
    except zlib.error as error:
        raise MalformedFrame(f"the {name} does not inflate: {error}") from error
    if len(content) > max_bytes:
        raise FrameTooLarge(len(content), max_bytes)
    if not inflate.eof or inflate.unused_data:
        raise MalformedFrame(f"the {name} ends too soon or goes on too long")
    return content
