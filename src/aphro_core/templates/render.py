"""A conversation written out by a chat template, in this process: the template is foreign code, however caged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aphro_core.messages.templates import Render


class TemplateRefusedError(Exception):
    """The template did not write this conversation. ``is_broken``: it would write none; ``line`` says where.

    ``is_over_limit``: it took too long or too much memory.
    """

    def __init__(
        self, message: str, *, is_broken: bool = False, is_over_limit: bool = False, line: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.is_broken = is_broken
        self.is_over_limit = is_over_limit
        self.line = line


def render_here(
    template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
) -> str:
    """Raises TemplateRefusedError. No limit holds it: what it takes in time and memory is up to the template."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            [list(messages)], chat_template=template, add_generation_prompt=add_generation_prompt, **variables
        )
    except TemplateSyntaxError as error:
        raise TemplateRefusedError(str(error), is_broken=True, line=error.lineno) from error
    except ImportError as error:
        raise TemplateRefusedError(str(error), is_broken=True) from error
    except MemoryError as error:
        raise TemplateRefusedError("it needs too much memory", is_over_limit=True) from error
    except Exception as error:  # foreign code on a client's data: whatever it raises is about those
        raise TemplateRefusedError(str(error)) from error
    text: str = rendered[0]
    return text


def render_message(asked: Render) -> str:
    return render_here(asked.template, asked.messages, asked.add_generation_prompt, asked.variables)
