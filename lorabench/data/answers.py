"""The answer in a text: what stands in the last box, the last number, and what number it is."""

from __future__ import annotations

import re
from fractions import Fraction

# An answer is short. What is longer is no answer, and is not even read.
MAX_CHARS = 1_000

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED_END = re.compile(r"[$\n]")
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_WHOLE_NUMBER = re.compile(rf"[-+]?(?:{_NUMBER})")
# The minus in `10-3` is no sign.
_ANY_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])-)?(?:{_NUMBER})")


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}`, stripped; None if there is no box or it is never closed.

    A box without braces (`$\boxed 2$`) ends at the dollar or the end of the line. Linear in the length of the text.
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
    """The number that the whole text is (`-12`, `1,234.50`), exactly; None if it is none."""
    if len(text) > MAX_CHARS or not _WHOLE_NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None without one."""
    found = None
    for match in _ANY_NUMBER.finditer(text):
        found = match.group()
    return None if found is None else number(found)


def gsm8k_answer(solution: str) -> str | None:
    """What stands after the last `####` of a GSM8K solution, without thousands commas; None without one."""
    _, mark, answer = solution.rpartition("####")
    return answer.strip().replace(",", "") or None if mark else None
