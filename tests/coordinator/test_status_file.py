"""The status costs the coordinator a fiftieth of its time, however many devices are in it."""

import msgspec
import pytest

from coordinator import status
from coordinator.status import Status, StatusFile, Updates

STATUS = Status(
    fleet="pumps",
    plan="0" * 32,
    epoch=1,
    state="running",
    stop_reason=None,
    moment=0.0,
    seconds=0.0,
    connected=True,
    mqtt_version="5",
    version=0,
    published_version=0,
    buffered=0,
    goal=1,
    updates=Updates(received=0, applied=0, duplicate=0, rejected={}, waiting=0),
    ignored_messages=0,
    staleness={},
    evaluations=(),
    parameters=8,
    metric=None,
    devices=(),
    cpu_seconds=0.0,
    rss_bytes=0,
)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.moment = 100.0

    def now(self):
        return self.moment

    def wall(self):
        return self.moment


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def file(tmp_path, clock):
    return StatusFile(tmp_path / "status.json", clock)


def costing(clock, seconds):
    """A status that takes so long to put together."""

    def made():
        clock.moment += seconds
        return STATUS

    return made


def test_the_first_is_due_at_once_and_a_cheap_one_twice_a_second(file, clock):
    assert file.is_due
    file.write(costing(clock, 0.001))
    clock.moment = 100.49
    assert not file.is_due
    clock.moment = 100.5
    assert file.is_due


@pytest.mark.parametrize(("cost_s", "interval_s"), [(0.01, 0.5), (0.04, 2.0), (0.1, 5.0), (1.0, 15.0)])
def test_one_that_costs_more_comes_more_rarely_but_comes(file, clock, cost_s, interval_s):
    file.write(costing(clock, cost_s))
    clock.moment = 100.0 + interval_s - 0.01
    assert not file.is_due
    clock.moment = 100.0 + interval_s + 0.01
    assert file.is_due


def test_who_reads_it_is_told_when_the_next_one_comes(file, clock, tmp_path):
    assert file.write(costing(clock, 0.1)).interval_s == 0.5
    written = file.write(costing(clock, 0.001))
    assert written.interval_s == pytest.approx(5.0)
    assert status.read(tmp_path / "status.json") == written
    assert msgspec.structs.replace(written, interval_s=0.5) == STATUS
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_where_the_disk_is_full_the_status_is_left_and_what_is_wrong_is_said_elsewhere(file, clock, tmp_path):
    (tmp_path / "status.json.new").mkdir()  # nothing can be written there
    assert file.write(lambda: STATUS).fleet == "pumps"
    assert not (tmp_path / "status.json").exists()
    assert not file.is_due  # and it is not tried again at once
    (tmp_path / "status.json.new").rmdir()
    clock.moment += 1.0
    assert file.is_due
    file.write(lambda: STATUS)
    assert status.read(tmp_path / "status.json").fleet == "pumps"
