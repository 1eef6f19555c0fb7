"""Text and chats to token ids and back, for a checkpoint folder or a GGUF file, without loading torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as Backend

from aphro_core.errors import ModelError, RequestError
from aphro_core.frontend.folder_tokenizer import read_folder_tokenizer
from aphro_core.frontend.gguf_tokenizer import read_gguf_tokenizer
from aphro_core.frontend.pieces import DECODERS, Pieces, read_decoder
from aphro_core.frontend.tokenizer_data import WITHOUT_TOKENIZER, TokenizerData
from aphro_core.templates.render import TemplateRefusedError, render_here

RenderTemplate = Callable[[str, Sequence[Mapping[str, Any]], bool, Mapping[str, Any]], str]

_RESERVED: Final = ("messages", "chat_template", "add_generation_prompt", "conversations")


class Tokenizer:
    """A vocabulary of ``vocab_size`` tokens. ``eos_token_ids`` end an answer. Safe to use from several threads."""

    def __init__(self, data: TokenizerData, *, source: Path, render: RenderTemplate = render_here) -> None:
        """``source`` is what errors name, ``render`` where chat templates run.

        Raises ModelError for a decoder that is not known here.
        """
        backend = data.backend
        decoder = read_decoder(backend)
        if decoder is None:
            kind = _kind_of_decoder(backend)
            raise ModelError(
                f"the tokenizer of {source} has a decoder of {kind}, allowed: {', '.join(DECODERS)}",
                hint=WITHOUT_TOKENIZER,
            )
        backend.no_truncation()
        backend.no_padding()
        to_bytes, self.strips_leading_space = decoder
        added = backend.get_added_tokens_decoder()
        self.bos_token_id = data.bos_token_id
        self.eos_token_ids = data.eos_token_ids
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._backend = backend
        self._data = data
        self._render_template = render
        self._all_pieces = Pieces(backend, to_bytes)
        self._visible_pieces = Pieces(backend, to_bytes, {token_id for token_id in added if added[token_id].special})
        self._texts: dict[int, str] = {}

    @property
    def chat_template(self) -> str | None:
        """The template of an ordinary chat."""
        return self._data.chat_templates.get("default")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens that are written out are found. Raises RequestError for what is no text."""
        return self._encode(text, add_special_tokens, "prompt")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool = True,
        **template_args: Any,
    ) -> list[int]:
        """Token ids of a conversation, written out by the chat template (``template_args`` are variables there).

        Raises RequestError: no template, or the template refuses these messages.
        """
        text = self._render(messages, add_generation_prompt, template_args)
        return self._encode(text, False, "messages")  # what goes before is up to the template

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of all these tokens; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token alone, a leading space and special tokens included; U+FFFD for a part of a character."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._all_pieces[token_id].decode(errors="replace")
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that one token adds to a text. Empty for an unknown id."""
        return self._all_pieces[token_id]

    def pieces(self, skip_special_tokens: bool) -> Pieces:
        """Token id -> bytes, special tokens empty if skipped."""
        return self._visible_pieces if skip_special_tokens else self._all_pieces

    def _encode(self, text: str, add_special_tokens: bool, field: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{field} has half a surrogate pair at character {error.start}, allowed: Unicode text", field=field
            ) from None
        except AttributeError:
            raise RequestError(f"{field} is a {type(text).__name__}, allowed: text", field=field) from None
        # the batch call leaves the other threads running, and the fast one counts no offsets
        encoded = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded[0].ids
        return ids

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, template_args: dict[str, Any]
    ) -> str:
        template = self._choose_template(bool(template_args.get("tools")))
        reserved = sorted(set(template_args) & set(_RESERVED))
        if reserved:
            raise RequestError(
                f"chat_template_kwargs has {', '.join(reserved)}, which has a place of its own or is not allowed",
                field="chat_template_kwargs",
            )
        variables = {**self._data.special_tokens, **template_args}
        try:
            return self._render_template(template, messages, add_generation_prompt, variables)
        except TemplateRefusedError as error:
            raise RequestError(f"the chat template refuses these messages: {error}", field="messages") from error

    def _choose_template(self, has_tools: bool) -> str:
        name = "tool_use" if has_tools and "tool_use" in self._data.chat_templates else "default"
        template = self._data.chat_templates.get(name)
        if template is None:
            known = f", only ones named {', '.join(self._data.chat_templates)}" if self._data.chat_templates else ""
            raise RequestError(
                f"this model has no chat template{known}: use /v1/completions with a prompt, or start the server with "
                f"--chat-template FILE",
                field="messages",
            )
        return template


def open_tokenizer(path: Path, *, chat_template: str | None = None, render: RenderTemplate = render_here) -> Tokenizer:
    """The tokenizer of a checkpoint folder or ``.gguf`` file. ``chat_template`` (its text) goes before the model's own.

    ``render`` runs the template: here, or in a process that has limits (templates/renderer.py). Raises ModelError: none
    there, damaged, or of a kind that is not known; also for a template that is broken or needs too much.
    """
    path = Path(path)
    data = read_gguf_tokenizer(path) if path.is_file() else read_folder_tokenizer(path)
    if chat_template is not None:
        data = replace(data, chat_templates={"default": chat_template})
    tokenizer = Tokenizer(data, source=path, render=render)
    if tokenizer.chat_template is not None:
        _check_template(tokenizer, "--chat-template" if chat_template is not None else str(path))
    return tokenizer


def _check_template(tokenizer: Tokenizer, source: str) -> None:
    """Try it out, so that its compiled form is there for the first chat, and a broken one is known at once."""
    try:
        tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    except RequestError as error:
        refused = error.__cause__ if isinstance(error.__cause__, TemplateRefusedError) else None
        if refused is not None and (refused.is_broken or refused.is_over_limit):  # else: it may refuse this very chat
            line = "" if refused.line is None else f" at line {refused.line}"
            raise ModelError(
                f"the chat template of {source} cannot be used{line}: {refused}",
                hint="--chat-template FILE, with a Jinja template",
            ) from error


def _kind_of_decoder(backend: Backend) -> str:
    described = json.loads(backend.decoder.__getstate__())
    return ", ".join(step["type"] for step in described.get("decoders", [described]))
