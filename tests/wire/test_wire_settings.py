from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from msgspec import Meta

from fedtide.wire.link import Broker, Tls
from fedtide.wire.settings import SettingsError, load, parse


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    state: Path = Path("state")
    goal: Annotated[int, Meta(ge=1)] = 10
    broker: Broker = Broker()


def read(text: str, directory: Path = Path("fleet")) -> Settings:
    return parse(text, Settings, "fleet/coordinator.toml", directory)


def test_tables_become_typed_objects_and_what_is_left_out_its_default() -> None:
    settings = read('name = "pumps"\n[broker]\nhosts = ["a:1883", "b:1884"]\nkeepalive_s = 30\n')
    assert settings == Settings(
        name="pumps",
        broker=Broker(hosts=("a:1883", "b:1884"), keepalive_s=30),
    )
    assert settings.broker.reconnect_max_s == 120.0


def test_relative_paths_are_relative_to_the_file_and_absolute_ones_stay() -> None:
    tls = '[broker.tls]\nauthority = "/etc/ca.pem"\ncertificate = "tls/own.pem"\n'
    text = f'name = "pumps"\nstate = "data"\n{tls}'
    settings = read(text, Path("/srv/fleet"))
    assert settings.state == Path("/srv/fleet/data")
    assert settings.broker.tls == Tls(
        authority=Path("/etc/ca.pem"), certificate=Path("/srv/fleet/tls/own.pem")
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('name = "pumps"\n[broker]\nhosts = []', r"length >= 1 - at `\$\.broker\.hosts`"),
        ('name = "pumps"\n[broker]\nhosts = [1883]', r"`str`, got `int` - at `\$\.broker\.hosts\[0\]`"),
        ('name = "pumps"\n[broker]\nhosts = "a:1883"', r"`array`, got `str` - at `\$\.broker\.hosts`"),
        ('name = "pumps"\n[broker]\nhost = "a:1883"', r"unknown field `host` - at `\$\.broker`"),
        ('name = "pumps"\n[broker]\nkeepalive_s = 4', r">= 5 - at `\$\.broker\.keepalive_s`"),
        (
            'name = "pumps"\n[broker]\nkeepalive_s = 30.0',
            r"`int`, got `float` - at `\$\.broker\.keepalive_s`",
        ),
        ('name = "pumps"\ngoal = 0', r">= 1 - at `\$\.goal`"),
        ('name = "pumps"\ngoal = "10"', r"`int`, got `str` - at `\$\.goal`"),
        ('name = "pumps"\ngaol = 1', "unknown field `gaol`"),
        ('name = "pumps"\nstate = 7', r"expected .*Path, got 7 - at `\$\.state`"),
        ('name = "pumps"\n[broker.tls]\n', r"missing required field `authority` - at `\$\.broker\.tls`"),
        ("goal = 1", "missing required field `name`"),
        ('name = "pumps', "is not TOML: Unterminated"),
        ('name = "a"\nname = "b"', "is not TOML: .*overwrite"),
    ],
)
def test_an_error_names_the_file_the_place_and_what_would_be_right(text: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint) as refused:
        read(text)
    assert str(refused.value).startswith("fleet/coordinator.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "coordinator.toml"
    with pytest.raises(SettingsError, match=f"cannot read {file}: No such file"):
        load(file, Settings)


def test_a_file_is_read_as_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_bytes('name = "Füllstand"\nstate = "data"'.encode())
    assert load(file, Settings) == Settings(name="Füllstand", state=tmp_path / "data")


def test_a_file_that_is_no_text_is_not_toml(tmp_path: Path) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_bytes(b'name = "F\xfcllstand"')
    with pytest.raises(SettingsError, match=r"is not TOML: .*utf-8"):
        load(file, Settings)
