"""``fedtide demo``."""

import logging
import sys
from pathlib import Path

import click
import msgspec
from rich.console import Console

from broker_config.local import available_brokers
from coordinator.settings import DEFAULT_CODEC
from fedtide.demo.report import summary
from fedtide.demo.settings import DemoSettings
from fedtide.wire.codecs import CODECS


@click.command()
@click.option("--devices", type=click.IntRange(2, 1000), default=20, show_default=True)
@click.option(
    "--slow", type=click.IntRange(0), default=4, show_default=True, help="Devices ten times slower."
)
@click.option("--dropping", type=click.IntRange(0), default=2, show_default=True,
              help="Devices that vanish without a goodbye and come back.")  # fmt: skip
@click.option("--alpha", type=click.FloatRange(0, min_open=True), default=0.3, show_default=True,
              help="Dirichlet parameter of the split by label; smaller is less even.")  # fmt: skip
@click.option("--target", type=click.FloatRange(0, 1), default=0.95, show_default=True,
              help="Held-out accuracy to reach.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(5), default=60.0, show_default=True, help="Longest run.")
@click.option("--codec", type=click.Choice(list(CODECS)), default=DEFAULT_CODEC, show_default=True)
@click.option(
    "--broker", type=click.Choice(["mosquitto", "nats"]), help="Default: mosquitto if installed, else nats."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-output"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def demo(*, as_json: bool, **options: object) -> None:
    """Train a model on real data with simulated devices that are real MQTT clients.

    \b
    A broker, a coordinator process and 20 devices; 4 are ten times slower, 2 drop off
    and come back. Exit code 0 if the target accuracy was reached, 1 if not.

    Examples:
      fedtide demo
      fedtide demo --devices 50 --seed 3
      fedtide demo --json --out /tmp/demo | jq .accuracy
    """
    settings = msgspec.convert(options, DemoSettings)
    if settings.slow + settings.dropping > settings.devices:
        raise click.UsageError(
            f"--slow {settings.slow} and --dropping {settings.dropping} are more "
            f"than --devices {settings.devices}"
        )
    if not available_brokers():
        raise click.ClickException(
            "no broker: install mosquitto (apt-get install mosquitto) or pip install 'fedtide[broker]'"
        )
    from fedtide.demo.run import run_demo  # noqa: PLC0415 - torch takes seconds to import

    console = Console(stderr=as_json)
    logging.basicConfig(level=logging.ERROR)  # devices that drop off on purpose are not news
    try:
        result = run_demo(settings, console)
    except KeyboardInterrupt:
        console.print("Stopped.")
        sys.exit(130)
    console.print(summary(result))
    console.print(f"Wrote {settings.out / 'report.json'} and {settings.out / 'report.png'}.")
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    sys.exit(0 if result.seconds_to_target is not None else 1)
