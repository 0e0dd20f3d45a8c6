"""How devices train: part of a plan's manifest. The owner of a device may override each value there."""

import math
from typing import Annotated, Literal

from msgspec import Meta

from fedtide.wire.frame import Message
from fedtide.wire.ids import ModelVersion

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


class Constant(
    Message, frozen=True, kw_only=True, tag_field="kind", tag="constant", forbid_unknown_fields=True
):
    """The same learning rate at every version."""

    def factor(self, version: ModelVersion) -> float:  # noqa: ARG002  (the interface of a schedule)
        """What the learning rate is multiplied by when training on ``version``."""
        return 1.0


class StepDecay(Message, frozen=True, kw_only=True, tag_field="kind", tag="step", forbid_unknown_fields=True):
    """The learning rate is multiplied by ``by`` every ``every_versions`` versions."""

    every_versions: Count
    by: Annotated[float, Meta(gt=0, le=1)] = 0.1

    def factor(self, version: ModelVersion) -> float:
        """``by`` to the power of ``version // every_versions``."""
        return float(self.by ** (version // self.every_versions))


class Exponential(
    Message, frozen=True, kw_only=True, tag_field="kind", tag="exponential", forbid_unknown_fields=True
):
    """The learning rate halves every ``half_life_versions`` versions."""

    half_life_versions: Positive

    def factor(self, version: ModelVersion) -> float:
        """``2 ** (-version / half_life_versions)``."""
        return float(2.0 ** (-version / self.half_life_versions))


class Cosine(Message, frozen=True, kw_only=True, tag_field="kind", tag="cosine", forbid_unknown_fields=True):
    """The learning rate falls along half a cosine wave, without restarts.

    Loshchilov and Hutter, SGDR, ICLR 2017, equation 5.

    Attributes:
        versions: how many versions the fall takes.
        floor: the part of the learning rate that is left at the end and after.
    """

    versions: Count
    floor: Annotated[float, Meta(ge=0, le=1)] = 0.0

    def factor(self, version: ModelVersion) -> float:
        """``floor + (1 - floor) * (1 + cos(pi * version / versions)) / 2``, ``floor`` after the end."""
        done = min(version / self.versions, 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


Schedule = Constant | StepDecay | Exponential | Cosine
"""Every learning-rate schedule: the one table of choices. By version, so that the whole fleet follows."""


class Training(Message, frozen=True, kw_only=True):
    """How a device trains on one model version.

    Attributes:
        local_epochs: passes over the examples per update.
        batch_size: examples per step.
        learning_rate: of the plan's optimizer, at version 0.
        schedule: how the learning rate changes with the version trained on.
        max_steps: at most this many optimizer steps per update; None: no limit beyond the epochs.
        max_seconds: no further step is begun after this many wall seconds, so that a slow device sends a
            smaller update, sooner; None: no limit.
        optimizer_state: ``reset``: the optimizer's state starts at zero for every update; ``keep``: it goes
            on where the device's last update on this plan left it.
        proximal: FedProx's μ, the pull towards the base version; 0: none. Only for a plan that was built
            with a proximal term.
        class_weights: ``balanced``: each class counts for the device's loss as if it had as many examples
            as the others; ``equal``: each example counts the same. Only for a plan with class weights.
        evaluation_share: share of the device's examples, 0 to 1, that it never trains on and evaluates each
            model version on; 0: none.
    """

    local_epochs: Count = 1
    batch_size: Count = 32
    learning_rate: float = 0.1
    schedule: Schedule = Constant()
    max_steps: Count | None = None
    max_seconds: Positive | None = None
    optimizer_state: Literal["reset", "keep"] = "reset"
    proximal: Annotated[float, Meta(ge=0)] = 0.0
    class_weights: Literal["equal", "balanced"] = "equal"
    evaluation_share: Annotated[float, Meta(ge=0, lt=1)] = 0.0

    def learning_rate_at(self, version: ModelVersion) -> float:
        """The learning rate for training on this version."""
        return self.learning_rate * self.schedule.factor(version)
