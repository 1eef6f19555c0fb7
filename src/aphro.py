"""The short import: ``from aphro import LLM, SamplingParams``."""

from aphro_core.llm import LLM
from aphro_core.request import SamplingParams

__all__ = ["LLM", "SamplingParams"]
