"""Running a service in the foreground: signals, logs, and what systemd wants to hear."""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from fedtide.wire.settings import SettingsError

T = TypeVar("T")

_EXTRA: Final = ("event", "reason")


class JsonLines(logging.Formatter):
    """One JSON object a line: a stable ``event`` for machines, the ``message`` for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        fields: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            **{name: str(getattr(record, name)) for name in _EXTRA if getattr(record, name, None)},
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def configure_logs(*, verbose: bool, as_json: bool) -> None:
    """Send logs to standard error, where systemd's journal takes them."""
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(
        JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    )
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[stream])


def work_in_an_empty_directory(directory: Path) -> None:
    """Make it the process's own, so that what names a file without saying where finds none.

    Every path in use must be absolute. A training plan that names a file is refused before onnxruntime sees
    it; this is the fence behind that, since onnxruntime looks for such files where the process works.

    Raises:
        OSError: it cannot be made.
        SettingsError: there is something in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if found := sorted(entry.name for entry in directory.iterdir()):
        raise SettingsError(f"{directory} must stay empty and holds {found[0]!r}: move it elsewhere")
    os.chdir(directory)


def run_until_signalled(service: Coroutine[Any, Any, T]) -> T | None:
    """Run to the end, or until SIGINT or SIGTERM, which end it cleanly (None)."""
    return asyncio.run(_run(service))


async def _run(service: Coroutine[Any, Any, T]) -> T | None:
    task = asyncio.create_task(service, name="service")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    watchdog = asyncio.create_task(_tell_systemd(), name="systemd")
    try:
        return await task
    except asyncio.CancelledError:
        return None
    finally:
        watchdog.cancel()
        notify("STOPPING=1")


async def _tell_systemd() -> None:
    """Say that we are ready, then that we are alive, twice as often as the unit's WatchdogSec asks."""
    notify("READY=1")
    microseconds = int(os.environ.get("WATCHDOG_USEC", "0"))
    while microseconds:
        await asyncio.sleep(microseconds / 2e6)
        notify("WATCHDOG=1")


def notify(message: str) -> None:
    """Send one message of systemd's protocol (sd_notify(3)); nothing where there is no systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto(message.encode(), name)
