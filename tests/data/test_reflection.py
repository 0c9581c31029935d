"""Words of reflection in responses."""

from __future__ import annotations

import pytest

from lorabench.data.reflection import reflects


@pytest.mark.parametrize(
    "response",
    [
        "So 12. Wait, that is wrong.",
        "Wait \u2014 no",
        "wait no, it is 3",
        "Hmmm, 12?",
        "Let me check this.",
        "Let\u2019s verify: 3 * 4 = 12.",
        "I will double-check.",
        "Alternatively, use symmetry.",
        "On second thought it is 3.",
        "That's not right.",
        "that isn't correct",
        "We try another substitution.",
    ],
)
def test_words_of_reflection(response):
    assert reflects(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "They wait 5 minutes, the waiter waited.",
        "He checks his bag and pays the check.",
        "An alternative is 5.",
        "The answer is 12.",
        "This is right.",
    ],
)
def test_plain_words(response):
    assert not reflects(response)
