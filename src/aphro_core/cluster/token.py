"""The cluster's token: made once on the head, carried to each host by the operator, kept in a file of its owner's."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from aphro_core.cluster.membership import private_folder, state_folder, write_private
from aphro_core.errors import UsageError

VARIABLE: Final = "APHRO_CLUSTER_TOKEN"
_TOKEN: Final = re.compile(r"[!-~]{32,512}")  # what fits a header of Ray's, and cannot be guessed


def new_token() -> str:
    """256 random bits."""
    return secrets.token_hex(32)


def token_path() -> Path:
    """Where the token of the cluster that this host is in is kept (mode 0600)."""
    return state_folder() / "token"


def keep_token(token: str) -> Path:
    private_folder(state_folder())
    write_private(token_path(), token.encode())
    return token_path()


def given_token(option: str | None, file: str | None, environment: Mapping[str, str]) -> str | None:
    """What was typed: ``--token-file`` ("-": standard input), ``--token``, or the variable; None where nothing was.

    Raises UsageError for a file that cannot be read and for what is no token.
    """
    if file is not None and option is not None:
        raise UsageError("--token and --token-file were both given", hint="one of them; the file is the safer one")
    if file is not None:
        return _checked(_read(file), f"--token-file {file}")
    if option is not None:
        return _checked(option, "--token")
    return _checked(environment[VARIABLE], VARIABLE) if environment.get(VARIABLE) else None


def _read(file: str) -> str:
    try:
        return sys.stdin.read(4096) if file == "-" else Path(file).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"--token-file {file}: {reason}", hint="the file `token` of the head's state folder") from None


def _checked(text: str, source: str) -> str:
    token = text.strip()
    if not _TOKEN.fullmatch(token):
        raise UsageError(
            f"{source} is no token of a cluster: {len(token)} characters; allowed: 32 to 512, without spaces",
            hint="copy what `aphro cluster up` printed on the head, or make one: openssl rand -hex 32",
        )
    return token
