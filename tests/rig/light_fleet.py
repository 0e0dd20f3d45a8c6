"""A fleet of light devices, which comes at one moment."""

import asyncio
from collections import Counter as Tally
from collections.abc import Sequence
from typing import Final

import light_packets as light
import numpy as np
from light_devices import LightDevice, LightRecord, LightUpdate, Place

from fedtide.wire.messages import DownMessage, Receipt
from fedtide.wire.seal import unseal_any
from fedtide.wire.signatures import DOWN_DOMAIN

_HOST: Final = "127.0.0.1"


class LightFleet:
    """The devices of one process.

    Args:
        place: where they connect.
        updates: one per device.
        rng: draws every wait.

    Attributes:
        record: what became of the updates.
    """

    def __init__(self, place: Place, updates: Sequence[LightUpdate], rng: np.random.Generator) -> None:
        self.record = LightRecord(place, rng)
        self._devices = [LightDevice(self.record, update, self._dial, self._look) for update in updates]
        self._dialling: set[asyncio.Task[None]] = set()
        self._done = asyncio.Event()

    async def run(self, within_s: float) -> float:
        """Start every device at a random moment within so many seconds; return when all have receipts.

        Returns:
            When the first was started, in seconds of the event loop.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        moments = np.sort(self.record.rng.uniform(0.0, within_s, len(self._devices)))
        for device, moment in zip(self._devices, moments, strict=True):
            loop.call_at(began + float(moment), device.start)
        staying = asyncio.create_task(self._stay_connected())
        try:
            await self._done.wait()
        finally:
            staying.cancel()
        return began

    def leave(self) -> None:
        """Every device says goodbye."""
        for task in self._dialling:
            task.cancel()
        for device in self._devices:
            device.leave()

    def verdicts(self) -> Tally[str]:
        """How many updates met which verdict, or were rejected for which reason.

        Raises:
            WireError: a receipt is not signed by the coordinator.
            ValueError: a device took another one's.
        """
        found: Tally[str] = Tally()
        for device, sealed in self.record.receipts.items():
            receipt = unseal_any(sealed, DownMessage, self.record.place.coordinator, DOWN_DOMAIN)
            if not isinstance(receipt, Receipt) or receipt.device != device:
                raise ValueError(f"device {device} took this for its receipt: {receipt}")
            found[(receipt.reason or receipt.verdict).value] += 1
        return found

    def _look(self) -> None:
        if len(self.record.receipts) == len(self._devices):
            self._done.set()

    def _dial(self, device: LightDevice) -> None:
        task = asyncio.get_running_loop().create_task(self._connect(device))
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)

    async def _connect(self, device: LightDevice) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: device, _HOST, self.record.place.port)
        except OSError:
            device.connection_lost(None)

    async def _stay_connected(self) -> None:
        while True:
            await asyncio.sleep(light.KEEPALIVE_S / 2)
            for device in self._devices:
                device.ping()
