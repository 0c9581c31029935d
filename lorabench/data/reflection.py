"""Words that show backtracking, self-verification or exploration in a response.

The paper reports that these behaviours develop during RL (section on reinforcement learning); the share of responses
with such words is this project's measure of them. A plain solution may contain the words too, so compare rates, not
single responses.
"""

from __future__ import annotations

import re

BACKTRACKING = (
    # An interjection, not the verb as in `wait five minutes`.
    r"wait(?=\s*[^\w\s]|\s+(?:no|but|actually)\b)",
    "hold on",
    "hmm+",
    "oops",
    "on second thought",
    "i made (?:a|an) (?:mistake|error)",
    "(?:that|this)(?: is|'s)(?: not|n't) (?:right|correct)",
    "(?:go|going) back",
    "start(?:ing)? over",
    "reconsider(?:ing)?",
)
VERIFICATION = (
    "let(?: me|'s| us) (?:check|verify|double[- ]check|test)",
    "double[- ]check(?:ing)?",
    "re-?check(?:ing)?",
    "verify(?:ing)?",
)
EXPLORATION = (
    "alternatively",
    "another (?:way|approach|method|idea)",
    "(?:try|trying) (?:again|another|a different|something)",
    "what if",
)

_WORDS = re.compile(rf"\b(?:{'|'.join(BACKTRACKING + VERIFICATION + EXPLORATION)})\b", re.IGNORECASE)


def reflects(response: str) -> bool:
    """Return whether a response has a word of backtracking, self-verification or exploration."""
    return _WORDS.search(response.replace("\u2019", "'")) is not None
