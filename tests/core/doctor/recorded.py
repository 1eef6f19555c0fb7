"""A host out of a recording: a tree of files below a folder, and a table of what its commands print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aphro_core.remote.local import LocalHost
from aphro_core.remote.remote import NOT_FOUND, Output


class RecordedHost(LocalHost):
    """Commands that are not in the table do not exist. The longest match of the command's first words answers."""

    def __init__(self, root: Path, commands: Mapping[str, str | Output] | None = None, *, name: str = "") -> None:
        super().__init__(name, root=root)
        self.python = "python"
        self._commands = dict(commands or {})

    async def run(
        self, *argv: str, timeout_seconds: float = 10.0, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> Output:
        line = " ".join(argv)
        if line.startswith("cat /") and (text := (await self.files(argv[1])).get(argv[1])) is not None:
            return Output(0, text, "")
        for start in sorted(self._commands, key=len, reverse=True):
            if line.startswith(start):
                answer = self._commands[start]
                return answer if isinstance(answer, Output) else Output(0, answer, "")
        return Output(NOT_FOUND, "", f"{argv[0]}: not found")


def write_tree(root: Path, files: Mapping[str, str]) -> Path:
    """``files`` (path -> text) below ``root``; a text of the form ``-> TARGET`` makes a symbolic link."""
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            path.symlink_to(text.removeprefix("-> "))
        else:
            path.write_text(text)
    return root
