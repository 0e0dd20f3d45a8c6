"""A coordinator without its network, for a plan of eight parameters that no device ever runs."""

import hashlib
from pathlib import Path

import msgspec
import numpy as np

from coordinator.accounting import Accounting
from coordinator.closed_loop import Version
from coordinator.intake import Intake
from coordinator.journal import Published
from coordinator.model_state import initial_state
from coordinator.plan.file import BuiltPlan
from coordinator.recovery import base_parameters, recover
from coordinator.replay import replay
from coordinator.settings import CoordinatorSettings, Rules
from coordinator.writer import Writer
from fedtide.wire import codecs
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks
from fedtide.wire.disk import OS_DISK
from fedtide.wire.envelope import UpdateHeader, open_update, seal_update
from fedtide.wire.ids import DeviceId, FleetId, ModelVersion
from fedtide.wire.parameters import Schema, TensorSpec, fingerprint
from fedtide.wire.plan import Limits, Plan, PlanManifest, Verified
from fedtide.wire.signatures import SigningKey
from fedtide.wire.training import Training

FLEET = FleetId("pumps")
DEVICES = tuple(DeviceId(f"pump-{number}") for number in range(4))


def float32(name, *shape):
    return TensorSpec(name=name, dtype="float32", shape=shape)


SCHEMA = Schema(tensors=(float32("p.weight", 2, 3), float32("p.bias", 2)))
"""Eight parameters."""

PLAN = BuiltPlan(
    Plan(
        PlanManifest(
            format=1,
            name="hand-made",
            opset=18,
            producer="hand",
            min_onnxruntime="1.23",
            schema=SCHEMA,
            local_state=(),
            local_buffers=(),
            inputs=(float32("x0", None, 3),),
            targets=TensorSpec(name="y", dtype="int64", shape=(None,)),
            learning_rate_input="learning_rate",
            min_batch=1,
            train_outputs=("p.weight'", "p.bias'", "loss"),
            evaluation_state=("p.weight", "p.bias"),
            metric=None,
            optimizer="SGD",
            operators=("Gemm",),
            training=Training(),
            limits=Limits(),
            verified=Verified(
                steps=1, median_gradient_error=0.0, max_gradient_error=0.0, torch_float32_max_error=0.0
            ),
            train_sha256=hashlib.sha256(b"").digest(),
            evaluation_sha256=hashlib.sha256(b"").digest(),
        ),
        train=b"",
        evaluation=b"",
    ),
    np.arange(8, dtype=np.float32),
)
"""Starts from the parameters 0, 1, … 7."""


def device_key(device):
    return SigningKey.from_seed(hashlib.sha256(device.encode()).digest())


def vector(*numbers):
    return np.array(numbers, np.float32)


def constant(value):
    return np.full(SCHEMA.size, value, np.float32)


def make_settings(**changes):
    return CoordinatorSettings(fleet=FLEET, plan=Path("model.plan"), **changes)


def make_header(payload=b"", **changes):
    """The header of a fresh, honest update on version 0."""
    header = UpdateHeader(
        fleet=FLEET,
        plan=PLAN.plan.id,
        device=DEVICES[0],
        counter=1,
        base_version=ModelVersion(0),
        base_sha256=fingerprint(PLAN.initial),
        codec="float32",
        num_examples=5,
        local_steps=1,
        payload_bytes=len(payload),
        payload_sha256=hashlib.sha256(payload).digest(),
    )
    return msgspec.structs.replace(header, **changes)


def make_update(delta=None, *, codec="float32", **changes):
    """A signed envelope; the delta is all ones unless given."""
    payload = codecs.get(codec).encode(constant(1.0) if delta is None else delta, SCHEMA)
    header = make_header(payload, codec=codec, **changes)
    return seal_update(header, payload, device_key(header.device))


class Bench:
    """Intake, writer, journal and models, put together as the service does; a method call is an event."""

    def __init__(self, directory, settings=None, plan=PLAN, disk=OS_DISK):
        self.settings = make_settings() if settings is None else settings
        self.closed = False
        self.plan = plan
        self.schema = plan.plan.manifest.schema
        self.recovered = recover(directory, self.settings, plan, disk)
        self.journal = self.recovered.journal
        self.writer = Writer(
            self.settings,
            plan=plan.plan.id,
            schema=self.schema,
            state=self.recovered.state,
            marks=self.journal.marks(),
            bases=base_parameters(self.recovered.models, plan),
        )
        self.writer.published = {row.version: row.fingerprint for row in self.journal.published()}
        self.accounting = Accounting.from_totals(self.journal.totals())
        keys = {device: device_key(device).public for device in DEVICES}
        self.intake = Intake(self.schema, keys.get, self.settings.update.max_partial_bytes)
        if not self.writer.published:
            self.publish()

    @property
    def state(self):
        return self.writer.state

    def receive(self, sender, payload):
        """One message of the ``up`` topic, at time 0."""
        return self.intake.receive(sender, payload, 0.0)

    def judge(self, *arrivals):
        """Judge and commit one batch; the receipts."""
        for _ in arrivals:
            self.accounting.arrived()
        judged = self.writer.judge(arrivals)
        self.journal.commit(judged.batch)
        self.accounting.judged(judged.batch.totals)
        return judged.receipts

    def send(self, *envelopes):
        """Envelopes of honest devices, in one batch; the receipts."""
        arrivals = []
        for envelope in envelopes:
            header = open_update(envelope, len(envelope)).header
            (chunk,) = update_chunks(envelope, header.counter, MAX_CHUNK_BYTES)
            arrivals.append(self.receive(header.device, chunk))
        return self.judge(*arrivals)

    def publish(self):
        """Offer the newest version, as far as disk and writer are concerned."""
        version = Version.of(self.state.version, self.state.parameters)
        keep = self.settings.publish.keep_versions
        self.recovered.models.save(version.number, version.parameters)
        self.journal.add_published(Published(version.number, version.fingerprint, 0.0), keep)
        needed = self.journal.oldest_base if self.settings.aggregator.needs_base else None
        self.recovered.models.remove_old(needed)
        self.writer.published = {row.version: row.fingerprint for row in self.journal.published()}

    def snapshot(self):
        self.journal.snapshot(self.state)

    def replay_from_start(self, on_version=lambda _state: None):
        """The state that the whole journal gives."""
        rules = Rules(aggregator=self.settings.aggregator, server_optimizer=self.settings.server_optimizer)
        _, state = replay(
            self.journal,
            initial_state(self.plan.initial, rules),
            0,
            schema=self.schema,
            bases=base_parameters(self.recovered.models, self.plan),
            on_version=on_version,
        )
        return state

    def close(self):
        """Leave the directory to the next coordinator; a second call does nothing."""
        if not self.closed:
            self.recovered.close()
        self.closed = True


def assert_same_state(one, other):
    """Equal to the bit: parameters, buffer, optimizer and rules."""
    assert one.version == other.version
    assert one.parameters.tobytes() == other.parameters.tobytes()
    assert one.buffer.total.tobytes() == other.buffer.total.tobytes()
    assert (one.buffer.divisor, one.buffer.count) == (other.buffer.divisor, other.buffer.count)
    assert one.optimizer.names == other.optimizer.names
    for mine, theirs in zip(one.optimizer.vectors, other.optimizer.vectors, strict=True):
        assert mine.tobytes() == theirs.tobytes()
    assert one.rules == other.rules
