"""Errors, warnings and trails of errors in a record, by the table of wordings."""

from __future__ import annotations

import re
from typing import Final

from aphro_core.doctor.nccl_log.error_rule import ErrorRule
from aphro_core.doctor.nccl_log.error_table import ERRORS
from aphro_core.doctor.nccl_log.facts import LogFacts, Sighting
from aphro_core.doctor.nccl_log.records import Record
from aphro_core.doctor.nccl_log.reports import is_said_by_a_log

_MAX_TEXT: Final = 2048  # NCCL cuts a record at 1024 bytes; rules must not wander through a line of 64 KiB
_TRAIL: Final = re.compile(r"^(?P<file>[\w./-]+\.(?:cc|h|cu|cpp|c)):\d+ -> (?P<code>\d)\b(?P<rest>.*)")
_DEADLY_FILES: Final = re.compile(
    r"(?:^|/)(?:init|group|bootstrap|transport|generic|enqueue|proxy|socket|transport/(?:net|p2p|shm|nvls))\.(?:cc|h|cu)$"
)
_FAREWELL: Final = re.compile(r"(?:^|/)socket\.(?:cc|h)$")  # with class 3: a thread of NCCL is told to stop
_HARMLESS_WARN: Final = re.compile(
    r"Could not find a path for pattern|falling back to simple order|libibverbs|NCCL_\w+ .*deprecated"
    r"|[Uu]nable to (?:load|find) .*(?:tuner|profiler)|GDRC(?:OPY|opy)|NET/Plugin"
    r"|ncclGetVersion symbol|pciPath: Could not find"
    r"|Got (?:non-fatal )?async event ?: ?(?:client rereg|port active|GID table|LID change|SM change|P_Key|QP last)"
    r"|Resiliency is enabled|\[Service thread\] Accept failed|Error opening file: /sys/devices/virtual/dmi"
    r"|port event: port active|Cannot get incoming CPU|Maximum retry reached for (?:accept|connect)"
)
_PORT_OF_RAS: Final = "ras/"  # of the service for reports, which the first job of a host has; others do without


def read_error(seen: Sighting, facts: LogFacts) -> bool:
    """Take down an error, a warning or part of an error's trail. False if the text is none of these."""
    record = seen.record
    if record.level == "WARN" and (
        _HARMLESS_WARN.search(record.text) or (_PORT_OF_RAS in record.where and "Call to bind" in record.text)
    ):
        return False
    rule, match = _match_rule(record)
    if rule and match:
        facts.note(rule.id, _fill(rule.title, match), seen)
        if rule.id == "log.nvls":
            facts.mark("nvls-failed", seen)
        if rule.id == "log.engine-wait":
            facts.wait(match["who"] or "", int(match["seconds"][:6]) * (1 + record.num_folded))
        return True
    if record.level == "WARN":
        facts.note("log.warn", record.text[:200].strip() or "a warning without text", seen)
        return True
    trail = _TRAIL.match(record.text)
    if (
        trail
        and trail["code"] not in "079"
        and record.level
        and not (trail["code"] == "3" and _FAREWELL.search(trail["file"]))
        and (_DEADLY_FILES.search(trail["file"]) or "hread]" in trail["rest"])
    ):
        is_of_nvls = "nvls." in trail["file"]
        facts.note("trail-nvls" if is_of_nvls else "trail", trail["code"], seen)
        if not is_of_nvls and trail["code"] == "1":
            facts.mark("aborts", seen)
    return bool(trail)


def _match_rule(record: Record) -> tuple[ErrorRule | None, re.Match[str] | None]:
    for rule in ERRORS:
        is_said = rule.in_info if record.level == "INFO" else bool(record.level) or not rule.is_general
        match = rule.words.search(record.text[:_MAX_TEXT]) if is_said and rule.where in record.where else None
        if match and (record.level or is_said_by_a_log(record.text, match, strictly=rule.in_prose)):
            return rule, match
    return None, None


def _fill(title: str, match: re.Match[str]) -> str:
    named = {name: _unquote(value or "") for name, value in match.groupdict().items()}
    named["magic"] = _spoken(named.get("magic", ""))
    defaults = {"peer": "the peer", "work": "no details"}
    text = re.sub(r"\{(\w+)\}", lambda hole: named.get(hole[1]) or defaults.get(hole[1], ""), title)
    return text.rstrip(": ").replace(" ()", "").replace("(such as )", "").removesuffix(", local rank")


def _spoken(magic: str) -> str:
    """The first eight bytes of whoever connected instead of a rank, where they are text: mostly of HTTP or ssh."""
    said = bytes.fromhex(magic)[::-1].decode("ascii", "replace")
    return f": it says {said!r}" if said and said.isprintable() and said.isascii() else ""


def _unquote(value: str) -> str:
    """Without the quotes around all of it; those around a part of it stay."""
    value = value.strip(" .")
    return value.strip("'\" .") if value.count("'") != 2 or value.startswith("'") else value
