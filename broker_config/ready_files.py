"""The configuration files shipped beside this module, as generated. Run the module to write them again."""

from pathlib import Path
from typing import Final

from broker_config.access import mosquitto_acl
from broker_config.mosquitto import ProductionSettings, development, production
from fedtide.wire.ids import FleetId

EXAMPLE_FLEET: Final = FleetId("pumps")
FOLDER: Final = Path(__file__).resolve().parent


def ready_files() -> tuple[tuple[str, str], ...]:
    """The shipped files: name and text of each."""
    return (
        ("development.conf", development(1883)),
        ("production.conf", production(ProductionSettings())),
        ("fleet.acl", mosquitto_acl(EXAMPLE_FLEET)),
    )


if __name__ == "__main__":
    for name, text in ready_files():
        (FOLDER / name).write_text(text, encoding="utf-8")
