"""The ``fedtide`` command."""

import importlib

from typing import Final

import click

from fedtide import __version__
from fedtide.cli.errors import explained

# Commands are imported when they are called: an agent starts without the coordinator's packages, and without torch.
_COMMANDS: Final = {
    "init": ("fedtide.cli.fleet", "init"),
    "enrol": ("fedtide.cli.fleet", "enrol"),
    "plan": ("fedtide.cli.plan", "plan"),
    "coordinator": ("fedtide.cli.coordinator", "coordinator"),
    "agent": ("fedtide.cli.agent", "agent"),
    "status": ("fedtide.cli.status", "status"),
    "watch": ("fedtide.cli.status", "watch"),
    "demo": ("fedtide.cli.demo", "demo"),
}
_EXTRAS: Final = {"plan": "plan", "coordinator": "coordinator", "status": "coordinator", "watch": "coordinator",
                  "init": "coordinator", "enrol": "coordinator", "demo": "demo"}  # fmt: skip


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's interface
        """Names in the order in which they are used."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command; where its packages are missing, say which extra brings them."""
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        try:
            command: click.Command = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get(cmd_name)
            if extra is None or (error.name or "").split(".")[0] in {"fedtide", "coordinator", "edge_agent"}:
                raise
            raise click.ClickException(
                f"fedtide {cmd_name} needs the package {error.name!r}, which is not installed.\n"
                f"Install it with: pip install 'fedtide[{extra}]'"
            ) from error
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fedtide")
def command() -> None:
    """Asynchronous federated learning over MQTT for fleets of small devices.

    \b
    See it work first:   fedtide demo
    Run a coordinator:   fedtide init FLEET_DIR; fedtide plan build TASK.py; fedtide coordinator run
    Run a device:        fedtide agent init …; fedtide agent run
    """


def main() -> None:
    """Entry point: exit code 0 on success, 1 on an explained failure, 2 on wrong usage."""
    explained(command)()



