"""How deltas travel in ``bytes_to_accuracy``: by which codec, at which step, with what is carried on.

What a codec leaves out goes into the device's next update by the device's own arithmetic.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np
from codec_peers import Received, TopK
from federated_deltas import Update
from report import own_cpu_seconds

from edge_agent.error_feedback import Corrected, corrected
from fedtide.wire import codecs
from fedtide.wire.codecs.rate import Rate
from fedtide.wire.envelope import UpdateHeader, seal_update
from fedtide.wire.ids import Counter, DeviceId, FleetId, plan_id
from fedtide.wire.parameters import Schema, Vector
from fedtide.wire.signatures import SigningKey

REFERENCE: Final = "float32"


class Method(Protocol):
    """How deltas travel."""

    def send(self, whole: Corrected, schema: Schema, *, first_phase: bool) -> Received:
        """What arrives of a delta, and what it took."""
        ...

    @property
    def feeds_back(self) -> bool:
        """Whether what is left out goes into the next update."""
        ...


@dataclass(frozen=True)
class Ours:
    """A codec of the table.

    Attributes:
        codec_id: which.
        step: in the first phase; None: the codec has none.
        last_step: in the second phase, where it is another one.
    """

    codec_id: str
    step: float | None = None
    last_step: float | None = None

    @property
    def feeds_back(self) -> bool:
        """As on a device: whether the codec is adjustable."""
        return codecs.get(self.codec_id).adjustable

    def send(self, whole: Corrected, schema: Schema, *, first_phase: bool) -> Received:
        """Encode and decode."""
        codec = codecs.get(self.codec_id)
        step = self.step if first_phase else self.last_step or self.step
        payload = codec.encode(whole.vector, schema, whole.request(Rate(step=step)))
        return Received(len(payload), codec.decode(payload, schema))


@dataclass(frozen=True)
class Peer:
    """The largest values, with error feedback."""

    codec: TopK
    feeds_back: bool = True

    def send(self, whole: Corrected, schema: Schema, *, first_phase: bool) -> Received:  # noqa: ARG002
        """Code one vector."""
        return self.codec.send(whole.vector)


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        REFERENCE: Ours("float32"),
        "q8": Ours("q8"),
        "top-k 1 %": Peer(TopK(0.01)),
        "ecsq 4": Ours("ecsq", 4.0),
        "ecsq 8": Ours("ecsq", 8.0),
        "lowrank 4": Ours("lowrank", 4.0),
        "lowrank 8": Ours("lowrank", 8.0),
        "lowrank 16": Ours("lowrank", 16.0),
        "lowrank 8, then 4": Ours("lowrank", 8.0, last_step=4.0),
        "lowrank 16, then 4": Ours("lowrank", 16.0, last_step=4.0),
    }
)


class Uplink:
    """Carries updates by one method, counts bytes, and keeps every device's residual."""

    def __init__(self, method: Method, schema: Schema, first_phase: int) -> None:
        self._method = method
        self._schema = schema
        self._first_phase = first_phase
        self._residuals: dict[int, Vector] = {}
        self._key = SigningKey.generate()
        self._payload_bytes = self._envelope_bytes = 0.0
        self.payload_bytes: dict[int, float] = {}
        self.envelope_bytes: dict[int, float] = {}
        self.cpu_s: list[float] = []

    def __call__(self, update: Update) -> Vector:
        """What the coordinator folds."""
        before = own_cpu_seconds()
        whole = corrected(update.delta, self._residuals.pop(update.device, None))
        received = self._method.send(whole, self._schema, first_phase=update.number <= self._first_phase)
        self.cpu_s.append(own_cpu_seconds() - before)
        if self._method.feeds_back:
            self._residuals[update.device] = np.subtract(whole.vector, received.values)
        self._payload_bytes += received.payload_bytes
        self._envelope_bytes += received.payload_bytes + self._overhead_bytes(update)
        self.payload_bytes[update.number] = self._payload_bytes
        self.envelope_bytes[update.number] = self._envelope_bytes
        return received.values

    def _overhead_bytes(self, update: Update) -> int:
        """Of a real envelope with a header like this update's, beyond its payload."""
        result, nothing = update.result, b""
        header = UpdateHeader(
            fleet=FleetId("fleet"),
            plan=plan_id(hashlib.sha256(nothing).digest()),
            device=DeviceId(f"device-{update.device:03d}"),
            counter=Counter(update.number),
            base_version=update.base_version,
            base_sha256=hashlib.sha256(nothing).digest(),
            codec="lowrank",
            num_examples=result.num_examples,
            local_steps=result.steps,
            metrics={"loss": result.loss, "metric": result.metric or 0.0},
            payload_bytes=1000,
            payload_sha256=hashlib.sha256(nothing).digest(),
            created=1e9,
        )
        return len(seal_update(header, nothing, self._key))
