"""Every message but the update envelope: what it says, who sends it, on which topic.

topic        message                                        sealed by
coord        CoordinatorState                               coordinator
model/head   Head                                           coordinator
dn/{device}  Receipt, MissingChunks, Resync (a tagged map)  coordinator
up/{s}/{d}   UpdateChunk of a signed envelope               device (the envelope)
st/{device}  Presence                                       -
ev/{device}  TrainingEvent, EvaluationEvent, Trouble        -
"""

from enum import StrEnum
from typing import Final

from fedtide.wire.frame import Message
from fedtide.wire.ids import BlobId, Counter, DeviceId, Epoch, FleetId, ModelVersion, PlanId, blob_id


class BlobRef(Message, frozen=True, array_like=True):
    """Where a content-addressed blob is: ``chunks`` retained messages below its id. Travels as an array.

    Attributes:
        size_bytes: of the whole content.
        sha256: of the whole content, checked before it is used; its first digits are the id. Sometimes only
            its first 16 bytes.
        chunk_bytes: of every chunk but the last.
    """

    size_bytes: int
    sha256: bytes
    chunk_bytes: int

    @property
    def id(self) -> BlobId:
        """The blob's topic level."""
        return blob_id(self.sha256)

    @property
    def chunks(self) -> int:
        """How many; empty content is one empty chunk."""
        return max(1, -(-self.size_bytes // self.chunk_bytes))


class ModelDelta(Message, frozen=True, array_like=True):
    """A blob (``model_blob.ModelBlob``) that leads from one published version to another. An array."""

    from_version: ModelVersion
    to_version: ModelVersion
    blob: BlobRef


_SHORT_IN_HEADS: Final = {
    "fleet": "f",
    "epoch": "e",
    "version": "v",
    "parent_sha256": "ps",
    "plan": "p",
    "parameters_sha256": "ms",
    "plan_blob": "pb",
    "full_blob": "mb",
    "deltas": "d",
    "delta_index": "di",
    "update_codec": "u",
    "training": "t",
    "release": "r",
    "issued": "i",
    "expires": "x",
    "blob": "b",
    "gate": "g",
}


class CodecRequest(Message, frozen=True, kw_only=True):
    """The codec devices shall use for updates, with its parameters by name."""

    id: str
    parameters: dict[str, float] = {}


class Release(Message, frozen=True, kw_only=True, omit_defaults=True, rename=_SHORT_IN_HEADS):
    """The model version for inference: the newest that passed the gate, or just the newest without a gate.

    Attributes:
        version: which.
        parameters_sha256: fingerprint of its parameters.
        blob: all its parameters, as in ``Head.full_blob``; retained as long as it is the release.
        gate: what the version had to pass, one sentence for people; empty where no gate is set.
    """

    version: ModelVersion
    parameters_sha256: bytes
    blob: BlobRef
    gate: str = ""


class Head(Message, frozen=True, kw_only=True, omit_defaults=True, rename=_SHORT_IN_HEADS):
    """The signed manifest of the published model version: everything a device needs to fetch and verify it.

    Every device gets every head; so on the wire fields have short names, and those at their default are left
    out.

    Attributes:
        fleet: which fleet.
        epoch: the coordinator's; devices ignore a lower one.
        version: of the model; devices never go back to a lower one.
        parent_sha256: fingerprint of the previously published version, 32 zero bytes for the first.
        plan: id of the training plan.
        parameters_sha256: fingerprint of the parameters (``parameters.fingerprint``).
        plan_blob: the signed plan.
        full_blob: all parameters, as a keyframe (``model_blob.ModelBlob``).
        deltas: to this version, from the one published before it: for devices that are in step.
        delta_index: the deltas from other recent versions (``model_blob.DeltaIndex``), for devices that
            missed some; None where there are none.
        update_codec: what updates shall be encoded with.
        training: whether devices shall train; False when the run has stopped.
        release: the version for inference, or None while none has passed the gate.
        issued: seconds since 1970, advisory.
        expires: after this a device with a working clock reports a stale head.
    """

    fleet: FleetId
    epoch: Epoch
    version: ModelVersion
    parent_sha256: bytes
    plan: PlanId
    parameters_sha256: bytes
    plan_blob: BlobRef
    full_blob: BlobRef
    deltas: tuple[ModelDelta, ...] = ()
    delta_index: BlobRef | None = None
    update_codec: CodecRequest
    training: bool
    release: Release | None = None
    issued: float
    expires: float

    @property
    def order(self) -> tuple[Epoch, ModelVersion]:
        """Newer heads compare greater: by epoch, then by version."""
        return self.epoch, self.version


class CoordinatorState(Message, frozen=True, kw_only=True):
    """Whether the coordinator is there, and what it speaks. Its will says offline.

    Attributes:
        fleet: which fleet.
        epoch: which run of the coordinator.
        run: drawn anew by each run, so that two runs which took the same epoch know of each other.
        online: False in the will and at a clean stop.
        protocol_min: oldest protocol version accepted.
        protocol_max: newest protocol version accepted.
        shards: number of ingest shards S.
        spread_s: a device that comes back together with others waits a random time up to this before it sends
            what it has (pace steering: Bonawitz et al., MLSys 2019, section 2.3).
    """

    fleet: FleetId
    epoch: Epoch
    run: str = ""
    online: bool
    protocol_min: int
    protocol_max: int
    shards: int = 1
    spread_s: float = 0.0


_SHORT: Final = {
    "counter": "n",
    "digest": "h",
    "size_bytes": "b",
    "index": "i",
    "count": "of",
    "content": "c",
}


class UpdateChunk(Message, frozen=True, kw_only=True, omit_defaults=True, rename=_SHORT):
    """Chunk ``index`` of ``count`` of one signed update envelope. Short names on the wire, as in its header.

    Attributes:
        counter: the update's, so that chunks of two updates are never mixed.
        digest: the envelope's identity (``envelope.update_digest``).
        size_bytes: of the whole envelope.
        index: from 0.
        count: number of chunks.
        content: this chunk's bytes.
    """

    counter: Counter
    digest: bytes
    size_bytes: int
    index: int = 0
    count: int = 1
    content: bytes


class Verdict(StrEnum):
    """What became of an update."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"
    """It had been applied before; nothing was added twice."""
    REJECTED = "rejected"


class Reason(StrEnum):
    """Why an update was rejected. The device is told, and metrics count by it."""

    MALFORMED = "malformed"
    TOO_LARGE = "too-large"
    UNSUPPORTED_VERSION = "unsupported-version"
    WRONG_FLEET = "wrong-fleet"
    UNKNOWN_DEVICE = "unknown-device"
    WRONG_DEVICE = "wrong-device"
    BAD_SIGNATURE = "bad-signature"
    REPLAYED_COUNTER = "replayed-counter"
    UNKNOWN_PLAN = "unknown-plan"
    FUTURE_VERSION = "future-version"
    UNKNOWN_BASE = "unknown-base"
    TOO_STALE = "too-stale"
    UNKNOWN_CODEC = "unknown-codec"
    UNSUPPORTED_FIELD = "unsupported-field"
    WRONG_SHAPE = "wrong-shape"
    NOT_FINITE = "not-finite"
    TOO_MANY = "too-many"
    """The device sends more than its share; what is over is not looked at."""
    UNREADABLE = "unreadable"
    """Reading it broke the coordinator: the bytes are set aside for a person."""
    STOPPED = "stopped"


class Receipt(Message, frozen=True, kw_only=True, tag_field="kind", tag="receipt"):
    """The coordinator's durable answer to one update. Only this empties a device's outbox.

    Attributes:
        device: whose update.
        epoch: the coordinator's run; devices do not believe one lower than they have heard of. 0: not said.
        counter: which update.
        digest: which bytes (``envelope.update_digest``): a forgery cannot earn a receipt for the real one.
        verdict: what became of it.
        reason: why it was rejected.
        detail: one sentence for people.
        version: the coordinator's current model version.
        retry_after_s: seconds the device shall wait before its next update.
        highest: the highest counter of this device that was judged. One that was set up again under its old
            name and key goes on above it. 0: not said.
    """

    device: DeviceId
    epoch: Epoch = Epoch(0)
    counter: Counter
    digest: bytes
    verdict: Verdict
    reason: Reason | None = None
    detail: str = ""
    version: ModelVersion
    retry_after_s: float = 0.0
    highest: Counter = Counter(0)


class MissingChunks(Message, frozen=True, kw_only=True, tag_field="kind", tag="missing"):
    """Chunks of an update that have not arrived; the device sends these again. ``epoch``: see ``Receipt``."""

    device: DeviceId
    epoch: Epoch = Epoch(0)
    counter: Counter
    digest: bytes
    indexes: tuple[int, ...]


class Resync(Message, frozen=True, kw_only=True, tag_field="kind", tag="resync"):
    """The coordinator asks a device to announce itself and to send its outbox again."""

    device: DeviceId


DownMessage = Receipt | MissingChunks | Resync


class Presence(Message, frozen=True, kw_only=True):
    """Whether a device is there. Its will says offline.

    Attributes:
        online: False in the will and at a clean stop.
        boot: changes with every start of the agent, so that a late will of an old session is recognised.
        agent_version: of the fedtide package.
        protocol: newest protocol version spoken.
        codecs: ids of the codecs it can encode.
        model_version: what it holds, None before its first model.
        public_key: of the device, so that an operator can accept it; empty in the will.
        sent: seconds since 1970 when this was made, advisory.
    """

    online: bool
    boot: str
    public_key: bytes = b""
    agent_version: str = ""
    protocol: int = 1
    codecs: tuple[str, ...] = ()
    model_version: ModelVersion | None = None
    sent: float = 0.0


class TrainingEvent(Message, frozen=True, kw_only=True, tag_field="kind", tag="training"):
    """What one local training run saw. At most once: metrics may be lost.

    Attributes:
        version: the base version trained on.
        num_examples: used.
        steps: optimizer steps done.
        seconds: wall time of the training.
        loss: mean over the last local epoch.
        metric: the plan's metric, mean over the last local epoch.
    """

    version: ModelVersion
    num_examples: int
    steps: int
    seconds: float
    loss: float
    metric: float | None = None


class EvaluationEvent(Message, frozen=True, kw_only=True, tag_field="kind", tag="evaluation"):
    """How a model version does on the examples that a device holds out. At most once.

    Attributes:
        version: evaluated, before any local training.
        num_examples: held out.
        loss: mean over them.
        metric: the plan's metric, mean over them.
    """

    version: ModelVersion
    num_examples: int
    loss: float
    metric: float | None = None


class Trouble(Message, frozen=True, kw_only=True, tag_field="kind", tag="trouble"):
    """Why a device does not train. At most once.

    Attributes:
        event: one word for machines, as in the device's own log: ``training.failed``, ``fetch.failed`` …
        detail: one sentence for people.
        version: the model version it concerns, or None.
    """

    event: str
    detail: str
    version: ModelVersion | None = None


DeviceEvent = TrainingEvent | EvaluationEvent | Trouble
"""What a device says on its ``ev`` topic."""
