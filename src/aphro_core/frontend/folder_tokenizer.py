"""A tokenizer from a checkpoint folder: tokenizer.json through transformers, older formats converted by it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as Backend

from aphro_core.errors import ModelError
from aphro_core.frontend.qwen_tokenizer import FILE_NAME as QWEN_FILE
from aphro_core.frontend.qwen_tokenizer import read_qwen_tokenizer
from aphro_core.frontend.tokenizer_data import WITHOUT_TOKENIZER, TokenizerData

logger: Final = logging.getLogger(__name__)

_OLDER_FORMATS: Final = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def read_folder_tokenizer(folder: Path) -> TokenizerData:
    """Only data of this folder is read: no code, no network. Raises ModelError when there is none, or a damaged one."""
    if not (folder / "tokenizer.json").is_file() and (folder / QWEN_FILE).is_file():
        return _with_models_ends(read_qwen_tokenizer(folder), folder)
    loaded = _load(folder)
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise ModelError(
            f"the tokenizer of {folder} ({type(loaded).__name__}) has no tokenizer.json and cannot be turned into one",
            hint=WITHOUT_TOKENIZER,
        )
    own = [] if loaded.eos_token_id is None else [loaded.eos_token_id]
    templates = loaded.chat_template
    return TokenizerData(
        backend=backend,
        special_tokens=loaded.special_tokens_map,
        bos_token_id=loaded.bos_token_id,
        eos_token_ids=tuple(dict.fromkeys([*_eos_token_ids(folder), *own])),
        chat_templates={"default": templates} if isinstance(templates, str) else dict(templates or {}),
    )


def _with_models_ends(data: TokenizerData, folder: Path) -> TokenizerData:
    return replace(data, eos_token_ids=tuple(dict.fromkeys([*_eos_token_ids(folder), *data.eos_token_ids])))


def _load(folder: Path) -> Any:
    try:
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        if not any((folder / name).is_file() for name in _OLDER_FORMATS):
            raise ModelError(
                f"{folder} has no tokenizer, looked for: tokenizer.json, {', '.join(_OLDER_FORMATS)}, {QWEN_FILE}",
                hint=WITHOUT_TOKENIZER,
            )
        _refuse_code(folder)
        logger.warning("%s has no tokenizer.json: its tokenizer is converted at each start, which loads torch.", folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # damaged files raise whatever the parser of their format raises
        raise ModelError(f"the tokenizer of {folder} cannot be read: {error}", hint=WITHOUT_TOKENIZER) from error


def _refuse_code(folder: Path) -> None:
    """A tokenizer that comes as Python: transformers would ask on the terminal whether to run it."""
    for name in ("tokenizer_config.json", "config.json"):
        if "AutoTokenizer" in (_read_json(folder / name).get("auto_map") or {}):
            raise ModelError(
                f"the tokenizer of {folder} is Python code (auto_map in {name}), which is never run",
                hint="write a tokenizer.json where you trust it, or " + WITHOUT_TOKENIZER,
            )


def _eos_token_ids(folder: Path) -> list[int]:
    """What the model's own files call the end of an answer."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found = _read_json(folder / name).get("eos_token_id")
        each = found if isinstance(found, list) else [found]
        ids += [token_id for token_id in each if type(token_id) is int and token_id >= 0]
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}", hint="fetch the model again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} has a {type(found).__name__}, expected an object", hint="fetch the model again")
    return found
