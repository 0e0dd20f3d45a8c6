"""The ``fedtide`` command."""

import importlib
import os
from typing import Final, NamedTuple

import click

from fedtide import __version__
from fedtide.cli.errors import explained


class _Command(NamedTuple):
    """Where a command is, which extra brings its packages, and what it does."""

    module: str
    extra: str
    summary: str


# Imported only when called: an agent starts without the coordinator's packages, and nothing waits for torch.
_COMMANDS: Final = {
    "demo": _Command("demo", "demo", "See a simulated fleet train on real data."),
    "init": _Command("fleet", "coordinator", "Make a new fleet: settings, key, broker files."),
    "plan": _Command("plan", "plan", "Build and show training plans."),
    "coordinator": _Command("coordinator", "coordinator", "Run the coordinator."),
    "enrol": _Command("fleet", "coordinator", "Accept a device into the fleet."),
    "status": _Command("status", "coordinator", "Show the fleet once."),
    "journal": _Command("journal", "coordinator", "Verify, replay, repair and export the journal."),
    "watch": _Command("status", "coordinator", "Show the fleet until Ctrl-C."),
    "agent": _Command("agent", "", "Set up and run the edge agent of a device."),
}
_OUR_PACKAGES: Final = {"fedtide", "coordinator", "edge_agent", "broker_config"}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's interface
        """Names in the order in which they are used."""
        return list(_COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in _COMMANDS.items()])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command; where its packages are missing, say which extra brings them."""
        place = _COMMANDS.get(cmd_name)
        if place is None:
            return None
        try:
            module = importlib.import_module(f"fedtide.cli.{place.module}")
        except ModuleNotFoundError as error:
            if not place.extra or (error.name or "").split(".")[0] in _OUR_PACKAGES:
                raise
            raise click.ClickException(
                f"fedtide {cmd_name} needs the package {error.name!r}, which is not installed.\n"
                f"Install it with: pip install 'fedtide[{place.extra}]'"
            ) from error
        command: click.Command = getattr(module, cmd_name)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fedtide")
def command() -> None:
    """Asynchronous federated learning over MQTT for fleets of small devices.

    \b
    See it work first:   fedtide demo
    Run a coordinator:   fedtide init DIR, fedtide plan build TASK.py, fedtide coordinator run
    Run a device:        fedtide agent init DIR …, fedtide agent run
    """


def main() -> None:
    """Entry point: exit code 0 on success, 1 on an explained failure, 2 on wrong usage."""
    # Before numpy is imported. Our matrices are small: threads of BLAS that wait for each other made the
    # codec's decompositions seven times slower on two cores, and other work is there for every core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    explained(command)()
