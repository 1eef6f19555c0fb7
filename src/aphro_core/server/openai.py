"""OpenAI's requests as ours: a typed body and a served model in, one ``Generation`` out, every wrong value named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

import anyio.lowlevel

from aphro_core.errors import RequestError
from aphro_core.request import MAX_LOGPROBS, Request, SamplingParams
from aphro_core.server.answer_size import check_answer_size
from aphro_core.server.contract import Frontend
from aphro_core.server.prompts import PromptEncoder
from aphro_core.server.refusals import HttpError
from aphro_core.server.schema import ChatBody, CompletionBody, Message, SamplingFields

MAX_CHOICES: Final = 1024  # of one body: prompts times n
MAX_TEMPLATE_KWARGS: Final = 32
MAX_SALT_LENGTH: Final = 256
_NO_SEED: Final = -1  # of clients that send one always

_ROLES: Final = ("system", "developer", "user", "assistant")
# passed on as they were given; a field that was not given takes SamplingParams' default
_SAMPLING: Final = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)
# names that mean something to the template's caller, not to the template
_NOT_FOR_TEMPLATES: Final = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "messages"}
    | {"bos_token", "eos_token", "max_length", "padding", "raise_exception", "return_dict", "return_tensors"}
    | {"self", "strftime_now", "tokenize", "tokenizer_kwargs", "tools", "truncation"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one body asks for: its requests, in the order of its prompts, and how the answer is written."""

    id: str
    requests: Sequence[Request]
    stream: bool
    include_usage: bool
    num_logprobs: int | None  # None = no log-probabilities in the answer
    echo: bool = False  # each choice begins with its prompt
    hides_output: bool = False  # only the echo was asked for
    return_token_ids: bool = False
    tokens_as_ids: bool = False
    spelled: Mapping[str, str] = field(default_factory=dict)  # a field of ours -> what the client calls it


def spell(error: RequestError, spelled: Mapping[str, str]) -> RequestError:
    """The same complaint in the client's words."""
    ours = error.field or ""
    if ours not in spelled:
        return error
    theirs, message = spelled[ours], error.message
    return RequestError(theirs + message.removeprefix(ours) if message.startswith(ours) else message, field=theirs)


def check_model(model: str | None, frontend: Frontend) -> None:
    """Raises HttpError (404) for another model than the one that is served; leaving the name out is fine."""
    if model is not None and model != frontend.served_name:
        message = f"the model {model[:200]!r} is not served here, allowed: {frontend.served_name!r}"
        raise HttpError(404, message, kind="invalid_request_error", param="model", code="model_not_found")


async def completion_of(body: CompletionBody, frontend: Frontend, encoder: PromptEncoder, salt: str) -> Generation:
    """Raises RequestError, or HttpError (404)."""
    check_model(body.model, frontend)
    hides_output = bool(body.echo) and body.max_tokens == 0
    sampling = _sampling(
        body,
        max_tokens=1 if hides_output else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    generation_id = f"cmpl-{uuid4().hex}"
    prompts = _split_prompts(body.prompt)
    if len(prompts) * sampling.n > MAX_CHOICES:
        message = f"{len(prompts)} prompts of {sampling.n} choices each, allowed: up to {MAX_CHOICES} choices together"
        raise RequestError(message, field="prompt")
    requests: list[Request] = []
    for index, prompt in enumerate(prompts):
        field = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
        if isinstance(prompt, str):
            ids: Sequence[int] = await encoder.encode(prompt, body.add_special_tokens is not False, field)
        else:
            ids = encoder.check_prompt(prompt, field)
        text = prompt if isinstance(prompt, str) else encoder.decode(prompt) if body.echo else None
        name = generation_id if len(prompts) == 1 else f"{generation_id}-{index}"
        requests.append(Request(name, ids, sampling, text, _salt(salt, body.cache_salt)))
        await anyio.lowlevel.checkpoint()  # a thousand prompts are encoded between what others ask
    check_answer_size(requests, frontend.max_model_len)
    return Generation(
        id=generation_id,
        requests=requests,
        stream=bool(body.stream),
        include_usage=_include_usage(body),
        num_logprobs=body.logprobs,
        echo=bool(body.echo),
        hides_output=hides_output,
        return_token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
    )


async def chat_of(body: ChatBody, frontend: Frontend, encoder: PromptEncoder, salt: str) -> Generation:
    """Raises RequestError, or HttpError (404)."""
    check_model(body.model, frontend)
    num_logprobs = _chat_logprobs(body)
    max_tokens, spelled = body.max_tokens, {"prompt": "messages"}
    if body.max_completion_tokens is not None:
        max_tokens, spelled = body.max_completion_tokens, {**spelled, "max_tokens": "max_completion_tokens"}
    try:
        sampling = _sampling(body, max_tokens=max_tokens, logprobs=num_logprobs, default_max_tokens=None)
    except RequestError as error:
        raise spell(error, spelled) from None
    ids = await encoder.encode_chat(
        template_messages(body.messages), body.add_generation_prompt is not False, template_kwargs(body)
    )
    generation_id = f"chatcmpl-{uuid4().hex}"
    requests = [Request(generation_id, ids, sampling, None, _salt(salt, body.cache_salt))]
    check_answer_size(requests, frontend.max_model_len)
    return Generation(
        id=generation_id,
        requests=requests,
        stream=bool(body.stream),
        include_usage=_include_usage(body),
        num_logprobs=num_logprobs,
        return_token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        spelled=spelled,
    )


def template_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates know them: text only, ``developer`` spelled ``system``."""
    if not messages:
        raise RequestError("messages is empty, allowed: at least one message", field="messages")
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def template_kwargs(body: Any) -> dict[str, Any]:
    """``chat_template_kwargs``: variables of the template, never the template itself or how it is run."""
    field = "chat_template_kwargs"
    given: Mapping[str, Any] = body.chat_template_kwargs or {}
    if len(given) > MAX_TEMPLATE_KWARGS:
        raise RequestError(f"{field} has {len(given)} entries, allowed: up to {MAX_TEMPLATE_KWARGS}", field=field)
    for name in given:
        if name in _NOT_FOR_TEMPLATES or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
            raise RequestError(
                f"{field} has {name[:80]!r}, allowed: names of the template's own variables", field=field
            )
    return dict(given)


def _template_message(message: Message, path: str) -> dict[str, str]:
    if message.role not in _ROLES:
        raise RequestError(
            f"{path}.role is {message.role[:80]!r}, allowed: {', '.join(_ROLES)} (tools are not supported)",
            field=f"{path}.role",
        )
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise RequestError(f"{path}.{name} is not supported by this server, leave it out", field=f"{path}.{name}")
    if message.content is None:
        raise RequestError(f"{path}.content is missing", field=f"{path}.content")
    content = message.content
    if not isinstance(content, str):
        content = "\n".join(_text_of(part, f"{path}.content[{index}]") for index, part in enumerate(content))
    named = {} if message.name is None else {"name": message.name}
    return {"role": "system" if message.role == "developer" else message.role, "content": content, **named}


def _text_of(part: Any, path: str) -> str:
    if part.type not in ("text", "input_text"):
        raise RequestError(f"{path}.type is {part.type[:80]!r}, allowed: text", field=f"{path}.type")
    if part.text is None:
        raise RequestError(f"{path}.text is missing", field=f"{path}.text")
    return str(part.text)


def _sampling(
    body: SamplingFields,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    default_max_tokens: int | None = 16,
) -> SamplingParams:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError(f"best_of is {body.best_of}, allowed: the same as n ({body.n or 1})", field="best_of")
    given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    if given.get("seed") == _NO_SEED:
        del given["seed"]
    given["max_tokens"] = default_max_tokens if max_tokens is None else max_tokens
    return SamplingParams(
        **given,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias={_token_id(key): value for key, value in (body.logit_bias or {}).items()},
    )


def _token_id(key: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", key):
        raise RequestError(f"logit_bias has the key {key[:80]!r}, allowed: token ids", field="logit_bias")
    return int(key)


def _chat_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise RequestError(f"top_logprobs is {body.top_logprobs}, allowed: 0 to {MAX_LOGPROBS}", field="top_logprobs")
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs is given, allowed: only with logprobs: true", field="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _split_prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """One prompt or many, as a list of them."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [prompt]
    if not prompt or len(kinds) > 1:
        raise RequestError(
            "prompt is an empty or a mixed list, allowed: texts, token ids, or lists of ids", field="prompt"
        )
    return prompt


def _include_usage(body: SamplingFields) -> bool:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is given, allowed: only with stream: true", field="stream_options")
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _salt(callers: str, asked: str | None) -> str:
    """Blocks are shared among requests of one key and, where the client asks for less, of one ``cache_salt``."""
    if asked is not None and len(asked) > MAX_SALT_LENGTH:
        raise RequestError(
            f"cache_salt has {len(asked)} characters, allowed: up to {MAX_SALT_LENGTH}", field="cache_salt"
        )
    return f"{callers}:{asked}" if asked else callers
