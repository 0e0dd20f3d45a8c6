"""The agent's settings: the tables of ``agent.toml``, decoded into typed, frozen objects."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_agent.data_sources import DataSource
from fedtide.wire import ids
from fedtide.wire.errors import MalformedId
from fedtide.wire.ids import DeviceId, FleetId
from fedtide.wire.link import Broker
from fedtide.wire.signatures import PublicKey
from fedtide.wire.training import Training

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


class LocalTraining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this device departs from the plan. A value left out is the plan's.

    Attributes:
        local_epochs: passes over the examples per update.
        batch_size: examples per step.
        learning_rate: of the local optimizer.
        max_steps: at most so many steps per update.
        threads: of one step; 1 is best on a busy or small machine.
        same_version_again: train again on a version already trained on, instead of waiting for a newer one.
        retrain_after_s: an update that could not be sent for so long gives way to a newer one.
    """

    local_epochs: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    max_steps: Count | None = None
    threads: Count = 1
    same_version_again: bool = False
    retrain_after_s: Positive = 6 * 3600.0

    def applied_to(self, plan: Training) -> Training:
        """The plan's values with this device's in their place."""
        return msgspec.structs.replace(
            plan,
            local_epochs=self.local_epochs or plan.local_epochs,
            batch_size=self.batch_size or plan.batch_size,
            learning_rate=self.learning_rate or plan.learning_rate,
            max_steps=self.max_steps or plan.max_steps,
        )


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of ``agent.toml``.

    Attributes:
        fleet: the fleet's id.
        device: this device's id.
        coordinator_key: the coordinator's public key, 64 hexadecimal digits: what this device trusts.
        key: this device's private key file.
        state: directory for the outbox and the model slots.
        data: the data source.
        broker: where the broker is.
        training: departures from the plan.
        max_model_bytes: larger models are refused.
        receipt_timeout_s: first wait for a receipt before the update is sent again; it grows from there.
    """

    fleet: FleetId
    device: DeviceId
    coordinator_key: str
    key: Path
    state: Path
    data: DataSource
    broker: Broker = Broker()
    training: LocalTraining = LocalTraining()
    max_model_bytes: Count = 64 << 20
    receipt_timeout_s: Positive = 10.0

    def __post_init__(self) -> None:
        try:
            ids.fleet_id(self.fleet)
            ids.device_id(self.device)
        except MalformedId as error:
            raise ValueError(str(error)) from error
        PublicKey.parse(self.coordinator_key)
