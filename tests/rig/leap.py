"""A selector that waits for no file: it moves a clock instead."""

import selectors
from collections.abc import Callable
from typing import Any, Final

LONGEST_STANDSTILL: Final = 30_000
"""Turns of the loop without any time passing, after which it is taken for endless."""


class Deadlock(Exception):
    """Nothing will ever happen again; the text names who waits."""


class Standstill(Exception):
    """The loop turns and turns and no time passes."""


class Leap(selectors.BaseSelector):
    """See the module.

    Attributes:
        now: virtual seconds.
        turns: of the loop, since time passed last.
        waiting: names who waits.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.turns = 0
        self._keys: dict[int, selectors.SelectorKey] = {}
        self.waiting: Callable[[], list[str]] = list

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = self._keys[number] = selectors.SelectorKey(fileobj, number, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock(f"at {self.now:.3f} s nothing will ever happen; waiting: {self.waiting()}")
        if timeout > 0:
            self.now += timeout
            self.turns = 0
        self.turns += 1
        if self.turns > LONGEST_STANDSTILL:
            raise Standstill(f"at {self.now:.3f} s no time passes; running: {self.waiting()}")
        return []

    def close(self) -> None:
        self._keys.clear()

    def get_map(self) -> dict[Any, selectors.SelectorKey]:
        return dict(self._keys)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys[fileobj if isinstance(fileobj, int) else fileobj.fileno()]
