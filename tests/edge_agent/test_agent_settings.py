from pathlib import Path

import pytest
from agent_world import COORDINATOR_KEY

from edge_agent.data_sources import Csv
from edge_agent.settings import AgentSettings, LocalTraining
from fedtide.wire.settings import SettingsError, parse
from fedtide.wire.training import Training

MINIMAL = f"""
fleet = "pumps"
device = "pump-7"
coordinator_key = "{COORDINATOR_KEY.public}"
key = "device.key"
state = "state"
data = {{kind = "csv", path = "examples.csv"}}
"""


def read(text: str) -> AgentSettings:
    return parse(text, AgentSettings, "agent.toml", Path("/etc/fedtide"))


def test_the_shortest_settings_have_defaults_for_the_rest() -> None:
    settings = read(MINIMAL)
    assert settings.data == Csv(path=Path("/etc/fedtide/examples.csv"))
    assert settings.state == Path("/etc/fedtide/state")
    assert settings.training == LocalTraining()
    assert settings.broker.hosts == ("127.0.0.1:1883",)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"pump-7"', '"Pump 7"', "device id 'Pump 7' is not allowed"),
        ('"pumps"', '"a/b"', "fleet id 'a/b' is not allowed"),
        (str(COORDINATOR_KEY.public), "abc", "64 hexadecimal digits"),
        (str(COORDINATOR_KEY.public), "ab", "32 bytes, not 1"),
        ('"csv"', '"sql"', r"'sql' - at `\$\.data\.kind`"),
        ('"csv", path', '"csv", paths', r"`\$\.data`"),
        ('device = "pump-7"', "", "missing required field `device`"),
    ],
)
def test_a_mistake_is_named(old: str, new: str, complaint: str) -> None:
    assert old in MINIMAL
    with pytest.raises(SettingsError, match=complaint):
        read(MINIMAL.replace(old, new))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("local_epochs = 0", r">= 1 - at `\$\.training\.local_epochs`"),
        ("learning_rate = 0.0", r"> 0.* - at `\$\.training\.learning_rate`"),
        ("epochs = 3", "unknown field `epochs`"),
        ("evaluation_share = 1.0", r"< 1.* - at `\$\.training\.evaluation_share`"),
    ],
)
def test_a_mistake_in_the_training_table_is_named(line: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        read(f"{MINIMAL}\n[training]\n{line}")


def test_a_device_departs_from_the_plan_only_where_its_settings_say_so() -> None:
    plan = Training(local_epochs=2, batch_size=16, learning_rate=0.25, max_steps=100)
    assert LocalTraining().applied_to(plan) == plan
    assert LocalTraining(local_epochs=5, learning_rate=0.5).applied_to(plan) == Training(
        local_epochs=5, batch_size=16, learning_rate=0.5, max_steps=100
    )
    assert LocalTraining(batch_size=8, max_steps=10).applied_to(plan) == Training(
        local_epochs=2, batch_size=8, learning_rate=0.25, max_steps=10
    )


@pytest.mark.parametrize(("own", "share"), [(None, 0.25), (0.0, 0.0), (0.5, 0.5)])
def test_a_device_may_hold_out_more_or_nothing(own: float | None, share: float) -> None:
    plan = Training(evaluation_share=0.25)
    assert LocalTraining(evaluation_share=own).applied_to(plan).evaluation_share == share


def test_the_released_model_is_kept_unless_the_settings_say_otherwise() -> None:
    assert read(MINIMAL).inference.keep
    assert not read(f"{MINIMAL}\n[inference]\nkeep = false").inference.keep
    with pytest.raises(SettingsError, match=r">= 0.* - at `\$\.inference\.min_interval_s`"):
        read(f"{MINIMAL}\n[inference]\nmin_interval_s = -1.0")


def test_a_device_may_turn_off_what_the_plan_turns_on() -> None:
    plan = Training(proximal=0.5, class_weights="balanced", optimizer_state="keep", max_seconds=60.0)
    own = LocalTraining(proximal=0.0, class_weights="equal", optimizer_state="reset", max_seconds=5.0)
    assert own.applied_to(plan) == Training(max_seconds=5.0)


def test_a_devices_memory_limit_is_in_mebibytes() -> None:
    assert read(MINIMAL).training.memory_bytes is None
    assert read(f"{MINIMAL}\n[training]\nmax_memory_mb = 1.5").training.memory_bytes == 1_572_864
