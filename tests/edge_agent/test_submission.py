"""What is sent and what is carried add up to what was trained, whatever is lost and when the power fails."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest
from agent_world import DEVICE_KEY, Release, agent_settings, tiny_plan
from coarse_codec import TABLE
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from simulated_disk import Operation, PowerCut, SimulatedDisk

from edge_agent import error_feedback
from edge_agent.feedback_file import FeedbackFile
from edge_agent.local_update import TrainingDiverged
from edge_agent.model_slots import InstalledModel
from edge_agent.plan_runtime import LocalResult
from edge_agent.settings import FEEDBACK_FILE
from edge_agent.submission import Submission
from fedtide.wire import codecs
from fedtide.wire.disk import UNSYNCED_DISK, Disk
from fedtide.wire.envelope import open_update
from fedtide.wire.ids import Counter, PlanId
from fedtide.wire.messages import CodecRequest, Reason, Verdict
from fedtide.wire.parameters import Vector
from fedtide.wire.steps import Step, listen

SCHEMA: Final = tiny_plan().manifest.schema
PLANS: Final = ("one", "two")


@cache
def model_of(plan: str = "one", codec: str = "coarse", step: float | None = None) -> InstalledModel:
    """Version 1 of a plan, and a head that asks for a codec; its parameters are 1, 1, 1."""
    release = Release(1, plan=tiny_plan(plan), codec=codec)
    asked = CodecRequest(id=codec, parameters={} if step is None else {"step": step})
    return InstalledModel(
        msgspec.structs.replace(release.head, update_codec=asked), release.plan, release.parameters
    )


def result_of(*delta: float) -> LocalResult:
    return LocalResult(np.array(delta, np.float32) + np.float32(1), 5, 1, loss=0.5, metric=None)


def submission(state: Path, disk: Disk = UNSYNCED_DISK) -> Submission:
    return Submission(agent_settings(state), DEVICE_KEY, lambda: 1000.0, disk)


@dataclass(frozen=True)
class Sent:
    """An update as the coordinator gets it."""

    counter: Counter
    plan: PlanId
    delta: Vector


def oldest(made: Submission) -> Sent:
    pending = made.outbox.oldest()
    assert pending is not None
    opened = open_update(pending.envelope, 10_000)
    delta = codecs.get(opened.header.codec).decode(opened.payload, SCHEMA)
    return Sent(pending.counter, opened.header.plan, delta)


@pytest.fixture(autouse=True)
def with_a_coarse_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "CODECS", TABLE)


@pytest.fixture
def nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_feedback, "MOST_CARRIED", math.inf)


def test_what_was_left_out_goes_with_the_next_update(tmp_path: Path) -> None:
    made = submission(tmp_path)
    made.submit(model_of(), result_of(5, -3, 1))
    first = oldest(made)
    assert first.delta.tolist() == [4, 0, 0]  # in steps of 4; 1, -3 and 1 are left out
    made.settle(first.counter, Verdict.APPLIED)
    made.submit(model_of(), result_of(5, -3, 1))
    assert oldest(made).delta.tolist() == [4, -4, 0]  # of 6, -6 and 2; 2, -2 and 2 are left out


@pytest.mark.parametrize("verdict", [Verdict.APPLIED, Verdict.DUPLICATE])
def test_applied_now_or_before_drains(tmp_path: Path, verdict: Verdict) -> None:
    made = submission(tmp_path)
    made.submit(model_of(), result_of(5, 5, 5))
    made.settle(oldest(made).counter, verdict)
    made.submit(model_of(), result_of(5, 5, 5))
    assert oldest(made).delta.tolist() == [4, 4, 4]  # of 1 + 5


def test_a_rejected_update_is_carried_on_whole(tmp_path: Path) -> None:
    made = submission(tmp_path)
    made.submit(model_of(), result_of(5, 5, 5))
    made.settle(oldest(made).counter, Verdict.REJECTED)
    assert made.outbox.oldest() is None
    made.submit(model_of(), result_of(5, 5, 5))
    assert oldest(made).delta.tolist() == [8, 8, 8]  # of 5 + 5


@pytest.mark.parametrize("reason", [Reason.REPLAYED_COUNTER, Reason.TOO_LARGE, Reason.UNREADABLE])
def test_a_refusal_that_does_not_say_whether_it_was_applied_before_carries_nothing_on(
    tmp_path: Path, reason: Reason
) -> None:
    """A disk that was put back to an earlier state, or a stranger who sends a bad chunk under its name."""
    made = submission(tmp_path)
    made.submit(model_of(), result_of(5, 5, 5))
    made.settle(oldest(made).counter, Verdict.REJECTED, reason)
    assert made.outbox.oldest() is None
    again = submission(tmp_path)
    again.submit(model_of(), result_of(5, 5, 5))
    assert oldest(again).delta.tolist() == [4, 4, 4]  # of 5, not of 10


def test_a_judged_rejection_carries_on_whatever_its_reason(tmp_path: Path) -> None:
    made = submission(tmp_path)
    made.submit(model_of(), result_of(5, 5, 5))
    made.settle(oldest(made).counter, Verdict.REJECTED, Reason.TOO_STALE)
    made.submit(model_of(), result_of(5, 5, 5))
    assert oldest(made).delta.tolist() == [8, 8, 8]  # of 5 + 5


def test_a_refusal_of_another_update_leaves_what_is_carried(tmp_path: Path) -> None:
    made = submission(tmp_path)
    made.submit(model_of(), result_of(5, 5, 5))
    counter = oldest(made).counter
    made.settle(Counter(counter - 1), Verdict.REJECTED, Reason.REPLAYED_COUNTER)
    made.settle(counter, Verdict.APPLIED)
    made.submit(model_of(), result_of(3, 3, 3))
    assert oldest(made).delta.tolist() == [4, 4, 4]  # of 1 + 3


def test_an_update_that_is_damaged_in_the_outbox_is_not_carried_on(tmp_path: Path) -> None:
    """It may have been sent and applied: its receipt will never be asked for."""
    made = submission(tmp_path)
    made.submit(model_of(), result_of(5, 5, 5))
    (file,) = (tmp_path / "outbox").glob("*.update")
    file.write_bytes(file.read_bytes()[:-1])
    assert submission(tmp_path).outbox.oldest() is None
    again = submission(tmp_path)  # nor after one more restart
    again.submit(model_of(), result_of(5, 5, 5))
    assert oldest(again).delta.tolist() == [4, 4, 4]  # of 5, not of 10


def test_a_superseded_update_is_carried_on_whole(tmp_path: Path) -> None:
    made = submission(tmp_path)
    made.submit(model_of(), result_of(5, 5, 5))
    made.submit(model_of(), result_of(5, 5, 5))
    assert len(made.outbox) == 1
    assert oldest(made).delta.tolist() == [8, 8, 8]


def test_the_step_is_the_heads_times_the_rms_of_the_delta_alone(tmp_path: Path) -> None:
    made = submission(tmp_path)
    made.submit(model_of(step=4.0), result_of(2, 2, 2))
    assert oldest(made).delta.tolist() == [0, 0, 0]  # in steps of 4 · 2 = 8
    made.submit(model_of(step=4.0), result_of(2, 2, 14))
    # The rms of the delta is sqrt((4 + 4 + 196) / 3) = 8.25; that of 4, 4 and 16 would be 9.8.
    assert oldest(made).delta.tolist() == [0, 0, 0]
    made.submit(model_of(step=1.0), result_of(2, 2, 14))
    # Of 6, 6, 30 in steps of 8.246: 3 · 8.246 = 24.74. Measured by the sum the step would be 17.9.
    assert oldest(made).delta == pytest.approx([0, 0, 24.74], abs=0.01)


def test_a_codec_without_a_rate_writes_nothing_beside_the_outbox(tmp_path: Path) -> None:
    made = submission(tmp_path)
    made.submit(model_of(codec="q8"), result_of(5, 5, 5))
    made.settle(oldest(made).counter, Verdict.APPLIED)
    assert {file.name for file in tmp_path.iterdir()} == {"outbox"}


def test_a_codec_without_a_rate_carries_all_that_another_has_left_out(tmp_path: Path) -> None:
    made = submission(tmp_path)
    made.submit(model_of(codec="coarse"), result_of(3, 3, 3))
    made.settle(oldest(made).counter, Verdict.APPLIED)
    made.submit(model_of(codec="float32"), result_of(1, 2, 3))
    assert oldest(made).delta.tolist() == [4, 5, 6]
    made.settle(oldest(made).counter, Verdict.REJECTED)
    made.submit(model_of(codec="float32"), result_of(2, 2, 2))
    assert oldest(made).delta.tolist() == [6, 7, 8]
    made.settle(oldest(made).counter, Verdict.APPLIED)
    made.submit(model_of(codec="float32"), result_of(1, 1, 1))
    assert oldest(made).delta.tolist() == [1, 1, 1]
    assert not (tmp_path / FEEDBACK_FILE).exists()


def test_another_plan_starts_without_what_was_left_out(tmp_path: Path) -> None:
    made = submission(tmp_path)
    made.submit(model_of("one"), result_of(3, 3, 3))
    made.settle(oldest(made).counter, Verdict.APPLIED)
    made.submit(model_of("two"), result_of(2, 2, 2))
    assert oldest(made).delta.tolist() == [0, 0, 0]  # of 2, not of 5


def test_a_training_that_diverged_leaves_what_is_carried(tmp_path: Path) -> None:
    made = submission(tmp_path)
    made.submit(model_of(), result_of(3, 3, 3))
    made.settle(oldest(made).counter, Verdict.APPLIED)
    with pytest.raises(TrainingDiverged):
        made.submit(model_of(), result_of(math.nan, 0, 0))
    made.submit(model_of(), result_of(2, 2, 2))
    assert oldest(made).delta.tolist() == [4, 4, 4]  # of 3 + 2


def test_what_is_given_up_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = submission(tmp_path)
    with caplog.at_level(logging.INFO):
        made.submit(model_of(), result_of(2400, 2400, 2400))
        for _ in range(3):  # 4 times the delta is carried: of 2400, a sixth; of 500, 400
            made.submit(model_of(), result_of(100, 100, 100))
            assert oldest(made).delta.tolist() == [500, 500, 500]
    assert caplog.text.count("83 % of that is given up") == 1
    assert len(caplog.records) == 1


# The power may fail at any operation of the disk.

STATE: Final = Path("/state")
Cut = int | Step | None
"""At which change of the disk the power fails, from 0, or at which step; or not."""


@dataclass(frozen=True)
class Train:
    """A local training, and what the power cut leaves if it fails."""

    delta: tuple[int, int, int]
    codec: str = "coarse"
    plan: str = "one"
    cut: Cut = None
    leaves: int = 0


@dataclass(frozen=True)
class Deliver:
    """The oldest update is sent; it or its receipt is lost, or the power fails while that is filed."""

    verdict: Verdict = Verdict.APPLIED
    arrives: bool = True
    is_answered: bool = True
    cut: Cut = None
    leaves: int = 0


@dataclass(frozen=True)
class Restart:
    """The power fails while nothing is done."""

    leaves: int = 0


class Ledger:
    """A device, its coordinator, and a list of what was trained and what was applied."""

    def __init__(self) -> None:
        self._disk = SimulatedDisk(page_bytes=128)
        self._disk.make_directory(STATE)
        self._device = submission(STATE, self._disk)
        self._verdicts: dict[Counter, Verdict] = {}
        self._carried: set[Counter | None] = set()
        """Updates that took part in error feedback; others count when they are applied, or not at all."""
        self._seen: set[Counter] = set()
        self._plan = "one"
        self._trained = np.zeros(3)
        self.applied = np.zeros(3)

    def do(self, step: Train | Deliver | Restart) -> None:
        match step:
            case Train():
                self._train(step)
            case Deliver():
                self._deliver(step)
            case Restart():
                self._restart(step.leaves)

    def residual(self) -> Vector:
        """What the device carries, once all its updates are answered."""
        while self._device.outbox.oldest() is not None:
            self._deliver(Deliver())
        residual = FeedbackFile(STATE / FEEDBACK_FILE, self._disk).residual(model_of(self._plan).plan)
        return np.zeros(3, np.float32) if residual is None else residual

    @property
    def trained(self) -> list[float]:
        return [float(value) for value in self._trained]

    def _train(self, step: Train) -> None:
        waiting = self._device.outbox.oldest()
        if waiting is not None and self._device.outbox.was_sent(waiting.counter):
            return  # an agent trains when its update is settled, or was never sent
        before = self._on_disk()
        with self._power_until(step.cut, step.leaves):
            self._device.submit(model_of(step.plan, step.codec), result_of(*step.delta))
        now = self._on_disk()
        if step.plan != self._plan and (before is None or now != before):
            self._plan = step.plan  # what the other plan's updates left out is forgotten
            self._trained, self.applied = np.zeros(3), np.zeros(3)
            self._carried.clear()
        new = {now} if now != before else set()
        for counter in self._in_the_outbox() - self._seen:
            self._seen.add(counter)
            if step.codec == "coarse":
                new.add(counter)
        if new - {None}:
            self._carried |= new - {None}
            self._trained += step.delta

    def _deliver(self, step: Deliver) -> None:
        if self._device.outbox.oldest() is None:
            return
        update = oldest(self._device)
        self._device.outbox.note_sent(update.counter)
        if not step.arrives:
            return
        verdict, reason = self._judge(update, step.verdict)
        if not step.is_answered:
            return
        with self._power_until(step.cut, step.leaves):
            self._device.settle(update.counter, verdict, reason)

    def _judge(self, update: Sent, verdict: Verdict) -> tuple[Verdict, Reason | None]:
        """As the coordinator's writer does: a counter is judged once, and below the highest never."""
        known = self._verdicts.get(update.counter)
        if known is not None:
            return Verdict.DUPLICATE if known is Verdict.APPLIED else known, None
        if any(counter > update.counter for counter in self._verdicts):
            return Verdict.REJECTED, Reason.REPLAYED_COUNTER
        if update.plan != model_of(self._plan).plan.id:
            verdict = Verdict.REJECTED
        self._verdicts[update.counter] = verdict
        if verdict is Verdict.APPLIED and update.counter in self._carried:
            self.applied += update.delta
        return verdict, None

    @contextmanager
    def _power_until(self, cut: Cut, leaves: int) -> Iterator[None]:
        changes = count()

        def changed(_: Operation) -> None:
            if next(changes) == cut:
                raise PowerCut

        def came_to(step: Step) -> None:
            if step is cut:
                raise PowerCut

        self._disk.watch(changed)
        listen(came_to)
        try:
            yield
        except PowerCut:
            self._restart(leaves)
        finally:
            self._disk.watch(None)
            listen(None)

    def _restart(self, leaves: int) -> None:
        """Only what was synced is left, or everything written, or something between, or all by kill -9."""
        states = [*self._disk.crash_states(np.random.default_rng(leaves), 16), self._disk.killed()]
        self._disk = states[leaves % len(states)]
        self._device = submission(STATE, self._disk)

    def _in_the_outbox(self) -> set[Counter]:
        return {Counter(int(file.stem)) for file in self._disk.files() if file.suffix == ".update"}

    def _on_disk(self) -> Counter | None:
        """The update that the device's feedback is about."""
        return FeedbackFile(STATE / FEEDBACK_FILE, self._disk.killed()).counter


cuts: Final = st.none() | st.integers(0, 14)
left: Final = st.integers(0, 40)
trainings: Final = st.builds(
    Train,
    delta=st.tuples(*[st.integers(-9, 9)] * 3),
    codec=st.sampled_from(["coarse", "coarse", "coarse", "float32"]),
    plan=st.sampled_from(["one"] * 7 + ["two"]),
    cut=cuts,
    leaves=left,
)
deliveries: Final = st.builds(
    Deliver,
    verdict=st.sampled_from([Verdict.APPLIED, Verdict.APPLIED, Verdict.REJECTED]),
    arrives=st.sampled_from([True, True, True, False]),
    is_answered=st.sampled_from([True, True, False]),
    cut=cuts,
    leaves=left,
)
restarts: Final = st.builds(Restart, leaves=left)

FIVE: Final = Train((5, 5, 5))


@example(steps=[FIVE, Deliver(), FIVE, Deliver()])
@example(steps=[Train((5, 5, 5), cut=Step.FEEDBACK_KEPT), FIVE])
@example(steps=[FIVE, Train((5, 5, 5), cut=Step.FEEDBACK_KEPT, leaves=1)])  # the older must not be sent
@example(steps=[FIVE, Train((5, 5, 5), cut=Step.UPDATE_KEPT)])  # nor beside the newer one
@example(steps=[FIVE, Deliver(cut=Step.FEEDBACK_SETTLED), Deliver()])  # still in the outbox: a duplicate
@example(steps=[FIVE, Deliver(cut=0), Restart(), Deliver()])  # not settled yet: a duplicate too
@example(steps=[FIVE, Deliver(is_answered=False), Restart(), FIVE])
@example(steps=[FIVE, Deliver(Verdict.REJECTED), FIVE, Deliver(), Restart()])
@example(steps=[FIVE, Deliver(), Train((1, 2, 3), codec="float32"), Deliver(), Train((1, 0, 0), "float32")])
@example(steps=[FIVE, Deliver(), Train((3, 3, 3), plan="two"), FIVE])
@given(steps=st.lists(st.one_of(trainings, trainings, deliveries, deliveries, restarts), max_size=14))
@hypothesis_settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_applied_and_what_is_carried_add_up_to_what_was_trained(
    nothing_is_left_behind: None, steps: list[Train | Deliver | Restart]
) -> None:
    ledger = Ledger()
    for step in steps:
        ledger.do(step)
    residual = ledger.residual()
    assert (ledger.applied + residual).tolist() == ledger.trained
