"""A whole fleet as separate processes: mosquitto, the real coordinator, and real agents of a given pace.

The devices connect first and wait for the first head together, so that imports and handshakes are no part of
what is timed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import digits
from report import cpu_seconds, peak_rss_mb

from broker_config.local import LocalBroker, start_local_broker
from coordinator.status import Status
from coordinator.status import read as read_status
from edge_agent.dataset import Dataset
from fedtide.fleet_directory import FleetDirectory, NewFleet, create
from fedtide.wire.signatures import SigningKey

HERE: Final = Path(__file__).resolve().parent
DEADLINE_S: Final = 90.0
POLL_S: Final = 0.01


@dataclass(frozen=True)
class Device:
    """One device: its examples, the least seconds of one training, and the seed of its order of examples."""

    dataset: Dataset
    pace_s: float
    seed: int


@dataclass
class ProcessFleet:
    """The running processes.

    Attributes:
        place: everything of this run is below it.
        broker: mosquitto.
        directory: the coordinator's.
        processes: agents and coordinator by name.
    """

    place: Path
    broker: LocalBroker
    directory: FleetDirectory
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _seen: float = 0.0

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by process."""
        return {name: cpu_seconds(pid) for name, pid in self._pids().items()}

    def rss_mb(self) -> dict[str, float]:
        """Peak resident memory, by process."""
        return {name: peak_rss_mb(pid) for name, pid in self._pids().items()}

    def next_status(self, deadline: float) -> Status:
        """The next ``status.json``, which the coordinator replaces twice a second.

        Raises:
            TimeoutError: none came before ``deadline``, in seconds since 1970.
        """
        while time.time() < deadline:
            with contextlib.suppress(FileNotFoundError):
                status = read_status(self.directory.status_file)
                if status.moment > self._seen:
                    self._seen = status.moment
                    return status
            time.sleep(POLL_S)
        raise TimeoutError(f"no new status; the coordinator says: {_tail(self.place / 'coordinator.err')}")

    def first_training(self) -> float:
        """Seconds since 1970 at which the first device's first training began."""
        texts = [output.read_text() for output in self.place.glob("agent-*.out")]
        return min(float(text) for text in texts if text)

    def _pids(self) -> dict[str, int]:
        return {"broker": self.broker.pid, **{name: p.pid for name, p in self.processes.items()}}


def wait_for_log(log: Path, event: str) -> None:
    """Wait until a process has logged an event as a JSON line.

    Raises:
        TimeoutError: it did not; with the end of the log.
    """
    deadline = time.monotonic() + DEADLINE_S
    while f'"event": "{event}"' not in log.read_text():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {event} in {log}: {_tail(log)}")
        time.sleep(POLL_S)


@contextlib.contextmanager
def running_fleet(
    place: Path, settings: str, held_out: Dataset, devices: Mapping[str, Device]
) -> Iterator[ProcessFleet]:
    """Start everything; end it on leaving.

    Args:
        place: an empty directory on a real disk.
        settings: lines of ``coordinator.toml`` beyond fleet, broker and held-out examples.
        held_out: evaluated on every version.
        devices: by id.
    """
    with start_local_broker(place / "broker", "mosquitto") as broker:
        new = NewFleet("digits", f"127.0.0.1:{broker.port}")
        directory, _ = create(place / "fleet", new)
        digits.save_examples(held_out, directory.path / "held-out.npz")
        common = f'fleet = "digits"\nbroker.hosts = ["127.0.0.1:{broker.port}"]\n'
        directory.settings_file.write_text(f'{common}evaluation.data = "held-out.npz"\n{settings}')
        fleet = ProcessFleet(place, broker, directory)
        try:
            for name, device in devices.items():
                config = set_up_device(place / name, name, device.dataset, fleet)
                pace = ["--seconds", str(device.pace_s), "--seed", str(device.seed)]
                command = [str(HERE / "paced_agent.py"), str(config), *pace]
                fleet.processes[name] = start_python(command, place / name)
            for name in devices:
                wait_for_log(place / f"{name}.err", "link.up")
            start_coordinator(fleet)
            yield fleet
        finally:
            for process in fleet.processes.values():
                process.send_signal(signal.SIGTERM)
            for process in fleet.processes.values():
                process.wait(DEADLINE_S)


def start_coordinator(fleet: ProcessFleet) -> None:
    """Start ``fedtide coordinator run``."""
    command = ["-m", "fedtide", "coordinator", "run", "--json-logs", "--dir", str(fleet.directory.path)]
    fleet.processes["coordinator"] = start_python(command, fleet.place / "coordinator")


def set_up_device(home: Path, name: str, dataset: Dataset, fleet: ProcessFleet) -> Path:
    """Write a device's settings, key and examples, enrol it, and return the path of its ``agent.toml``."""
    home.mkdir()
    key = SigningKey.generate()
    key.save(home / "device.key")
    (fleet.directory.roster / f"{name}.pub").write_text(f"{key.public}\n")
    digits.save_examples(dataset, home / "examples.npz")
    config = home / "agent.toml"
    config.write_text(
        f"""\
fleet = "digits"
device = "{name}"
coordinator_key = "{fleet.directory.key().public}"
key = "device.key"
state = "state"
broker.hosts = ["127.0.0.1:{fleet.broker.port}"]
data = {{ kind = "npz", path = "examples.npz" }}
"""
    )
    return config


def start_python(arguments: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    """Start a Python process, one thread for arithmetic; it writes to ``output``.out and ``output``.err."""
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    with (
        output.with_name(f"{output.name}.out").open("wb") as out,
        output.with_name(f"{output.name}.err").open("wb") as err,
    ):
        return subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=err, env=environment)


def _tail(log: Path) -> str:
    return log.read_text()[-2000:] if log.exists() else "nothing"
