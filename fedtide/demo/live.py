"""The demo's live view: what the coordinator and the devices count, while they count it."""

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from coordinator.status import Status
from edge_agent.simulation import SimulatedFleet
from fedtide.demo.report import TrafficPoint, megabytes, summarise_staleness
from fedtide.status_view import accounting_line, evaluation_lines, headline

_RATE_WINDOW_S = 3.0


@dataclass(frozen=True)
class Counted:
    """What has been counted at one moment; ``seconds`` since the coordinator began."""

    seconds: float
    applied: int
    traffic: TrafficPoint


def count(status: Status, fleet: SimulatedFleet) -> Counted:
    """Add up what the devices sent and received."""
    traffic = fleet.traffic.values()
    point = TrafficPoint(
        seconds=status.seconds,
        uplink_bytes=sum(one.sent_bytes for one in traffic),
        downlink_bytes=sum(one.received_bytes for one in traffic),
    )
    return Counted(status.seconds, status.updates.applied, point)


def updates_sent(fleet: SimulatedFleet) -> int:
    """Updates the devices sent, repetitions included."""
    return sum(tally.sent for tallies in fleet.tallies.values() for tally in tallies)


def models_trained_on(fleet: SimulatedFleet) -> int:
    """Models the devices fetched and trained on."""
    return sum(tally.trained for tallies in fleet.tallies.values() for tally in tallies)


def view(status: Status, fleet: SimulatedFleet, history: list[Counted], now: float) -> RenderableType:
    """A few lines, redrawn in place."""
    return Group(
        headline(status, now),
        *evaluation_lines(status),
        accounting_line(status),
        _devices(status, fleet),
        _figures(status, fleet, history),
    )


def line(status: Status, fleet: SimulatedFleet, history: list[Counted]) -> str:
    """The same in one line, for a terminal that cannot redraw, or a log file."""
    accuracy = status.evaluations[-1].metric if status.evaluations else None
    return (
        f"{status.seconds:5.1f} s  version {status.version:4d}  "
        f"accuracy {'-' if accuracy is None else f'{accuracy:.4f}'}  "
        f"{_figures(status, fleet, history).plain}"
    )


def _devices(status: Status, fleet: SimulatedFleet) -> Text:
    text = Text("devices: ")
    for device in status.devices:
        away = device.device in fleet.away or not device.online
        text.append(
            "○" if away else "●", "red" if away else "yellow" if device.device.startswith("slow") else "green"
        )
    online = sum(device.online for device in status.devices)
    text.append(f"  {online} of {len(status.devices)} online")
    if fleet.away:
        text.append(f"  away: {', '.join(sorted(fleet.away))}", "red")
    return text


def _figures(status: Status, fleet: SimulatedFleet, history: list[Counted]) -> Text:
    newest = history[-1]
    then = next((past for past in history if past.seconds >= newest.seconds - _RATE_WINDOW_S), newest)
    elapsed = newest.seconds - then.seconds
    rate = (newest.applied - then.applied) / elapsed if elapsed else 0.0
    whole = status.parameters * 4
    up = _saving(newest.traffic.uplink_bytes, updates_sent(fleet) * whole)
    down = _saving(newest.traffic.downlink_bytes, models_trained_on(fleet) * whole)
    return Text(
        f"{rate:.1f} updates/s  staleness {summarise_staleness(status.staleness).mean:.1f}"
        f"  up {megabytes(newest.traffic.uplink_bytes)}{up}"
        f"  down {megabytes(newest.traffic.downlink_bytes)}{down}"
    )


def _saving(size_bytes: int, float32_bytes: int) -> str:
    return f" (1/{float32_bytes / size_bytes:.0f} of float32)" if size_bytes and float32_bytes else ""
