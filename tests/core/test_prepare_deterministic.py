"""``--deterministic`` is granted or refused, never ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from aphro_core import host
from aphro_core.errors import UsageError
from aphro_core.prepare import EngineOptions, prepare
from tests.tiny import write_tiny_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_checkpoint(tmp_path / "tiny", "llama")
    return tmp_path / "tiny"


class Said:
    """A reporter that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_granted_on_a_cpu_and_its_cost_is_said(folder: Path, dtype: str) -> None:
    said = Said()
    prepared = prepare(EngineOptions(model=str(folder), device="cpu", dtype=dtype, deterministic=True), said)  # type: ignore[arg-type]
    assert prepared.config.deterministic
    assert any(line.startswith("Deterministic: ") and "slower" in line for line in said.lines)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "quantization": "int8"}, "stay packed"),
        ({"device": "cuda", "dtype": "bfloat16"}, "on GPUs"),
    ],
)
def test_refused_where_it_would_not_hold(
    folder: Path, more: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "visible_gpus", lambda: ["0"])
    monkeypatch.setattr(host, "torch_has_cuda", lambda: True)
    options = EngineOptions(model=str(folder), **{"device": "cpu", **more}, deterministic=True)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as caught:
        prepare(options, Said())  # type: ignore[arg-type]
    assert named in caught.value.message
    assert caught.value.hint
