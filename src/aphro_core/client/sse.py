"""Reading an event stream: from bytes in whatever pieces they arrive to the data of whole events."""

from __future__ import annotations

import re
from typing import Final

_LINE_END: Final = re.compile(rb"\r\n|\n|\r")


class EventReader:
    """The data of server-sent events, as the WHATWG's specification frames them; comments and other fields are skipped.

    Does no I/O: feed it what was read. An event is whole at its blank line, never before.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of every event that ``piece`` completes, lines of one event joined by line breaks."""
        buffer = self._rest + piece
        events = []
        start = 0
        for end in _LINE_END.finditer(buffer):
            if end.group() == b"\r" and end.end() == len(buffer):
                break  # its \n may be in the next piece
            events += self._take_line(buffer[start : end.start()])
            start = end.end()
        self._rest = buffer[start:]
        return events

    def _take_line(self, line: bytes) -> list[bytes]:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return []
        found = [b"\n".join(self._data)] if self._data else []
        self._data = []
        return found
