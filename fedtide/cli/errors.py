"""Errors that people can act on are shown as one sentence; everything else keeps its traceback."""

import sys
from collections.abc import Callable
from typing import Final

import click

from fedtide.wire.errors import WireError
from fedtide.wire.settings import SettingsError

# By name, so that showing an error never imports the coordinator's packages on a device.
_EXPLAINED: Final = frozenset(
    {
        "AlreadyRunning",
        "BrokerUnavailable",
        "DamagedPlanFile",
        "DataError",
        "DemoFailed",
        "DiskFailed",
        "Fenced",
        "FleetExists",
        "JournalDamaged",
        "KeyConflict",
        "NoModel",
        "PlanRefused",
        "PlanRejected",
        "ReplayMismatch",
        "RosterFull",
        "StorageFailed",
        "TaskError",
    }
)
_BASES: Final = (SettingsError, WireError, OSError)


def explained(command: Callable[[], None]) -> Callable[[], None]:
    """The command, with the errors above shown as ``Error: …`` and exit code 1."""

    def run() -> None:
        try:
            command()
        except Exception as raised:
            error = _alone(raised)
            if not isinstance(error, _BASES) and type(error).__name__ not in _EXPLAINED:
                raise
            click.echo(f"Error: {error}", err=True)
            sys.exit(1)

    return run


def _alone(error: Exception) -> Exception:
    """What one of several tasks failed with, out of the group that the others' end made of it."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
