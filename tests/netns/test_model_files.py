"""Model files of several hosts: a flipped bit is found, and one without the model reads the engine's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aphro import LLM
from aphro_core.config import HostSlots
from aphro_core.errors import AphroError, ExitCode
from aphro_core.reporter import SilentReporter
from tests import tiny
from tests.netns.hosts import NetnsHost, hosts
from tests.netns.small import SMALL, tokens_of

pytestmark = pytest.mark.usefixtures("warm_start")

WHERE = (HostSlots("node0", 1), HostSlots("node1", 1))


class Heard(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, key: str, done: int, total: int, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[list[NetnsHost]]:
    env = {f"node{number}": {"XDG_CACHE_HOME": str(folder / f"cache{number}")} for number in range(2)}
    with hosts(2, env=env) as made:
        yield made


@contextmanager
def hidden(node: NetnsHost, path: Path) -> Iterator[None]:
    """``path`` is empty on that host alone."""
    node.run("mount", "--bind", "/dev/null" if path.is_file() else "/mnt", str(path))
    try:
        yield
    finally:
        node.run("umount", str(path))


@pytest.mark.parametrize(("kind", "tp", "pp"), [("safetensors", 1, 2), ("gguf", 2, 1)])
def test_a_host_without_the_model(nodes: list[NetnsHost], folder: Path, kind: str, tp: int, pp: int) -> None:
    path = folder / f"of-{kind}"
    if kind == "gguf":
        path = path.with_suffix(".gguf")
        tiny.write_tiny_gguf(path, quant="F16")
    else:
        tiny.write_tiny_checkpoint(path, "llama", num_layers=4)
    with LLM(str(path), **SMALL) as llm:
        expected = tokens_of(llm)
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    with hidden(nodes[1], path):
        with pytest.raises(AphroError, match="node1") as refused:
            LLM(str(path), hosts=WHERE, **sizes, **SMALL)
        assert "--model-from head" in str(refused.value.hint)
        said = Heard()
        for run in range(2 if kind == "gguf" else 1):
            with LLM(str(path), hosts=WHERE, model_from="head", reporter=said, **sizes, **SMALL) as llm:
                assert tokens_of(llm) == expected
                ready = llm._session.ready
                assert ready is not None
                first, second = ready.ranks
                assert first.bytes_fetched is None
                assert second.bytes_fetched is not None
                assert (second.bytes_fetched == 0) == (run == 1), "the second time it is there"
    assert any("came from this host" in line for line in said.lines)
    spans = [
        line for line in said.lines if line.startswith("Warning: tensor parallel spans node0, node1, which exchange ")
    ]
    assert len(spans) == (2 if tp == 2 else 0)
    assert not (folder / "cache0").exists()


def test_a_flipped_bit(nodes: list[NetnsHost], folder: Path) -> None:
    path = folder / "flipped"
    tiny.write_tiny_checkpoint(path, "llama")
    weights = path / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    (folder / "damaged").write_bytes(damaged)
    nodes[1].run("mount", "--bind", str(folder / "damaged"), str(weights))
    said = Heard()
    with pytest.raises(AphroError, match=r"node1: model\.safetensors of .* has other contents") as refused:
        LLM(str(path), tensor_parallel_size=2, hosts=WHERE, verify="full", reporter=said, **SMALL)
    assert refused.value.exit_code == ExitCode.MODEL
    assert any("comparing model files" in line for line in said.lines)
    nodes[1].run("umount", str(weights))
    assert (folder / "cache1" / "aphro" / "digests.json").stat().st_size > 100
