"""A socket that is read ahead: the MQTT library asks for a packet's first bytes one at a time."""

import array
import fcntl
import socket
import ssl
import termios
from typing import Final

_AHEAD_BYTES: Final = 64 * 1024


class BufferedSocket:
    """A non-blocking socket, plain or TLS, of which as much is read at once as is there, up to 64 KiB.

    A selector sees only what is still in the system: ask :meth:`pending` for what has been read ahead.

    Attributes:
        sent_bytes: handed to the system so far, before encryption.
    """

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self._ahead = memoryview(b"")
        self.sent_bytes = 0

    def recv(self, most: int, /) -> bytes:
        """At most so many bytes; none at the end of the stream.

        Raises:
            BlockingIOError, ssl.SSLWantReadError: there are none now.
            OSError: the connection is lost.
        """
        if not self._ahead:
            if most >= _AHEAD_BYTES:
                return self._inner.recv(most)
            self._ahead = memoryview(self._inner.recv(_AHEAD_BYTES))
        taken, self._ahead = bytes(self._ahead[:most]), self._ahead[most:]
        return taken

    def pending(self) -> int:
        """How many bytes can be had without asking the system."""
        held = self._inner.pending() if isinstance(self._inner, ssl.SSLSocket) else 0
        return len(self._ahead) + held

    def send(self, content: bytes | bytearray, /) -> int:
        """Hand bytes to the system; how many it took. Raises as ``socket.send``."""
        taken = self._inner.send(content)
        self.sent_bytes += taken
        return taken

    def unsent_bytes(self) -> int:
        """What the system still holds, unsent or unacknowledged (tcp(7): SIOCOUTQ); 0 if it does not say."""
        answer = array.array("i", [0])
        try:
            fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, answer)
        except (OSError, ValueError):
            return 0
        return answer[0]

    def fileno(self) -> int:
        """The descriptor, for a selector; -1 once closed."""
        return self._inner.fileno()

    def setblocking(self, flag: bool, /) -> None:  # noqa: FBT001 - the library's interface
        """Whether calls wait; reading ahead is for those that do not."""
        self._inner.setblocking(flag)

    def close(self) -> None:
        """Close it; what was read ahead is forgotten."""
        self._ahead = memoryview(b"")
        self._inner.close()
