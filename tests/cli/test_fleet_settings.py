"""The settings that a new fleet begins with: every line that is commented out would be understood."""

import re
from pathlib import Path

import msgspec

from coordinator.settings import CoordinatorSettings, Journal, Pacing, Share
from fedtide.fleet_directory import NewFleet, create
from fedtide.wire.ids import FleetId

COMMENTED_OUT = re.compile(r"^# (?=\[|\w+ = )", re.MULTILINE)


def decoded(text: str) -> CoordinatorSettings:
    return msgspec.toml.decode(text, type=CoordinatorSettings, dec_hook=lambda _type, value: Path(value))


def test_whatever_is_commented_out_is_a_setting_with_its_place(tmp_path: Path) -> None:
    directory, _ = create(tmp_path / "fleet", NewFleet(fleet=FleetId("pumps"), broker="127.0.0.1:1883"))
    text = directory.settings_file.read_text()
    shown = decoded(COMMENTED_OUT.sub("", text))
    assert shown.rollback is not None
    assert shown.stop.versions == 1000
    assert (shown.journal, shown.pacing, shown.share) == (Journal(), Pacing(), Share())
    assert decoded(text).rollback is None
