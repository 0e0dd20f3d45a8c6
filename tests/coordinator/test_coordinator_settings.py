"""The ``[update]`` table: which codec, how finely, and from which version on."""

from pathlib import Path

import pytest

from coordinator.settings import DEFAULT_CODEC, CoordinatorSettings, Update
from fedtide.fleet_directory import NewFleet, create
from fedtide.wire import codecs
from fedtide.wire.codecs.float32 import Float32
from fedtide.wire.messages import CodecRequest
from fedtide.wire.settings import SettingsError, parse

MINIMAL = 'fleet = "pumps"\nplan = "model.plan"\n'
SCHEDULE = """
[update]
codec = "adjustable"
codec_parameters = { step = 16 }
[[update.later]]
from_version = 200
codec_parameters = { step = 8.5 }
[[update.later]]
from_version = 300
codec_parameters = { bits_per_parameter = 0.05 }
"""


class Adjustable(Float32):
    """Some codec with a rate."""

    codec_id = "adjustable"
    adjustable = True


@pytest.fixture(autouse=True)
def with_an_adjustable_codec(monkeypatch):
    monkeypatch.setattr(codecs, "CODECS", {**codecs.CODECS, "adjustable": Adjustable()})


def update(text):
    return parse(MINIMAL + text, CoordinatorSettings, "coordinator.toml", Path()).update


def test_without_a_word_the_default_codec_is_asked_for_at_its_own_rate():
    assert update("") == Update()
    assert Update().request_at(0) == CodecRequest(id=DEFAULT_CODEC)
    assert DEFAULT_CODEC in codecs.CODECS


@pytest.mark.parametrize(
    ("version", "parameters"),
    [
        (0, {"step": 16.0}),
        (199, {"step": 16.0}),
        (200, {"step": 8.5}),
        (299, {"step": 8.5}),
        (300, {"bits_per_parameter": 0.05}),
        (10**9, {"bits_per_parameter": 0.05}),
    ],
)
def test_the_rate_follows_the_versions(version, parameters):
    assert update(SCHEDULE).request_at(version) == CodecRequest(id="adjustable", parameters=parameters)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            '"adjustable"',
            '"zfp"',
            r"unknown codec 'zfp'; this build has float32, .*adjustable - at `\$\.update`",
        ),
        ("step = 16", "stop = 16", r"adjustable has no parameter 'stop'; it has: step, .* - at `\$\.update`"),
        ("step = 16", "step = 65", r"step = 65; it must be from .* to 64 - at `\$\.update`"),
        ("step = 16", 'step = "16"', r"Expected `float`, got `str` - at `\$\.update\.codec_parameters"),
        ("step = 16", "step = 16, bytes_per_update = 9", "step and bytes_per_update are given"),
        ("step = 8.5", "stop = 8.5", r"later, from_version = 200: codec adjustable has no parameter 'stop'"),
        ("step = 8.5", "step = -1", r"later, from_version = 200: step = -1; it must be above 0"),
        ("= 300", "= 200", r"later: from_version = 200 comes after 200; it must rise - at `\$\.update`"),
        ("= 300", "= 100", r"later: from_version = 100 comes after 200; it must rise"),
        ("from_version = 200", "from_version = 0", r">= 1 - at `\$\.update\.later\[0\]\.from_version`"),
        ("from_version = 200", "from = 200", "unknown field `from`"),
        ('"adjustable"', '"q8"', "codec q8 has no parameter 'step'; it has: none"),
    ],
)
def test_a_mistake_in_the_update_table_is_named(old, new, complaint):
    assert old in SCHEDULE
    with pytest.raises(SettingsError, match=complaint):
        update(SCHEDULE.replace(old, new, 1))


def test_a_rate_for_later_needs_a_codec_that_has_one():
    with pytest.raises(SettingsError, match="later, from_version = 5: codec q8 has no parameter 'step'"):
        update(
            '[update]\ncodec = "q8"\n[[update.later]]\nfrom_version = 5\ncodec_parameters = { step = 8.0 }\n'
        )


def test_what_a_new_fleets_settings_show_of_the_rate_can_be_used(tmp_path):
    directory, _ = create(tmp_path, NewFleet("pumps", "127.0.0.1:1883"))
    text = directory.settings_file.read_text()
    assert directory.settings().update == Update()
    for line in (
        "codec_parameters = { step = 8.0 }",
        "[[update.later]]",
        "from_version = 200",
        "codec_parameters = { step = 4.0 }",
    ):
        assert text.count(f"# {line}") == 1
        text = text.replace(f"# {line}", line)
    text = text.replace(f'codec = "{DEFAULT_CODEC}"', 'codec = "adjustable"')
    directory.settings_file.write_text(text)
    found = directory.settings().update
    assert found.request_at(199) == CodecRequest(id="adjustable", parameters={"step": 8.0})
    assert found.request_at(200) == CodecRequest(id="adjustable", parameters={"step": 4.0})
