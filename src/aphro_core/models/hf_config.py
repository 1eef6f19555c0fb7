"""Typed reads from a Hugging Face config: untrusted JSON in, checked values out, or a ModelError that names the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from aphro_core.errors import ModelError

MAX_SIZE: Final = 2**24  # of a dimension: far above every model, far below what could exhaust a host in arithmetic

MAX_NUMBER: Final = 1e30  # of a factor or an angle's base: far above every model's, and a float32 with room

Value = TypeVar("Value")


class HfConfig:
    """A config's keys, read one by one. A key that is missing or null takes its default; without one it is required."""

    def __init__(self, values: Mapping[str, Any], *, prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix  # of nested keys, for messages

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        value = self._read(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.refuse(key, f"an integer from {minimum} to {maximum}")
        return value

    def number(
        self, key: str, default: float | None = None, *, minimum: float = 0.0, maximum: float = MAX_NUMBER
    ) -> float:
        value = self._read(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not minimum <= value <= maximum:  # which NaN is not
            raise self.refuse(key, f"a number from {minimum:g} to {maximum:g}")
        return float(value)

    def norm_eps(self, key: str, default: float) -> float:
        """What a norm adds to the mean square: beside more than 1 there would be nothing left of the square."""
        return self.number(key, default, maximum=1.0)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value == 0.0:
            raise self.refuse(key, "a number above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._read(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def choice(self, key: str, allowed: Mapping[str, Value], default: str | None = None) -> Value:
        """One of the names in ``allowed``, as the value that stands there."""
        value = self._read(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.refuse(key, ", ".join(allowed))
        return allowed[value]

    def choice_of(self, key: str, allowed: Sequence[int]) -> int:
        """One of these numbers."""
        value = self._read(key, None)
        if type(value) is not int or value not in allowed:
            raise self.refuse(key, ", ".join(map(str, allowed)))
        return value

    def text(self, key: str) -> str:
        value = self._read(key, None)
        if not isinstance(value, str):
            raise self.refuse(key, "a string")
        return value

    @property
    def keys(self) -> list[str]:
        return list(self._values)

    def names(self, key: str) -> list[str]:
        """A list of strings; empty when the key is missing."""
        value = self._read(key, ())
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(x, str) for x in value):
            raise self.refuse(key, "a list of strings")
        return list(value)

    def lists(self, key: str) -> list[list[str]]:
        """A list of lists of strings, or of strings, which count as lists of one; empty when the key is missing."""
        value = self._read(key, ())
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        groups: list[Any] = [[group] if isinstance(group, str) else group for group in value] if is_list else [None]
        if not all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups):
            raise self.refuse(key, "a list of lists of strings")
        return groups

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        value = self._read(key, None)
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_list or not all(type(x) in (int, float) and 0 < x <= MAX_NUMBER for x in value):
            raise self.refuse(key, f"a list of numbers above 0, up to {MAX_NUMBER:g}")
        return tuple(map(float, value))

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers from 0 up; empty when the key is missing."""
        value = self._read(key, ())
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_list or not all(type(x) is int and 0 <= x < MAX_SIZE for x in value):
            raise self.refuse(key, "a list of integers from 0 up")
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; empty when the key is missing."""
        value = self._read(key, ())
        ids = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if not all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < MAX_SIZE for x in ids):
            raise self.refuse(key, "a token id or a list of token ids")
        return tuple(ids)

    def section(self, key: str) -> HfConfig:
        """A nested object; empty when the key is missing."""
        value = self._read(key, {})
        if not isinstance(value, Mapping):
            raise self.refuse(key, "an object")
        return HfConfig(value, prefix=f"{self._prefix}{key}.")

    def refuse(self, key: str, allowed: str) -> ModelError:
        """The error to raise for ``key``: its value as found, and what is allowed."""
        value = repr(self._values.get(key))
        shown = value if len(value) <= 80 else f"{value[:77]}..."
        return ModelError(
            f"the model's config has {self._prefix}{key} = {shown}, allowed: {allowed}",
            hint="compare config.json with the publisher's original, or use another model",
        )

    def _read(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelError(
                f"the model's config lacks {self._prefix}{key}",
                hint="compare config.json with the publisher's original, or use another model",
            )
        return default
