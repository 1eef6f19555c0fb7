"""Models from the Hugging Face Hub: only the files that serving needs, and what to do when they cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from aphro_core.errors import ModelError

Header = tuple[str, str, tuple[int, ...], int]  # of a tensor: name, data type, shape, bytes

PATTERNS: Final = [
    "*.json",
    "*.safetensors",
    "tokenizer*",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
]
NOT_NEEDED: Final = ["*/*", "consolidated*"]  # variants in subfolders; the same weights under other names


def download(model: str, *, revision: str | None, on_progress: Callable[[str], None] | None) -> Path:
    """The folder of a snapshot in the Hugging Face cache, fetched where it is not there yet.

    Progress bars are the library's own, on stderr. Without a network a cached snapshot is used as it is.
    Raises ModelError: no such model or revision, no access, no network.
    """
    from huggingface_hub import snapshot_download

    if on_progress is not None:
        on_progress(f"No local path {model}: looking for it on the Hugging Face Hub and in its cache.")
    with _explained(model, revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=PATTERNS, ignore_patterns=NOT_NEEDED))


def fetch_headers(
    model: str, *, revision: str | None, on_progress: Callable[[str], None] | None
) -> tuple[Path, list[Header] | None]:
    """(the folder that holds config.json, the headers of the weights' files), by requests for these bytes alone.

    No headers (None) where the snapshot is cached whole, or where the weights are in no safetensors. Raises as above.
    """
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    if on_progress is not None:
        on_progress(f"No local path {model}: reading its config and headers from the Hugging Face Hub or its cache.")
    with _explained(model, revision):
        folder = Path(hf_hub_download(model, "config.json", revision=revision)).parent
        if any(folder.glob("*.safetensors")):
            return folder, None
        try:
            found = get_safetensors_metadata(model, revision=revision)
        except NotASafetensorsRepoError:
            return folder, None
    return folder, [
        (name, str(info.dtype), tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
        for file in found.files_metadata.values()
        for name, info in file.tensors.items()
    ]


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """The library's errors as ModelErrors with the next step."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{model!r} at revision {revision!r}" if revision else f"{model!r}"
    try:
        yield
    except HFValidationError as error:
        problem, hint = (
            f"{model!r} is neither a path nor a Hugging Face id",
            "give a folder, a .gguf file or owner/name",
        )
        raise ModelError(problem, hint=hint) from error
    except GatedRepoError as error:
        hint = "accept its terms on its page, then set HF_TOKEN to a token of that account"
        raise ModelError(f"the Hugging Face model {what} is gated and this account has no access", hint=hint) from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; for a private model set HF_TOKEN; for a local one give its path"
        raise ModelError(f"no local path and no Hugging Face model {what}", hint=hint) from error
    except RevisionNotFoundError as error:
        hint = "leave --revision out for the main branch, or give a branch, tag or commit that exists"
        raise ModelError(f"no Hugging Face model {what}", hint=hint) from error
    except LocalEntryNotFoundError as error:
        hint = "give the path of a local folder or .gguf file, or fetch the model where there is a network"
        raise ModelError(
            f"no local path {model}, it is not in the Hugging Face cache, and the Hub cannot be reached", hint=hint
        ) from error
    except EntryNotFoundError as error:
        hint = "a repository of GGUF files: fetch one and give its path; otherwise check the model's page"
        raise ModelError(f"the Hugging Face model {what} has no config.json", hint=hint) from error
    except Exception as error:  # the library lets through its HTTP client's own errors; a full disk ends here too
        hint = "try again (what was fetched is kept), or give the path of a local folder or .gguf file"
        problem = f"the Hugging Face model {what} could not be fetched: {type(error).__name__}: {error}"
        raise ModelError(problem, hint=hint) from error
