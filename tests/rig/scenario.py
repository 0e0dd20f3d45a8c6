"""What is to happen in a simulation, and what came of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from broker_memory import Limits
from chaos import FAULTS
from fleet_witness import Audit

from fedtide.wire.disk import Disk
from fedtide.wire.steps import Step

if TYPE_CHECKING:
    from simulated_fleet import Fleet


@dataclass(frozen=True)
class Scenario:
    """What happens in one simulation.

    Attributes:
        seed: of everything.
        devices: how many.
        faulty_s: virtual seconds in which things fail.
        calm_s: virtual seconds after them.
        faults: which of ``chaos.FAULTS``.
        every_s: mean virtual seconds between two faults.
        step_odds: chance that a process is killed at a step that it comes to.
        only_step: the one step at which processes are killed; None: any.
        most_strikes: at each step only so many times; once all are done, faults are over.
        goal: updates per version.
        train_s: least and most seconds of a device's training.
        coordinator: settings of the coordinator; what is not given is drawn.
        device: further settings of the devices.
        limits: the broker's; None: drawn.
        status_every_s: how often the coordinator writes its status.
        look_every_s: how often the accounting is looked at.
        coordinator_disk: None: a simulated one; a real one loses nothing when the power is cut.
        script: what else happens; None: nothing.
        command: what repeats it; None: what its numbers give.
    """

    seed: int
    devices: int = 5
    faulty_s: float = 60.0
    calm_s: float = 240.0
    faults: tuple[str, ...] = tuple(FAULTS)
    every_s: float = 6.0
    step_odds: float = 0.002
    only_step: Step | None = None
    most_strikes: int = 1_000_000
    goal: int = 3
    train_s: tuple[float, float] = (0.5, 4.0)
    coordinator: dict[str, Any] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    limits: Limits | None = None
    status_every_s: float = 5.0
    look_every_s: float = 0.25
    coordinator_disk: Disk | None = None
    script: "Callable[[Fleet], Any] | None" = None
    command: str | None = None

    @property
    def repeated_by(self) -> str:
        """What repeats it."""
        if self.command is not None:
            return self.command
        step = f" --step {self.only_step}" if self.only_step else ""
        return (
            f"python tests/rig/simulate.py --seed {self.seed} --devices {self.devices} "
            f"--seconds {self.faulty_s:g} --calm {self.calm_s:g} --every {self.every_s:g} "
            f"--step-odds {self.step_odds:g}{step} --faults {','.join(self.faults)}"
        )


@dataclass(frozen=True)
class Report:
    """What came of a simulation.

    Attributes:
        audit: the journal's word.
        virtual_s: how long it was.
        real_s: how long it took.
        starts: how often processes were started, by machine.
        faults: how often each fault came.
        strikes: how often a process ended at each step.
        messages: that reached the broker.
        disk_failures: how often a program ended because of its disk.
        dropped: by the broker's full queues, after it had acknowledged them.
        digest: SHA-256 over the journal and the published versions: equal for equal seeds.
    """

    audit: Audit
    virtual_s: float
    real_s: float
    starts: dict[str, int]
    faults: dict[str, int]
    strikes: dict[Step, int]
    messages: int
    disk_failures: int
    dropped: int
    digest: str
