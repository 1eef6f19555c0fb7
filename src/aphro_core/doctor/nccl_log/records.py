"""One line of a log -> the NCCL records in it, whatever stands before, between and behind them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_COLOUR: Final = re.compile(r"(?:\x1b|ESC)?\[\d{0,3}(?:;\d{1,3})*[mK]")
_LEVEL: Final = re.compile(r"N?CCL (INFO|WARN|TRACE|CALL|ABORT|ERROR)(?: |$)")
# host:pid:tid [device] <ms> file:line (function), at the end of what stands before the level
_HEAD: Final = re.compile(
    r"(?P<host>(?:\[[\w. -]+\]|<[\w. -]+>|[^\s:<>\x22\x27\[\]]{0,255}))"
    r":(?P<pid>\d+|\[\w+\]|[A-Za-z_]\w*):(?:\d+|\[\w+\]|[A-Za-z_]\w*)"
    r"(?: +\[(?P<device>[^\]\s]*)\](?P<where>| (?!.*:\d+:\d+ +\[).*:\d+(?: \([^()]*\))?))? *$"
)
_DEVICE_ONLY: Final = re.compile(r"\[(?P<device>\d+)\](?P<where>| \S*:\d+(?: \(\S*\))?) *$")
_WHERE_ONLY: Final = re.compile(r"(?P<where>[\w./+-]+:\d+(?: \([^()]*\))?) *$")
_BEFORE_2_3: Final = re.compile(
    r"(?P<host>[^\s:]{1,255}):(?P<pid>\d+):\d+ \[(?P<device>\d+)\]"
    r"(?: (?P<where>\S+:\d+))? (?P<level>INFO|WARN) (?P<text>.*)"
)
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?")
_REPEATED: Final = re.compile(r"\[repeated (\d+)x across cluster\]")
_INNER_BREAK: Final = re.compile(r"\\r?\\n(?!\")|\\n(?!\")")  # of a log that was quoted as one string
_MAX_LINE: Final = 65536  # of one line; NCCL cuts a record at 1024 bytes, terminals glue many into one line
_MAX_HEAD: Final = 1024


@dataclass(frozen=True, slots=True)
class Record:
    """What one process said. ``level`` is "" for text without a prefix; ``time`` is as it stands there, or ""."""

    text: str
    level: str = ""
    host: str = ""
    pid: str = ""
    where: str = ""  # file:line or function:line
    time: str = ""
    num_folded: int = 0  # further lines like it that Ray did not print

    @property
    def process(self) -> str:
        return f"{self.host}:{self.pid}"


def read_records(line: str) -> list[Record]:
    """All records of a line, in order; none if it holds none. Never raises.

    Text between two records belongs to the first, up to the second's ``host:pid:tid``.
    """
    line = clean(line)
    marks = list(_LEVEL.finditer(line))
    if not marks:
        old = _BEFORE_2_3.search(line[:_MAX_HEAD]) if "] INFO " in line or " WARN " in line else None
        return [_build(line[old.start("text") :], old["level"], old, line[: old.start()])] if old else []
    records: list[Record] = []
    head_start, heads = 0, []
    for mark in marks:
        start = max(head_start, mark.start() - _MAX_HEAD)
        before = line[start : mark.start()]
        head = _HEAD.search(before) or _DEVICE_ONLY.search(before) or _WHERE_ONLY.search(before)
        heads.append((start + head.start() if head else mark.start(), head, before))
        head_start = mark.end()
    ends = [start for start, _, _ in heads[1:]] + [len(line)]
    for mark, (_, head, before), end in zip(marks, heads, ends, strict=True):
        records.append(_build(line[mark.end() : max(end, mark.end())], mark[1], head, before))
    return records


def read_bare(line: str) -> Record:
    """A line that has lost its prefix, or never had one: only its text is known."""
    return _build(clean(line).strip(), "", None, "")


def clean(line: str) -> str:
    """Without colours and the escapes of JSON logs, and not longer than can be read in reasonable time."""
    line = _COLOUR.sub("", line[:_MAX_LINE])
    line = _INNER_BREAK.sub("  ", line) if "\\n" in line else line
    return line.replace("\\u003e", ">").replace("\\u003c", "<") if "\\u003" in line else line


def _build(text: str, level: str, head: re.Match[str] | None, before: str) -> Record:
    named = head.groupdict() if head else {}
    time = _TIME.search(before)
    text, num_folded = _strip_behind(text)
    return Record(
        text=text,
        level=level,
        host=(named.get("host") or "").strip("[]<>"),
        pid=named.get("pid") or "",
        where=(named.get("where") or "").strip(),
        time=time[0].replace("T", " ").replace(",", ".") if time else "",
        num_folded=num_folded,
    )


def _strip_behind(text: str) -> tuple[str, int]:
    """Without what Ray, a JSON log or a paste put behind it, and how many lines Ray says it left out."""
    repeated = _REPEATED.search(text)
    if repeated:
        text = text[: repeated.start()]
    return text.partition('\\n"')[0].rstrip(" \t\r\n`"), int(repeated[1]) - 1 if repeated else 0
