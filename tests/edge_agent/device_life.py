"""A device's files through many trainings, receipts, models and starts, beside the plainest account of them.

The account knows what was promised; at any moment a disk can be held against it: what the running process
left, or what a power cut may have made of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from agent_world import COORDINATOR_KEY, DEVICE_KEY, Release, agent_settings, tiny_plan
from simulated_disk import Fault, Operation, PowerCut, SimulatedDisk

from edge_agent.feedback_file import FeedbackFile
from edge_agent.kept_state import Kept, KeptFile
from edge_agent.model_slots import InstalledModel, ModelSlots
from edge_agent.new_examples import TrainedTo
from edge_agent.plan_runtime import LocalResult
from edge_agent.plan_trial import PlanTrial
from edge_agent.settings import FEEDBACK_FILE, KEPT_FILE, MODELS_DIRECTORY, TRIAL_FILE
from edge_agent.submission import Submission
from fedtide.wire import codecs
from fedtide.wire.envelope import open_update
from fedtide.wire.ids import Counter
from fedtide.wire.messages import CodecRequest, Reason, Verdict
from fedtide.wire.parameters import TensorSpec, Vector
from fedtide.wire.plan import Plan

STATE: Final = Path("/state")
MODELS: Final = STATE / MODELS_DIRECTORY
SETTINGS: Final = agent_settings(STATE)
PLANS: Final = tuple(tiny_plan(name) for name in ("line", "curve", "wave"))
KEPT_PLAN: Final = Plan(
    msgspec.structs.replace(
        tiny_plan().manifest, local_state=(TensorSpec(name="o.m", dtype="float32", shape=(3,)),)
    ),
    *(tiny_plan().train, tiny_plan().evaluation),
)

Files = frozenset[tuple[Path, bytes]]


@cache
def model_of(codec: str) -> InstalledModel:
    """Version 1, of parameters 1, 1, 1, and a head that asks for a codec."""
    release = Release(1, codec=codec)
    head = msgspec.structs.replace(release.head, update_codec=CodecRequest(id=codec))
    return InstalledModel(head, release.plan, release.parameters)


@cache
def release_of(version: int) -> Release:
    """A version; its plan changes now and then, and every third is released."""
    release = Release(version, plan=PLANS[version // 2 % len(PLANS)])
    return release.itself() if version % 3 == 0 else release


@dataclass
class Verdicts:
    """The coordinator: what it said of each counter, and what it has in its model."""

    said: dict[Counter, Verdict] = field(default_factory=dict)
    applied: dict[Counter, Vector] = field(default_factory=dict)

    def copy(self) -> "Verdicts":
        return Verdicts(dict(self.said), dict(self.applied))

    @property
    def mass(self) -> Vector:
        return sum(self.applied.values(), np.zeros(3, np.float32))

    def judge(self, counter: Counter, envelope: bytes, verdict: Verdict) -> tuple[Verdict, Reason | None]:
        """A counter is judged once, and none below the highest (``coordinator.marks``)."""
        known = self.said.get(counter)
        if known is not None:
            return Verdict.DUPLICATE if known is Verdict.APPLIED else known, None
        if any(judged > counter for judged in self.said):
            return Verdict.REJECTED, Reason.REPLAYED_COUNTER
        self.said[counter] = verdict
        if verdict is Verdict.APPLIED:
            opened = open_update(envelope, 10_000)
            self.applied[counter] = codecs.get(opened.header.codec).decode(
                opened.payload, model_of("coarse").plan.manifest.schema
            )
        return verdict, Reason.TOO_STALE if verdict is Verdict.REJECTED else None


@dataclass
class Account:
    """What the device was asked to do, and what of it was done when the call returned.

    Attributes:
        used: the highest counter that was given out.
        waiting: envelopes submitted and not settled.
        sent: counters that may have been applied.
        settled: counters whose receipt was taken.
        superseded: counters that another update has taken the place of.
        set_aside: counters of updates that could not be read.
        trained: sum of the deltas of all trainings submitted.
        delta: of the training under way.
        settling: the counter whose receipt is being taken.
        version: the newest model installed, or run.
        installing: the version that is being installed.
        released: the newest version released here.
        was_unreadable: a file could not be read: what it held may be lost, but must not be there twice. For
            deltas without negative numbers.
        marks: what was last trained to, and what the training under way is to leave.
    """

    used: int = -1
    waiting: dict[Counter, bytes] = field(default_factory=dict)
    sent: set[Counter] = field(default_factory=set)
    settled: set[Counter] = field(default_factory=set)
    superseded: set[Counter] = field(default_factory=set)
    set_aside: set[Counter] = field(default_factory=set)
    trained: Vector = field(default_factory=lambda: np.zeros(3, np.float32))
    delta: Vector | None = None
    settling: Counter | None = None
    version: int = 0
    installing: int | None = None
    released: int = 0
    was_unreadable: bool = False
    marks: tuple[int | None, ...] = (None,)


class Device:
    """The processes of one device, one after the other, on a disk that may change between them.

    Args:
        disk: with nothing on it.
        codec: what heads ask for; with "coarse", nothing may be missing of what was trained.

    Attributes:
        fault: what fails on this disk and on those that take its place.
    """

    def __init__(self, disk: SimulatedDisk, codec: str = "coarse") -> None:
        self.disk = disk
        self.codec = codec
        self.fault: Fault | None = None
        self.account = Account()
        self.coordinator = Verdicts()
        self._whole_models: dict[Files, tuple[int, int]] = {}
        disk.make_directory(STATE)
        self.start()
        with self._trial.update(model_of(codec).plan.id):
            pass  # else three ends in a first update would have the plan refused, as they should

    def start(self) -> None:
        """A new process on the same disk."""
        self.submission = _submission(self.disk)
        self._note_counters()
        self.slots = ModelSlots(MODELS, COORDINATOR_KEY.public, self.disk)
        self.slots.take_over()
        newest, released = self.slots.newest(), self.slots.released()
        account = self.account
        account.version = max(account.version, newest.head.version if newest else 0)
        account.released = max(account.released, released.release.version if released else 0)
        self._trained_to = TrainedTo(STATE / "trained-to", self.disk)
        self._kept = KeptFile(STATE / KEPT_FILE, self.disk)
        self._trial = PlanTrial(STATE / TRIAL_FILE, self.disk)

    def replace_disk(self, disk: SimulatedDisk) -> None:
        """The process has ended. Find out what was done of what was under way, and start another.

        Raises:
            OSError: the disk fails at once; to be called again.
        """
        self.disk.watch(None)
        self.disk = disk
        disk.fail(self.fault)
        account = self.account
        if account.delta is not None:
            before = account.trained.tolist()
            if self.codec == "coarse" and self._mass_on(disk.killed()).tolist() != before:
                account.trained = account.trained + account.delta
            account.delta = None
        account.installing = None
        self.start()
        pending = _pending(self.submission)
        gone = set(account.waiting) - set(pending) - {account.settling}
        account.set_aside |= {counter for counter in gone if self.submission.outbox.was_damaged(counter)}
        account.superseded |= gone - account.set_aside
        if account.settling is not None and account.settling not in pending:
            account.settled.add(account.settling)
        account.settling = None
        account.waiting = {c: e for c, e in pending.items() if c not in account.settled}

    def _note_counters(self) -> None:
        """Every counter that is given out is above all that ever were."""
        outbox, account = self.submission.outbox, self.account
        reserve = outbox.reserve

        def noted() -> Counter:
            counter = reserve()
            assert counter > account.used, "a counter is used twice"
            account.used = counter
            return counter

        outbox.reserve = noted  # type: ignore[method-assign]

    # What a device does.

    def train(self, delta: tuple[int, int, int]) -> None:
        """As the agent does, when nothing waits, or nothing that was ever sent."""
        waiting = self.submission.outbox.oldest()
        if waiting is not None and self.submission.outbox.was_sent(waiting.counter):
            return
        account = self.account
        model, vector = model_of(self.codec), np.array(delta, np.float32)
        with self._trial.update(model.plan.id):
            pass
        self.submission.make(model, LocalResult(vector + np.float32(1), 5, 1, loss=0.5, metric=None))
        account.delta = vector
        self.finish()
        mark = 1 + (account.marks[0] or 0)
        account.marks += (mark,)
        self._kept.keep(KEPT_PLAN, Kept(optimizer=(np.full(3, mark, np.float32),)))
        self._trained_to.note(mark)
        account.marks = (mark,)

    def finish(self) -> None:
        """As the agent does before anything else."""
        account = self.account
        self.submission.finish()
        if account.settling is not None:
            self._note_settled(account.settling)
        pending = _pending(self.submission)
        if account.delta is not None and set(pending) - set(account.waiting) - account.settled:
            account.superseded |= set(account.waiting) - set(pending)
            account.waiting = {c: e for c, e in pending.items() if c not in account.settled}
            account.trained = account.trained + account.delta
            account.delta = None

    def deliver(self, verdict: Verdict, *, arrives: bool = True, is_answered: bool = True) -> None:
        """Send the oldest; it or its receipt may be lost on the way."""
        oldest = self.submission.outbox.oldest()
        if oldest is None:
            return
        self.submission.outbox.note_sent(oldest.counter)
        self.account.sent.add(oldest.counter)
        if not arrives:
            return
        said, reason = self.coordinator.judge(oldest.counter, oldest.envelope, verdict)
        if not is_answered:
            return
        self.account.settling = oldest.counter
        self.submission.settle(oldest.counter, said, reason)
        self._note_settled(oldest.counter)

    def _note_settled(self, counter: Counter) -> None:
        self.account.settled.add(counter)
        self.account.waiting.pop(counter, None)
        self.account.settling = None

    def install(self) -> None:
        """The next version, and its release where its head names one."""
        account = self.account
        release = release_of(account.installing or account.version + 1)
        account.installing = release.version
        self.slots.install(release.sealed_head, release.head, release.plan_blob, release.content)
        account.version = release.version
        if release.release is not None:
            self.slots.install_release(release.sealed_head, release.head, release.plan_blob, release.content)
            account.released = release.version
        account.installing = None

    # What must be so, whatever a power cut left.

    def check(self, disk: SimulatedDisk) -> None:
        """Hold a disk against the account; the disk is used up."""
        account = self.account
        disk.fail(None)
        self._check_models(disk)
        device = _submission(disk)
        pending = _pending(device)
        known = set(account.waiting) | account.settled | account.superseded | account.set_aside
        under_way = set(pending) - known
        if account.delta is None:
            assert not under_way, f"nobody submitted {under_way}"
        assert len(under_way) <= 1
        if under_way:  # what it supersedes must not be sent beside it
            assert set(account.waiting) & set(pending) <= account.sent
        for counter, envelope in account.waiting.items():
            if counter in pending:
                assert pending[counter] == envelope
            elif counter != account.settling and not device.outbox.was_damaged(counter):
                # The feedback of the one that supersedes it is on disk, and carries it.
                assert account.delta is not None, f"{counter} is lost"
                assert counter not in account.sent, f"{counter} is lost"
        assert not account.superseded & set(pending), "what was superseded is back"
        assert device.outbox.damaged == ()
        assert device.outbox.reserve() > account.used, "a counter is used twice"
        assert TrainedTo(STATE / "trained-to", disk).mark in account.marks
        PlanTrial(STATE / TRIAL_FILE, disk).check(model_of(self.codec).plan.id)
        kept = KeptFile(STATE / KEPT_FILE, disk).of(KEPT_PLAN).optimizer
        assert (int(kept[0][0]) if kept else None) in account.marks
        if self.codec == "coarse":
            mass, allowed = self._mass_on(disk), [account.trained]
            if account.delta is not None:
                allowed.append(account.trained + account.delta)
            fits = np.less_equal if account.was_unreadable else np.equal
            assert any(fits(mass, each).all() for each in allowed), (
                f"{mass} applied and carried; {allowed} trained"
            )

    def _check_models(self, disk: SimulatedDisk) -> None:
        account = self.account
        files = frozenset((path, content) for path, content in disk.files().items() if MODELS in path.parents)
        if files not in self._whole_models:  # most cuts leave the models as they were
            self._whole_models[files] = _whole_models(disk)
        version, released = self._whole_models[files]
        assert version in {account.version, account.installing}, f"version {version}"
        assert released in {account.released, account.installing}, f"released {released}"

    def _mass_on(self, disk: SimulatedDisk) -> Vector:
        """What was applied and what is carried, once everything on this disk is answered."""
        device, coordinator = _submission(disk), self.coordinator.copy()
        while (oldest := device.outbox.oldest()) is not None:
            device.settle(
                oldest.counter, *coordinator.judge(oldest.counter, oldest.envelope, Verdict.APPLIED)
            )
        residual = FeedbackFile(STATE / FEEDBACK_FILE, disk).residual(model_of(self.codec).plan)
        return coordinator.mass + (np.zeros(3, np.float32) if residual is None else residual)


def _submission(disk: SimulatedDisk) -> Submission:
    return Submission(SETTINGS, DEVICE_KEY, lambda: 1000.0, disk)


def _pending(device: Submission) -> dict[Counter, bytes]:
    return {counter: each.envelope for counter, each in device.outbox._pending.items()}


def _whole_models(disk: SimulatedDisk) -> tuple[int, int]:
    """The versions installed and released on a disk, each exactly as it was published; 0 for none."""
    slots = ModelSlots(MODELS, COORDINATOR_KEY.public, disk)
    newest, released = slots.newest(), slots.released()
    if newest is not None:
        wanted = release_of(newest.head.version)
        assert (newest.head, newest.plan) == (wanted.head, wanted.plan)
        assert np.array_equal(newest.parameters, wanted.parameters)
    if released is not None:
        assert np.array_equal(released.parameters, release_of(released.release.version).parameters)
    return (newest.head.version if newest else 0), (released.release.version if released else 0)


class Life:
    """A device and what happens to it, drawn from one seed.

    Args:
        seed: of everything that is drawn.
        codec: what heads ask for.
        states_per_change: on average, how many crash states are looked at after each change of the disk.

    Attributes:
        states: crash states held against the account.
    """

    def __init__(self, seed: int, *, codec: str = "coarse", states_per_change: float = 1.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.device = Device(SimulatedDisk(page_bytes=128), codec)
        self.states = 0
        self._states_per_change = states_per_change
        self._cut_in: int | None = None
        self._watch()

    def live(self, actions: int) -> None:
        """So many things happen; in some of them the power is cut or the process killed."""
        for _ in range(actions):
            self._cut_in = int(self.rng.integers(14)) if self.rng.random() < 0.4 else None
            try:
                self._act()
            except PowerCut:
                self.end_process()
            self._cut_in = None

    def end_process(self) -> None:
        """By a power cut or by kill -9; a new one starts."""
        disk = self.device.disk
        if self.rng.random() < 0.4:
            left = disk.killed()
        else:
            states = list(disk.crash_states(self.rng, 12))
            left = states[int(self.rng.integers(len(states)))]
        self.device.replace_disk(left)
        self._watch()

    def _act(self) -> None:
        rng, device = self.rng, self.device
        match int(rng.integers(10)):
            case 0 | 1 | 2 | 3:
                device.train(_delta(rng))
            case 4 | 5 | 6 | 7:
                verdict = Verdict.REJECTED if rng.random() < 0.25 else Verdict.APPLIED
                device.deliver(verdict, arrives=rng.random() < 0.9, is_answered=rng.random() < 0.8)
            case 8:
                device.install()
            case _:
                self.end_process()

    def _watch(self) -> None:
        self.device.disk.watch(self._changed)

    def _changed(self, _: Operation) -> None:
        count = int(self.rng.poisson(self._states_per_change))
        if count:
            states = list(self.device.disk.crash_states(self.rng, max(count, 2)))
            chosen = self.rng.permutation(len(states))[:count]
            for index in chosen:
                self.device.check(states[int(index)])
                self.states += 1
        if self._cut_in is not None:
            if not self._cut_in:
                raise PowerCut
            self._cut_in -= 1


def _delta(rng: np.random.Generator) -> tuple[int, int, int]:
    first, second, third = (int(each) for each in rng.integers(-9, 10, 3))
    return first, second, third


Act = Callable[[Device], None]
SCRIPT: Final[tuple[Act, ...]] = (
    lambda device: device.train((5, 5, 5)),
    lambda device: device.deliver(Verdict.APPLIED),
    lambda device: device.install(),
    lambda device: device.train((3, 3, 6)),
    lambda device: device.train((1, 2, 3)),  # supersedes what was never sent
    lambda device: device.deliver(Verdict.REJECTED),
    lambda device: device.install(),
    lambda device: device.train((7, 0, 7)),
    lambda device: device.deliver(Verdict.APPLIED, is_answered=False),
    lambda device: device.deliver(Verdict.APPLIED),  # before: a duplicate
    lambda device: device.install(),  # and its release
    lambda device: device.train((2, 2, 2)),
    lambda device: device.deliver(Verdict.APPLIED),
)
"""What a device does on an ordinary day."""
