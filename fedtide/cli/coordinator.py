"""``fedtide coordinator``."""

import sys
from pathlib import Path

import click
import msgspec

from coordinator.settings import CoordinatorSettings
from fedtide.cli.fleet import DIRECTORY
from fedtide.coordination import check, serve
from fedtide.fleet_directory import FleetDirectory
from fedtide.running import configure_logs, run_until_signalled


@click.group()
def coordinator() -> None:
    """Run the coordinator."""


@coordinator.command()
@DIRECTORY
@click.option(
    "--open", "open_enrolment", is_flag=True, help="Accept the first key any device shows. For trials."
)
@click.option("--check", "only_check", is_flag=True, help="Check the settings and the plan, then exit.")
@click.option(
    "--take-over", is_flag=True, help="Go on in this directory although another coordinator had the fleet."
)
@click.option("--json-logs", is_flag=True, help="Logs as JSON lines.")
@click.option("--verbose", is_flag=True, help="Logs with more detail.")
def run(
    path: Path, *, open_enrolment: bool, only_check: bool, take_over: bool, json_logs: bool, verbose: bool
) -> None:
    """Run the coordinator of the fleet in a directory until it is stopped.

    \b
    Exit codes: 0 stopped by a condition or a signal, 1 a failure that is explained.

    \b
    Examples:
      fedtide coordinator run --dir pumps
      fedtide coordinator run --dir pumps --check
    """
    configure_logs(verbose=verbose, as_json=json_logs)
    directory = FleetDirectory(path)
    settings: CoordinatorSettings = directory.settings()
    if open_enrolment:
        settings = msgspec.structs.replace(settings, open_enrolment=True)
    if only_check:
        click.echo(check(directory, settings))
        return
    if settings.open_enrolment:
        click.secho("Open enrolment: every device that shows itself is accepted. For trials only.",
                    fg="yellow", err=True)  # fmt: skip
    reason = run_until_signalled(serve(directory, settings, take_over=take_over))
    if reason:
        click.echo(f"Stopped: {reason}.", err=True)
    sys.exit(0)
