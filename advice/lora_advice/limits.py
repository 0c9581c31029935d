"""Work on other people's files in a process whose time and memory are limited, so that no file ends the others' work.

Nothing within a process can end a regular expression or a parser in C, its memory can't be limited apart from that of
its caller, and signals reach the main thread alone, in which a caller in a notebook need not be. So the work is done in
a fork of this process, which one signal ends. It goes from file to file, and a new one takes over where it has ended.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lora_advice.errors import UserError

T = TypeVar("T")

SECONDS, SECONDS_WITH_HUB = 5, 60
"""Of CPU time for a file, which usually takes a hundredth of one; a limit by the clock would fail on a busy machine."""
_WALL_PER_CPU_SECOND = 6
MEMORY = 700_000_000  # bytes beyond what this process has already
_LARGEST_ANSWER = 10_000_000
_LONGEST_REASON = 400
_TOO_MUCH = f"it takes more than {MEMORY / 1e9:g} GB of memory to read"


def in_limits(work: Callable[[T], Any], items: Sequence[T], seconds: float = SECONDS) -> list[Any]:
    """Return for each item what `work` returns of it as plain data, or the UserError that says why there is nothing."""
    answers = list[Any]()
    while len(answers) < len(items):
        left = items[len(answers) :]
        reading, writing = os.pipe()
        process, status = os.fork(), 0
        if process == 0:
            _answer(work, left, seconds, writing)
        os.close(writing)
        lines = list[bytes]()
        try:
            with open(reading, "rb") as pipe:
                # Another fork of the caller may hold the pipe open, so its end is not waited for.
                while len(lines) < len(left) and (line := pipe.readline()).endswith(b"\n"):
                    lines.append(line)
        finally:
            with suppress(ProcessLookupError, ChildProcessError):  # the caller may have asked the system to reap
                os.kill(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
        answers += [UserError(answer) if isinstance(answer, str) else answer for answer in map(json.loads, lines)]
        if len(lines) < len(left):
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            late = f"it takes more than {seconds:g} s to read"
            reasons = {signal.SIGPROF: late, signal.SIGALRM: late, 0: _TOO_MUCH}
            answers.append(UserError(reasons.get(number, f"reading it ended with {signal.strsignal(number)}")))
    return answers


def matching(patterns: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Return for each regular expression the names that it matches as a whole, in their order.

    A pattern that is not valid raises UserError, as does one that takes longer than a second: Python's `re` can take
    exponential time, as for `(a+)+$`.
    """

    def match(pattern: str) -> list[str]:
        try:
            return [*filter(re.compile(pattern).fullmatch, names)]
        except (re.error, OverflowError) as error:
            raise UserError(f"it is not valid: {error}") from error

    matches = in_limits(match, patterns, seconds=1)
    for pattern, result in zip(patterns, matches, strict=True):
        if isinstance(result, UserError):
            raise UserError(f"the regular expression {pattern[:80]!r}: {result}")
    return matches


def _answer(work: Callable[[T], Any], items: Iterable[T], seconds: float, writing: int) -> NoReturn:
    """Write a line of JSON for each item, a text where there is only a reason, and end this process."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends this process
        for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM, signal.SIGPROF])
        with suppress(OSError):  # without /proc there is no limit of memory
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit, (soft, hard) = pages * resource.getpagesize() + MEMORY, resource.getrlimit(resource.RLIMIT_AS)
            if soft == resource.RLIM_INFINITY or soft > limit:
                resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        with open(writing, "wb") as pipe:
            for item in items:
                signal.setitimer(signal.ITIMER_PROF, seconds)
                signal.setitimer(signal.ITIMER_REAL, seconds * _WALL_PER_CPU_SECOND)
                line = _line(work, item)
                for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
                    signal.setitimer(timer, 0)
                pipe.write(line.encode() + b"\n")
                pipe.flush()
    finally:
        os._exit(0)


def _line(work: Callable[[T], Any], item: T) -> str:
    """Return what is said of an item. Whatever its content makes a reader stumble over, the others are read."""
    try:
        answer = json.dumps(work(item), allow_nan=False)
        if len(answer) <= _LARGEST_ANSWER:
            return answer
        reason = "it states too many runs, or has too many faults, to be shown"
    except UserError as error:
        reason = str(error)
    except MemoryError:
        reason = _TOO_MUCH
    except RecursionError:
        reason = "it is nested too deeply, or refers to itself"
    except Exception as error:
        reason = f"it is not understood ({type(error).__name__}: {error})"
    return json.dumps(reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}...")
