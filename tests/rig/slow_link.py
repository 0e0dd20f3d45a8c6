"""A relay as slow as a 2G modem: some bytes a second each way, and small buffers, so that senders feel it."""

import asyncio
import socket
from typing import Self

_TURN_S = 0.05
_BUFFER_BYTES = 4096


class SlowLink:
    """Entering it listens on loopback; leaving it cuts every connection.

    Args:
        port: to listen on.
        broker_port: where to connect to.
        bytes_per_s: each way, each connection.
    """

    def __init__(self, port: int, broker_port: int, bytes_per_s: int) -> None:
        self._port = port
        self._broker_port = broker_port
        self._turn_bytes = max(1, int(bytes_per_s * _TURN_S))
        self._relays: set[asyncio.Task[None]] = set()
        self._moving = asyncio.Event()
        self._moving.set()

    async def __aenter__(self) -> Self:
        listening = _small(socket.socket())
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self._port))
        listening.listen()
        listening.setblocking(False)
        self._listening = listening
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (self._accepting, *self._relays):
            task.cancel()
        await asyncio.gather(self._accepting, *self._relays, return_exceptions=True)
        self._listening.close()

    def stall(self) -> None:
        """From here on nothing moves, and nobody is told."""
        self._moving.clear()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            peer, _ = await loop.sock_accept(self._listening)
            task = asyncio.create_task(self._relay(peer))
            self._relays.add(task)
            task.add_done_callback(self._relays.discard)

    async def _relay(self, peer: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with peer, _small(socket.socket()) as broker:
            for end in (peer, broker):
                end.setblocking(False)
            await loop.sock_connect(broker, ("127.0.0.1", self._broker_port))
            ways = [asyncio.create_task(self._carry(*way)) for way in ((peer, broker), (broker, peer))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)

    async def _carry(self, source: socket.socket, target: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while content := await loop.sock_recv(source, self._turn_bytes):
            await self._moving.wait()
            await loop.sock_sendall(target, content)
            await asyncio.sleep(_TURN_S * len(content) / self._turn_bytes)


def _small(end: socket.socket) -> socket.socket:
    """With buffers of some KiB: what a modem has not sent yet waits at the sender, not in between."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return end
