"""``fedtide agent``: what runs on a device."""

from pathlib import Path

import click

from edge_agent.settings import EMPTY_DIRECTORY, AgentSettings
from fedtide.assembly import make_agent
from fedtide.cli.predict import predict
from fedtide.running import configure_logs, run_until_signalled, work_in_an_empty_directory
from fedtide.wire import ids
from fedtide.wire.settings import load
from fedtide.wire.signatures import PublicKey, SigningKey


@click.group()
def agent() -> None:
    """Set up and run the edge agent of a device."""


agent.add_command(predict)


@agent.command()
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--fleet", required=True, help="The fleet's id.")
@click.option("--device", required=True, help="This device's id: [a-z0-9_-]{1,64}.")
@click.option("--broker", default="127.0.0.1:1883", show_default=True, help="HOST:PORT of the broker.")
@click.option("--coordinator-key", required=True, metavar="HEX", help="As fedtide init printed it.")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="An .npz or .csv file of examples, or a folder of windows.",
)
def init(path: Path, *, fleet: str, device: str, broker: str, coordinator_key: str, data: Path) -> None:
    """Make DIR with this device's settings and its own key. The private key never leaves it.

    \b
    Example:
      fedtide agent init pump-7 --fleet pumps --device pump-7 --broker 192.0.2.10:1883 \\
        --coordinator-key 3b6a27bc… --data readings.npz
    """
    ids.fleet_id(fleet)
    ids.device_id(device)
    try:
        trusted = PublicKey.parse(coordinator_key)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--coordinator-key") from error
    kind = "windows" if data.is_dir() else data.suffix.removeprefix(".")
    if kind not in {"npz", "csv", "windows"}:
        raise click.BadParameter(
            f"{data} ends in {data.suffix!r}; .npz and .csv are read, and folders of windows",
            param_hint="--data",
        )
    if (path / "agent.toml").exists():
        raise click.ClickException(f"{path} holds an agent already; choose another directory")
    path.mkdir(parents=True, exist_ok=True)
    key = SigningKey.generate()
    key.save(path / "device.key")
    (path / "agent.toml").write_text(
        _SETTINGS.format(
            fleet=fleet,
            device=device,
            key=trusted,
            broker=broker,
            kind=kind,
            data=data.resolve(),
            directory=path.resolve(),
        )
    )
    click.echo(f"Made the agent of device {device!r} in {path}.")
    click.echo(f"On the coordinator: fedtide enrol {device} --key {key.public}")
    click.echo(f"Then here: fedtide agent run --config {path / 'agent.toml'}")


@agent.command()
@click.option("--config", type=click.Path(path_type=Path), default=Path("agent.toml"), show_default=True)
@click.option("--check", "only_check", is_flag=True, help="Check the settings and the key, then exit.")
@click.option("--json-logs", is_flag=True, help="Logs as JSON lines.")
@click.option("--verbose", is_flag=True, help="Logs with more detail.")
def run(config: Path, *, only_check: bool, json_logs: bool, verbose: bool) -> None:
    """Run the agent until it is stopped. It needs no torch and no compiler.

    \b
    Exit codes: 0 stopped by a signal, 1 a failure that is explained, 70 a training plan that does not stop:
    start the agent again, it will leave that plan alone.
    Example: fedtide agent run --config pump-7/agent.toml
    """
    configure_logs(verbose=verbose, as_json=json_logs)
    settings = load(config.absolute(), AgentSettings)
    if only_check:
        key = SigningKey.load(settings.key)
        click.echo(
            f"Device {settings.device!r} of fleet {settings.fleet!r}, key {key.public}: settings are good."
        )
        return
    run_until_signalled(_run(settings))


async def _run(settings: AgentSettings) -> None:
    work_in_an_empty_directory(settings.state / EMPTY_DIRECTORY)
    await make_agent(settings).run()


_SETTINGS = """\
# The agent's settings. Lines that are commented out show the defaults.
fleet = "{fleet}"
device = "{device}"
coordinator_key = "{key}"        # what this device trusts
key = "{directory}/device.key"   # never leaves this machine
state = "{directory}/state"      # outbox and model slots

[broker]
hosts = ["{broker}"]
# username = "{device}"
# password = "…"
# [broker.tls]
# authority = "authority.pem"
# certificate = "{device}.pem"
# key = "{device}.key"

[data]                           # npz, csv, windows, sensor or custom: docs/data-sources.md
kind = "{kind}"
path = "{data}"
# min_examples = 1               # do not train before there are so many
# min_new_examples = 0           # nor, after a training, before so many have come

# [training]                     # where this device departs from the plan
# local_epochs = 1
# batch_size = 32
# learning_rate = 0.1
# max_steps = 100
# max_seconds = 60.0            # begin no further step after so long
# optimizer_state = "reset"     # or "keep": go on where the last update ended
# class_weights = "equal"       # or "balanced": for a plan with class weights
# evaluation_share = 0.2        # of the examples: held out of training, to evaluate each version on
# threads = 1
# max_memory_mb = 256           # working memory of a step; the plan's limit may be lower

# [inference]                    # the released model, for fedtide agent predict
# keep = true
# min_interval_s = 60.0          # between two models fetched only for this
"""
