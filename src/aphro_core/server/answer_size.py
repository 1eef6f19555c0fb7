"""How large an answer may get: log-probabilities of many choices together would take more memory than a server has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aphro_core.errors import RequestError
from aphro_core.request import Request

MAX_LOGPROB_ENTRIES: Final = 2**21  # about 0.4 GiB until the answer is written


def check_answer_size(requests: Sequence[Request], max_model_len: int) -> None:
    """Raises RequestError for several choices whose log-probabilities may be too many. One choice is always allowed."""
    if len(requests) == 1 and requests[0].sampling.n == 1:
        return
    entries = sum(_logprob_entries(request, max_model_len) for request in requests)
    if entries > MAX_LOGPROB_ENTRIES:
        raise RequestError(
            f"logprobs of all tokens of all choices may be {entries}, allowed: {MAX_LOGPROB_ENTRIES} together: fewer "
            f"choices, a smaller max_tokens, or fewer logprobs",
            field="logprobs",
        )


def _logprob_entries(request: Request, max_model_len: int) -> int:
    sampling, num_prompt_tokens = request.sampling, len(request.prompt_token_ids)
    room = max(max_model_len - num_prompt_tokens, 0)
    max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    entries = 0
    if sampling.logprobs is not None:
        entries += sampling.n * max_tokens * (sampling.logprobs + 1)
    if sampling.prompt_logprobs is not None:
        entries += num_prompt_tokens * (sampling.prompt_logprobs + 1)
    return entries
