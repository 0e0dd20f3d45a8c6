"""``fedtide status`` and ``fedtide watch``: the fleet as an operator sees it."""

import time
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.live import Live

from coordinator.status import Status, read
from fedtide.cli.fleet import DIRECTORY
from fedtide.fleet_directory import FleetDirectory
from fedtide.status_view import fleet_view

_REFRESH_S = 0.5


@click.command()
@DIRECTORY
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def status(path: Path, *, as_json: bool) -> None:
    """Show the fleet once: versions, accounting, and every device.

    \b
    Examples:
      fedtide status --dir pumps
      fedtide status --dir pumps --json | jq .updates
    """
    current = _read(path)
    if as_json:
        click.echo(msgspec.json.encode(current).decode())
    else:
        Console().print(fleet_view(current, time.time()))


@click.command()
@DIRECTORY
def watch(path: Path) -> None:
    """Show the fleet and keep showing it until Ctrl-C.

    \b
    Example: fedtide watch --dir pumps
    """
    try:
        with Live(fleet_view(_read(path), time.time()), refresh_per_second=4) as live:
            while True:
                time.sleep(_REFRESH_S)
                live.update(fleet_view(_read(path), time.time()))
    except KeyboardInterrupt:
        return


def _read(path: Path) -> Status:
    directory = FleetDirectory(path)
    try:
        return read(directory.status_file)
    except FileNotFoundError:
        raise click.ClickException(
            f"no coordinator has run in {path}; start it with: fedtide coordinator run --dir {path}"
        ) from None
    except msgspec.ValidationError as error:
        raise click.ClickException(
            f"{directory.status_file} was written by another version: {error}"
        ) from error
