"""Stop strings against the obvious search, however the text is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aphro_core.frontend.stop_strings import StopFinder, StopString

# two letters, so that prefixes overlap all the time
words = st.text("ab", min_size=1, max_size=5)


def first_end(text: str, stops: list[str], from_end: int = 0) -> tuple[int, str] | None:
    """The obvious way: try each end in turn, the longest stop first."""
    for end in range(from_end + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end, stop
    return None


def held(text: str, stops: list[str]) -> int:
    """The longest end of the text that is a proper start of a stop string."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )


@given(st.lists(words, max_size=12), st.lists(words, min_size=1, max_size=4))
def test_finds_what_ends_first(parts: list[str], stops: list[str]) -> None:
    finder = StopFinder([StopString.of(stop) for stop in stops])
    seen = ""
    for part in parts:
        found, expected = finder.find(part), first_end(seen + part, stops)
        assert found == (None if expected is None else (expected[0] - len(seen), expected[1]))
        seen += part
        if found is not None:
            return
        assert finder.num_held == held(seen, stops)


@given(words | st.just(""), words | st.just(""), st.lists(words, min_size=1, max_size=3))
def test_skipped_text_may_begin_but_not_end_one(skipped: str, text: str, stops: list[str]) -> None:
    finder = StopFinder([StopString.of(stop) for stop in stops])
    finder.skip(skipped)
    assert finder.num_held == held(skipped, stops)
    expected = first_end(skipped + text, stops, from_end=len(skipped))
    assert finder.find(text) == (None if expected is None else (expected[0] - len(skipped), expected[1]))


def test_is_linear_for_the_worst_strings() -> None:
    """A string of one letter and texts of the same: each character is compared a bounded number of times."""
    stop = StopString.of("a" * 1023 + "b")
    comparisons = 0

    class Counted(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __getitem__(self, index: object) -> str:
            nonlocal comparisons
            comparisons += 1
            return str.__getitem__(self, index)  # type: ignore[index]

    matched = 0
    counted = StopString(Counted(stop.text), stop.fallback)
    for part in ["a" * 50] * 100:
        end, matched = counted.feed(part, matched)
        assert end is None
    assert comparisons < 4 * 5000
    assert matched == 1023
