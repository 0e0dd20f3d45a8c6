import errno
import os
import shutil
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from simulated_disk import Operation, PowerCut, SimulatedDisk, full

from edge_agent.outbox import Outbox
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.envelope import update_digest
from fedtide.wire.ids import Counter

FIRST: Final = 1000 << 20  # a new outbox at second 1000 since 1970: 2^20 counters a second


def new_outbox(directory: Path, now: float = 1000.0) -> Outbox:
    return Outbox(directory, lambda: now, UNSYNCED_DISK)


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

    used.append(Outbox(tmp_path, broken_clock, UNSYNCED_DISK).reserve())
    assert used == sorted(set(used))


def test_a_counter_is_reserved_on_disk_before_it_is_given_out(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path)
    for _ in range(200):
        counter = outbox.reserve()
        for copy in ("counter", "counter.copy"):
            assert int.from_bytes((tmp_path / copy).read_bytes()[8:], "little") > counter


def test_a_lost_counter_file_does_not_bring_back_counters_that_still_wait(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path)
    counter = outbox.reserve()
    outbox.put(counter, b"update")
    for copy in ("counter", "counter.copy"):
        (tmp_path / copy).write_bytes(b"\0\0\0")
    assert new_outbox(tmp_path, now=0.0).reserve() > counter


def test_counters_go_on_above_the_highest_that_the_coordinator_knows(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path, now=-1.0)
    assert outbox.reserve() == 0  # a clock before 1970 is taken as 1970
    outbox.go_above(Counter(FIRST))
    assert outbox.reserve() == FIRST + 1
    assert new_outbox(tmp_path, now=0.0).reserve() > FIRST + 1


def test_counters_never_go_back_whatever_the_coordinator_says(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path)
    used = outbox.reserve()
    for judged in (0, used - 1, used):
        outbox.go_above(Counter(judged))
    assert outbox.reserve() == used + 1


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
    synced.clear()
    counter = outbox.reserve()
    assert synced == ["counter.new", tmp_path.name, "counter.copy.new", tmp_path.name]
    synced.clear()
    outbox.put(counter, b"update")
    assert synced == [f"{counter}.update.new", tmp_path.name]
    synced.clear()
    outbox.remove(counter)
    assert synced == []  # a power cut may bring it back: the coordinator then answers "duplicate"


def test_no_counter_is_given_out_that_a_power_cut_could_give_out_again() -> None:
    rng, disk, directory = np.random.default_rng(1), SimulatedDisk(), Path("/state/outbox")
    outbox, given, states = Outbox(directory, lambda: 1000.0, disk), -1, 0

    def look(_: Operation) -> None:
        nonlocal states
        for state in disk.crash_states(rng, 40):
            assert Outbox(directory, lambda: 1000.0, state).reserve() > given
            states += 1

    disk.watch(look)
    for _ in range(200):
        given = outbox.reserve()
        assert Outbox(directory, lambda: 1000.0, next(iter(disk.crash_states(rng)))).reserve() > given
    assert states > 150


def test_what_a_killed_process_put_is_durable_before_it_is_sent() -> None:
    disk, directory = SimulatedDisk(), Path("/state/outbox")
    outbox = Outbox(directory, lambda: 1000.0, disk)
    counter = outbox.reserve()

    def kill(operation: Operation) -> None:
        if operation.kind == "replace":
            raise PowerCut

    disk.watch(kill)
    with pytest.raises(PowerCut):
        outbox.put(counter, b"update")
    started = disk.killed()
    assert len(Outbox(directory, lambda: 1000.0, started)) == 1
    for state in started.crash_states(np.random.default_rng(1)):
        assert len(Outbox(directory, lambda: 1000.0, state)) == 1


def test_a_superseded_update_does_not_come_back_beside_the_newer_one() -> None:
    rng, disk, directory = np.random.default_rng(1), SimulatedDisk(), Path("/state/outbox")
    outbox = Outbox(directory, lambda: 1000.0, disk)
    old, new = outbox.reserve(), outbox.reserve()
    outbox.put(old, b"old")
    found: set[tuple[bytes, ...]] = set()

    def look(_: Operation) -> None:
        for state in disk.crash_states(rng):
            left = Outbox(directory, lambda: 1000.0, state)
            found.add(tuple(pending.envelope for pending in left._pending.values()))

    disk.watch(look)
    outbox.put(new, b"new")
    assert found == {(b"old",), (b"new",)}
    found.clear()
    outbox.remove(new)
    assert found == {(b"new",), ()}


@pytest.mark.parametrize("copy", ["counter", "counter.copy"])
@pytest.mark.parametrize("kind", ["damaged", "gone", "unreadable"])
def test_one_of_two_counters_that_is_damaged_brings_no_used_counter_back(copy: str, kind: str) -> None:
    disk, directory = SimulatedDisk(), Path("/state/outbox")
    outbox = Outbox(directory, lambda: 1000.0, disk)
    used = [outbox.reserve() for _ in range(100)]
    file = directory / copy
    match kind:
        case "damaged":
            content = bytearray(disk.read(file))
            content[-3] ^= 1
            disk.damage(file, bytes(content))
        case "gone":
            disk.remove(file)
        case _:
            disk.fail(
                lambda operation: errno.EIO if (operation.kind, operation.path) == ("read", file) else None
            )
    again = Outbox(directory, lambda: 0.0, disk)
    assert again.damaged == (() if kind == "gone" else (file,))
    assert again.reserve() > used[-1]
    assert Outbox(directory, lambda: 0.0, disk).reserve() > used[-1]


def test_a_counter_that_could_not_be_reserved_is_not_given_out() -> None:
    disk = SimulatedDisk()
    outbox = Outbox(Path("/state/outbox"), lambda: 1000.0, disk)
    disk.fail(full)
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            outbox.reserve()
    disk.fail(None)
    assert outbox.reserve() == FIRST


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


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:7],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"ftu3" + content[4:],
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
    assert again.damaged == (file,)
    assert again.was_damaged(first)
    once_more = new_outbox(tmp_path)
    assert once_more.damaged == ()  # told once
    assert once_more.was_damaged(first)


def test_files_that_are_not_ours_do_no_harm(tmp_path: Path) -> None:
    names = {"notes.update", "²².update", "-7.update", "README", "0x7.update", f"{'9' * 21}.update"}
    for name in names:
        (tmp_path / name).write_bytes(b"ftu2 something that a person left here")
    outbox = new_outbox(tmp_path)
    assert outbox.oldest() is None
    assert outbox.damaged == ()
    assert {file.name for file in tmp_path.iterdir()} == names


def test_what_a_power_cut_left_unfinished_is_removed(tmp_path: Path) -> None:
    for name in ("7.update.new", "counter.new", "counter.copy.new"):
        (tmp_path / name).write_bytes(b"half of someth")
    assert new_outbox(tmp_path).oldest() is None
    assert list(tmp_path.iterdir()) == []


def test_an_update_under_another_ones_name_is_a_damaged_one(tmp_path: Path) -> None:
    """As where a block of the disk is written to the wrong place, or an old one is read."""
    outbox = new_outbox(tmp_path)
    first, second = outbox.reserve(), outbox.reserve()
    for counter in (first, second):
        outbox.put(counter, b"update")
        outbox.note_sent(counter)
    (tmp_path / f"{second}.update").write_bytes((tmp_path / f"{first}.update").read_bytes())
    again = new_outbox(tmp_path)
    assert (len(again), again.was_damaged(second)) == (1, True)


def test_of_what_was_set_aside_the_newest_eight_are_kept(tmp_path: Path) -> None:
    for number in range(20):
        outbox = new_outbox(tmp_path)
        counter = outbox.reserve()
        outbox.put(counter, b"update %d" % number)
        (tmp_path / f"{counter}.update").write_bytes(b"damaged")
    outbox = new_outbox(tmp_path)
    assert len(outbox) == 0
    assert outbox.was_damaged(counter)
    assert len(list(new_outbox(tmp_path)._directory.glob("*.damaged"))) == 8


def test_an_outbox_goes_on_above_what_the_coordinator_has_judged(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path)
    outbox.go_above(Counter(FIRST + 5000))
    assert outbox.reserve() == FIRST + 5001
    outbox.go_above(Counter(7))
    assert outbox.reserve() == FIRST + 5002
    assert new_outbox(tmp_path).reserve() > FIRST + 5002


class DeviceThatLosesPower(RuleBasedStateMachine):
    """An outbox beside the plainest model of it, under restarts at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path("/state/outbox")
        self.disk = SimulatedDisk()
        self.outbox = Outbox(self.directory, lambda: 1000.0, self.disk)
        self.given: list[Counter] = []
        self.unused: list[Counter] = []
        self.waiting: dict[Counter, bytes] = {}
        self.sent: set[Counter] = set()

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
        self.disk = self.disk.killed()
        self.outbox = Outbox(self.directory, lambda: now if self.given else 1000.0, self.disk)
        self.unused = []
        self.sent = set(self.waiting)

    @precondition(lambda self: self.unused)
    @rule(written=st.binary(max_size=20))
    def lose_power_while_an_update_is_written(self, written: bytes) -> None:
        self.disk.damage(self.directory / f"{self.unused[-1]}.update.new", written)
        self.lose_power(0.0)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def lose_power_and_one_file(self, data: st.DataObject) -> None:
        counter = data.draw(st.sampled_from(sorted(self.waiting)))
        self.disk.damage(self.directory / f"{counter}.update", data.draw(st.binary(max_size=20)))
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
