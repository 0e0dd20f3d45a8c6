"""The agent's settings: the tables of ``agent.toml``, decoded into typed, frozen objects."""

from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from edge_agent.data_sources import DataSource
from fedtide.wire import ids
from fedtide.wire.errors import MalformedId
from fedtide.wire.ids import DeviceId, FleetId
from fedtide.wire.link import Broker
from fedtide.wire.signatures import PublicKey
from fedtide.wire.training import Training

MODELS_DIRECTORY: Final = "models"
"""Where an agent's state directory has the model slots."""
KEPT_FILE: Final = "kept"
"""Where it has what the device keeps of its training and never sends."""
FEEDBACK_FILE: Final = "error-feedback"
"""Where it has what updates have left out, to be carried by the next one."""
TRIAL_FILE: Final = "plan-trial"
"""Where it has how the plan in use has fared."""
EMPTY_DIRECTORY: Final = "empty"
"""Where the agent's process works: a plan can name no file there."""

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


class LocalTraining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this device departs from the plan. A value left out is the plan's; see ``Training`` for more.

    Attributes:
        local_epochs: passes over the examples per update.
        batch_size: examples per step.
        learning_rate: of the local optimizer, at version 0; the plan's schedule applies to it.
        max_steps: at most so many steps per update.
        max_seconds: no further step is begun after so many wall seconds.
        optimizer_state: ``reset`` or ``keep``; kept state is written to disk after every update.
        proximal: FedProx's μ.
        class_weights: ``equal`` or ``balanced``.
        evaluation_share: share of the examples that is held out of training.
        threads: of one step; 1 is best on a busy or small machine.
        max_memory_mb: working memory of a step in MiB, if less than the plan's own limit.
        same_version_again: train again on a version already trained on, instead of waiting for a newer one.
        retrain_after_s: an update that could not be sent for so long gives way to a newer one, unless its
            codec has error feedback.
    """

    local_epochs: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    max_steps: Count | None = None
    max_seconds: Positive | None = None
    optimizer_state: Literal["reset", "keep"] | None = None
    proximal: Annotated[float, Meta(ge=0)] | None = None
    class_weights: Literal["equal", "balanced"] | None = None
    evaluation_share: Annotated[float, Meta(ge=0, lt=1)] | None = None
    threads: Count = 1
    max_memory_mb: Positive | None = None
    same_version_again: bool = False
    retrain_after_s: Positive = 6 * 3600.0

    def applied_to(self, plan: Training) -> Training:
        """The plan's values with this device's in their place."""
        own = {
            name: getattr(self, name)
            for name in plan.__struct_fields__
            if getattr(self, name, None) is not None
        }
        return msgspec.structs.replace(plan, **own)

    @property
    def memory_bytes(self) -> int | None:
        """The device's own limit of working memory, if it has one."""
        return None if self.max_memory_mb is None else int(self.max_memory_mb * 2**20)


class Inference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The released model, for ``fedtide agent predict`` and programs on this device.

    Attributes:
        keep: keep the released model on this device.
        min_interval_s: at least so many seconds between two models that are fetched only for inference or
            evaluation; what is fetched to be trained on serves both and waits for nothing.
    """

    keep: bool = True
    min_interval_s: Annotated[float, Meta(ge=0)] = 60.0


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
        inference: whether and how often the released model is kept.
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
    inference: Inference = Inference()
    max_model_bytes: Count = 64 << 20
    receipt_timeout_s: Positive = 10.0

    def __post_init__(self) -> None:
        try:
            ids.fleet_id(self.fleet)
            ids.device_id(self.device)
        except MalformedId as error:
            raise ValueError(str(error)) from error
        PublicKey.parse(self.coordinator_key)
