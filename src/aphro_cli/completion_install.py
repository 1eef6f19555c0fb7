"""Where each shell looks for completions, and putting the script there or taking it away, as often as one likes."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aphro_core.errors import UsageError

SHELLS: Final = {"bash": "aphro.bash", "zsh": "_aphro", "fish": "aphro.fish"}  # -> the script's name
_BEGIN, _END = "# >>> aphro completion >>>", "# <<< aphro completion <<<"
_BLOCK: Final = re.compile(rf"\n?{re.escape(_BEGIN)}\n.*?{re.escape(_END)}\n", re.DOTALL)
_LOADERS: Final = (  # of bash-completion, which reads scripts from the user's folder by itself
    "/usr/share/bash-completion/bash_completion",
    "/etc/bash_completion",
    "/usr/local/share/bash-completion/bash_completion",
)


@dataclass(frozen=True)
class Place:
    """``startup``: the shell's file that has to source ``script``; None where the shell finds it by itself."""

    shell: str
    script: Path
    startup: Path | None


def find_place(shell: str, environ: Mapping[str, str], home: Path, *, has_loader: bool | None = None) -> Place:
    """By the shell's own variables. ``has_loader``: whether bash-completion is there; None: look."""
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    if shell == "fish":
        config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
        return Place(shell, config / "fish" / "completions" / "aphro.fish", None)
    if shell == "zsh":
        return Place(shell, data / "zsh" / "site-functions" / "_aphro", Path(environ.get("ZDOTDIR") or home) / ".zshrc")
    folder = Path(environ.get("BASH_COMPLETION_USER_DIR") or data / "bash-completion")
    has_loader = any(map(os.path.exists, _LOADERS)) if has_loader is None else has_loader
    return Place(shell, folder / "completions" / "aphro", None if has_loader else home / ".bashrc")


def install(place: Place, script: str, header: str) -> list[str]:
    """What was done, in lines. Raises UsageError for a script that is not ours, and where nothing can be written."""
    found = _read(place.script)
    if found and header not in found:
        raise UsageError(
            f"{place.script} is there, and aphro did not write it",
            hint=f"move it away, or aphro completion show --shell {place.shell} > FILE",
        )
    lines = [_write(place.script, script, found)]
    if place.startup is not None:
        before = _read(place.startup)
        lines.append(_write(place.startup, _without_block(before) + _block(place), before))
    return lines


def uninstall(place: Place, header: str) -> list[str]:
    """The opposite of :func:`install`; what is not there need not be taken away."""
    lines = []
    if header in _read(place.script):
        place.script.unlink()
        lines.append(f"removed {place.script}")
    startup = _read(place.startup) if place.startup is not None else ""
    if place.startup is not None and _without_block(startup) != startup:
        _write(place.startup, _without_block(startup), startup)
        lines.append(f"taken out of {place.startup}")
    return lines or [f"nothing to remove for {place.shell}"]


def detect_shell(environ: Mapping[str, str], ancestors: list[str]) -> tuple[str, str]:
    """(shell, how that is known): the nearest that this process runs in, else the login shell. Raises UsageError."""
    for name in ancestors:
        if name.lstrip("-") in SHELLS:
            return name.lstrip("-"), "this runs in it"
    login = Path(environ.get("SHELL", "")).name
    if login in SHELLS:
        return login, "$SHELL"
    raise UsageError(
        f"the shell cannot be told ($SHELL is {environ.get('SHELL', '')!r}), allowed: {', '.join(SHELLS)}",
        hint="aphro completion install --shell bash",
    )


def ancestor_names(pid: int) -> list[str]:
    """Names of the processes above ``pid``, the nearest first; [] where the kernel does not say."""
    names = []
    for _ in range(8):
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :]
        names.append(name)
        pid = int(rest.split()[1])
    return names[1:]


def _block(place: Place) -> str:
    """For zsh the completion system has to run first; it may run already, or not."""
    start = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n" if place.shell == "zsh" else ""
    path = str(place.script).replace("'", "'\\''")
    return f"\n{_BEGIN}\n{start}[ -r '{path}' ] && source '{path}'\n{_END}\n"


def _without_block(text: str) -> str:
    return _BLOCK.sub("", text)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="check the file") from error


def _write(path: Path, text: str, before: str) -> str:
    """Whole or not at all, with the mode and behind the link that it had; says what was done."""
    if text == before and path.exists():
        return f"already there: {path}"
    target = path.resolve()  # files of a shell are often links into a repository
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}.", delete=False) as partial:
            partial.write(text)
        os.chmod(partial.name, mode)
        os.replace(partial.name, target)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", hint="check who owns the folder") from error
    return f"{'changed' if before else 'written'}: {path}"
