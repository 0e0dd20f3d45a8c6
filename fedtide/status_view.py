"""The fleet as a terminal shows it. Pure: a status in, something rich can print out."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from coordinator.status import EvaluationPoint, Status

_BARS = "▁▂▃▄▅▆▇█"
_STALE_STATUS_S = 5.0
_SHOWN_DEVICES = 40


def fleet_view(status: Status, now: float) -> RenderableType:
    """Headline, accounting, and a table of devices."""
    return Group(headline(status, now), accounting_line(status), device_table(status))


def headline(status: Status, now: float) -> Text:
    """Fleet, state, version, held-out metric and its curve."""
    age_s = now - status.moment
    state = status.state
    if state == "running" and age_s > _STALE_STATUS_S:
        state = f"silent for {age_s:.0f} s"
    link = f"MQTT {status.mqtt_version}" if status.connected else "no broker"
    text = Text.assemble(
        (f"{status.fleet} ", "bold"),
        (state, "green" if state == "running" else "yellow"),
        f"  {link}  epoch {status.epoch}\n",
        f"version {status.version} (published {status.published_version})",
        f"  buffer {status.buffered}/{status.goal}",
    )
    if status.evaluations:
        newest = status.evaluations[-1]
        text.append("  loss not finite" if newest.loss is None else f"  loss {newest.loss:.4f}")
        if newest.metric is not None:
            text.append(f"  {status.metric or 'metric'} {newest.metric:.4f} ", "bold")
            text.append(sparkline(status.evaluations), "cyan")
    if status.stop_reason:
        text.append(f"\nstopped: {status.stop_reason}")
    return text


def accounting_line(status: Status) -> Text:
    """The accounting: received = applied + duplicate + rejected + waiting."""
    updates = status.updates
    rejected = ", ".join(f"{reason} {count}" for reason, count in sorted(updates.rejected.items()))
    return Text(
        f"updates: received {updates.received} = applied {updates.applied} + duplicate {updates.duplicate}"
        f" + rejected {sum(updates.rejected.values())}{f' ({rejected})' if rejected else ''}"
        f" + waiting {updates.waiting}"
    )


def device_table(status: Status) -> Table:
    """One row per device, at most 40; those with the most weight first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("device", "", "applied", "rejected", "staleness", "share", "loss", "last rejection"):
        table.add_column(column, justify="left" if column in {"device", "", "last rejection"} else "right")
    shown = sorted(status.devices, key=lambda device: (-device.weight_share, device.device))[:_SHOWN_DEVICES]
    for device in shown:
        table.add_row(
            device.device,
            Text("online", "green") if device.online else Text("away", "red"),
            str(device.applied),
            str(device.rejected),
            f"{device.mean_staleness:.1f}",
            f"{100 * device.weight_share:.1f} %",
            "" if device.loss is None else f"{device.loss:.3f}",
            device.last_rejection or "",
        )
    hidden = len(status.devices) - len(shown)
    if hidden:
        table.add_row(f"… and {hidden} more")
    return table


def sparkline(points: tuple[EvaluationPoint, ...], width: int = 40) -> str:
    """The metric over versions as a line of bars, lowest to highest seen."""
    values = [point.metric for point in points if point.metric is not None]
    if not values:
        return ""
    step = max(1, -(-len(values) // width))
    sampled = values[::-1][::step][::-1]
    low, high = min(sampled), max(sampled)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in sampled)
