"""The shipped files are the generated ones, and the generators refuse what mosquitto would misread."""

from pathlib import Path

import pytest

from broker_config.local import start_local_broker
from broker_config.mosquitto import ProductionSettings, development, production
from broker_config.nats import embedded
from broker_config.ready_files import FOLDER, ready_files


def settings_of(text):
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(("name", "text"), ready_files(), ids=[name for name, _ in ready_files()])
def test_a_shipped_file_is_the_generated_one(name, text):
    assert (FOLDER / name).read_text(encoding="utf-8") == text, "python -m broker_config.ready_files"


def test_every_shipped_configuration_file_is_generated():
    shipped = {path.name for path in FOLDER.iterdir() if path.suffix in {".conf", ".acl"}}
    assert shipped == {name for name, _ in ready_files()}


def test_production_asks_every_device_for_a_certificate():
    lines = settings_of(production(ProductionSettings()))
    tls = lines[lines.index("listener 8883") : lines.index("listener 1883 127.0.0.1")]
    assert {"require_certificate true", "use_identity_as_username true", "tls_version tlsv1.2"} <= set(tls)
    assert "allow_anonymous false" in lines
    assert "acl_file /etc/mosquitto/fleet.acl" in lines


def test_development_and_production_have_the_same_limits():
    limits = {"max_queued_messages 20000", "max_queued_bytes 536870912", "max_packet_size 1048576"}
    assert limits <= set(settings_of(development(1883)))
    assert limits <= set(settings_of(production(ProductionSettings())))


def test_no_setting_has_a_comment_behind_it():
    # mosquitto takes the rest of the line as the value.
    for text in (development(1883), production(ProductionSettings(revocations=Path("/etc/mosquitto/x.crl")))):
        assert not any("#" in line for line in settings_of(text))


def test_revocations_are_read_only_where_there_is_a_list():
    assert "crlfile" not in production(ProductionSettings())
    listed = production(ProductionSettings(revocations=Path("/etc/mosquitto/certs/authority.crl")))
    assert "crlfile /etc/mosquitto/certs/authority.crl" in settings_of(listed)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_is_none_is_refused(port, tmp_path):
    with pytest.raises(ValueError, match=f"port {port} is not a TCP port"):
        development(port)
    with pytest.raises(ValueError, match=f"port {port} is not a TCP port"):
        embedded(port, tmp_path)
    with pytest.raises(ValueError, match=f"port {port} is not a TCP port"):
        ProductionSettings(port=port)


def test_two_listeners_on_one_port_are_refused():
    with pytest.raises(ValueError, match="both 8883"):
        ProductionSettings(port=8883, local_port=8883)


def test_a_value_that_would_start_a_line_of_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one line"):
        development(1883, "127.0.0.1\nallow_anonymous true")
    with pytest.raises(ValueError, match="one line"):
        development(1883, run_as="root\nlistener 1")
    with pytest.raises(ValueError, match="one line"):
        ProductionSettings(access_file=tmp_path / "a\nb")


def test_a_relative_path_is_refused():
    with pytest.raises(ValueError, match="relative"):
        ProductionSettings(state=Path("state"))


def test_nats_must_wait_a_second_before_it_sends_again(tmp_path):
    with pytest.raises(ValueError, match="ack_wait is 0 s"):
        embedded(1883, tmp_path, ack_wait=0)


@pytest.mark.mosquitto
def test_mosquitto_loads_the_shipped_development_file(tmp_path, free_tcp_port):
    # The shipped file's own port may be taken here.
    text = (FOLDER / "development.conf").read_text(encoding="utf-8").replace("1883", str(free_tcp_port))
    with start_local_broker(tmp_path, "mosquitto", text, free_tcp_port) as broker:
        assert broker.running
        assert "Warning" not in broker.log_tail()
