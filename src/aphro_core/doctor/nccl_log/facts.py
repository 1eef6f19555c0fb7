"""What a log says, gathered in bounded memory: notes by kind, the hops of rank pairs, and which rank is where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from aphro_core.doctor.finding import Evidence
from aphro_core.doctor.nccl_log.hops import Hop
from aphro_core.doctor.nccl_log.records import Record

_MAX_VALUES: Final = 256  # different values of one kind
_MAX_PLACES: Final = 64  # hosts or processes remembered a value
_MAX_PAIRS: Final = 200_000
_MAX_RANKS: Final = 200_000
_MAX_TEXT: Final = 400  # of one line of evidence
_MAX_HEAD: Final = 100

PairKey = tuple[int, int, str, bool | None]


@dataclass(frozen=True, slots=True)
class Sighting:
    """A record and the line that it stands in. ``order`` counts what was noted, over all files."""

    record: Record
    file: str
    line: int
    raw: str
    order: int = 0

    @property
    def evidence(self) -> Evidence:
        """The line, or of a long one the part that begins a little before the record's text."""
        raw = self.raw.strip()
        start = max(0, raw.find(self.record.text[:40]) - _MAX_HEAD) if len(raw) > _MAX_TEXT else 0
        return Evidence(self.file, self.line, raw[start : start + _MAX_TEXT])


@dataclass(slots=True)
class Note:
    """One value that was seen, where first, on which hosts and how often."""

    value: str
    first: Sighting
    count: int = 0
    hosts: set[str] = field(default_factory=set)
    processes: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Pair:
    """All channels that go from ``src`` to ``dst`` the same way. ``count`` is of lines."""

    src: int
    dst: int
    via: str
    gdr: bool | None
    first: Sighting
    count: int = 0
    devs: set[int] = field(default_factory=set)
    sides: set[str] = field(default_factory=set)
    proxies: set[int] = field(default_factory=set)
    src_hosts: set[str] = field(default_factory=set)
    dst_hosts: set[str] = field(default_factory=set)
    processes: set[str] = field(default_factory=set)


class LogFacts:
    """The accumulator that a scan fills and a verdict reads."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.num_lines = 0
        self.num_records = 0
        self.num_torn = 0  # lines that hold part of a record
        self.num_folded = 0  # lines that Ray left out
        self.num_pairs_left_out = 0
        self.notes: dict[str, dict[str, Note]] = {}
        self.pairs: dict[PairKey, Pair] = {}
        self.rank_hosts: dict[int, set[str]] = {}
        self.addresses: dict[str, set[str]] = {}  # host -> IPs its processes use
        self.gpus: dict[tuple[str, str, str], int] = {}  # (commId, host and address, busId) -> rank
        self.marks: dict[str, dict[str, int]] = {}  # what happened -> process -> the order of its last time
        self.waited: dict[str, int] = {}  # who -> seconds that it waits, with no sign of work in between
        self._process_address: dict[str, str] = {}
        self._order = 0

    def see(self, record: Record, file: str, line: int, raw: str) -> Sighting:
        self._order += 1
        return Sighting(record, file, line, raw, self._order)

    def note(self, kind: str, value: str, seen: Sighting) -> None:
        values = self.notes.setdefault(kind, {})
        note = values.get(value)
        if note is None:
            if len(values) >= _MAX_VALUES:
                return
            note = values[value] = Note(value, seen)
        note.count += 1 + seen.record.num_folded
        _remember(note.hosts, seen.record.host)
        _remember(note.processes, seen.record.process)

    def mark(self, event: str, seen: Sighting) -> None:
        processes = self.marks.setdefault(event, {})
        if seen.record.process in processes or len(processes) < _MAX_RANKS:
            processes[seen.record.process] = seen.order

    def wait(self, who: str, seconds: int) -> None:
        if who in self.waited or len(self.waited) < _MAX_PLACES:
            self.waited[who] = self.waited.get(who, 0) + seconds

    def all_notes(self, kind: str) -> list[Note]:
        return list(self.notes.get(kind, {}).values())

    def first(self, *kinds: str) -> Note | None:
        """The earliest note of any of the kinds."""
        notes = [note for kind in kinds for note in self.all_notes(kind)]
        return min(notes, key=lambda note: note.first.order, default=None)

    def environment(self, name: str) -> Note | None:
        """The note on the last value that NCCL says it read for ``name``; its value is ``NAME=value``."""
        notes = [note for note in self.all_notes("env") if note.value.startswith(f"{name}=")]
        return notes[-1] if notes else None

    def hop(self, hop: Hop, seen: Sighting) -> Pair | None:
        """The pair that the hop belongs to, with this line counted; None when there are too many pairs to keep."""
        key = (hop.src, hop.dst, hop.via, hop.gdr)
        pair = self.pairs.get(key)
        if pair is None:
            if len(self.pairs) >= _MAX_PAIRS:
                self.num_pairs_left_out += 1
                return None
            pair = self.pairs[key] = Pair(*key, seen)
        pair.count += 1 + seen.record.num_folded
        if hop.dev is not None:
            pair.devs.add(hop.dev)
        if hop.gdr is not None:
            pair.sides.add(hop.side)
        if hop.proxy is not None:
            pair.proxies.add(hop.proxy)
        self._place_hop(hop, pair, seen.record)
        return pair

    def _place_hop(self, hop: Hop, pair: Pair, record: Record) -> None:
        _remember(pair.processes, record.process)
        if not record.host:
            return
        on_one_host = hop.gdr is None and hop.via != "P2P/MNNVL"
        if hop.side == "send" or on_one_host:
            _remember(pair.src_hosts, record.host)
            self.place_rank(hop.src, record.host)
        if hop.side == "receive" or on_one_host:
            _remember(pair.dst_hosts, record.host)
            self.place_rank(hop.dst, record.host)

    def place_rank(self, rank: int, host: str) -> None:
        if host and (rank in self.rank_hosts or len(self.rank_hosts) < _MAX_RANKS):
            _remember(self.rank_hosts.setdefault(rank, set()), host)

    def place_address(self, record: Record, address: str) -> None:
        """The address that a process bootstraps over tells two hosts of one name apart."""
        if len(self._process_address) < _MAX_RANKS:
            self._process_address.setdefault(record.process, address)
        if record.host and len(self.addresses) < _MAX_RANKS:
            _remember(self.addresses.setdefault(record.host, set()), address)

    def place_gpu(self, comm_id: str, rank: int, bus_id: str, record: Record) -> int | None:
        """Remember which rank has the GPU; another rank of the same communicator that has it too is returned."""
        place = f"{record.host} {self._process_address.get(record.process, '')}"
        if len(self.gpus) >= _MAX_RANKS:
            return None
        other = self.gpus.setdefault((comm_id, place, bus_id), rank)
        return other if other != rank else None


def _remember(places: set[str], place: str) -> None:
    if place and len(places) < _MAX_PLACES:
        places.add(place)
