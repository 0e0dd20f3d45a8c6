"""The fleet as a terminal shows it. Pure: a status in, something rich can print out."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from coordinator.status import DeviceStatus, Status

_BARS = "▁▂▃▄▅▆▇█"
_LATE_S = 5.0
_SHOWN_DEVICES = 40


def fleet_view(status: Status, now: float) -> RenderableType:
    """Headline, evaluations and release, accounting, and a table of devices."""
    return Group(
        headline(status, now),
        *evaluation_lines(status),
        release_line(status),
        *rollback_lines(status),
        accounting_line(status),
        device_table(status),
    )


def headline(status: Status, now: float) -> Text:
    """Fleet, state and version."""
    age_s = now - status.moment
    state = status.state
    if state == "running" and age_s > status.interval_s + _LATE_S:
        state = f"silent for {age_s:.0f} s"
    link = f"MQTT {status.mqtt_version}" if status.connected else "no broker"
    text = Text.assemble(
        (f"{status.fleet} ", "bold"),
        (state, "green" if state == "running" else "yellow"),
        f"  {link}  epoch {status.epoch}\n",
        f"version {status.version} (published {status.published_version})",
        f"  buffer {status.buffered}/{status.goal}",
    )
    if status.stop_reason:
        text.append(f"\nstopped: {status.stop_reason}")
    return text


def evaluation_lines(status: Status) -> Iterable[Text]:
    """What the coordinator finds on its held-out examples, and what the devices find on theirs."""
    name = status.metric or "metric"
    if status.evaluations:
        newest = status.evaluations[-1]
        text = Text(f"held out: version {newest.version}")
        text.append("  loss not finite" if newest.loss is None else f"  loss {newest.loss:.4f}")
        if newest.metric is not None:
            text.append(f"  {name} {newest.metric:.4f} ", "bold")
            text.append(sparkline([point.metric for point in status.evaluations]), "cyan")
        yield text
    if status.federated is not None:
        found = status.federated
        versions = _span(found.oldest_version, found.version)
        text = Text(f"devices:  {versions}  loss {found.loss:.4f}")
        if found.metric is not None:
            text.append(f"  {name} {found.metric:.4f} ", "bold")
            text.append(sparkline([point.metric for point in status.federated_history]), "cyan")
        text.append(
            f"  (what {_many(found.devices, 'device')} found on {found.examples:,} of their examples)"
        )
        yield text


def release_line(status: Status) -> Text:
    """Which version is for inference, and why."""
    if status.released_version is None:
        gate = f": none has passed {status.release_gate}" if status.release_gate else ""
        return Text(f"released: no version yet{gate}")
    why = f"it passed {status.release_gate}" if status.release_gate else "every one is, no gate is set"
    return Text(f"released: version {status.released_version} ({why})")


def rollback_lines(status: Status) -> Iterable[Text]:
    """How often the model went back to an earlier version, and why it did last; nothing if it never did."""
    last = status.last_rollback
    if last is not None:
        text = f"rolled back {_many(status.rollbacks, 'time')}, last to version {last.good}: {last.why}"
        yield Text(text, "red")


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
    held_out = any(device.evaluation is not None for device in status.devices)
    own = [f"own {status.metric or 'loss'}"] if held_out else []
    left = {"device", "", "trouble"}
    for column in ("device", "", "applied", "rejected", "staleness", "share", "loss", *own, "trouble"):
        table.add_column(column, justify="left" if column in left else "right")
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
            *([_own_metric(device)] if held_out else []),
            _trouble(device),
        )
    hidden = len(status.devices) - len(shown)
    if hidden:
        table.add_row(f"… and {hidden} more")
    return table


def _own_metric(device: DeviceStatus) -> str:
    """What a device found on the examples it holds out, and on which version."""
    found = device.evaluation
    if found is None:
        return ""
    value = found.loss if found.metric is None else found.metric
    return f"{value:.3f} at {found.version}"


def _trouble(device: DeviceStatus) -> Text:
    """Why a device does not train, in its own words; else why its latest update was rejected."""
    if device.trouble is not None:
        return Text(f"{device.trouble.event}: {device.trouble.detail}", "red")
    return Text(f"rejected: {device.last_rejection}" if device.last_rejection else "")


def _span(oldest: int, newest: int) -> str:
    return f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def sparkline(metrics: Iterable[float | None], width: int = 40) -> str:
    """The metric over versions as a line of bars, lowest to highest seen."""
    values = [metric for metric in metrics if metric is not None]
    if not values:
        return ""
    step = max(1, -(-len(values) // width))
    sampled = values[::-1][::step][::-1]
    low, high = min(sampled), max(sampled)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in sampled)
