"""Words that show a response going back, checking itself or trying another way.

The paper sees backtracking, self-verification and exploration grow in RL (section on reinforcement learning); counting
their words is our measure of it. A word may also stand in a plain solution, so compare rates, not single responses.
"""

from __future__ import annotations

import re

BACKTRACKING = (
    # The word of a person who stops, not of one who waits five minutes.
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
    """Whether a response has a word of backtracking, self-verification or exploration."""
    return _WORDS.search(response.replace("\u2019", "'")) is not None
