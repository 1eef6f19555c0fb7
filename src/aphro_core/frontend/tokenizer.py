"""Text and chats to token ids and back, for a checkpoint folder or a GGUF file, without loading torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as Backend

from aphro_core.errors import ModelError, RequestError
from aphro_core.frontend.gguf_tokenizer import read_gguf_tokenizer
from aphro_core.frontend.pieces import DECODERS, Pieces, read_decoder

logger: Final = logging.getLogger(__name__)

_WITHOUT: Final = "serve token ids alone: --skip-tokenizer-init, or LLM(..., skip_tokenizer_init=True)"
_RESERVED: Final = ("messages", "chat_template", "add_generation_prompt", "conversations")


class Tokenizer:
    """A vocabulary of ``vocab_size`` tokens. ``eos_token_ids`` end an answer. Safe to use from several threads."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token_id: int | None,
        eos_token_ids: Sequence[int],
        special_tokens: Mapping[str, Any],
        chat_templates: Mapping[str, str],
        source: Path,
    ) -> None:
        """``special_tokens`` are variables of a template (``bos_token``); ``chat_templates`` by name, "default" first."""
        decoder = read_decoder(backend)
        if decoder is None:
            raise ModelError(
                f"the tokenizer of {source} has a decoder {_kind_of_decoder(backend)}, allowed: {', '.join(DECODERS)}",
                hint=_WITHOUT,
            )
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._chat_templates = dict(chat_templates)
        to_bytes, self.strips_leading_space = decoder
        hidden = {token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special}
        self._all_pieces = Pieces(backend, to_bytes)
        self._visible_pieces = Pieces(backend, to_bytes, frozenset(hidden))
        self._texts: dict[int, str] = {}
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        """The template of an ordinary chat."""
        return self._chat_templates.get("default")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens are also found when they are written out. Raises RequestError for what is no text."""
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
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**self._special_tokens, **template_args}
        try:
            rendered, _ = render_jinja_template(
                [list(messages)], chat_template=template, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # the template is foreign code on a client's data: whatever it raises is about those
            raise RequestError(f"the chat template refuses these messages: {error}", field="messages") from error
        text: str = rendered[0]
        return text

    def _choose_template(self, has_tools: bool) -> str:
        name = "tool_use" if has_tools and "tool_use" in self._chat_templates else "default"
        template = self._chat_templates.get(name)
        if template is None:
            known = f", only ones named {', '.join(self._chat_templates)}" if self._chat_templates else ""
            raise RequestError(
                f"this model has no chat template{known}: use /v1/completions with a prompt, or start the server with "
                f"--chat-template FILE",
                field="messages",
            )
        return template


def open_tokenizer(path: Path, *, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder or ``.gguf`` file. ``chat_template`` (its text) goes before the model's own.

    Raises ModelError: none there, damaged, or of a kind that is not known; also for a template with a syntax error.
    """
    path = Path(path)
    tokenizer = _open_gguf(path, chat_template) if path.is_file() else _open_folder(path, chat_template)
    if tokenizer.chat_template is not None:
        _check_template(tokenizer, "--chat-template" if chat_template is not None else str(path))
    return tokenizer


def _open_gguf(path: Path, chat_template: str | None) -> Tokenizer:
    found = read_gguf_tokenizer(path)
    return Tokenizer(
        found.backend,
        bos_token_id=found.bos_token_id,
        eos_token_ids=found.eos_token_ids,
        special_tokens=found.special_tokens,
        chat_templates=_templates(found.chat_templates, chat_template),
        source=path,
    )


def _open_folder(folder: Path, chat_template: str | None) -> Tokenizer:
    loaded = _load_transformers(folder)
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise ModelError(
            f"the tokenizer of {folder} ({type(loaded).__name__}) has no tokenizer.json and cannot be turned into one",
            hint=_WITHOUT,
        )
    own = [] if loaded.eos_token_id is None else [loaded.eos_token_id]
    return Tokenizer(
        backend,
        bos_token_id=loaded.bos_token_id,
        eos_token_ids=[*_eos_token_ids(folder), *own],
        special_tokens=loaded.special_tokens_map,
        chat_templates=_templates(loaded.chat_template, chat_template),
        source=folder,
    )


def _load_transformers(folder: Path) -> Any:
    """The tokenizer as transformers reads it: only data of this folder, never code, never the network."""
    try:
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        if not _has_slow_tokenizer(folder):
            raise ModelError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json)", hint=_WITHOUT)
        logger.warning("%s has no tokenizer.json: its tokenizer is converted at each start, which loads torch.", folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # damaged files raise whatever the parser of their format raises
        raise ModelError(f"the tokenizer of {folder} cannot be read: {error}", hint=_WITHOUT) from error


def _has_slow_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return any((folder / name).is_file() for name in names)


def _eos_token_ids(folder: Path) -> list[int]:
    """What the model's own config files call the end, first of them first."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_bytes()).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ModelError(f"{folder / name} cannot be read: {error}", hint="fetch the model again") from error
        each = found if isinstance(found, list) else [found]
        ids += [token_id for token_id in each if isinstance(token_id, int) and token_id >= 0]
    return ids


def _templates(own: str | Mapping[str, str] | None, given: str | None) -> dict[str, str]:
    if given is not None:
        return {"default": given}
    return {"default": own} if isinstance(own, str) else dict(own or {})


def _check_template(tokenizer: Tokenizer, source: str) -> None:
    """Try it out, so that its compiled form is there for the first chat, and a broken one is known at once."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    except RequestError as error:
        if isinstance(error.__cause__, TemplateSyntaxError | ImportError):  # else: it may refuse this chat
            line = f" at line {error.__cause__.lineno}" if isinstance(error.__cause__, TemplateSyntaxError) else ""
            raise ModelError(
                f"the chat template of {source} cannot be used{line}: {error.__cause__}",
                hint="--chat-template FILE, with a Jinja template",
            ) from error


def _kind_of_decoder(backend: Backend) -> str:
    described = json.loads(backend.decoder.__getstate__())
    return ", ".join(step["type"] for step in described.get("decoders", [described]))
