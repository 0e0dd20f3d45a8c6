"""Model slots: the device's copy of the global model, in two slots, so that one of them is always whole.

    a.model  b.model     length of the sealed head, the sealed head, the parameters
    plans/{plan}.plan    the signed plan

A new model replaces the older slot in one step (one rename, two syncs: cheap on an SD card). What is loaded
is verified again: signature, fingerprint, plan.
"""

import logging
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedtide.wire.durable import write_durably
from fedtide.wire.errors import WireError
from fedtide.wire.ids import PlanId
from fedtide.wire.messages import Head
from fedtide.wire.parameters import Vector, fingerprint, from_bytes
from fedtide.wire.plan import Plan, open_plan
from fedtide.wire.seal import unseal
from fedtide.wire.signatures import HEAD_DOMAIN, PublicKey

log = logging.getLogger(__name__)

_SLOTS: Final = ("a", "b")
_LENGTH: Final = struct.Struct("<I")


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
class _OpenedPlan:
    """A verified plan with the blob it came in."""

    blob: bytes
    plan: Plan


class WrongModel(Exception):
    """Content that does not belong to its head."""


class ModelSlots:
    """Two slots on disk.

    Args:
        directory: made if it is not there.
        key: the coordinator's, pinned.
        sync: False for simulated devices.
    """

    def __init__(self, directory: Path, key: PublicKey, *, sync: bool = True) -> None:
        (directory / "plans").mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._key = key
        self._sync = sync
        self._active: str | None = None
        self._active_plan: PlanId | None = None
        self._opened: _OpenedPlan | None = None

    def newest(self) -> InstalledModel | None:
        """The newest whole model on disk, or None."""
        found = [(slot, model) for slot in _SLOTS if (model := self._load(slot)) is not None]
        if not found:
            return None
        self._active, model = max(found, key=lambda pair: pair[1].head.order)
        self._active_plan = model.head.plan
        self._opened = _OpenedPlan(self._plan_file(model.head.plan).read_bytes(), model.plan)
        return model

    def plan_blob(self, plan: PlanId) -> bytes | None:
        """A plan's blob, if it is here."""
        if self._opened is not None and self._opened.plan.id == plan:
            return self._opened.blob
        file = self._plan_file(plan)
        return file.read_bytes() if file.exists() else None

    def install(self, sealed_head: bytes, head: Head, plan_blob: bytes, content: bytes) -> InstalledModel:
        """Verify a fetched model and write it to the slot that is not in use.

        Raises:
            WrongModel: parameters or plan are not the head's.
            WireError: the plan is malformed or not signed.
        """
        known, opened = self._opened, self._open(plan_blob)
        model = _checked(head, opened.plan, content)
        if known is not opened or not self._plan_file(head.plan).exists():
            write_durably(self._plan_file(head.plan), plan_blob, sync=self._sync)
            self._forget_other_plans(head.plan)
        self._opened = opened
        slot = "b" if self._active == "a" else "a"
        packed = _LENGTH.pack(len(sealed_head)) + sealed_head + content
        write_durably(self._slot_file(slot), packed, sync=self._sync)
        self._active, self._active_plan = slot, head.plan
        return model

    def _open(self, blob: bytes) -> _OpenedPlan:
        """Open a plan's blob, unless it is the one in use."""
        if self._opened is not None and self._opened.blob == blob:
            return self._opened
        return _OpenedPlan(blob, open_plan(blob, self._key))

    def _forget_other_plans(self, newest: PlanId) -> None:
        """Keep the plans of the newest model and of the one in use; a disk is not for history."""
        kept = {self._plan_file(plan) for plan in (newest, self._active_plan) if plan is not None}
        for file in (self._directory / "plans").glob("*.plan"):
            if file not in kept:
                file.unlink()

    def _load(self, slot: str) -> InstalledModel | None:
        try:
            sealed, content = _unpack(self._slot_file(slot).read_bytes())
            head = unseal(sealed, Head, self._key, HEAD_DOMAIN)
            opened = self._open(self._plan_file(head.plan).read_bytes())
            return _checked(head, opened.plan, content)
        except FileNotFoundError:
            return None
        except (WireError, WrongModel) as error:
            log.warning("Slot %s is not usable: %s", slot, error, extra={"event": "slot.damaged"})
            return None

    def _slot_file(self, slot: str) -> Path:
        return self._directory / f"{slot}.model"

    def _plan_file(self, plan: PlanId) -> Path:
        # A head is signed, but a name from the network never becomes a path unchecked.
        return self._directory / "plans" / f"{bytes.fromhex(plan).hex()}.plan"


def _unpack(packed: bytes) -> tuple[bytes, bytes]:
    if len(packed) < _LENGTH.size:
        raise WrongModel(f"a slot of {len(packed)} bytes")
    end = _LENGTH.size + _LENGTH.unpack_from(packed)[0]
    return packed[_LENGTH.size : end], packed[end:]


def _checked(head: Head, plan: Plan, content: bytes) -> InstalledModel:
    if plan.id != head.plan:
        raise WrongModel(f"the plan is {plan.id}; the head names {head.plan}")
    if len(content) != plan.manifest.schema.size * 4:
        raise WrongModel(f"{len(content):,} bytes of parameters; the plan has {plan.manifest.schema.size:,}")
    parameters = from_bytes(content)
    if fingerprint(parameters) != head.parameters_sha256:
        raise WrongModel(f"the parameters do not have the fingerprint of version {head.version}")
    return InstalledModel(head, plan, parameters)
