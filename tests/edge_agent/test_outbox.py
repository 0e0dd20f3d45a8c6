import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_agent import outbox as outbox_module
from edge_agent.outbox import Outbox
from fedtide.wire.durable import write_durably
from fedtide.wire.envelope import update_digest
from fedtide.wire.ids import Counter

FIRST: Final = 1000 << 20  # a new outbox at second 1000 since 1970: 2^20 counters a second


def new_outbox(directory: Path, now: float = 1000.0) -> Outbox:
    return Outbox(directory, lambda: now, sync=False)


def test_a_new_outbox_is_empty_and_begins_counting_at_the_clock(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path / "outbox")
    assert outbox.oldest() is None
    assert len(outbox) == 0
    assert [outbox.reserve() for _ in range(3)] == [FIRST, FIRST + 1, FIRST + 2]


def test_a_device_set_up_again_under_its_old_name_does_not_use_its_counters_again(tmp_path: Path) -> None:
    before = new_outbox(tmp_path / "before", now=1000.0)
    used = {before.reserve() for _ in range(500)}
    after = new_outbox(tmp_path / "after", now=1001.0)
    assert after.reserve() > max(used)


def test_counters_go_on_after_a_restart_and_the_clock_is_not_asked_again(tmp_path: Path) -> None:
    used = []
    for _ in range(5):
        outbox = new_outbox(tmp_path)
        used += [outbox.reserve() for _ in range(3)]

    def broken_clock() -> float:
        raise AssertionError("only a new outbox asks the clock")

    used.append(Outbox(tmp_path, broken_clock, sync=False).reserve())
    assert used == sorted(set(used))


def test_a_counter_is_reserved_on_disk_before_it_is_given_out(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path)
    for _ in range(200):
        counter = outbox.reserve()
        assert int((tmp_path / "counter").read_text()) > counter


def test_a_lost_counter_file_does_not_bring_back_counters_that_still_wait(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path)
    counter = outbox.reserve()
    outbox.put(counter, b"update")
    (tmp_path / "counter").write_bytes(b"\0\0\0")
    assert new_outbox(tmp_path, now=0.0).reserve() > counter


def test_an_update_is_on_disk_when_put_returns(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path)
    counter = outbox.reserve()
    pending = outbox.put(counter, b"update")
    copy = tmp_path.with_name("as the power cut left it")
    shutil.copytree(tmp_path, copy)
    assert new_outbox(copy).oldest() == pending
    assert (pending.counter, pending.envelope, pending.digest) == (
        counter,
        b"update",
        update_digest(b"update"),
    )


def test_an_update_is_synced_when_put_returns_and_a_counter_when_it_is_given_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    outbox = Outbox(tmp_path, lambda: 1000.0)
    counter = outbox.reserve()
    assert synced == ["counter.new", tmp_path.name]
    synced.clear()
    outbox.put(counter, b"update")
    assert synced == [f"{counter}.update.new", tmp_path.name]
    synced.clear()
    outbox.remove(counter)
    assert synced == []  # a power cut may bring it back: the coordinator then answers "duplicate"


def test_a_newer_update_takes_the_place_of_one_that_was_never_sent(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path)
    old, new = outbox.reserve(), outbox.reserve()
    outbox.put(old, b"old")
    outbox.put(new, b"new")
    assert len(outbox) == 1
    assert new_outbox(tmp_path).oldest() == outbox.oldest()
    oldest = outbox.oldest()
    assert oldest is not None
    assert oldest.envelope == b"new"


def test_an_update_that_was_sent_stays_until_its_receipt_and_goes_first(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path)
    sent, unsent, newest = (outbox.reserve() for _ in range(3))
    outbox.put(sent, b"sent")
    outbox.note_sent(sent)
    outbox.put(unsent, b"unsent")
    outbox.put(newest, b"newest")
    assert outbox.was_sent(sent)
    assert not outbox.was_sent(newest)
    envelopes = []
    while (oldest := outbox.oldest()) is not None:
        envelopes.append(oldest.envelope)
        outbox.remove(oldest.counter)
    assert envelopes == [b"sent", b"newest"]
    assert list(tmp_path.glob("*.update")) == []


def test_after_a_restart_every_update_counts_as_sent(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path)
    outbox.put(outbox.reserve(), b"perhaps sent")
    again = new_outbox(tmp_path)
    again.put(again.reserve(), b"newer")
    assert len(again) == 2
    oldest = again.oldest()
    assert oldest is not None
    assert oldest.envelope == b"perhaps sent"


def test_the_old_update_is_removed_only_when_the_new_one_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = new_outbox(tmp_path)
    outbox.put(outbox.reserve(), b"old")

    def full_disk(path: Path, content: bytes, *, sync: bool = True) -> None:
        if path.suffix == ".update":
            raise OSError("no space left on device")
        write_durably(path, content, sync=sync)

    monkeypatch.setattr(outbox_module, "write_durably", full_disk)
    with pytest.raises(OSError, match="no space"):
        outbox.put(outbox.reserve(), b"new")
    monkeypatch.undo()
    oldest = new_outbox(tmp_path).oldest()
    assert oldest is not None
    assert oldest.envelope == b"old"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:7],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"ftu2" + content[4:],
        lambda content: content[:-1] + bytes((content[-1] ^ 1,)),
        lambda content: bytes(len(content)),  # what some file systems leave after a power cut
    ],
    ids=["empty", "header cut", "cut", "longer", "other magic", "one bit", "zeros"],
)
def test_a_damaged_file_is_set_aside_and_the_others_are_sent(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    outbox = new_outbox(tmp_path)
    first, second = outbox.reserve(), outbox.reserve()
    for counter in (first, second):
        outbox.put(counter, b"update %d" % counter)
        outbox.note_sent(counter)
    file = tmp_path / f"{first}.update"
    file.write_bytes(damage(file.read_bytes()))
    again = new_outbox(tmp_path)
    oldest = again.oldest()
    assert oldest is not None
    assert (oldest.counter, len(again)) == (second, 1)
    assert [each.name for each in tmp_path.glob("*.damaged")] == [f"{first}.damaged"]
    assert again.reserve() > second


def test_files_that_are_not_ours_do_no_harm(tmp_path: Path) -> None:
    for name in ("notes.update", "7.update.new", "².update", "README"):
        (tmp_path / name).write_bytes(b"ftu1 something that a person left here")
    outbox = new_outbox(tmp_path)
    assert outbox.oldest() is None
    assert len(list(tmp_path.glob("*.damaged"))) == 2


class DeviceThatLosesPower(RuleBasedStateMachine):
    """An outbox beside the plainest model of it, under restarts at any time."""

    def __init__(self) -> None:
        super().__init__()
        self._temporary = tempfile.TemporaryDirectory()
        self.directory = Path(self._temporary.name)
        self.outbox = new_outbox(self.directory)
        self.given: list[Counter] = []
        self.unused: list[Counter] = []
        self.waiting: dict[Counter, bytes] = {}
        self.sent: set[Counter] = set()

    def teardown(self) -> None:
        self._temporary.cleanup()

    @rule(times=st.integers(1, 70))
    def reserve(self, times: int) -> None:
        for _ in range(times):
            counter = self.outbox.reserve()
            assert all(counter > earlier for earlier in self.given[-1:])
            self.given.append(counter)
        self.unused = [counter]

    @precondition(lambda self: self.unused)
    @rule(envelope=st.binary(max_size=20))
    def put(self, envelope: bytes) -> None:
        counter = self.unused.pop()
        self.outbox.put(counter, envelope)
        self.waiting = {key: value for key, value in self.waiting.items() if key in self.sent}
        self.waiting[counter] = envelope

    @precondition(lambda self: self.waiting)
    @rule()
    def send_the_oldest(self) -> None:
        oldest = self.outbox.oldest()
        assert oldest is not None
        self.outbox.note_sent(oldest.counter)
        self.sent.add(oldest.counter)

    @precondition(lambda self: self.sent & set(self.waiting))
    @rule(data=st.data())
    def receive_a_receipt(self, data: st.DataObject) -> None:
        counter = data.draw(st.sampled_from(sorted(self.sent & set(self.waiting))))
        self.outbox.remove(counter)
        del self.waiting[counter]

    @rule(now=st.floats(0.0, 2000.0))
    def lose_power(self, now: float) -> None:
        self.outbox = new_outbox(self.directory, now if self.given else 1000.0)
        self.unused = []
        self.sent = set(self.waiting)

    @precondition(lambda self: self.unused)
    @rule(written=st.binary(max_size=20))
    def lose_power_while_an_update_is_written(self, written: bytes) -> None:
        (self.directory / f"{self.unused[-1]}.update.new").write_bytes(written)
        self.lose_power(0.0)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def lose_power_and_one_file(self, data: st.DataObject) -> None:
        counter = data.draw(st.sampled_from(sorted(self.waiting)))
        (self.directory / f"{counter}.update").write_bytes(data.draw(st.binary(max_size=20)))
        del self.waiting[counter]
        self.lose_power(0.0)

    @invariant()
    def what_waits_is_what_was_put_and_not_answered(self) -> None:
        assert len(self.outbox) == len(self.waiting)
        oldest = self.outbox.oldest()
        if oldest is None:
            assert not self.waiting
        else:
            assert oldest.counter == min(self.waiting)
            assert oldest.envelope == self.waiting[oldest.counter]
            assert self.outbox.was_sent(oldest.counter) == (oldest.counter in self.sent)


TestDeviceThatLosesPower = DeviceThatLosesPower.TestCase
TestDeviceThatLosesPower.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
