"""Model slots: the device's copy of the global model, in two slots, so that one of them is always whole.

    a.model  b.model     the sealed head and the parameters (:mod:`edge_agent.slot_file`)
    released.model       the same for the released model: the head that names it, its parameters
    plans/{plan}.plan    magic, CRC-32, the signed plan

A new model replaces the older slot in one step (one rename, two syncs: cheap on an SD card). What is loaded
is verified again: signature, fingerprint, plan; they cover every byte but a few bits of a plan's compression.
Another process may read while the agent writes.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.checked_file import body_of, checked
from edge_agent.slot_file import MOST_END_BYTES, first_head, last_head, packed, unpacked
from fedtide.wire.disk import OS_DISK, Disk, write_durably
from fedtide.wire.errors import WireError
from fedtide.wire.ids import Epoch, ModelVersion, PlanId
from fedtide.wire.messages import Head, Release
from fedtide.wire.parameters import Vector, fingerprint, from_bytes, to_bytes
from fedtide.wire.plan import Plan, open_plan
from fedtide.wire.seal import unseal
from fedtide.wire.signatures import HEAD_DOMAIN, PublicKey

log = logging.getLogger(__name__)

_SLOTS: Final = ("a", "b")
_RELEASED: Final = "released"
_PLANS: Final = "plans"
_PLAN_MAGIC: Final = b"ftp1"


@dataclass(frozen=True)
class InstalledModel:
    """A complete, verified model.

    Attributes:
        head: what it is.
        plan: how to train and run it.
        parameters: read-only float32 vector of the plan's schema.
    """

    head: Head
    plan: Plan
    parameters: Vector


@dataclass(frozen=True)
class ReleasedModel:
    """A complete, verified model for inference.

    Attributes:
        head: the one that names it.
        release: what it is.
        plan: how to run it.
        parameters: read-only float32 vector of the plan's schema.
    """

    head: Head
    release: Release
    plan: Plan
    parameters: Vector

    @property
    def order(self) -> tuple[Epoch, ModelVersion]:
        """Newer releases compare greater: by the coordinator's epoch, then by version."""
        return self.head.epoch, self.release.version


@dataclass(frozen=True)
class _OpenedPlan:
    """A verified plan with the blob it came in."""

    blob: bytes
    plan: Plan


class WrongModel(Exception):
    """Content that does not belong to its head."""


class ModelSlots:
    """Two slots on disk, and one for the released model.

    A file that is damaged or cannot be read is not used.

    Args:
        directory: made when something is installed.
        key: the coordinator's, pinned.
        disk: where the directory is.
    """

    def __init__(self, directory: Path, key: PublicKey, disk: Disk = OS_DISK) -> None:
        self._directory = directory
        self._key = key
        self._disk = disk
        self._active: str | None = None
        self._active_head: Head | None = None
        self._released_plan: PlanId | None = None
        self._opened: _OpenedPlan | None = None
        self._candidate: _OpenedPlan | None = None

    def take_over(self) -> None:
        """Make durable what a killed process installed, before this one runs it; for the one that writes.

        Raises:
            OSError: the disk failed.
        """
        for directory in (self._directory, self._directory / _PLANS):
            with contextlib.suppress(FileNotFoundError):
                self._disk.sync_directory(directory)

    def newest(self) -> InstalledModel | None:
        """The newest whole model on disk, or None."""
        found = [(slot, *loaded) for slot in _SLOTS if (loaded := self._load(slot)) is not None]
        if not found:
            return None
        self._active, model, self._opened = max(found, key=lambda each: each[1].head.order)
        self._active_head = model.head
        return model

    def last_head(self) -> Head | None:
        """The newest head in any slot, whether its model is still whole or not; None: there is none."""
        heads = [head for slot in (*_SLOTS, _RELEASED) for head in self._heads_in(self._slot_file(slot))]
        return max(heads, key=lambda head: head.order, default=None)

    def released(self) -> ReleasedModel | None:
        """The released model on disk, or None."""
        try:
            sealed, content = unpacked(self._disk.read(self._slot_file(_RELEASED)))
            head = unseal(sealed, Head, self._key, HEAD_DOMAIN)
            opened = self._open(self._read_plan(head.plan))
            model = _checked_release(head, opened.plan, content)
        except FileNotFoundError:
            return None
        except (WireError, WrongModel, OSError) as error:
            log.warning("The released model is not usable: %s", error, extra={"event": "slot.damaged"})
            return None
        self._released_plan = head.plan
        return model

    def content(self, parameters_sha256: bytes) -> bytes | None:
        """The bytes of the parameters with this fingerprint, if they are in one of the slots."""
        found: list[tuple[bytes, Vector]] = [
            (loaded[0].head.parameters_sha256, loaded[0].parameters)
            for slot in _SLOTS
            if (loaded := self._load(slot)) is not None
        ]
        released = self.released()
        if released is not None:
            found.append((released.release.parameters_sha256, released.parameters))
        return next((to_bytes(vector) for sha256, vector in found if sha256 == parameters_sha256), None)

    def plan_blob(self, plan: PlanId) -> bytes | None:
        """A plan's blob, if it is here and whole."""
        for opened in (self._opened, self._candidate):
            if opened is not None and opened.plan.id == plan:
                return opened.blob
        try:
            blob = self._read_plan(plan)
            self.plan(blob, plan)
        except FileNotFoundError:
            return None
        except (WireError, WrongModel, OSError) as error:
            log.warning("Plan %s is not usable: %s", plan, error, extra={"event": "slot.damaged"})
            return None
        return blob

    def plan(self, blob: bytes, wanted: PlanId) -> Plan:
        """The plan in a blob, verified; what is fetched next is bounded by its schema.

        Raises:
            WrongModel: it is another plan.
            WireError: it is malformed or not signed.
        """
        self._candidate = self._open(blob)
        _check_plan(self._candidate.plan, wanted)
        return self._candidate.plan

    def install(self, sealed_head: bytes, head: Head, plan_blob: bytes, content: bytes) -> InstalledModel:
        """Verify a fetched model and write it to the slot that is not in use.

        Raises:
            WrongModel: parameters or plan are not the head's.
            WireError: the plan is malformed or not signed.
            OSError: the disk is full or failed; the models installed before are still there.
        """
        opened = self._open(plan_blob)
        model = _checked(head, opened.plan, content)
        self._keep_plan(head.plan, opened)
        slot = "b" if self._active == "a" else "a"
        write_durably(self._disk, self._slot_file(slot), packed(sealed_head, content))
        self._active, self._active_head = slot, head
        return model

    def install_release(
        self, sealed_head: bytes, head: Head, plan_blob: bytes, content: bytes
    ) -> ReleasedModel:
        """Verify the release that a head names, and make it the released model in one step.

        Raises:
            WrongModel: parameters or plan are not the release's, or the head names none.
            WireError: the plan is malformed or not signed.
            OSError: the disk is full or failed; the release installed before is still there.
        """
        opened = self._open(plan_blob)
        model = _checked_release(head, opened.plan, content)
        self._keep_plan(head.plan, opened)
        if not self._link_active(head):
            write_durably(self._disk, self._slot_file(_RELEASED), packed(sealed_head, content))
        self._released_plan = head.plan
        return model

    def _link_active(self, head: Head) -> bool:
        """Where the newest model is what its head releases, a second name for its file saves writing it."""
        itself = head.release is not None and head.release.parameters_sha256 == head.parameters_sha256
        if self._active is None or head != self._active_head or not itself:
            return False
        target = self._slot_file(_RELEASED)
        link = target.with_name(target.name + ".new")
        try:
            self._disk.remove(link)
            self._disk.link(self._slot_file(self._active), link)
        except OSError:
            return False  # a file system without links
        self._disk.replace(link, target)
        self._disk.remove(link)  # renaming a file onto another name of itself does nothing
        self._disk.sync_directory(self._directory)
        return True

    def _keep_plan(self, plan: PlanId, opened: _OpenedPlan) -> None:
        """Write a plan's file, unless it is the one in use."""
        directory, file = self._directory / _PLANS, self._plan_file(plan)
        if opened is not self._opened or file.name not in self._disk.names(directory):
            self._disk.make_directory(directory)
            write_durably(self._disk, file, checked(_PLAN_MAGIC, opened.blob))
            self._forget_other_plans(plan)
        self._opened = opened

    def _open(self, blob: bytes) -> _OpenedPlan:
        """Open a plan's blob, unless it is the one in use or was opened last."""
        for opened in (self._opened, self._candidate):
            if opened is not None and opened.blob == blob:
                return opened
        return _OpenedPlan(blob, open_plan(blob, self._key))

    def _forget_other_plans(self, newest: PlanId) -> None:
        """Keep the plans of the newest model, the one in use and the released one: a disk is no history."""
        active = self._active_head.plan if self._active_head else None
        plans = (newest, active, self._released_plan)
        kept = {self._plan_file(plan).name for plan in plans if plan is not None}
        directory = self._directory / _PLANS
        for name in self._disk.names(directory):
            if name not in kept:  # what a power cut left unfinished among them
                self._disk.remove(directory / name)

    def _load(self, slot: str) -> tuple[InstalledModel, _OpenedPlan] | None:
        try:
            sealed, content = unpacked(self._disk.read(self._slot_file(slot)))
            head = unseal(sealed, Head, self._key, HEAD_DOMAIN)
            opened = self._open(self._read_plan(head.plan))
            return _checked(head, opened.plan, content), opened
        except FileNotFoundError:
            return None
        except (WireError, WrongModel, OSError) as error:
            log.warning("Slot %s is not usable: %s", slot, error, extra={"event": "slot.damaged"})
            return None

    def _heads_in(self, file: Path) -> Iterator[Head]:
        """Those at a slot's two ends that are as they were signed; only its ends are read."""
        try:
            size_bytes = self._disk.size(file)
            first = self._disk.read(file, 0, MOST_END_BYTES)
            last = self._disk.read(file, max(0, size_bytes - MOST_END_BYTES))
        except OSError:
            return
        for sealed in (first_head(first), last_head(last)):
            with contextlib.suppress(WireError):
                yield unseal(sealed, Head, self._key, HEAD_DOMAIN)

    def _read_plan(self, plan: PlanId) -> bytes:
        return body_of(_PLAN_MAGIC, self._disk.read(self._plan_file(plan)))

    def _slot_file(self, slot: str) -> Path:
        return self._directory / f"{slot}.model"

    def _plan_file(self, plan: PlanId) -> Path:
        # A head is signed, but a name from the network never becomes a path unchecked.
        return self._directory / _PLANS / f"{bytes.fromhex(plan).hex()}.plan"


def _checked(head: Head, plan: Plan, content: bytes) -> InstalledModel:
    return InstalledModel(
        head, plan, _checked_parameters(head.plan, plan, content, head.version, head.parameters_sha256)
    )


def _checked_release(head: Head, plan: Plan, content: bytes) -> ReleasedModel:
    release = head.release
    if release is None:
        raise WrongModel(f"the head of version {head.version} names no release")
    parameters = _checked_parameters(head.plan, plan, content, release.version, release.parameters_sha256)
    return ReleasedModel(head, release, plan, parameters)


def _check_plan(plan: Plan, wanted: PlanId) -> None:
    if plan.id != wanted:
        raise WrongModel(f"the plan is {plan.id}; the head names {wanted}")


def _checked_parameters(
    wanted: PlanId, plan: Plan, content: bytes, version: ModelVersion, parameters_sha256: bytes
) -> Vector:
    _check_plan(plan, wanted)
    if len(content) != plan.manifest.schema.size * 4:
        raise WrongModel(f"{len(content):,} bytes of parameters; the plan has {plan.manifest.schema.size:,}")
    parameters = from_bytes(content)
    if fingerprint(parameters) != parameters_sha256:
        raise WrongModel(f"the parameters do not have the fingerprint of version {version}")
    return parameters
