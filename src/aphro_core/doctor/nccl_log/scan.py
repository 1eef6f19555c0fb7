"""Gigabytes of log -> facts, in bounded memory: a line's shape is judged once, and only telling shapes are read.

The shape of a line is the line without digits and small hex letters. Training loops, collectives and channel lists
repeat few shapes many times, so most lines cost one set lookup; Channel lines are counted without being parsed again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from aphro_core.doctor.nccl_log.errors import read_error
from aphro_core.doctor.nccl_log.facts import LogFacts, Pair
from aphro_core.doctor.nccl_log.hops import read_hop
from aphro_core.doctor.nccl_log.readings import read_note
from aphro_core.doctor.nccl_log.records import Record, read_bare, read_records

_DIGITS: Final = b"0123456789abcdef"
# every alternative begins with a letter that is rare in prose: the search skips to it
_TELLING: Final = re.compile(
    rb"CCL|ccl(?:[A-Z]|==)|\] INFO|\] WARN|via (?:NET|P2P|SHM|COLL|direct sh)|NET[/ ]|Rank +\d+ .*Pid|Duplicate GPU"
    rb"|Multiple Ranks|P2P is |bv_[a-z]|IBV_|Cuda fail|HIP fail|Got compl|Last error|ket\w*: |Bootstrap|NVLS|MNNVL"
    rb"|mote rails|memory segment|Watchdog c"
)
_TORN: Final = re.compile(r":\d+:\d+ \[\d+\](?: |$)|NCCL ?(?:I|W|T|IN|INF|WA|WAR)?$| via \S*$")
_PROCESS: Final = re.compile(rb"([A-Za-z0-9][\w.-]*):(\d+):\d+")
_MAX_LINE_BYTES: Final = 1 << 20  # what has no line break for so long is no log
_MAX_SHAPES: Final = 1 << 16
_MAX_SHAPE_BYTES: Final = 1024
_MAX_ALIKE: Final = 4096  # lines of one shape that are read; more of them would say the same
_MAX_CHANNELS: Final = 1 << 16


def _plain_record(process: re.Match[bytes], hop: bytes) -> Record:
    """Of a line that holds nothing but a known prefix and a Channel record, without looking for other records."""
    return Record(hop.decode("utf-8", "replace").rstrip(), "INFO", process[1].decode(), process[2].decode())


class Scan:
    """Reads one file after the other into ``facts``."""

    def __init__(self, facts: LogFacts) -> None:
        self._facts = facts
        self._file = ""
        self._line = 0  # of lines before the current block
        self._boring: set[bytes] = set()
        self._num_alike: dict[bytes, int] = {}
        self._channel_shapes: set[bytes] = set()
        self._is_full_of_channels = False
        # the text behind "Channel NN" -> the process that said it last, and its pair; and the same for all processes
        self._channels: dict[bytes, tuple[bytes, Pair]] = {}
        self._said: dict[tuple[bytes, bytes], Pair] = {}

    def read_file(self, file: str, blocks: Iterable[bytes]) -> None:
        """Scan one file, given in pieces of any size; ``file`` is its name in evidence."""
        self._facts.files.append(file)
        self._file, self._line = file, 0
        rest = b""
        for block in blocks:
            whole, line_break, rest_of_block = block.rpartition(b"\n")
            if line_break:
                self._read_block(rest + whole)
                rest = rest_of_block
            else:
                rest += block
            if len(rest) > _MAX_LINE_BYTES:
                self._read_block(rest)
                rest = b""
        if rest:
            self._read_block(rest)
        self._facts.num_lines += self._line

    def _read_block(self, block: bytes) -> None:
        """Lines of a log come in runs: after a block full of Channel lines the next one is looked at for them first."""
        lines = block.split(b"\n") if self._is_full_of_channels else []
        indexes = self._count_channels(lines) if lines else None
        left = block if indexes is None else b"\n".join([lines[index] for index in indexes])
        shapes = left.translate(None, _DIGITS).split(b"\n") if left or indexes is None else []
        boring, channel_shapes = self._boring, self._channel_shapes
        telling = [(at, shape) for at, shape in enumerate(shapes) if shape not in boring]
        lines = lines or (block.split(b"\n") if telling else [])
        num_channels = len(lines) - len(shapes) if indexes is not None else 0
        for at, shape in telling:
            index = at if indexes is None else indexes[at]
            if shape in channel_shapes:
                num_channels += 1
                self._read_channel(self._line + index + 1, lines[index])
            elif shape not in boring:  # nor has become so in this block
                self._read_line(self._line + index + 1, lines, index, shape)
        self._is_full_of_channels = num_channels * 2 > (len(lines) or len(shapes))
        self._line += len(lines) or len(shapes)

    def _count_channels(self, lines: list[bytes]) -> list[int]:
        """Count the lines that differ in their channel alone from one that was read; the indexes of all others."""
        channels, others = self._channels, []
        for index, line in enumerate(lines):
            said = channels.get(line[line.rfind(b" : ") :])
            if said is not None and said[0] in line:
                said[1].count += 1
            else:
                others.append(index)
        self._facts.num_records += len(lines) - len(others)
        return others

    def _read_channel(self, number: int, line: bytes) -> None:
        """A line of a channel's shape: its hop is parsed once for each process that says it, and then counted."""
        hop = line[line.rfind(b" : ") :]
        words = line[: -len(hop)].rsplit(None, 6)  # ... host:pid:tid [0] NCCL INFO Channel 00/0
        process = words[-6] if len(words) > 5 else b""
        pair = self._said.get((process, hop))
        if pair is not None:
            pair.count += 1
            self._facts.num_records += 1
        else:
            text = line.decode("utf-8", "replace")
            plain = _PROCESS.fullmatch(process) if b"[rep" not in hop else None
            records = [_plain_record(plain, hop)] if plain else read_records(text)
            pairs = [self._read_record(record, number, text)[1] for record in records]
            pair = pairs[0] if len(pairs) == 1 and not records[0].num_folded else None
        if pair is not None and process:
            if len(self._said) >= _MAX_CHANNELS:
                self._said.clear()
                self._channels.clear()
            self._said[process, hop] = pair
            self._channels[hop] = process, pair

    def _read_line(self, number: int, lines: list[bytes], index: int, shape: bytes) -> None:
        line = lines[index]
        if not _TELLING.search(line):
            self._remember_boring(shape)
            return
        text = line.decode("utf-8", "replace")
        told = is_hop = False
        for part in text.split("\r") if "\r" in text else (text,):
            records = read_records(part)
            results = [self._read_record(record, number, part) for record in records]
            told = told or any(is_told for is_told, _ in results)
            is_hop = is_hop or any(pair for _, pair in results)
            if len(results) == 1 and results[0][1] is not None and not records[0].num_folded and " : " in part:
                self._channel_shapes.add(shape)
            if not records:
                told = self._read_bare(part, number) or told
        if "Last error:" in text and index + 1 < len(lines):
            quoted = lines[index + 1].decode("utf-8", "replace")
            record = Record(read_bare(re.sub(r"^.*?\[\w+\|?\d*\]:", "", quoted)).text, "WARN")
            self._read_record(record, number + 1, quoted)
        if not is_hop:  # each hop counts, however many there are
            self._weigh_shape(shape, told)

    def _read_bare(self, part: str, number: int) -> bool:
        bare = read_bare(part)
        told, _ = self._read_record(bare, number, part)
        if not told and _TORN.search(part):
            self._facts.num_torn += 1
            return True
        return told

    def _read_record(self, record: Record, number: int, raw: str) -> tuple[bool, Pair | None]:
        """Whether the record says anything, and the pair whose hop it is."""
        facts = self._facts
        facts.num_records += bool(record.level)
        facts.num_folded += record.num_folded
        seen = facts.see(record, self._file, number, raw)
        hop = read_hop(record.text)
        if hop:
            return True, facts.hop(hop, seen)
        is_note = read_note(seen, facts)
        return read_error(seen, facts) or is_note, None

    def _weigh_shape(self, shape: bytes, told: bool) -> None:
        num_alike = self._num_alike.get(shape, 0) + 1
        if not told or num_alike > _MAX_ALIKE:
            self._remember_boring(shape)
            self._num_alike.pop(shape, None)
        elif len(shape) <= _MAX_SHAPE_BYTES:
            if len(self._num_alike) >= _MAX_SHAPES:
                self._num_alike.clear()
            self._num_alike[shape] = num_alike

    def _remember_boring(self, shape: bytes) -> None:
        if len(self._boring) >= _MAX_SHAPES:
            self._boring.clear()
        if len(shape) <= _MAX_SHAPE_BYTES:
            self._boring.add(shape)
