"""The LLM class: prompts in every form, results shaped as the field expects, errors by name, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from aphro import LLM, SamplingParams
from aphro_core.errors import ModelError, PlacementError, RequestError, UsageError
from aphro_core.request import OutputDelta, Request
from tests.e2e.server_process import descendants_of, is_running
from tests.tiny import write_tiny_checkpoint

SMALL = {"device": "cpu", "dtype": "float32", "max_model_len": 128, "num_blocks": 64, "skip_tokenizer_init": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    write_tiny_checkpoint(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(str(tiny), **SMALL) as llm:
        yield llm


def test_every_form_of_token_prompt_gives_the_same(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5)
    forms = [llm.generate([3, 4, 5], params), llm.generate([[3, 4, 5]], params)]
    forms += [
        llm.generate({"prompt_token_ids": [3, 4, 5]}, params),
        llm.generate(prompt_token_ids=[[3, 4, 5]], sampling_params=params),
    ]
    assert len({tuple(outputs[0].outputs[0].token_ids) for outputs in forms}) == 1
    assert forms[0][0].prompt_token_ids == [3, 4, 5]
    assert forms[0][0].finished


def test_choices_and_params_per_prompt(llm: LLM) -> None:
    params = [SamplingParams(n=3, seed=1, max_tokens=4), SamplingParams(temperature=0, max_tokens=2, logprobs=2)]
    first, second = llm.generate([[1, 2], [3]], params)
    assert [choice.index for choice in first.outputs] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in first.outputs}) > 1
    assert first.outputs[0].logprobs is None
    assert [choice.finish_reason for choice in first.outputs] == ["length"] * 3
    positions = second.outputs[0].logprobs
    assert positions is not None
    assert [len(position) for position in positions] == [2, 2]
    assert second.outputs[0].cumulative_logprob == pytest.approx(
        sum(position[token].logprob for position, token in zip(positions, second.outputs[0].token_ids, strict=True))
    )


def test_the_longest_begin_first_and_answers_keep_their_order(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend, begun = llm._session.frontend, []

    def stream(request: Request, *, is_whole: bool) -> AbstractAsyncContextManager[AsyncIterator[OutputDelta]]:
        begun.append((request.prompt_token_ids[0], request.sampling.max_tokens))
        return type(frontend).stream(frontend, request, is_whole=is_whole)

    monkeypatch.setattr(frontend, "stream", stream)
    lengths = [2, 5, None, 5, 3]
    params = [SamplingParams(temperature=0, max_tokens=most, ignore_eos=True) for most in lengths]
    outputs = llm.generate([[number] for number in range(1, 6)], params, use_tqdm=False)
    assert begun == [(3, None), (2, 5), (4, 5), (5, 3), (1, 2)]
    assert [output.prompt_token_ids for output in outputs] == [[1], [2], [3], [4], [5]]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 5, 127, 5, 3]


def test_prompt_logprobs_cover_the_prompt(llm: LLM) -> None:
    output = llm.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=1, prompt_logprobs=1))[0]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [next(iter(position)) for position in output.prompt_logprobs[1:] if position] == [2, 3, 4]


def test_stop_token_ids_end_a_choice(llm: LLM) -> None:
    free = llm.generate([[9, 8]], SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].token_ids
    stop = free[3]
    choice = llm.generate([[9, 8]], SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop]))[0].outputs[0]
    assert choice.token_ids == free[: free.index(stop) + 1]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ([], SamplingParams(), "prompt"),
        ([10**6], SamplingParams(), "prompt"),
        (list(range(128)), SamplingParams(), "prompt"),
        ([1], SamplingParams(max_tokens=500), "max_tokens"),
        ([1], SamplingParams(logit_bias={10**6: 1.0}), "logit_bias"),
        ([1], SamplingParams(stop=["x"]), "stop"),
    ],
)
def test_a_wrong_request_names_its_field_and_harms_no_other(
    llm: LLM, prompt: list[int], params: SamplingParams, field: str
) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate([prompt], params)
    assert caught.value.field == field
    assert llm.generate([[1]], SamplingParams(max_tokens=2))[0].finished


def test_refusals_name_the_cause(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tensor_paralel_size"):
        LLM(str(tiny), tensor_paralel_size=2)
    with pytest.raises(PlacementError, match="64"):
        LLM(str(tiny), tensor_parallel_size=64, **SMALL)
    with pytest.raises(ModelError, match="nothing-here"):
        LLM(str(tmp_path / "nothing-here"), **SMALL)
    assert descendants_of(os.getpid()) == [] or all("engine" not in str(pid) for pid in descendants_of(os.getpid()))


def test_a_damaged_checkpoint_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        LLM(str(tmp_path), **SMALL)


def test_leaving_the_block_leaves_no_process(tiny: Path) -> None:
    before = set(descendants_of(os.getpid()))
    with LLM(str(tiny), tensor_parallel_size=2, **SMALL) as llm:
        assert llm.generate([[1, 2]], SamplingParams(max_tokens=2))[0].finished
        started = set(descendants_of(os.getpid())) - before
        assert len(started) >= 3  # engine, two ranks (and the fork server)
    deadline = time.monotonic() + 3
    while any(is_running(pid) for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.02)


SCRIPT = """
from aphro import LLM
llm = LLM({model!r}, tensor_parallel_size=2, device="cpu", dtype="float32", max_model_len=128, skip_tokenizer_init=True)
print(len(llm.generate([[1, 2, 3]])[0].outputs[0].token_ids))
"""


def test_the_seeds_script_needs_no_main_guard_and_ends_clean(tiny: Path) -> None:
    """LLM(...) at the top of a script, never closed by hand."""
    done = subprocess.run(
        check=False,
        args=[sys.executable, "-c", SCRIPT.format(model=str(tiny))],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "16\n"


def test_text_and_chat(smollm2_gguf: Path) -> None:
    with LLM(str(smollm2_gguf), device="cpu", dtype="float32", max_model_len=512) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=16)
        output = llm.generate("The capital of France is", greedy)[0]
        assert "Paris" in output.outputs[0].text
        assert output.prompt == "The capital of France is"
        answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], greedy)[0].outputs[0]
        assert "Paris" in answer.text
        stopped = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=16, stop=["Par"]))[
            0
        ]
        assert "Par" not in stopped.outputs[0].text
        assert stopped.outputs[0].stop_reason == "Par"
