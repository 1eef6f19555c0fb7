"""Kernels compiled beforehand: each once, in processes that may fail or die, and none of them launched meanwhile."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

import aphro_kernels
from aphro_kernels.language import tl, triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime._async_compile import active_mode

from aphro_core.worker import compile_ahead
from aphro_core.worker.compile_ahead import can_compile_ahead, compiling_ahead


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))


def launch(folder: Path, name: str, made: dict[str, Any], compiled_here: list[str]) -> None:
    """What Triton does for a kernel: compile it once, by the cache on disk if it is there, and launch it."""

    def compile_() -> str:
        if not (folder / name).exists():
            (folder / name).write_text(str(os.getpid()))
            if name == "deadly":
                os._exit(9)
            if name == "broken" and os.getpid() != PID:
                raise ValueError("cannot be compiled there")
        if os.getpid() == PID:
            compiled_here.append(name)
        return name

    if name not in made:
        mode = active_mode.get()
        assert mode is not None
        kernel = mode.submit(name, compile_, lambda kernel: made.__setitem__(name, kernel))
        assert made[name] is kernel
    made[name].run(made[name].function, made[name].packed_metadata, made[name].launch_metadata(None))


PID = os.getpid()


@pytest.mark.parametrize("num_processes", [1, 3])
def test_each_kernel_is_compiled_once_and_launched_by_nobody(
    tmp_path: Path, num_processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launchers = tmp_path / "launchers"
    launchers.mkdir()
    monkeypatch.setattr(compile_ahead, "_build_launcher", lambda kernel: (launchers / kernel).touch())
    assert can_compile_ahead() == hasattr(triton, "AsyncCompileMode")
    made: dict[str, Any] = {}
    here: list[str] = []
    names = ["a", "b", "broken", "deadly", *"cdefgh"] if num_processes > 1 else list("abc")
    with compiling_ahead(num_processes):
        for name in names * 2:
            launch(tmp_path, name, made, here)
        assert here == []
    assert made == {name: name for name in names}, "each is there, and no stand-in is left"
    assert here == names
    pids = {int((tmp_path / name).read_text()) for name in names}
    assert pids == {PID} if num_processes == 1 else PID not in pids
    assert {path.name for path in launchers.iterdir()} == (set("abcdefgh") if num_processes > 1 else set())
    assert active_mode.get() is None


def test_processes_that_do_not_end_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank, wait = os.getpid(), os.pipe()
    monkeypatch.setattr(compile_ahead, "_build_launcher", lambda kernel: None)
    jobs = [lambda: os.getpid() == rank or os.read(wait[0], 1), lambda: None]
    processes = compile_ahead._Processes(jobs, 2)
    assert not processes.wait(time.monotonic() + 0.2)
    processes.end()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    for end in wait:
        os.close(end)


def test_what_is_noted_first_is_begun_beside_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "_build_launcher", lambda kernel: None)
    made: dict[str, Any] = {}
    here: list[str] = []
    with compiling_ahead(3) as begin:
        for name in "abcd":
            launch(tmp_path, name, made, here)
        begin()
        deadline = time.monotonic() + 20
        while len(list(tmp_path.iterdir())) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {path.name for path in tmp_path.iterdir()} == set("abcd")
        launch(tmp_path, "e", made, here)
        assert here == []
    assert here == list("abcde")
    assert str(PID) not in {path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_an_error_leaves_no_process_behind() -> None:
    wait = os.pipe()

    def fail() -> None:
        with compiling_ahead(2) as begin:
            mode = active_mode.get()
            assert mode is not None
            for name in "ab":
                mode.submit(name, lambda: os.read(wait[0], 1), lambda kernel: None)
            begin()
            raise ValueError("a step")

    with pytest.raises(ValueError, match="a step"):
        fail()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    for end in wait:
        os.close(end)


def test_long_ones_come_first() -> None:
    def job(name: str) -> Any:
        src = SimpleNamespace(name=name)
        return lambda: src.name

    names = ["_rms_norm_kernel", "chain_kernel", "draw_kernel", "hopper_attention_kernel"]
    found = [one() for one in compile_ahead._longest_first([job(name) for name in names] + [lambda: "another's"])]
    assert found == ["hopper_attention_kernel", "chain_kernel", "_rms_norm_kernel", "draw_kernel", "another's"]


@triton.jit
def chain_kernel(x) -> None:
    tl.store(x, 1)


def test_the_triton_that_is_here_says_whose_a_job_is_and_what_is_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has kernels in the closures of its jobs, and their files, under names that no document promises."""
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    monkeypatch.setattr(chain_kernel, "device_caches", {0: ({}, {}, target, backend, None)})
    monkeypatch.setattr(chain_kernel, "ASTSource", ASTSource, raising=False)
    monkeypatch.setattr(chain_kernel, "compile", triton.compiler.compile, raising=False)

    def note() -> compile_ahead._Notes:
        notes = compile_ahead._Notes()
        with compile_ahead._active(notes):
            chain_kernel._do_compile("a key", {"x": "*i32"}, 0, {}, backend.parse_options({}), {}, False)
        return notes

    ((job, _),) = note().jobs
    assert compile_ahead._kernel_of(job) == "chain_kernel"
    assert len(note().to_compile) == 1
    try:
        job()
    except RuntimeError as error:
        pytest.skip(f"this Triton cannot compile for a GPU here: {error}")
    assert note().to_compile == []
    assert len(note().jobs) == 1


def test_kernels_that_take_long_are_there() -> None:
    sources = "".join(file.read_text() for file in Path(aphro_kernels.__path__[0]).glob("*.py"))
    assert [name for name in compile_ahead._LONG if f"def {name}(" not in sources] == []


def test_jobs_that_cannot_be_looked_into_keep_their_order() -> None:
    jobs = [partial(str, "a"), partial(str, "b")]
    assert compile_ahead._longest_first(jobs) == jobs


@pytest.mark.parametrize("num_forked", [0, 1])
def test_a_limit_of_processes_is_no_end_of_a_start(
    num_forked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compile_ahead, "_build_launcher", lambda kernel: None)
    fork, forked = os.fork, list[int]()

    def fork_some() -> int:
        if len(forked) == num_forked:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        forked.append(fork())
        return forked[-1]

    monkeypatch.setattr(os, "fork", fork_some)
    made: dict[str, Any] = {}
    here: list[str] = []
    with compiling_ahead(3):
        for name in "abc":
            launch(tmp_path, name, made, here)
    assert here == list("abc")
    assert made == {name: name for name in "abc"}
    assert f"{num_forked} of 3 processes compile kernels" in caplog.text
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
