"""Running the demo: broker, coordinator process, simulated devices, live view, report."""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from rich.console import Console
from rich.live import Live

from broker_config.local import LocalBroker, start_local_broker
from coordinator.plan.build import build
from coordinator.status import Status, read
from edge_agent.simulation import SimulatedFleet
from fedtide.demo import live, plot, report
from fedtide.demo.digits import split_digits
from fedtide.demo.fleet import prepare, simulated_devices
from fedtide.demo.settings import DemoSettings, kind_of
from fedtide.demo.task import task
from fedtide.fleet_directory import FleetDirectory

_REFRESH_S: Final = 0.25
_PLAIN_EVERY_S: Final = 2.0
_SHORTEST_S: Final = 15.0  # long enough to see devices drop off and come back
_START_WITHIN_S: Final = 30.0
_STOP_WITHIN_S: Final = 15.0
_MQTT_VERSIONS: Final = {4: "3.1.1", 5: "5"}  # protocol levels of the CONNECT packet


class DemoFailed(Exception):
    """The demo could not run to its end; the text says what happened."""


@dataclass
class _Run:
    """A running demo."""

    settings: DemoSettings
    directory: FleetDirectory
    fleet: SimulatedFleet
    history: list[live.Counted] = field(default_factory=list)

    def status(self) -> Status | None:
        """The coordinator's newest status, once there is one."""
        try:
            return read(self.directory.status_file)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def note(self, status: Status) -> None:
        """Keep a point of the curves."""
        self.history.append(live.count(status, self.fleet))

    def finished(self, status: Status) -> bool:
        """Whether the target is reached and everybody is back, or time is up."""
        reached = report.seconds_to_target(status.evaluations, self.settings.target) is not None
        shortest = min(_SHORTEST_S, self.settings.seconds)
        everybody = not self.fleet.away and status.seconds >= shortest
        return status.seconds >= self.settings.seconds or (reached and everybody)


def run_demo(settings: DemoSettings, console: Console) -> report.Report:
    """Run it all and write ``report.json`` and ``report.png``.

    Raises:
        DemoFailed: the coordinator ended early.
    """
    with tempfile.TemporaryDirectory(prefix="fedtide-demo-") as temporary:
        path = Path(temporary)
        rng = np.random.default_rng(settings.seed)
        console.print("Building the training plan from a torch module (about 15 s) …")
        digits = split_digits(settings.devices, settings.alpha, rng)
        plan = build(task(settings.seed))
        with start_local_broker(path / "broker", settings.broker) as broker:
            address = f"{broker.host}:{broker.port}"
            console.print(f"Broker: {broker.kind} on {address}, MQTT {_MQTT_VERSIONS[broker.mqtt_version]}.")
            directory = prepare(path / "fleet", plan, digits, settings, address)
            devices = simulated_devices(directory, digits, settings, address, path / "devices")
            demo = _Run(settings, directory, SimulatedFleet(devices, settings.seed))
            status = asyncio.run(_conduct(demo, console))
            result = _report(demo, status, broker)
    settings.out.mkdir(parents=True, exist_ok=True)
    report.write(result, settings.out / "report.json")
    plot.draw(result, settings.out / "report.png")
    return result


async def _conduct(demo: _Run, console: Console) -> Status:
    """Start the coordinator and the devices, show them, stop them; the coordinator's last status."""
    with (demo.directory.path / "coordinator.log").open("wb") as log:
        coordinator = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fedtide", "coordinator", "run", "--json-logs",
            "--dir", str(demo.directory.path),
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    devices = asyncio.create_task(demo.fleet.run(), name="demo.devices")
    try:
        await _show(demo, coordinator, console)
    finally:
        if coordinator.returncode is None:
            coordinator.send_signal(signal.SIGINT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_WITHIN_S):
                await coordinator.wait()
        if coordinator.returncode is None:
            coordinator.kill()
        devices.cancel()
        await asyncio.gather(devices, return_exceptions=True)
    status = demo.status()
    if status is None or coordinator.returncode != 0:
        raise DemoFailed(f"the coordinator failed:\n{_log_tail(demo.directory)}")
    demo.note(status)
    return status


async def _show(demo: _Run, coordinator: asyncio.subprocess.Process, console: Console) -> None:
    began, shown_at = time.monotonic(), 0.0
    with (
        Live(console=console, auto_refresh=False)
        if console.is_terminal
        else contextlib.nullcontext() as screen
    ):
        while True:
            await asyncio.sleep(_REFRESH_S)
            status = demo.status()
            if coordinator.returncode is not None or (
                status is None and time.monotonic() - began > _START_WITHIN_S
            ):
                raise DemoFailed(f"the coordinator did not run:\n{_log_tail(demo.directory)}")
            if status is None:
                continue
            demo.note(status)
            if screen is not None:
                screen.update(live.view(status, demo.fleet, demo.history, time.time()), refresh=True)
            elif time.monotonic() - shown_at >= _PLAIN_EVERY_S:
                shown_at = time.monotonic()
                console.print(live.line(status, demo.fleet, demo.history), soft_wrap=True)
            if demo.finished(status):
                return


def _log_tail(directory: FleetDirectory) -> str:
    return "\n".join((directory.path / "coordinator.log").read_text().splitlines()[-20:])


def _report(demo: _Run, status: Status, broker: LocalBroker) -> report.Report:
    settings, newest = demo.settings, demo.history[-1]
    sent = live.updates_sent(demo.fleet)
    accuracies = [point.metric for point in status.evaluations if point.metric is not None]
    kinds = {device.device: kind_of(int(device.device[-3:]), settings) for device in status.devices}
    return report.Report(
        accuracy=accuracies[-1] if accuracies else 0.0,
        best_accuracy=max(accuracies, default=0.0),
        target_accuracy=settings.target,
        seconds_to_target=report.seconds_to_target(status.evaluations, settings.target),
        seconds=status.seconds,
        versions=status.version,
        updates=report.update_counts(status, sent),
        staleness=report.summarise_staleness(status.staleness),
        staleness_histogram=dict(sorted(status.staleness.items())),
        uplink_bytes=newest.traffic.uplink_bytes,
        uplink_bytes_float32=sent * status.parameters * 4,
        downlink_bytes=newest.traffic.downlink_bytes,
        downlink_bytes_float32=live.models_trained_on(demo.fleet) * status.parameters * 4,
        devices=tuple(
            report.DeviceReport(
                device=device.device,
                speed=kinds[device.device],
                applied=device.applied,
                mean_staleness=device.mean_staleness,
                weight_share=device.weight_share,
            )
            for device in status.devices
        ),
        evaluations=status.evaluations,
        traffic=tuple(counted.traffic for counted in demo.history),
        coordinator_cpu_seconds=status.cpu_seconds,
        coordinator_rss_bytes=status.rss_bytes,
        parameters=status.parameters,
        codec=settings.codec,
        broker=broker.kind,
        mqtt_version=_MQTT_VERSIONS[broker.mqtt_version],
        seed=settings.seed,
    )
