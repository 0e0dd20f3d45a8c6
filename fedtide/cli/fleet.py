"""``fedtide init`` and ``fedtide enrol``."""

from pathlib import Path

import click

from broker_config.certificates import issue
from coordinator.roster import Roster
from fedtide.fleet_directory import FleetDirectory, NewFleet, create
from fedtide.wire import ids
from fedtide.wire.signatures import PublicKey

DIRECTORY = click.option(
    "--dir", "path", type=click.Path(path_type=Path), default=Path(), show_default="current directory",
    help="The fleet's directory.",
)  # fmt: skip


@click.command()
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--fleet", default="fleet", show_default=True, help="The fleet's id: [a-z0-9_-]{1,64}.")
@click.option("--broker", default="127.0.0.1:1883", show_default=True, help="HOST:PORT of the broker.")
@click.option("--goal", type=click.IntRange(1), default=10, show_default=True, help="Updates per version.")
@click.option("--held-out", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="An .npz file to evaluate every version on.")  # fmt: skip
@click.option("--tls", "tls_hosts", multiple=True, metavar="HOST",
              help="Set up TLS: a name or address of the broker. May be repeated.")  # fmt: skip
def init(path: Path, **options: object) -> None:
    """Make a new fleet in DIR: settings, the coordinator's key, and the broker's files.

    \b
    Examples:
      fedtide init pumps --fleet pumps
      fedtide init pumps --fleet pumps --tls broker.local --tls 192.0.2.10
    """
    new = NewFleet(**options)  # type: ignore[arg-type]
    try:
        directory, key = create(path, new)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"Made fleet {new.fleet!r} in {path}.")
    click.echo(f"Coordinator key: {key}")
    click.echo(f"Broker:          mosquitto -c {path / 'broker' / 'mosquitto.conf'}")
    click.echo(f"Next:            fedtide plan build TASK.py --out {directory.path / 'model.plan'}")


@click.command()
@click.argument("device")
@click.option("--key", help="The device's public key; without it, the key the device has shown is accepted.")
@DIRECTORY
def enrol(device: str, key: str | None, path: Path) -> None:
    """Accept DEVICE into the fleet. A running coordinator notices within a second.

    \b
    Examples:
      fedtide enrol pump-7 --key 3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29
      fedtide enrol pump-7                 (accept the key it has shown)
    """
    directory = FleetDirectory(path)
    settings = directory.settings()
    name = ids.device_id(device)
    pending = directory.pending / f"{name}.pub"
    if key is None and not pending.exists():
        raise click.ClickException(
            f"device {name} has not shown itself; give its key with --key (fedtide agent init prints it)"
        )
    try:
        public = PublicKey.parse(key) if key is not None else PublicKey.load(pending)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--key") from error
    Roster(directory.roster, settings.max_devices).enrol(name, public)
    pending.unlink(missing_ok=True)
    click.echo(f"Enrolled {name} with key {public}.")
    if directory.tls.is_dir() and not (directory.tls / "devices" / f"{name}.crt").exists():
        files = issue(directory.tls, name)
        click.echo(f"Copy to the device: {directory.tls / 'authority.crt'}, {files.certificate}, {files.key}")
