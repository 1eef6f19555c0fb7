"""Token ids to text as they come: whole characters only, nothing that may be the start of a stop string."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from dataclasses import dataclass

from aphro_core.frontend.pieces import Pieces
from aphro_core.frontend.stop_strings import StopFinder, StopString
from aphro_core.frontend.tokenizer import Tokenizer
from aphro_core.request import SamplingParams


@dataclass(frozen=True, slots=True)
class TextRules:
    """How the output of a request becomes text: the same for all of its choices, built once."""

    pieces: Pieces
    strips_leading_space: bool
    stops: tuple[StopString, ...]
    include_stop: bool
    min_tokens: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> TextRules:
        pieces = tokenizer.pieces(sampling.skip_special_tokens)
        # a SentencePiece text loses its first space; behind a prompt that can be seen, that was the prompt's
        strips = tokenizer.strips_leading_space and not any(pieces[token_id] for token_id in reversed(prompt_token_ids))
        stops = tuple(map(StopString.of, sampling.stop))
        return cls(pieces, strips, stops, sampling.include_stop_str_in_output, sampling.min_tokens)


class Detokenizer:
    """The text of one choice. What ``push`` and ``finish`` return, joined, is the decoded text of all tokens.

    ``stop_string`` is set when one was found: the text ends before it (behind it, if it is to be included), and
    ``num_tokens`` counts the tokens up to the one that completed it. A stop string may not end within the first
    ``min_tokens`` tokens. Where parts of the text are cut changes nothing: of several stop strings the first to end
    counts. Linear in the tokens, whatever they are.
    """

    __slots__ = ("_finder", "_held", "_partial", "_rules", "_strips_space", "num_tokens", "stop_string")

    def __init__(self, rules: TextRules) -> None:
        self.num_tokens = 0
        self.stop_string: str | None = None
        self._rules = rules
        self._strips_space = rules.strips_leading_space
        self._partial = b""  # the start of a character
        self._held = ""  # the start of a stop string
        self._finder = StopFinder(rules.stops) if rules.stops else None

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add for certain. Not to be called once a stop string was found."""
        pieces = self._rules.pieces
        if self._finder is None:
            self.num_tokens += len(token_ids)
            return self._decode(b"".join([pieces[token_id] for token_id in token_ids]))
        text = ""
        for token_id in token_ids:
            self.num_tokens += 1
            text += self._guard(self._finder, self._decode(pieces[token_id]))
            if self.stop_string is not None:
                break
        return text

    def finish(self) -> str:
        """What was held back, when no token follows. Half a character becomes U+FFFD."""
        text, self._held = self._held + self._decode(b"", is_last=True), ""
        return text

    def _decode(self, data: bytes, is_last: bool = False) -> str:
        if self._partial:
            data = self._partial + data
        text, num_read = utf_8_decode(data, "replace", is_last)
        self._partial = data[num_read:]
        if self._strips_space and text:
            self._strips_space = False
            return text[1:] if text[0] == " " else text
        return text

    def _guard(self, finder: StopFinder, text: str) -> str:
        if not text:
            return ""
        whole = self._held + text
        if self.num_tokens <= self._rules.min_tokens:
            finder.skip(text)
        elif (found := finder.find(text)) is not None:
            end, self.stop_string = found
            stop = len(whole) - len(text) + end - (0 if self._rules.include_stop else len(self.stop_string))
            self._held, self._partial = "", b""
            return whole[:stop]
        num_shown = len(whole) - finder.num_held
        self._held = whole[num_shown:]
        return whole[:num_shown]
