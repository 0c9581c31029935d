"""Regular expressions of other people's files, matched in a process whose time is limited.

Python's `re` can take exponential time, as for `(a+)+$`, and nothing in the same process can end a match.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from lora_advice.errors import UserError

SECONDS = 1
"""CPU time of the process; usual patterns take a fiftieth of it."""
_WALL_PER_CPU_SECOND = 60
_SHOWN = 80
"""Characters of a pattern in a message."""
_PROGRAM = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]),) * 2)
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        matches = re.compile(pattern).fullmatch
    except (re.error, OverflowError, RecursionError) as error:
        print(json.dumps(f"is not valid: {error}"), flush=True)
    else:
        print(json.dumps([name for name in names if matches(name)]), flush=True)
"""


class PatternError(UserError):
    """A regular expression is not valid; the message names it."""


class SlowPatternError(PatternError):
    """A regular expression takes too long to match."""


def matching(patterns: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Return for each regular expression the names that it matches as a whole, in their order.

    Raises:
        PatternError: a pattern is not valid.
        SlowPatternError: matching takes longer than `SECONDS`.
    """
    if not patterns:
        return []
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM, str(SECONDS)]
    given, wall = json.dumps([patterns, names]), SECONDS * _WALL_PER_CPU_SECOND
    try:
        lines = subprocess.run(command, input=given, capture_output=True, text=True, timeout=wall).stdout.splitlines()
    except subprocess.TimeoutExpired as error:
        raise SlowPatternError(f"{_named(patterns[0])} was not matched within {wall} s") from error
    results = [json.loads(line) for line in lines]
    for pattern, result in zip(patterns, results, strict=False):
        if isinstance(result, str):
            raise PatternError(f"{_named(pattern)} {result}")
    if len(results) < len(patterns):
        slow = _named(patterns[len(results)])
        raise SlowPatternError(f"{slow} takes longer than {SECONDS} s on {len(names)} names of modules")
    return results


def _named(pattern: str) -> str:
    shown = pattern if len(pattern) <= _SHOWN else f"{pattern[:_SHOWN]}..."
    return f"the regular expression {shown!r}"
