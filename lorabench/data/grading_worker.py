"""The process in which math-verify parses what a model wrote, with hard limits on time and memory.

It is run by path, so that it imports neither torch nor the package. For each JSON line [response's answer, right
answer] it writes a JSON line, true or false; a first line `true` says that it is ready. The caller must expect it to
die: the kernel ends a comparison that takes too long, and a process that takes too much memory may end itself.

math-verify parses LaTeX only here, since its parser of plain expressions, like sympy's, evaluates them as Python. The
process can write no content of files either, whatever a library does.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

import sympy.physics.units  # noqa: F401  # Imported late by sympy, it takes the time of a comparison.
from math_verify import LatexExtractionConfig, parse, verify

_MEMORY_BYTES = 2**30
_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]


def equal(given: str, answer: str) -> bool:
    """Return whether two LaTeX answers are equal according to math-verify.

    Its own time limits are off: they are signal handlers, which do not run while a power is computed in C.
    """
    right, response = (parse(f"\\boxed{{{text}}}", _LATEX, parsing_timeout=None) for text in (answer, given))
    return bool(verify(right, response, timeout_seconds=None))


def confine() -> None:
    """Limit memory, and forbid to write files, to start processes and to dump core, for the rest of the process."""
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def main(seconds: float) -> None:
    """Answer requests until the input ends; after `seconds` of CPU time for one, the kernel ends the process."""
    # A job is stopped by a signal to all its processes, which must not make the current answer wrong.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    requests, replies = sys.stdin, os.fdopen(os.dup(1), "w")
    # The output of a library must not be taken for a reply.
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    confine()
    print("true", file=replies, flush=True)
    os.dup2(silent, 2)
    for line in requests:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = equal(*json.loads(line))
        except Exception:
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
