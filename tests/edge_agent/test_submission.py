"""What is sent and what is carried add up to what was trained, whatever is lost and when the power fails."""

import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest
from agent_world import DEVICE_KEY, Release, agent_settings, tiny_plan
from coarse_codec import TABLE
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_agent import error_feedback, feedback_file, outbox
from edge_agent.feedback_file import FeedbackFile
from edge_agent.local_update import TrainingDiverged
from edge_agent.model_slots import InstalledModel
from edge_agent.plan_runtime import LocalResult
from edge_agent.settings import FEEDBACK_FILE
from edge_agent.submission import Submission
from fedtide.wire import codecs
from fedtide.wire.durable import write_durably
from fedtide.wire.envelope import open_update
from fedtide.wire.ids import Counter, PlanId
from fedtide.wire.messages import CodecRequest, Reason, Verdict
from fedtide.wire.parameters import Vector

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


def submission(state: Path, *, sync: bool = False) -> Submission:
    return Submission(agent_settings(state), DEVICE_KEY, lambda: 1000.0, sync=sync)


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


@pytest.mark.parametrize("reason", [Reason.REPLAYED_COUNTER, Reason.TOO_LARGE, Reason.MALFORMED])
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


# The power may fail between any two writes.


class PowerCut(BaseException):
    """The process ends here."""


@dataclass
class Disk:
    """Every change of a file, and how many more there will be before the power fails."""

    changes_left: int | None = None
    unsynced: list[tuple[Path, bytes]] = field(default_factory=list)
    """Files removed from folders that have not been synced since: a power cut may bring them back."""

    def write_durably(self, path: Path, content: bytes, *, sync: bool = True) -> None:
        assert sync
        self._change()
        write_durably(path, content, sync=False)
        self.sync_directory(path.parent)

    def unlink(self, path: Path, missing_ok: bool = False) -> None:  # noqa: FBT001, FBT002 - as Path.unlink
        assert missing_ok
        self._change()
        if path.exists():
            self.unsynced.append((path, path.read_bytes()))
            path.rename(path.with_suffix(".gone"))

    def sync_directory(self, directory: Path) -> None:
        self.unsynced = [each for each in self.unsynced if each[0].parent != directory]

    def fail(self, *, brings_back: bool) -> None:
        if brings_back:
            for path, content in self.unsynced:
                path.write_bytes(content)
        self.unsynced.clear()
        self.changes_left = None

    def _change(self) -> None:
        if self.changes_left == 0:
            raise PowerCut
        if self.changes_left is not None:
            self.changes_left -= 1

    @contextmanager
    def in_use(self) -> Iterator["Disk"]:
        with pytest.MonkeyPatch.context() as patch:
            for module in (outbox, feedback_file):
                patch.setattr(module, "write_durably", self.write_durably)
            patch.setattr(feedback_file, "sync_directory", self.sync_directory)
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: self.unlink(path, missing_ok))
            patch.setattr(error_feedback, "MOST_CARRIED", math.inf)  # nothing is left behind on purpose
            yield self


@dataclass(frozen=True)
class Train:
    """A local training; the power fails after so many changes of files, or not."""

    delta: tuple[int, int, int]
    codec: str = "coarse"
    plan: str = "one"
    cut_after: int | None = None
    brings_back: bool = False


@dataclass(frozen=True)
class Deliver:
    """The oldest update is sent; it or its receipt is lost, or the power fails while that is filed."""

    verdict: Verdict = Verdict.APPLIED
    arrives: bool = True
    is_answered: bool = True
    cut_after: int | None = None
    brings_back: bool = False


@dataclass(frozen=True)
class Restart:
    """The power fails while nothing is done."""

    brings_back: bool = False


class Ledger:
    """A device, its coordinator, and a list of what was trained and what was applied."""

    def __init__(self, state: Path, disk: Disk) -> None:
        self._state = state
        self._disk = disk
        self._device = submission(state, sync=True)
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
                self._restart(brings_back=step.brings_back)

    def residual(self) -> Vector:
        """What the device carries, once all its updates are answered."""
        while self._device.outbox.oldest() is not None:
            self._deliver(Deliver())
        residual = FeedbackFile(self._state / FEEDBACK_FILE).residual(model_of(self._plan).plan)
        return np.zeros(3, np.float32) if residual is None else residual

    @property
    def trained(self) -> list[float]:
        return [float(value) for value in self._trained]

    def _train(self, step: Train) -> None:
        waiting = self._device.outbox.oldest()
        if waiting is not None and self._device.outbox.was_sent(waiting.counter):
            return  # an agent trains when its update is settled, or was never sent
        before = self._on_disk()
        self._disk.changes_left = step.cut_after
        try:
            self._device.submit(model_of(step.plan, step.codec), result_of(*step.delta))
        except PowerCut:
            self._restart(brings_back=step.brings_back)
        self._disk.changes_left = None
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
        self._disk.changes_left = step.cut_after
        try:
            self._device.settle(update.counter, verdict, reason)
        except PowerCut:
            self._restart(brings_back=step.brings_back)
        self._disk.changes_left = None

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

    def _restart(self, *, brings_back: bool) -> None:
        self._disk.fail(brings_back=brings_back)
        self._device = submission(self._state, sync=True)

    def _in_the_outbox(self) -> set[Counter]:
        return {Counter(int(file.stem)) for file in (self._state / "outbox").glob("*.update")}

    def _on_disk(self) -> Counter | None:
        """The update that the device's feedback is about."""
        left, self._disk.changes_left = self._disk.changes_left, None
        try:
            return FeedbackFile(self._state / FEEDBACK_FILE).counter
        finally:
            self._disk.changes_left = left


cuts: Final = st.none() | st.integers(0, 5)
trainings: Final = st.builds(
    Train,
    delta=st.tuples(*[st.integers(-9, 9)] * 3),
    codec=st.sampled_from(["coarse", "coarse", "coarse", "float32"]),
    plan=st.sampled_from(["one"] * 7 + ["two"]),
    cut_after=cuts,
    brings_back=st.booleans(),
)
deliveries: Final = st.builds(
    Deliver,
    verdict=st.sampled_from([Verdict.APPLIED, Verdict.APPLIED, Verdict.REJECTED]),
    arrives=st.sampled_from([True, True, True, False]),
    is_answered=st.sampled_from([True, True, False]),
    cut_after=cuts,
    brings_back=st.booleans(),
)
restarts: Final = st.builds(Restart, brings_back=st.booleans())

FIVE: Final = Train((5, 5, 5))


@example(steps=[FIVE, Deliver(), FIVE, Deliver()])
@example(steps=[Train((5, 5, 5), cut_after=2), FIVE])  # the feedback is written, and the update is not
@example(steps=[FIVE, Train((5, 5, 5), cut_after=2, brings_back=True)])  # the older one must not be sent
@example(steps=[FIVE, Train((5, 5, 5), cut_after=3, brings_back=True)])  # nor beside the newer one
@example(steps=[FIVE, Deliver(cut_after=1), Deliver()])  # settled, and still in the outbox: a duplicate
@example(steps=[FIVE, Deliver(cut_after=0), Restart(), Deliver()])  # not settled yet: a duplicate too
@example(steps=[FIVE, Deliver(is_answered=False), Restart(), FIVE])
@example(steps=[FIVE, Deliver(Verdict.REJECTED), FIVE, Deliver(), Restart(brings_back=True)])
@example(steps=[FIVE, Deliver(), Train((1, 2, 3), codec="float32"), Deliver(), Train((1, 0, 0), "float32")])
@example(steps=[FIVE, Deliver(), Train((3, 3, 3), plan="two"), FIVE])
@given(steps=st.lists(st.one_of(trainings, trainings, deliveries, deliveries, restarts), max_size=14))
@hypothesis_settings(max_examples=150)
def test_what_was_applied_and_what_is_carried_add_up_to_what_was_trained(
    steps: list[Train | Deliver | Restart],
) -> None:
    with tempfile.TemporaryDirectory() as folder, Disk().in_use() as disk:
        ledger = Ledger(Path(folder), disk)
        for step in steps:
            ledger.do(step)
        residual = ledger.residual()
        assert (ledger.applied + residual).tolist() == ledger.trained
