"""Extraction of the final answer from a text: the content of its last box, or its last number, read exactly."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARS = 1_000
"""Characters of the longest text that counts as an answer; longer ones are not even parsed."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED_END = re.compile(r"[$\n]")
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_WHOLE_NUMBER = re.compile(rf"[-+]?(?:{_NUMBER})")
# The minus in `10-3` is an operator, not a sign.
_ANY_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])-)?(?:{_NUMBER})")


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}`, stripped; None without a closed box.

    A box without braces (`$\boxed 2$`) ends at the dollar sign or the end of the line. The time is linear in the length
    of the text.
    """
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    if not text.startswith("{", start):
        return _UNBRACED_END.split(text[start:], maxsplit=1)[0].strip()
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip()
    return None


def number(text: str) -> Fraction | None:
    """Return the exact value of a text that is a number and nothing else (`-12`, `1,234.50`); None if it is not."""
    if len(text) > MAX_CHARS or not _WHOLE_NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


def last_number(text: str) -> Fraction | None:
    """Return the exact value of the last number in a text; None if the text has no number."""
    last = None
    for match in _ANY_NUMBER.finditer(text):
        last = match.group()
    return None if last is None else number(last)


def gsm8k_answer(solution: str) -> str | None:
    """Return the text after the last `####` of a GSM8K solution, without thousands separators; None without one."""
    _, mark, answer = solution.rpartition("####")
    return answer.strip().replace(",", "") or None if mark else None
