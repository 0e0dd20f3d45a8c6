"""A disk that is full or fails, at any operation: nothing lost, nothing twice, and the operator is told."""

import errno
import math
from itertools import count

import numpy as np
import pytest
from coarse_codec import TABLE
from device_life import SCRIPT, Act, Device
from simulated_disk import CHANGES, Operation, SimulatedDisk, full

from edge_agent import error_feedback
from fedtide.wire import codecs
from fedtide.wire.messages import Verdict


@pytest.fixture(autouse=True)
def everything_left_out_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "CODECS", TABLE)
    monkeypatch.setattr(error_feedback, "MOST_CARRIED", math.inf)


class Day:
    """The script on a disk that fails once, at one operation, with one error; reading included.

    A full disk is tried again by the same process. After any other error the process ends, and another goes
    on with what it wrote or, every other time, with what a power cut leaves.
    """

    def __init__(self, fails_at: int, number: int) -> None:
        self.device = Device(SimulatedDisk(page_bytes=128))
        self.failed = False
        self._number = number
        self._cuts_power = fails_at % 2 == 1
        self._fails_at = fails_at
        self._operations = count()
        self._rng = np.random.default_rng(fails_at)
        self.device.fault = self._fault
        self.device.disk.fail(self._fault)

    def _fault(self, operation: Operation) -> int | None:
        reads = operation.kind not in CHANGES
        if (reads and self._number == errno.ENOSPC) or next(self._operations) != self._fails_at:
            return None
        self.failed = True
        self.device.account.was_unreadable |= reads
        return self._number

    def live(self) -> None:
        for action in (*SCRIPT[:9], restart, *SCRIPT[9:], restart, *SCRIPT[:5]):
            had_failed = self.failed
            try:
                self.device.finish()
                action(self.device)
            except OSError as error:
                assert error.errno in {self._number, errno.EROFS}  # noqa: PT017 - most days nothing is raised
                self._look()
                self._go_on(is_running=action is not restart)
            if self.failed and not had_failed:
                self._look()
        self._look()
        self._settle_all()

    def _go_on(self, *, is_running: bool) -> None:
        if is_running and self._number == errno.ENOSPC:
            self.device.finish()
        else:
            self.device.replace_disk(self._left())

    def _left(self) -> SimulatedDisk:
        """After a directory's sync has failed nothing can be written before the machine starts again."""
        killed = self.device.disk.killed()
        if self._cuts_power or killed.is_read_only:
            return next(iter(self.device.disk.crash_states(self._rng, 2)))
        return killed

    def _look(self) -> None:
        for disk in (self.device.disk, *self.device.disk.crash_states(self._rng, 3)):
            if not disk.is_read_only:
                self.device.check(disk.killed())

    def _settle_all(self) -> None:
        self.device.fault = None
        self.device.disk.fail(None)
        self.device.finish()
        while self.device.account.waiting:
            self.device.deliver(Verdict.APPLIED)
        self._look()


def restart(device: Device) -> None:
    device.replace_disk(device.disk.killed())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "input/output error"])
def test_an_error_at_some_operations_loses_nothing_and_doubles_nothing(number: int) -> None:
    assert days(number, every=23) > 220


@pytest.mark.long
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "input/output error"])
def test_an_error_at_every_operation_loses_nothing_and_doubles_nothing(number: int) -> None:
    assert days(number, every=1) > 220


def days(number: int, *, every: int) -> int:
    """Days with the error at every so many operations; how many operations there were."""
    for fails_at in count(0, every):
        day = Day(fails_at, number)
        try:
            day.live()
        except Exception as error:
            error.add_note(f"operation {fails_at}")
            raise
        if not day.failed:
            return fails_at
    return 0


def test_a_disk_that_stays_full_keeps_what_there_is_and_nothing_unfinished() -> None:
    device = Device(SimulatedDisk(page_bytes=128))
    for action in SCRIPT[:4]:
        action(device)
    before = device.disk.files()
    device.disk.fail(full)
    for _ in range(3):
        for action in SCRIPT:
            refused(device, action)
    assert {path: content for path, content in device.disk.files().items() if path in before} == before
    assert not [path for path in device.disk.files() if path.suffix == ".new"]
    device.disk.fail(None)
    for action in (Device.finish, *SCRIPT):
        action(device)
    device.check(device.disk.killed())


def refused(device: Device, action: Act) -> None:
    for each in (Device.finish, action):
        try:
            each(device)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - some need no room
            return
