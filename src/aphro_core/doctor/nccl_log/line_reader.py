"""One line of a log -> facts: of its shape's kind, what is known of it, and what has to be read again."""

from __future__ import annotations

import re
from typing import Final

from aphro_core.doctor.nccl_log.errors import read_error
from aphro_core.doctor.nccl_log.facts import LogFacts, Pair
from aphro_core.doctor.nccl_log.hops import read_hop
from aphro_core.doctor.nccl_log.readings import read_note
from aphro_core.doctor.nccl_log.records import Record, read_bare, read_records

# One alternative a first letter, of letters that are rare in prose: a search skips to them. What begins with a common
# letter is looked for apart.
_RARE: Final = (
    rb"C(?:CL|OLL|uda fail|ommunicator ranks|UDA (?:error: |out of)|apturing CUDA|ompiling a graph)"
    rb"|N(?:ET[/ ]|VLS|VRM: |o available (?:sh|bl))|A(?: worker died|pplication startup c|vg (?:bus|generation) )"
    rb"|S(?:HM|IG(?:KILL|SEGV|BUS|ILL)|eg(?:mentation f|fault enc))|Illegal instr|Bus err|Test CUDA|Error 802: "
    rb"|\](?: INFO| WARN| The client socket|: [\w.]*(?:Error|Exception): )|P(?:2P[/ ]|rocess \d+ on n|C call to)"
    rb"|Killed (?:process|  )"
    rb"|R(?:ank +\d+ .*Pid|AS network)|M(?:ultiple Ranks|NNVL|issing comm|odel loading)|IBV_"
    rb"|G(?:ot compl|loo conn|raph capt)"
    rb"|H(?:IP (?:fail|error: )|eartbeat m)"
    rb"|D(?:uplicate GPU|ist(?:Network|Store)Error)|O(?:ut (?:Of Memory|of bounds v)|OMKilled|OM\))"
    rb"|Last error|Bootstrap|xit(?:ed on signal| ?code *:? *(?:-|13))"
    rb"|W(?:atchdog (?:c|timeout \()|ARN [A-Z]|orker (?:proc |\w+ pid \d))|Timed out waiting for eng"
    rb"|_(?:(?<=bv_)[a-z]|kill event)|ket\w*: "
)
COMMON_WORDS: Final = (b"ccl", b"mote rails", b"memory segment", b"direct shared mem")
TELLING_WITHOUT_COMMON: Final = re.compile(_RARE)
TELLING: Final = re.compile(_RARE + rb"|ccl[A-Z=]|mote rails|memory segment|direct shared mem")
_DIGITS: Final = b"0123456789abcdef"
_TORN: Final = re.compile(r":\d+:\d+ \[\d+\](?: |$)|NCCL ?(?:I|W|T|IN|INF|WA|WAR)?$| via \S*$")
_PROCESS: Final = re.compile(rb"([A-Za-z0-9][\w.-]*):(\d+):\d+")
_MAX_SHAPES: Final = 1 << 16
_MAX_SHAPE_BYTES: Final = 1024
_MAX_ALIKE: Final = 4096  # lines of one shape that are read; more of them would say the same
MAX_CHANNELS: Final = 1 << 16  # Channel lines that are remembered


def shapes_of(text: bytes) -> bytes:
    """The text without digits and small hex letters: what lines that say the same of others have in common."""
    return text.translate(None, _DIGITS)


def _plain_record(process: re.Match[bytes], hop: bytes) -> Record:
    """Of a line that holds nothing but a known prefix and a Channel record, without looking for other records."""
    return Record(hop.decode("utf-8", "replace").rstrip(), "INFO", process[1].decode(), process[2].decode())


class LineReader:
    """Reads lines of one file after the other into ``facts``; ``file`` is the one that lines are of."""

    def __init__(self, facts: LogFacts) -> None:
        self.file = ""
        self._quoted = "", 0  # the file and number of a line that was read as the one before it says
        self.boring: set[bytes] = set()  # shapes that say nothing
        self.channel_shapes: set[bytes] = set()
        # the text behind "Channel NN" -> the process that said it last, and its pair; and the same for all processes
        self.channels: dict[bytes, tuple[bytes, Pair]] = {}
        self._said: dict[tuple[bytes, bytes], Pair] = {}
        self._num_alike: dict[bytes, int] = {}
        self._facts = facts

    def read_any(self, number: int, lines: list[bytes], index: int) -> Pair | None:
        """A line of whatever shape; the pair if it is a Channel line as others before it."""
        shape = shapes_of(lines[index])
        if shape in self.channel_shapes:
            return self.read_channel(number, lines[index])
        if shape not in self.boring:
            self.read_line(number, lines, index, shape)
        return None

    def read_channel(self, number: int, line: bytes) -> Pair | None:
        """A line of a channel's shape: its hop is parsed once for each process that says it, and then counted."""
        head, _, hop = line.rpartition(b" : ")
        words = head.rsplit(None, 6)  # ... host:pid:tid [0] NCCL INFO Channel 00/0
        process = words[-6] if len(words) > 5 else b""
        pair = self._said.get((process, hop))
        if pair is not None:
            pair.count += 1
            self._facts.num_records += 1
        else:
            text = line.decode("utf-8", "replace")
            plain = _PROCESS.fullmatch(process) if b"[rep" not in hop else None
            records = [_plain_record(plain, b" : " + hop)] if plain else read_records(text)
            pairs = [self._read_record(record, number, text)[1] for record in records]
            pair = pairs[0] if len(pairs) == 1 and not records[0].num_folded else None
        if pair is not None and process:
            if len(self._said) >= MAX_CHANNELS:
                self._said.clear()
                self.channels.clear()
            self._said[process, hop] = pair
            self.channels[hop] = process, pair
        return pair

    def read_line(self, number: int, lines: list[bytes], index: int, shape: bytes) -> None:
        line = lines[index]
        if not TELLING.search(line):
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
                self.channel_shapes.add(shape)
            if not records and self._quoted != (self.file, number):
                told = self._read_bare(part, number) or told
        if "Last error:" in text and index + 1 < len(lines):
            quoted = lines[index + 1].decode("utf-8", "replace")
            record = Record(read_bare(re.sub(r"^.*?\[\w+\|?\d*\]:", "", quoted)).text, "WARN")
            if self._read_record(record, number + 1, quoted)[0]:
                self._quoted = self.file, number + 1
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
        seen = facts.see(record, self.file, number, raw)
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
        if len(self.boring) >= _MAX_SHAPES:
            self.boring.clear()
        if len(shape) <= _MAX_SHAPE_BYTES:
            self.boring.add(shape)
