"""The errors an operator or a client sees: what happened, what to do next, and the exit code it ends in."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The documented exit codes of every command (docs/cli.md, "Exit codes")."""

    OK = 0
    INTERNAL = 1  # a fault of ours: please report it
    USAGE = 2  # a flag or an argument is wrong
    MODEL = 3  # the model is missing, unknown, damaged or mismatched
    PLACEMENT = 4  # an illegal tp/pp, or too few devices
    MEMORY = 5  # the model or its KV cache does not fit
    ADDRESS = 6  # the address or port cannot be bound
    ENGINE = 7  # the engine or a worker died
    RECOVERY = 8  # it died too often to be started again
    SERVER = 9  # the server that was asked cannot be reached, or refuses, or fails a request
    CLUSTER = 10  # no cluster here, the head does not answer or refuses, or nodes are missing
    INTERRUPTED = 130  # Ctrl-C before the server was up
    TERMINATED = 143  # SIGTERM before the server was up


class AphroError(Exception):
    """Something that is not our bug: ``message`` says what, ``hint`` is the next step to try (one line)."""

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, message: str, *, hint: str | None = None, exit_code: ExitCode | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(AphroError):
    exit_code = ExitCode.USAGE


class ModelError(AphroError):
    """The checkpoint is missing, of an unknown architecture, truncated, or not what its config says."""

    exit_code = ExitCode.MODEL


class PlacementError(AphroError):
    """A tp/pp size that the arithmetic forbids, or more ranks than devices."""

    exit_code = ExitCode.PLACEMENT


class MemoryBudgetError(AphroError):
    exit_code = ExitCode.MEMORY


class AddressError(AphroError):
    exit_code = ExitCode.ADDRESS


class ServerError(AphroError):
    """A running server that ``chat``, ``bench`` or ``top`` asked: not there, refusing, or broken off."""

    exit_code = ExitCode.SERVER


class ClusterError(AphroError):
    """This host is in no cluster, cannot join it, or the cluster is not what was expected."""

    exit_code = ExitCode.CLUSTER


class EngineDeadError(AphroError):
    """The engine or one of its workers is gone; ``message`` carries rank, host and first cause.

    ``is_external``: it was killed or stopped from outside, so that no request is to blame. ``lost_host``: the one that
    does not answer any more, "" if none.
    """

    exit_code = ExitCode.ENGINE

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        exit_code: ExitCode | None = None,
        is_external: bool = False,
        lost_host: str = "",
    ) -> None:
        super().__init__(message, hint=hint, exit_code=exit_code)
        self.is_external = is_external
        self.lost_host = lost_host


class StartInterruptedError(AphroError):
    """SIGINT or SIGTERM came before the server was up; ``phase`` is what was going on."""

    def __init__(self, signal_name: str, phase: str) -> None:
        code = ExitCode.INTERRUPTED if signal_name == "SIGINT" else ExitCode.TERMINATED
        super().__init__(f"{signal_name} before the server was up; interrupted: {phase}", exit_code=code)


class RequestFailedError(Exception):
    """One request cannot be computed (HTTP 500): a step with it alone failed, or the engine died under it twice."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class RequestError(Exception):
    """One request is wrong (HTTP 400): ``field`` as the client spelled it, and what is allowed there."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class OverloadedError(Exception):
    """The queue is full or the server is draining (HTTP 429/503); try again after ``retry_after`` seconds."""

    def __init__(self, message: str, *, retry_after: int = 1, draining: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.draining = draining


def first_cause(error: BaseException) -> BaseException:
    """Out of (nested) exception groups the one to show: an error of ours before any other, else the first."""
    while isinstance(error, BaseExceptionGroup):
        members: tuple[BaseException, ...] = error.exceptions
        ours = [member for member in members if isinstance(first_cause(member), (AphroError, RequestError))]
        error = ours[0] if ours else members[0]
    return error
