"""Gigabytes of log -> facts, in bounded memory: a line's shape is judged once, and only telling shapes are read.

The shape of a line is the line without digits and small hex letters. Training loops, collectives and channel lists
repeat few shapes many times, so most lines cost one set lookup. Lines come in runs, so each block of a log is read in
the way that would have suited the block before: by shapes, as Channel lines that are counted without being parsed, or,
where no line is like another, by looking for telling words in the whole block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from enum import Enum
from typing import Final

from aphro_core.doctor.nccl_log.facts import LogFacts, Pair
from aphro_core.doctor.nccl_log.line_reader import (
    COMMON_WORDS,
    MAX_CHANNELS,
    TELLING,
    TELLING_WITHOUT_COMMON,
    LineReader,
    shapes_of,
)

_CHANNEL: Final = re.compile(rb"Channel \d+(?:/\d+)? : ")
_MAX_LINE_BYTES: Final = 1 << 20  # what has no line break for so long is no log
_MAX_QUOTED_BYTES: Final = 2048  # of a record that another program repeats; NCCL cuts them at 1024
_MAX_BLOCKS_OF_WORDS: Final = 64  # read by words before shapes are tried again


class _Way(Enum):
    """How the next block is read: whatever it holds, the facts are the same."""

    SHAPES = "by the shapes of its lines"
    CHANNELS = "lines that differ in their channel alone are counted together"
    STAMPED = "the same, of lines that a time or a number makes different"
    WORDS = "only lines that hold a telling word are looked at"


class Scan:
    """Reads one file after the other into ``facts``."""

    def __init__(self, facts: LogFacts) -> None:
        self._facts = facts
        self._reader = LineReader(facts)
        self._line = 0  # of lines before the current block
        self._way = _Way.SHAPES
        self._num_blocks_of_words = 0
        self._lines: dict[bytes, Pair] = {}  # a Channel line without its channel -> its pair

    def read_file(self, file: str, blocks: Iterable[bytes]) -> None:
        """Scan one file, given in pieces of any size; ``file`` is its name in evidence."""
        self._facts.files.append(file)
        self._reader.file, self._line = file, 0
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
        if self._way is _Way.WORDS:
            self._line += self._read_by_words(block)
        elif self._way is _Way.CHANNELS:
            self._line += self._count_channels(block)
        elif self._way is _Way.STAMPED:
            self._line += self._count_stamped_channels(block)
        else:
            self._line += self._read_by_shapes(block)

    def _read_by_shapes(self, block: bytes) -> int:
        """The number of lines, as of the other ways."""
        shapes = shapes_of(block).split(b"\n")
        boring = self._reader.boring
        telling = [index for index, shape in enumerate(shapes) if shape not in boring]
        lines = block.split(b"\n") if telling else []
        num_channels = num_new = 0
        for index in telling:
            shape = shapes[index]
            if shape in self._reader.channel_shapes:
                num_channels += 1
                self._reader.read_channel(self._line + index + 1, lines[index])
            elif shape not in boring:  # nor has become so in this block
                num_new += 1
                self._reader.read_line(self._line + index + 1, lines, index, shape)
        if num_channels * 2 > len(shapes):
            self._way = _Way.CHANNELS
        elif num_new * 4 > len(shapes):
            self._way, self._num_blocks_of_words = _Way.WORDS, 0
        return len(shapes)

    def _read_by_words(self, block: bytes) -> int:
        telling = TELLING if any(word in block for word in COMMON_WORDS) else TELLING_WITHOUT_COMMON
        number, num_telling, start, end = self._line + 1, 0, 0, -1
        while found := telling.search(block, end + 1):
            before, start = start, block.rfind(b"\n", 0, found.start()) + 1
            number += block.count(b"\n", before, start)
            end = block.find(b"\n", found.end())
            if end < 0:
                end = len(block)
            following = block[end + 1 : end + _MAX_QUOTED_BYTES].partition(b"\n")[0]
            self._reader.read_any(number, [block[start:end], following], 0)
            num_telling += 1
        num_lines = block.count(b"\n") + 1
        self._num_blocks_of_words += 1
        if num_telling * 4 > num_lines or self._num_blocks_of_words >= _MAX_BLOCKS_OF_WORDS:
            self._way = _Way.SHAPES
        return num_lines

    def _count_channels(self, block: bytes) -> int:
        """Lines are counted without their channels; of those that are new the first is read."""
        alike = _CHANNEL.sub(b"", block).split(b"\n")
        counts = Counter(alike)
        unknown, num_counted, num_read = set(), 0, 0
        for line, count in counts.items():
            pair = self._lines.get(line)
            if pair is None:
                unknown.add(line)
            else:
                pair.count += count
                num_counted += count
        lines = block.split(b"\n") if unknown else []
        for index, line in enumerate(alike) if unknown else ():
            if line not in unknown:
                continue
            pair = self._reader.read_any(self._line + index + 1, lines, index)
            counts[line] -= 1
            if pair is not None:
                if len(self._lines) >= MAX_CHANNELS:
                    self._lines.clear()
                self._lines[line] = pair
                unknown.discard(line)
                pair.count += counts[line]
                num_counted += counts[line]
                num_read += 1
        self._facts.num_records += num_counted
        if (num_counted + num_read) * 2 < len(alike):
            self._way = _Way.SHAPES
        elif len(counts) * 2 > len(alike):
            self._way = _Way.STAMPED
        return len(alike)

    def _count_stamped_channels(self, block: bytes) -> int:
        """Each line is counted by what stands behind its channel, if the process stands before it."""
        channels, others = self._reader.channels, []
        lines = block.split(b"\n")
        for index, line in enumerate(lines):
            head, _, hop = line.rpartition(b" : ")
            said = channels.get(hop)
            if said is not None and said[0] in head:
                said[1].count += 1
            else:
                others.append(index)
        self._facts.num_records += len(lines) - len(others)
        for index in others:
            self._reader.read_any(self._line + index + 1, lines, index)
        if len(others) * 2 > len(lines):
            self._way = _Way.SHAPES
        return len(lines)
