"""A model's own list of digests: where it has one, a file with a flipped bit is refused before anything reads it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from aphro_core.checkpoint.digests import digest_files
from aphro_core.checkpoint.model_files import model_files
from aphro_core.errors import ModelError

_LISTS: Final = ("SHA256SUMS", "sha256sums.txt", "checksums.sha256")
_MAX_BYTES: Final = 1 << 20
_LINE: Final = re.compile(r"\\?([0-9a-fA-F]{64})(?:[ \t]+\*?(\S.*))?")  # as sha256sum writes it; alone in FILE.sha256


def verify_manifest(path: Path, on_progress: Callable[[int, int], None] = lambda done, total: None) -> str | None:
    """Compare the files of ``path`` with its list of digests, and say in a line that they are alike; None without one.

    Lists are SHA256SUMS beside the files, or FILE.sha256. What was read once is not read again until it changes.
    Raises ModelError that names the file, with both digests.
    """
    files = model_files(path)
    expected = {file.name: digest for file in files if (digest := _expected(file)) is not None}
    if not expected:
        return None
    found = digest_files([file for file in files if file.name in expected], on_progress)
    for name, digest in expected.items():
        if found[name] != digest:
            raise ModelError(
                f"{files[0].parent / name} is damaged, or another file: its SHA-256 is {found[name]}, its list of "
                f"digests says {digest}",
                hint="fetch the file again; or correct the list, if the file was changed on purpose",
            )
    return f"SHA-256 of {len(expected)} of {len(files)} model files: as their list says."


def _expected(file: Path) -> str | None:
    own = file.with_name(f"{file.name}.sha256")
    if own.is_file():
        digests = list(_read(own, file.name).values())
        return digests[0] if digests else None
    for name in _LISTS:
        listed = file.with_name(name)
        if listed.is_file():
            return _read(listed, None).get(file.name)
    return None


def _read(listed: Path, alone: str | None) -> Mapping[str, str]:
    """File name -> digest; ``alone``: the file that a digest without a name is of."""
    if listed.stat().st_size > _MAX_BYTES:
        raise ModelError(f"{listed} has more than {_MAX_BYTES} bytes, which no list of digests has")
    found = {}
    for line in listed.read_text(errors="replace").splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is not None and (name := match[2] or alone) is not None:
            found[name.removeprefix("./")] = match[1].lower()
    return found
