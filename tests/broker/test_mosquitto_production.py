"""The shipped production configuration, access rules and certificates, loaded in a real mosquitto."""

import os
import signal
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from broker_peer import Login, Peer, Refused

from broker_config.access import COORDINATOR_USER, mosquitto_acl
from broker_config.certificates import create_authority, issue, withdraw
from broker_config.local import LocalBroker, free_port, start_local_broker
from broker_config.mosquitto import ProductionSettings, production
from fedtide.wire.ids import fleet_id

pytestmark = pytest.mark.mosquitto

NOT_AUTHORIZED = 0x87
PASSWORD = "only for this test"


@dataclass(frozen=True)
class Fleet:
    """A production broker with its certificates."""

    broker: LocalBroker
    certificates: Path
    tls_port: int

    def device(self, name, **options):
        files = self.certificates / "devices" / name
        return self.over_tls(
            name,
            client_context(self.certificates, files.with_suffix(".crt"), files.with_suffix(".key")),
            **options,
        )

    def over_tls(self, name, context, *, user=None, password=None, version=5):
        login = Login(context, user, password)
        return Peer(("localhost", self.tls_port), name, version=version, login=login)

    def coordinator(self, password=PASSWORD):
        login = Login(user=COORDINATOR_USER, password=password)
        return Peer((self.broker.host, self.broker.port), "coordinator", version=5, login=login)


def client_context(authority_folder, certificate=None, key=None):
    context = ssl.create_default_context(cafile=authority_folder / "authority.crt")
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def is_refused(fleet, name):
    try:
        with fleet.device(name):
            return False
    except Refused:
        return True


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("production")
    certificates = folder / "certs"
    create_authority(certificates)
    issue(certificates, "test broker", "broker", ("localhost", "127.0.0.1"))
    issue(certificates, COORDINATOR_USER, "coordinator")
    for name in ("pump-a", "pump-b", "pump-lost", "pump-stolen"):
        issue(certificates, name)
    access, passwords = folder / "fleet.acl", folder / "passwords"
    access.write_text(mosquitto_acl(fleet_id("pumps")), encoding="utf-8")
    subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, COORDINATOR_USER, PASSWORD], check=True)
    settings = ProductionSettings(
        certificates=certificates,
        access_file=access,
        password_file=passwords,
        state=folder / "state",
        port=free_port(),
        local_port=free_port(),
        revocations=withdraw(certificates, "pump-stolen"),
    )
    # A test run as root: mosquitto would become a user who cannot read the test's folder.
    as_root = "user root\n" if os.geteuid() == 0 else ""
    with start_local_broker(
        folder, "mosquitto", as_root + production(settings), settings.local_port
    ) as broker:
        yield Fleet(broker, certificates, settings.port)


def test_a_device_publishes_its_own_update_to_the_coordinator(fleet):
    with fleet.coordinator() as coordinator, fleet.device("pump-a") as device:
        coordinator.subscribe("fl/1/pumps/up/0/+")
        assert device.publish("fl/1/pumps/up/0/pump-a", b"update") == 0
        message = coordinator.receive()
        assert (message.topic, message.payload) == ("fl/1/pumps/up/0/pump-a", b"update")


@pytest.mark.parametrize(
    "forbidden",
    [
        "fl/1/pumps/up/0/pump-b",
        "fl/1/pumps/st/pump-b",
        "fl/1/pumps/ev/pump-b",
        "fl/1/pumps/dn/pump-b",
        "fl/1/pumps/dn/pump-a",
        "fl/1/pumps/coord",
        "fl/1/pumps/model/head",
        "fl/1/pumps/model/b/0a/0",
        "fl/1/fans/up/0/pump-a",
    ],
)
def test_a_device_cannot_publish_where_the_topic_table_does_not_let_it(fleet, forbidden):
    with fleet.coordinator() as coordinator:
        coordinator.subscribe("fl/1/pumps/#")
        with fleet.device("pump-a") as device:
            # mosquitto 2.0 hangs up on a denied message over TLS, in some versions before it says why.
            assert device.publish(forbidden, b"forged") in {NOT_AUTHORIZED, None}
        with fleet.device("pump-a") as device:
            device.publish("fl/1/pumps/up/0/pump-a", b"marker")
        # The marker was sent after the forged message and is the only one that came.
        assert coordinator.receive().payload == b"marker"


def test_a_device_reads_its_own_receipts_and_not_those_of_others(fleet):
    with fleet.coordinator() as coordinator, fleet.device("pump-a") as device:
        # mosquitto grants any subscription and filters what it delivers.
        device.subscribe("fl/1/pumps/dn/pump-b", "fl/1/pumps/dn/+", "fl/1/pumps/dn/pump-a")
        coordinator.publish("fl/1/pumps/dn/pump-b", b"for pump-b")
        coordinator.publish("fl/1/pumps/dn/pump-a", b"for pump-a")
        assert device.receive().payload == b"for pump-a"


def test_a_device_cannot_listen_to_the_updates_of_others(fleet):
    with fleet.coordinator() as coordinator, fleet.device("pump-b") as other, fleet.device("pump-a") as spy:
        spy.subscribe("fl/1/pumps/up/#", "fl/1/pumps/st/#", "fl/1/pumps/coord")
        other.publish("fl/1/pumps/up/0/pump-b", b"private")
        other.publish("fl/1/pumps/st/pump-b", b"online")
        coordinator.publish("fl/1/pumps/coord", b"marker")
        assert spy.receive().payload == b"marker"


def test_a_device_reads_the_head_and_the_models_chunks(fleet):
    with fleet.coordinator() as coordinator, fleet.device("pump-a") as device:
        device.subscribe("fl/1/pumps/model/#")
        coordinator.publish("fl/1/pumps/model/b/0a/0", b"chunk")
        coordinator.publish("fl/1/pumps/model/head", b"head")
        assert [device.receive().payload for _ in range(2)] == [b"chunk", b"head"]


def test_a_device_that_speaks_mqtt_3_is_held_to_the_same_rules(fleet):
    with fleet.coordinator() as coordinator:
        coordinator.subscribe("fl/1/pumps/up/0/+")
        with fleet.device("pump-a", version=4) as device:
            device.publish("fl/1/pumps/up/0/pump-b", b"forged")
        with fleet.device("pump-a", version=4) as device:
            assert device.publish("fl/1/pumps/up/0/pump-a", b"marker") == 0
        assert coordinator.receive().payload == b"marker"


def test_a_device_that_claims_the_coordinators_name_and_password_stays_a_device(fleet):
    with fleet.coordinator() as coordinator:
        coordinator.subscribe("fl/1/pumps/model/head", "fl/1/pumps/up/0/pump-a")
        with fleet.device("pump-a", user=COORDINATOR_USER, password=PASSWORD) as device:
            assert device.publish("fl/1/pumps/model/head", b"forged") in {NOT_AUTHORIZED, None}
        with fleet.device("pump-a", user=COORDINATOR_USER, password=PASSWORD) as device:
            device.publish("fl/1/pumps/up/0/pump-a", b"marker")
        assert coordinator.receive().payload == b"marker"


def test_a_coordinator_on_another_machine_comes_in_with_its_certificate(fleet):
    files = fleet.certificates / "coordinator.crt", fleet.certificates / "coordinator.key"
    context = client_context(fleet.certificates, *files)
    with fleet.over_tls("remote", context) as coordinator, fleet.device("pump-a") as device:
        device.subscribe("fl/1/pumps/model/head")
        assert coordinator.publish("fl/1/pumps/model/head", b"head") == 0
        assert device.receive().payload == b"head"


def test_a_device_without_a_certificate_is_refused(fleet):
    with pytest.raises(Refused), fleet.over_tls("pump-a", client_context(fleet.certificates)):
        pass


def test_a_certificate_of_another_authority_is_refused(fleet, tmp_path):
    create_authority(tmp_path)
    foreign = issue(tmp_path, "pump-a")
    context = client_context(fleet.certificates, foreign.certificate, foreign.key)
    with pytest.raises(Refused), fleet.over_tls("pump-a", context):
        pass


def test_the_brokers_certificate_does_not_let_anybody_in(fleet):
    files = fleet.certificates / "broker.crt", fleet.certificates / "broker.key"
    context = client_context(fleet.certificates, *files)
    with pytest.raises(Refused), fleet.over_tls("pump-a", context):
        pass


def test_a_withdrawn_certificate_is_refused(fleet):
    with pytest.raises(Refused), fleet.device("pump-stolen"):
        pass


def test_a_certificate_withdrawn_later_is_refused_once_mosquitto_reads_the_list_again(fleet):
    with fleet.device("pump-lost"):
        pass
    withdraw(fleet.certificates, "pump-lost")
    os.kill(fleet.broker.pid, signal.SIGHUP)
    # The signal is acted upon between two connections; each attempt waits for the broker's answer.
    assert any(is_refused(fleet, "pump-lost") for _ in range(100))
    with fleet.device("pump-a"):
        pass


def test_a_device_refuses_a_broker_of_another_authority(fleet, tmp_path):
    create_authority(tmp_path)
    context = client_context(tmp_path)
    with (
        socket.create_connection(("localhost", fleet.tls_port)) as connection,
        pytest.raises(ssl.SSLCertVerificationError, match=r"local issuer|self.signed"),
    ):
        context.wrap_socket(connection, server_hostname="localhost")


def test_the_local_listener_wants_the_coordinators_password(fleet):
    with pytest.raises(Refused), fleet.coordinator("wrong"):
        pass
    address = fleet.broker.host, fleet.broker.port
    with pytest.raises(Refused), Peer(address, "nobody", version=5):
        pass


def test_mosquitto_warns_of_nothing_but_patterns_for_everybody(fleet):
    log = fleet.broker.log_path.read_text(encoding="utf-8")
    warnings = [line.partition(": ")[2] for line in log.splitlines() if "Warning" in line]
    # The three topics every device reads. Said again each time the rules are read.
    assert set(warnings) - {"Warning: Mosquitto should not be run as root/administrator."} == {
        f"Warning: ACL pattern 'fl/1/pumps/{topic}' does not contain '%c' or '%u'."
        for topic in ("coord", "model/head", "model/b/+/+")
    }
