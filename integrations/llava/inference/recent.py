"""What was used last, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

__all__ = ["Recent"]

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by key, of which the longest unused go when all together take more than `most_bytes`.

    Threads may share it. A copy in another process begins empty.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._bytes = 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Recent, (self.most_bytes,)

    def get(self, key: Hashable) -> Value | None:
        """Return the value of a key, which is used by that; None if there is none."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: Value, num_bytes: int) -> None:
        """Store a value that takes so many bytes, unless these alone are too many."""
        if num_bytes > self.most_bytes:
            return
        with self._lock:
            self._bytes += num_bytes - self._values.pop(key, (None, 0))[1]
            self._values[key] = (value, num_bytes)
            while self._bytes > self.most_bytes:
                self._bytes -= self._values.popitem(last=False)[1][1]
