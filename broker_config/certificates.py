"""A private certificate authority for a fleet's broker and devices.

A folder holds the authority and what it issued::

    authority.crt  authority.key   the authority; its key never leaves this folder
    authority.crl                  certificates withdrawn before their time, once there are any
    broker.crt     broker.key      copy to the broker's machine
    coordinator.crt coordinator.key  only for a coordinator on another machine than the broker
    devices/{id}.crt  devices/{id}.key  copy to that device, with authority.crt

Keys are ECDSA on P-256 (FIPS 186-5), which every TLS 1.2 library on a small device speaks; certificates
follow the profile of RFC 5280. Private keys are files of mode 0600 and are never overwritten.
"""

import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal, get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker_config.access import COORDINATOR_USER
from fedtide.wire.errors import MalformedId
from fedtide.wire.ids import device_id

CertificateKind = Literal["device", "broker", "coordinator"]

# Devices sit where nobody comes by: certificates outlive the hardware, and withdrawing one is what ends it.
_AUTHORITY_LIFE: Final = timedelta(days=20 * 365)
_LIFE: Final = timedelta(days=10 * 365)
# A device without a battery-backed clock starts in the past.
_CLOCK_SLACK: Final = timedelta(days=1)
_HOST_NAME: Final = re.compile(
    r"(?!.{254})[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
)
_COMMON_NAME_LIMIT: Final = 64  # RFC 5280, appendix A.1: ub-common-name


@dataclass(frozen=True)
class Certificate:
    """Where an issued certificate and its private key lie, both in PEM."""

    certificate: Path
    key: Path


def create_authority(directory: Path, name: str = "fedtide fleet authority") -> Certificate:
    """Create a private authority: ``authority.crt`` and ``authority.key``.

    Args:
        directory: the folder, made with mode 0700 if missing.
        name: the authority's common name, 1 to 64 characters.

    Raises:
        ValueError: there is an authority in this folder, or the name is not allowed.
    """
    files = Certificate(directory / "authority.crt", directory / "authority.key")
    subject = _name(name)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    private = ec.generate_private_key(ec.SECP256R1())
    _write_key(files.key, private)
    certificate = (
        _builder(subject, subject, private.public_key(), _AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(private.public_key()), critical=False
        )
        .sign(private, hashes.SHA256())
    )
    _write_certificate(files.certificate, certificate)
    return files


def issue(
    directory: Path, common_name: str, kind: CertificateKind = "device", hosts: Iterable[str] = ()
) -> Certificate:
    """Create a key and have the folder's authority certify it.

    Args:
        directory: the folder of :func:`create_authority`.
        common_name: what mosquitto takes as the user's name: the device id, or ``coordinator``. Any for a
            broker.
        kind: what the certificate is good for: a broker is accepted by devices, the others by a broker.
        hosts: a broker's DNS names and IP addresses, every one that devices connect to.

    Raises:
        ValueError: there is no authority here, the certificate exists, the name is not allowed for this kind,
            a broker has no hosts or another kind has some, or there is no such kind.
    """
    names = _alternative_names(common_name, kind, tuple(hosts))
    authority, authority_key = _load_authority(directory)
    files = _place(directory, common_name, kind)
    files.key.parent.mkdir(mode=0o700, exist_ok=True)
    private = ec.generate_private_key(ec.SECP256R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if kind == "broker" else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(_name(common_name), authority.subject, private.public_key(), _LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(authority_key, hashes.SHA256())
    _write_key(files.key, private)
    _write_certificate(files.certificate, certificate)
    return files


def withdraw(directory: Path, device: str) -> Path:
    """Add a device's certificate to the authority's revocation list, ``authority.crl``, and return its path.

    mosquitto reads the list at start and on SIGHUP, when ``crlfile`` names it. The device's files stay, so
    that its id cannot be issued again by mistake.

    Raises:
        ValueError: there is no authority here, it issued nothing to that device, or that is no device id.
    """
    _check_device(device)
    authority, authority_key = _load_authority(directory)
    issued = _place(directory, device, "device").certificate
    if not issued.is_file():
        raise ValueError(f"no certificate for device {device!r} in {directory}: nothing to withdraw")
    serial = x509.load_pem_x509_certificate(issued.read_bytes()).serial_number
    path = directory / "authority.crl"
    now = datetime.now(tz=UTC)
    # A list that has run out refuses every device, so it lives as long as the authority.
    builder = x509.CertificateRevocationListBuilder(
        issuer_name=authority.subject,
        last_update=now - _CLOCK_SLACK,
        next_update=authority.not_valid_after_utc,
    )
    if path.is_file():
        for earlier in x509.load_pem_x509_crl(path.read_bytes()):
            if earlier.serial_number != serial:
                builder = builder.add_revoked_certificate(earlier)
    entry = x509.RevokedCertificateBuilder(serial_number=serial, revocation_date=now).build()
    signed = builder.add_revoked_certificate(entry).sign(authority_key, hashes.SHA256())
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    return path


def _place(directory: Path, common_name: str, kind: CertificateKind) -> Certificate:
    # Devices have a folder of their own: one may be called "broker".
    stem = directory / "devices" / common_name if kind == "device" else directory / kind
    return Certificate(stem.with_name(f"{stem.name}.crt"), stem.with_name(f"{stem.name}.key"))


def _alternative_names(
    common_name: str, kind: CertificateKind, hosts: tuple[str, ...]
) -> list[x509.GeneralName]:
    if kind not in get_args(CertificateKind):
        raise ValueError(
            f"no certificate of kind {kind!r}: take one of {', '.join(get_args(CertificateKind))}"
        )
    if kind == "device":
        _check_device(common_name)
    if kind == "device" and common_name == COORDINATOR_USER:
        raise ValueError(
            f"a device may not be called {COORDINATOR_USER!r}: that user may write the whole fleet's topics"
        )
    if kind == "coordinator" and common_name != COORDINATOR_USER:
        raise ValueError(f"a coordinator's common name is {COORDINATOR_USER!r}, not {common_name!r}")
    if kind != "broker" and hosts:
        raise ValueError(f"hosts are for a broker's certificate; {kind} {common_name!r} came with {hosts!r}")
    if kind == "broker" and not hosts:
        raise ValueError("a broker's certificate needs the names or addresses devices connect to: pass hosts")
    return [_host(text) for text in hosts]


def _check_device(name: str) -> None:
    # The name becomes a file's: this also keeps it inside the folder.
    try:
        device_id(name)
    except MalformedId as error:
        raise ValueError(str(error)) from error


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if not _HOST_NAME.fullmatch(text):
            raise ValueError(
                f"host {text!r} is neither an IP address nor a lower-case DNS name without port"
            ) from None
        return x509.DNSName(text)


def _name(common_name: str) -> x509.Name:
    if not 1 <= len(common_name) <= _COMMON_NAME_LIMIT or not common_name.isprintable():
        raise ValueError(f"common name {common_name[:80]!r}: 1 to {_COMMON_NAME_LIMIT} printable characters")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _load_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate((directory / "authority.crt").read_bytes())
        key = serialization.load_pem_private_key((directory / "authority.key").read_bytes(), password=None)
    except FileNotFoundError as error:
        raise ValueError(
            f"{directory} has no {Path(error.filename).name}: call create_authority first"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(  # noqa: TRY004 - a file's content, not an argument's type
            f"{directory / 'authority.key'} is not an elliptic-curve key: not made by create_authority"
        )
    return certificate, key


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(tz=UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        # The mode at creation: there is no moment in which others can read the key.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ValueError(f"{path} exists; move it away to make a new one") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(text)


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
