"""One message of every kind, with no field at its default, and the keys that sign them in tests."""

import hashlib
from typing import Final

from fedtide.wire.chunks import blob_ref
from fedtide.wire.envelope import MaskScheme, UpdateHeader, UpdateId
from fedtide.wire.frame import Message
from fedtide.wire.ids import Counter, DeviceId, Epoch, FleetId, ModelVersion, PlanId
from fedtide.wire.messages import (
    CodecRequest,
    CoordinatorState,
    EvaluationEvent,
    Head,
    MissingChunks,
    ModelDelta,
    Presence,
    Reason,
    Receipt,
    Release,
    Resync,
    TrainingEvent,
    Trouble,
    UpdateChunk,
    Verdict,
)
from fedtide.wire.model_blob import DeltaIndex, IndexRow, ModelBlob, ModelFormat
from fedtide.wire.parameters import Schema, TensorSpec
from fedtide.wire.plan import Limits, Plan, PlanManifest, Verified
from fedtide.wire.signatures import SigningKey
from fedtide.wire.training import Cosine, Training

COORDINATOR_KEY: Final = SigningKey.from_seed(bytes(range(32)))
DEVICE_KEY: Final = SigningKey.from_seed(bytes(range(32, 64)))

FLEET: Final = FleetId("pumps")
DEVICE: Final = DeviceId("pump-7")
PAYLOAD: Final = bytes(range(16))
GRAPHS: Final = (b"train graph", b"evaluation graph")

HEAD: Final = Head(
    fleet=FLEET,
    epoch=Epoch(3),
    version=ModelVersion(41),
    parent_sha256=b"p" * 32,
    plan=PlanId("0123456789abcdef0123456789abcdef"),
    parameters_sha256=b"m" * 32,
    plan_blob=blob_ref(b"a plan", 4),
    full_blob=blob_ref(b"all parameters", 4),
    deltas=(ModelDelta(ModelVersion(39), ModelVersion(41), blob_ref(b"a delta", 4)),),
    delta_index=blob_ref(b"an index", 4),
    update_codec=CodecRequest(id="q8", parameters={"block": 256.0}),
    training=True,
    release=Release(
        version=ModelVersion(38),
        parameters_sha256=b"r" * 32,
        blob=blob_ref(b"released parameters", 4),
        gate="accuracy at least 0.9",
    ),
    issued=1_700_000_000.5,
    expires=1_700_086_400.5,
)
MODEL_BLOB: Final = ModelBlob(
    ModelFormat.GRID, ModelVersion(39), ModelVersion(41), b"r" * 16, b"\x00\xff payload"
)
INDEX: Final = DeltaIndex(
    ModelVersion(41),
    4096,
    (IndexRow(ModelVersion(39), 300, b"d" * 16), IndexRow(ModelVersion(38), 70_000, b"e" * 16)),
    (IndexRow(ModelVersion(32), 500, b"i" * 16),),
)
STATE: Final = CoordinatorState(
    fleet=FLEET,
    epoch=Epoch(3),
    run="0123456789abcdef",
    online=True,
    protocol_min=1,
    protocol_max=2,
    shards=4,
    spread_s=2.5,
)
CHUNK: Final = UpdateChunk(
    counter=Counter(2**53), digest=b"d" * 32, size_bytes=300, index=1, count=3, content=b"\x00\xff chunk"
)
RECEIPT: Final = Receipt(
    device=DEVICE,
    epoch=Epoch(3),
    counter=Counter(2**53),
    digest=b"d" * 32,
    verdict=Verdict.REJECTED,
    reason=Reason.TOO_STALE,
    detail="17 versions old; at most 16",
    version=ModelVersion(58),
    retry_after_s=1.5,
    highest=Counter(2**53 + 1),
)
MISSING: Final = MissingChunks(
    device=DEVICE, epoch=Epoch(3), counter=Counter(2**53), digest=b"d" * 32, indexes=(0, 2, 200)
)
RESYNC: Final = Resync(device=DEVICE)
PRESENCE: Final = Presence(
    online=True,
    boot="00ff00ff00ff00ff",
    public_key=DEVICE_KEY.public.raw,
    agent_version="0.1.0",
    protocol=2,
    codecs=("float32", "q8"),
    model_version=ModelVersion(41),
    sent=1_700_000_000.25,
)
EVENT: Final = TrainingEvent(
    version=ModelVersion(41), num_examples=600, steps=19, seconds=2.5, loss=0.75, metric=0.875
)
EVALUATION: Final = EvaluationEvent(version=ModelVersion(41), num_examples=60, loss=0.5, metric=0.9375)
TROUBLE: Final = Trouble(
    event="training.failed", detail="a step took longer than 30 s", version=ModelVersion(41)
)
HEADER: Final = UpdateHeader(
    fleet=FLEET,
    plan=PlanId("0123456789abcdef0123456789abcdef"),
    device=DEVICE,
    counter=Counter(2**63 - 1),
    base_version=ModelVersion(41),
    base_sha256=b"m" * 32,
    codec="q8",
    codec_parameters={"block": 256.0},
    num_examples=600,
    local_steps=19,
    metrics={"loss": 0.75, "metric": 0.875},
    payload_bytes=16,
    payload_sha256=hashlib.sha256(PAYLOAD).digest(),
    mask=MaskScheme(id="pairwise", sealed_seed=b"seed"),
    inner=(UpdateId(device=DeviceId("pump-8"), counter=Counter(5)),),
    created=1_700_000_000.125,
)
MANIFEST: Final = PlanManifest(
    format=1,
    name="line",
    opset=20,
    producer="by hand",
    min_onnxruntime="1.23",
    schema=Schema(
        tensors=(
            TensorSpec(name="p.slope", dtype="float32", shape=(2, 1)),
            TensorSpec(name="p.bias", dtype="float32", shape=()),
        )
    ),
    local_state=(TensorSpec(name="o.slope", dtype="float32", shape=(2, 1)),),
    local_buffers=(TensorSpec(name="b.steps", dtype="int64", shape=()),),
    inputs=(TensorSpec(name="x0", dtype="float32", shape=(None, 2)),),
    targets=TensorSpec(name="y", dtype="float32", shape=(None, 1)),
    learning_rate_input="rate",
    min_batch=2,
    train_outputs=("p.slope'", "p.bias'", "o.slope'", "b.steps'", "loss", "metric"),
    evaluation_state=("p.slope", "p.bias"),
    metric="accuracy",
    optimizer="SGD",
    operators=("Add", "MatMul"),
    training=Training(
        local_epochs=2,
        batch_size=16,
        learning_rate=0.25,
        schedule=Cosine(versions=300, floor=0.125),
        max_steps=100,
        max_seconds=2.5,
        optimizer_state="keep",
        proximal=0.5,
        class_weights="balanced",
        evaluation_share=0.25,
    ),
    limits=Limits(step_deadline_s=5.0, memory_bytes=1 << 20),
    buffers="local",
    proximal_input="mu",
    class_weights=TensorSpec(name="class_weights", dtype="float32", shape=(3,)),
    clip_norm=1.0,
    verified=Verified(
        steps=3, median_gradient_error=1e-7, max_gradient_error=2e-7, torch_float32_max_error=1e-7
    ),
    train_sha256=hashlib.sha256(GRAPHS[0]).digest(),
    evaluation_sha256=hashlib.sha256(GRAPHS[1]).digest(),
)

MESSAGES: Final[tuple[Message, ...]] = (
    HEAD,
    MODEL_BLOB,
    INDEX,
    STATE,
    CHUNK,
    RECEIPT,
    MISSING,
    RESYNC,
    PRESENCE,
    EVENT,
    EVALUATION,
    TROUBLE,
    HEADER,
    MANIFEST,
)
"""Every message that travels by itself; the others travel inside these."""


def sample_plan() -> Plan:
    return Plan(MANIFEST, *GRAPHS)
