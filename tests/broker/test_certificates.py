"""Certificates do what their kind says, and keys stay private."""

import ssl
import stat

import pytest
from cryptography import x509

from broker_config.certificates import create_authority, issue, withdraw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("authority")
    create_authority(made)
    issue(made, "the broker", "broker", ("broker.local", "192.168.7.2"))
    issue(made, "pump-1")
    return made


def handshake(folder, *, broker, device, host="broker.local"):
    """Run a mutual TLS handshake in memory: no sockets. Raises what either side raises."""
    sides = []
    for purpose, stem in ((ssl.Purpose.CLIENT_AUTH, broker), (ssl.Purpose.SERVER_AUTH, device)):
        context = ssl.create_default_context(purpose, cafile=folder / "authority.crt")
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(folder / f"{stem}.crt", folder / f"{stem}.key")
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        is_broker = purpose is ssl.Purpose.CLIENT_AUTH
        name = None if is_broker else host
        side = context.wrap_bio(incoming, outgoing, server_side=is_broker, server_hostname=name)
        sides.append((side, incoming, outgoing))
    (listening, to_broker, from_broker), (connecting, to_device, from_device) = sides
    # Three flights of TLS 1.3: hello, the broker's answer, the device's certificate.
    for side in (connecting, listening, connecting, listening):
        to_broker.write(from_device.read())
        to_device.write(from_broker.read())
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return listening.getpeercert()


def test_the_broker_learns_the_device_id_from_the_certificate(folder):
    peer = handshake(folder, broker="broker", device="devices/pump-1")
    assert peer["subject"] == ((("commonName", "pump-1"),),)


def test_a_device_reaches_the_broker_by_any_of_its_hosts(folder):
    assert handshake(folder, broker="broker", device="devices/pump-1", host="192.168.7.2")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(folder, broker="broker", device="devices/pump-1", host="elsewhere.local")


def test_a_device_cannot_pose_as_the_broker(folder):
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake(folder, broker="devices/pump-1", device="devices/pump-1", host="pump-1")


def test_a_broker_cannot_pose_as_a_device(folder):
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake(folder, broker="broker", device="broker")


def test_only_the_owner_reads_a_key(folder):
    keys = sorted(folder.rglob("*.key"))
    assert [key.name for key in keys] == ["authority.key", "broker.key", "pump-1.key"]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_a_device_cannot_certify_another(folder):
    certificate = x509.load_pem_x509_certificate((folder / "devices" / "pump-1.crt").read_bytes())
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False


def test_a_device_called_broker_does_not_take_the_brokers_files(folder):
    before = (folder / "broker.crt").read_bytes()
    assert issue(folder, "broker").certificate == folder / "devices" / "broker.crt"
    assert (folder / "broker.crt").read_bytes() == before


def test_nothing_issued_is_ever_overwritten(folder):
    key = (folder / "devices" / "pump-1.key").read_bytes()
    with pytest.raises(ValueError, match=r"pump-1\.key exists; move it away"):
        issue(folder, "pump-1")
    with pytest.raises(ValueError, match=r"authority\.key exists"):
        create_authority(folder)
    assert (folder / "devices" / "pump-1.key").read_bytes() == key


def test_a_list_of_withdrawn_certificates_grows_and_names_each_once(tmp_path):
    create_authority(tmp_path)
    serials = set()
    for name in ("pump-1", "pump-2"):
        issued = issue(tmp_path, name).certificate.read_bytes()
        serials.add(x509.load_pem_x509_certificate(issued).serial_number)
    withdraw(tmp_path, "pump-1")
    withdraw(tmp_path, "pump-2")
    listed = x509.load_pem_x509_crl(withdraw(tmp_path, "pump-1").read_bytes())
    assert [entry.serial_number in serials for entry in listed] == [True, True]
    authority = x509.load_pem_x509_certificate((tmp_path / "authority.crt").read_bytes())
    assert listed.is_signature_valid(authority.public_key())
    # A list that has run out would refuse every device.
    assert listed.next_update_utc == authority.not_valid_after_utc


def test_there_is_nothing_to_withdraw_for_an_unknown_device(folder):
    with pytest.raises(ValueError, match="no certificate for device 'pump-9'"):
        withdraw(folder, "pump-9")


def test_without_an_authority_nothing_is_issued(tmp_path):
    with pytest.raises(ValueError, match=r"has no authority\.crt: call create_authority first"):
        issue(tmp_path, "pump-1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "Pump", "a/b", "../authority", "x" * 65, "pump 1"])
def test_a_device_name_that_is_no_device_id_is_refused(folder, name):
    with pytest.raises(ValueError, match="device id"):
        issue(folder, name)


@pytest.mark.parametrize("name", ["a/b", "../authority"])
def test_withdrawing_looks_nowhere_but_among_the_devices(folder, name):
    with pytest.raises(ValueError, match="device id"):
        withdraw(folder, name)


def test_no_device_gets_the_coordinators_name(folder):
    with pytest.raises(ValueError, match="device id 'coordinator' is not allowed"):
        issue(folder, "coordinator")
    with pytest.raises(ValueError, match="common name is 'coordinator', not 'pump-2'"):
        issue(folder, "pump-2", "coordinator")


def test_only_a_broker_has_hosts_and_it_must_have_some(folder):
    with pytest.raises(ValueError, match="pass hosts"):
        issue(folder, "another broker", "broker")
    with pytest.raises(ValueError, match="hosts are for a broker"):
        issue(folder, "pump-3", "device", ("pump-3.local",))


@pytest.mark.parametrize(
    "host", ["", "broker.local:8883", "*", "Broker.local", "-a", "a..b", "10.0.0.300/8", "x" * 64]
)
def test_a_host_that_is_no_name_or_address_is_refused(folder, host):
    with pytest.raises(ValueError, match="neither an IP address nor"):
        issue(folder, "another broker", "broker", (host,))


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb"])
def test_a_common_name_outside_the_standard_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="1 to 64 printable characters"):
        create_authority(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_kind_that_does_not_exist_is_refused(folder):
    with pytest.raises(ValueError, match="no certificate of kind 'admin'"):
        issue(folder, "pump-4", "admin")
