"""Whether a line without a prefix reports an error or only speaks of it, as issues, READMEs and comments do."""

from __future__ import annotations

import re
from typing import Final

# What writers put before a line: levels, times, [rank0], (Worker pid=7), worker-0:, file.py:12], and JSON's key.
# All groups are atomic: a line of 1 KiB that almost is such a head takes no time.
_STRONG: Final = (
    r"(?>\[[^\]]*\d[^\]]*\]:?|\([^)]*pid=[^)]*\)|<std(?:out|err)>:?|stderr\b"
    r"|\{.{0,400}?\"(?:msg|message|log|error)\" ?: ?\""
    r"|\[?(?:ERROR|FATAL|CRITICAL|WARNING|WARN|INFO|DEBUG|E|F|W|I)\]?(?![\w-]):?"
    r"|\d{2,4}[-/.:]\d\d[-/.:\dT,+Z]*+|[\w/-][\w./-]{0,200}\.\w{1,4}:\d+\]?:?"
    r"|(?=[a-zA-Z._/]{0,100}[\d-])[\w./-]{1,200}+(?: ?\||:(?=\s))"
    r"|```|terminate called after throwing an instance of '[^']*'|Process \S{0,100}\d:)"
)
_BETWEEN: Final = r"(?>[\s|-]|__main__|\d++(?=\s))*+"
# The type of an exception, or what C++ and watchdogs put before its text
_KIND: Final = (
    r"(?>(?:\b[\w.:]{0,100}(?:Error|Exception)|what\(\)|[Ee]rror|[Ee]xception|[Ff]ailure|[Ff]atal(?: error)?)\s*:\s+)"
)
_MODULES: Final = r"(?>\w{1,50}[.:])*+"
_IS_HEAD: Final = re.compile(rf"\s*+(?P<head>{_STRONG}(?:{_BETWEEN}{_STRONG})*+{_BETWEEN})?+{_KIND}*+{_MODULES}")
_BEGINS_AS_LOG: Final = re.compile(rf"\s*+{_STRONG}")
_ENDS_AS_ERROR: Final = re.compile(rf"{_KIND}{_MODULES}$")
_ADVICE: Final = re.compile(
    r"\b(?:if|you|your|when|means?|usually|because|try|then|see|fix(?:es|ed)?|solution|should|may|might|can|lower|set)\b",
    re.IGNORECASE,
)
_MAX_HEAD: Final = 1024


def is_said_by_a_log(text: str, words: re.Match[str], *, strictly: bool) -> bool:
    """Of a line without NCCL's prefix, in which an error's ``words`` (from their group ``at`` on) were found.

    They must not stand between backticks. ``strictly``: they stand behind nothing but what log writers put there and
    the exception's type; or the line begins as one of a log and they stand behind the type. A line that begins with
    them must not go on as advice does.
    """
    start = words.start("at") if "at" in words.re.groupindex else words.start()
    before = text[max(0, start - _MAX_HEAD) : start]
    if "`" in before and before.replace("```", "").count("`") % 2:
        return False
    if not strictly:
        return True
    found = _IS_HEAD.fullmatch(before)
    if found:
        return bool(found["head"]) or not _ADVICE.search(text[start : words.end()].partition("  ")[0])
    return bool(_BEGINS_AS_LOG.match(before) and _ENDS_AS_ERROR.search(before))
