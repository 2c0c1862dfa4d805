"""Token counts: the estimate is plausible, the upper bound is never below it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.messages import Message
from providers.tokens import estimate_messages, estimate_tokens, upper_bound

SENTENCE = "The maintainers answer questions within a day and publish a release every month. "


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("", 0, 0),
        ("hello", 1, 1),
        (SENTENCE * 20, 280, 360),
        ('{"id": 12345, "name": "redis"}' * 10, 130, 230),
        ("日本語のテキスト" * 10, 60, 90),
        ("привет мир " * 10, 20, 50),
        ("😀" * 10, 20, 20),
    ],
)
def test_estimates_are_plausible(text: str, low: int, high: int) -> None:
    assert low <= estimate_tokens(text) <= high


@given(st.text(max_size=300))
def test_the_upper_bound_is_never_below_the_estimate(text: str) -> None:
    messages = (Message("system", text), Message("user", text))
    assert upper_bound(messages, {"type": "object"}) >= estimate_messages(messages, {"type": "object"})


def test_the_upper_bound_counts_bytes_messages_and_schema() -> None:
    plain = upper_bound((Message("user", "é" * 10),))
    assert plain == 20 + 16 + 10
    assert upper_bound((Message("user", "é" * 10),), {"type": "string"}) > plain
