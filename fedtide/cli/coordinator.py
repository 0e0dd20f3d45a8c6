"""``fedtide coordinator``."""

from pathlib import Path

import click

from coordinator.metrics import serve_metrics
from fedtide.cli.fleet import DIRECTORY
from fedtide.coordination import open_coordinator
from fedtide.fleet_directory import FleetDirectory
from fedtide.running import configure_logs, run_until_signalled
from fedtide.wire.link import Traffic


@click.group()
def coordinator() -> None:
    """Run the coordinator."""


@coordinator.command()
@DIRECTORY
@click.option("--open", "open_enrolment", is_flag=True, help="Accept the first key any device shows. For trials.")
@click.option("--check", is_flag=True, help="Check the settings and the plan, then exit.")
@click.option("--json-logs", is_flag=True, help="Logs as JSON lines.")
@click.option("--verbose", is_flag=True, help="Logs with more detail.")
def run(path: Path, *, open_enrolment: bool, check: bool, json_logs: bool, verbose: bool) -> None:
    """Run the coordinator of the fleet in a directory until it is stopped.

    \b
    Exit codes: 0 stopped by a condition or a signal, 1 a failure that is explained.
    Examples:
      fedtide coordinator run --dir pumps
      fedtide coordinator run --dir pumps --check
    """
    import msgspec  # noqa: PLC0415

    configure_logs(verbose=verbose, as_json=json_logs)
    directory = FleetDirectory(path)
    settings = directory.settings()
    if open_enrolment:
        settings = msgspec.structs.replace(settings, open_enrolment=True)
    if settings.open_enrolment:
        click.secho("Open enrolment: any device that shows itself is accepted. For trials only.", fg="yellow", err=True)
    reason = run_until_signalled(_run(directory, settings, check=check))
    if reason:
        click.echo(f"Stopped: {reason}.", err=True)
