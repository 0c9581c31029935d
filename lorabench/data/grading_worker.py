"""The process in which math-verify parses what a model wrote; it can compute, and nothing else.

It is run by path, so that it imports neither torch nor the package. For each JSON line [response's answer, right
answer] it writes a JSON line, true or false; a first line `true` says that it is ready. The caller must expect it to
die: the kernel ends a comparison that takes too long, and a process that takes too much memory may end itself.

math-verify parses LaTeX only, since its parser of plain expressions, like sympy's, evaluates them as Python. The audit
hook enforces this whatever a library does: no text is executed, no file is written, no process is started.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import resource
import signal
import sys
from types import CodeType
from typing import Any

import sympy.physics.units  # noqa: F401  # Imported late by sympy, it evaluates the names of its units.
from math_verify import LatexExtractionConfig, parse, verify
from sympy.polys import monomials

_MEMORY_BYTES = 2**30
_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
_FORBIDDEN = ("os.", "shutil.", "subprocess.", "pty.", "socket.", "ctypes.")
# Importing a module lists folders.
_ALLOWED = ("os.listdir", "os.scandir")
# Modules that execute code built from their own templates, without text from outside.
_TEMPLATES = {collections.__file__, dataclasses.__file__, monomials.__file__}
# sympy turns digits into a number by executing `from sympy import *` and evaluating `Integer (12 )`.
_NUMBERS = {"sympy", "Integer", "Float"}


def equal(given: str, answer: str) -> bool:
    """Return whether two LaTeX answers are equal according to math-verify.

    The time limits of math-verify are off: they are Python signal handlers, which do not run while a power of large
    numbers is computed in C.
    """
    right, response = (parse(f"\\boxed{{{text}}}", _LATEX, parsing_timeout=None) for text in (answer, given))
    return bool(verify(right, response, timeout_seconds=None))


def confine() -> None:
    """Irrevocably give up every permission that a comparison does not need."""
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    forbidden = event.startswith(_FORBIDDEN) and event not in _ALLOWED
    if event == "open":
        forbidden = isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    elif event == "exec":
        forbidden = not _harmless(arguments[0], sys._getframe(1).f_code.co_filename)
    if forbidden:
        raise PermissionError(event)


def _harmless(code: CodeType, caller: str) -> bool:
    """Return whether code comes from a module or a template, or names nothing but what sympy's numbers need."""
    if caller in _TEMPLATES or not code.co_filename.startswith("<") or code.co_filename.startswith("<frozen "):
        return True
    return set(code.co_names) <= _NUMBERS and not any(isinstance(constant, CodeType) for constant in code.co_consts)


def main(seconds: float) -> None:
    """Answer requests until the input ends.

    Args:
        seconds: CPU time of a comparison, after which the kernel ends the process.
    """
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
