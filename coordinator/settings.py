"""The settings in ``coordinator.toml``: every table decodes into the object that does the work."""

import math
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from coordinator.aggregation import Aggregator, FedBuff
from coordinator.rollback import Rollback
from coordinator.server_optimizers import SGD, ServerOptimizer
from coordinator.staleness import Polynomial, StalenessPolicy
from fedtide.wire import codecs, ids
from fedtide.wire.chunks import MAX_CHUNK_BYTES
from fedtide.wire.codecs.rate import COARSEST_STEP, FINEST_STEP, rate_of
from fedtide.wire.errors import MalformedId, UnknownCodec
from fedtide.wire.ids import FleetId, ModelVersion
from fedtide.wire.link import Broker
from fedtide.wire.messages import CodecRequest
from fedtide.wire.model_blob import ModelFormat

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]

DEFAULT_CODEC: Final = "lowrank"
"""What updates are encoded with where the settings do not say."""


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every table: unknown keys are errors."""


class Publish(Table, frozen=True, kw_only=True):
    """How often versions go to the devices. Versions in between count for staleness but are not sent.

    Attributes:
        min_interval_s: at least this long between two published versions.
        every_versions: and at least this many versions.
        head_lifetime_s: after this a device reports a stale head; the head is issued anew at half of it.
        keep_versions: how many published versions an update may start from, and how many models stay on disk;
            with deltas at least 129.
        format: ``grid``: devices hold the model rounded to a grid, in a quarter of the bytes and, where they
            are not far behind, a hundredth; what is rounded off is made up for by the next version.
            ``float32``: they hold it to the bit, in 4 bytes per parameter.
        step: of the rounding from one published version to the next, in units of the rms of what changed: 4
            is fine, 8 the usual, 16 coarse. Only with ``grid``.
        deltas: whether there are deltas, from any of the last 128 published versions. Without, every
            device takes every version whole. Only with ``grid``.
    """

    min_interval_s: Annotated[float, Meta(ge=0)] = 1.0
    every_versions: Count = 1
    head_lifetime_s: Positive = 7 * 86_400.0
    keep_versions: Annotated[int, Meta(ge=2)] = 100
    format: ModelFormat = ModelFormat.GRID
    step: Annotated[float, Meta(ge=FINEST_STEP, le=COARSEST_STEP)] = 8.0
    deltas: bool = True

    @property
    def with_deltas(self) -> bool:
        """Whether devices that hold a recent version are offered what changed since."""
        return self.deltas and self.format == ModelFormat.GRID


class Evaluation(Table, frozen=True, kw_only=True):
    """Held-out evaluation of published versions on the coordinator's side.

    Attributes:
        data: an ``.npz`` file with the plan's inputs (``x`` or ``x0`` …) and targets (``y``).
        every_versions: evaluate when this many versions were made since the last evaluation.
    """

    data: Path
    every_versions: Count = 1


class Federated(Table, frozen=True, kw_only=True):
    """The federated metric: the mean of what devices find on the examples they hold out.

    Attributes:
        max_age_versions: what a device found on a version older than this no longer counts.
    """

    max_age_versions: Count = 20


class ReleaseGate(Table, frozen=True, kw_only=True):
    """What a version must pass to be released for inference. Every threshold given must be met.

    Attributes:
        on: ``held-out``: the coordinator's own evaluation decides; ``federated``: what the devices find on
            the examples they hold out, which they say themselves and nobody can check.
        metric_at_least: for a metric that is better when higher.
        metric_at_most: for a metric that is better when lower.
        loss_at_most: for any plan; the only one for a plan without a metric.
        min_devices: with ``federated``: at least so many devices must have evaluated the version.
    """

    on: Literal["held-out", "federated"] = "held-out"
    metric_at_least: float | None = None
    metric_at_most: float | None = None
    loss_at_most: float | None = None
    min_devices: Count = 3

    def __post_init__(self) -> None:
        if self.metric_at_least is self.metric_at_most is self.loss_at_most is None:
            raise ValueError("give metric_at_least, metric_at_most or loss_at_most")
        for name in ("metric_at_least", "metric_at_most", "loss_at_most"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}, a finite number is needed")


class Stop(Table, frozen=True, kw_only=True):
    """When the coordinator stops by itself: at the first condition that holds. None given: it runs on.

    Attributes:
        versions: this many model versions were made.
        updates: this many updates were applied.
        metric: the held-out metric reached this.
        seconds: it ran this long.
    """

    versions: Count | None = None
    updates: Count | None = None
    metric: float | None = None
    seconds: Positive | None = None


class Journal(Table, frozen=True, kw_only=True):
    """The journal's bounds.

    Attributes:
        snapshot_every_updates: a snapshot at least every so many journal entries bounds recovery time.
        snapshot_every_bytes: and at least every so many bytes, or as many as a snapshot itself takes.
        keep_bytes: the oldest segments and their snapshots are removed when all of them take more than this,
            but never what belongs to the last two snapshots.
        max_batch: entries per group commit.
        max_batch_bytes: of the updates in one, unless it is a single larger one; no more wait for their turn.
    """

    snapshot_every_updates: Count = 1000
    snapshot_every_bytes: Annotated[int, Meta(ge=1 << 16, le=256 << 20)] = 64 << 20
    keep_bytes: Count = 4 << 30
    max_batch: Count = 256
    max_batch_bytes: Count = 64 << 20


class Later(Table, frozen=True, kw_only=True):
    """Other codec parameters from some version on.

    Attributes:
        from_version: the first model version with them.
        codec_parameters: all of them; none is taken over from before.
    """

    from_version: Count
    codec_parameters: dict[str, float]


class Update(Table, frozen=True, kw_only=True):
    """What is asked of updates, and what is accepted.

    Attributes:
        codec: what devices shall encode with.
        codec_parameters: the codec's rate: ``step``, ``bits_per_parameter`` or ``bytes_per_update``; see
            ``fedtide.wire.codecs.rate.Rate``. Codecs that are not adjustable have none.
        later: changes of the rate during a run, by rising version. Coarse early and fine late takes the
            fewest bytes to a given accuracy: while the model is far from it, what is left out hardly matters.
        weight_by_examples: multiply the aggregation weight by num_examples.
        max_examples: num_examples beyond this counts as this, so that no device can claim the whole average.
        retry_after_s: seconds every receipt asks a device to wait before its next update.
        max_partial_bytes: of all updates of which some chunks have arrived.
        missing_after_s: a partial update that is silent for so long is asked for its missing chunks.
    """

    codec: str = DEFAULT_CODEC
    codec_parameters: dict[str, float] = {}
    later: tuple[Later, ...] = ()
    weight_by_examples: bool = False
    max_examples: Count = 1_000_000
    retry_after_s: Annotated[float, Meta(ge=0)] = 0.0
    max_partial_bytes: Count = 256 << 20
    missing_after_s: Positive = 5.0

    def __post_init__(self) -> None:
        try:
            adjustable = codecs.get(self.codec).adjustable
        except UnknownCodec as error:
            raise ValueError(str(error)) from error
        rate_of(self.codec, self.codec_parameters, adjustable=adjustable)
        before = 0
        for later in self.later:
            if later.from_version <= before:
                raise ValueError(
                    f"later: from_version = {later.from_version} comes after {before}; it must rise"
                )
            before = later.from_version
            try:
                rate_of(self.codec, later.codec_parameters, adjustable=adjustable)
            except ValueError as error:
                raise ValueError(f"later, from_version = {before}: {error}") from error

    def request_at(self, version: ModelVersion) -> CodecRequest:
        """What the head of this version asks updates to be encoded with."""
        parameters = self.codec_parameters
        for later in self.later:
            if later.from_version <= version:
                parameters = later.codec_parameters
        return CodecRequest(id=self.codec, parameters=parameters)


class Pacing(Table, frozen=True, kw_only=True):
    """How far apart devices are told to send, once there are many of them. See ``coordinator.pace``.

    Attributes:
        at_once: so many updates may come at one moment: what the broker has under way to us or queues. Fleets
            of fewer devices are never told to wait.
        share: of what is sustained, as measured; the rest is for what the measurement does not see.
        at_first_per_s: updates per second taken to be sustained before anything was measured.
        least_per_s: never less, whatever was measured.
        most_per_s: never more; where the broker is far away, what the line carries.
        longest_s: no device is told to wait longer.
    """

    at_once: Count = 32
    share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    at_first_per_s: Positive = 200.0
    least_per_s: Positive = 10.0
    most_per_s: Positive = 5_000.0
    longest_s: Positive = 600.0


class Share(Table, frozen=True, kw_only=True):
    """How many messages one device may send; what is over is dropped unread. See ``coordinator.shares``.

    A small update is one message, a large one as many as it has chunks; presence and events have a share of
    the same size to themselves. An agent waits for the receipt of an update before it sends the next, and so
    stays far below.

    Attributes:
        messages_per_s: in the long run.
        burst_messages: at once, after a pause.
    """

    messages_per_s: Positive = 50.0
    burst_messages: Count = 1_000


class Metrics(Table, frozen=True, kw_only=True):
    """The Prometheus endpoint.

    Attributes:
        port: TCP port to serve it on.
        host: address to serve it on.
    """

    port: Annotated[int, Meta(ge=0, le=65_535)]
    host: str = "127.0.0.1"


class CoordinatorSettings(Table, frozen=True, kw_only=True):
    """All of ``coordinator.toml``.

    Attributes:
        fleet: the fleet's id.
        plan: the built plan file.
        broker: where the broker is.
        aggregator: FedBuff, FedAsync or FedAvg.
        staleness: the staleness policy.
        server_optimizer: what steps along the aggregated delta.
        flush_after_s: a partly full buffer is aggregated after this long; None: only when it is full.
        publish: pacing.
        update: what is asked of updates.
        pacing: how far apart devices are told to send.
        share: how many messages one device may send.
        evaluation: held-out evaluation; None: no evaluation.
        rollback: which held-out results lead back to an earlier version; None: none does.
        federated: the metric of the devices' own held-out examples.
        release: what a version must pass to be released for inference; None: every published version is.
        stop: when to stop.
        journal: bounds of the journal.
        metrics: the Prometheus endpoint; None: none.
        open_enrolment: accept the first key any device shows. For trials only.
        max_devices: bound of the roster.
        chunk_bytes: upper bound of one MQTT payload.
    """

    fleet: FleetId
    plan: Path
    broker: Broker = Broker()
    aggregator: Aggregator = FedBuff()
    staleness: StalenessPolicy = Polynomial()
    server_optimizer: ServerOptimizer = SGD()
    flush_after_s: Positive | None = 60.0
    publish: Publish = Publish()
    update: Update = Update()
    pacing: Pacing = Pacing()
    share: Share = Share()
    evaluation: Evaluation | None = None
    rollback: Rollback | None = None
    federated: Federated = Federated()
    release: ReleaseGate | None = None
    stop: Stop = Stop()
    journal: Journal = Journal()
    metrics: Metrics | None = None
    open_enrolment: bool = False
    max_devices: Count = 100_000
    chunk_bytes: Annotated[int, Meta(ge=1024, le=MAX_CHUNK_BYTES)] = MAX_CHUNK_BYTES

    def __post_init__(self) -> None:
        try:
            ids.fleet_id(self.fleet)
        except MalformedId as error:
            raise ValueError(str(error)) from error
        if self.release is not None and self.release.on == "held-out" and self.evaluation is None:
            raise ValueError('release on "held-out" needs an [evaluation] table with held-out examples')
        if self.rollback is not None and self.evaluation is None:
            raise ValueError("[rollback] needs an [evaluation] table with held-out examples")


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the settings that decides what a journal replays to; journaled whenever it changes."""

    aggregator: Aggregator
    server_optimizer: ServerOptimizer

    def to_bytes(self) -> bytes:
        """JSON, as the journal keeps it."""
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Rules":
        """What :meth:`to_bytes` wrote."""
        return msgspec.json.decode(content, type=cls)
