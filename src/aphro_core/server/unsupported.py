"""Fields that other servers know: those that would change the answer are refused by name, the others ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# field -> the values that ask for nothing; any other is refused, since leaving it out would change the answer
REFUSED: Final[Mapping[str, tuple[object, ...]]] = {
    "add_special_tokens": (None, False),  # of a chat: the template writes them
    "allowed_token_ids": (None, []),
    "audio": (None,),
    "bad_words": (None, []),
    "chat_template": (None,),  # a client's template would be code
    "continue_final_message": (None, False),
    "custom_token_bans": (None, [], ""),
    "documents": (None, []),
    "dry_multiplier": (None, 0),
    "dynatemp_max": (None, 0),
    "dynatemp_min": (None, 0),
    "dynatemp_range": (None, 0),
    "ebnf": (None, ""),
    "echo": (None, False),  # of a chat
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "grammar": (None, ""),
    "guided_choice": (None, [], ""),
    "guided_grammar": (None, ""),
    "guided_json": (None, ""),
    "guided_regex": (None, ""),
    "json_schema": (None, ""),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "mirostat_mode": (None, 0),
    "modalities": (None, ["text"]),
    "no_repeat_ngram_size": (None, 0),
    "nsigma": (None, 0),
    "prediction": (None,),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),  # echo with logprobs has them
    "reasoning_effort": (None, "none"),
    "regex": (None, ""),
    "response_format": (None, {"type": "text"}),
    "skew": (None, 0),
    "smoothing_factor": (None, 0),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tfs": (None, 1),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_a": (None, 0),
    "truncate_prompt_tokens": (None,),
    "typical_p": (None, 1),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
    "xtc_probability": (None, 0),
}
IGNORED: Final = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
