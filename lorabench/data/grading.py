"""What is read from a response: its final answer, whether the answer is right, and whether the response reflects.

Graders give the reward of RL, and the accuracy in evaluation. A response is never trusted. Numbers are parsed here,
exactly. Boxed answers whose equality is not obvious are compared by math-verify in worker processes (see
grading_worker.py) with hard limits on time and memory; an answer that exceeds a limit is wrong, and the worker is
replaced.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from queue import LifoQueue
from types import TracebackType
from typing import Self

BOX = r" Write your answer in \boxed{} format."
NUMBER_BOX = r" Provide a numerical answer without units, written inside \boxed{}."

MAX_CHARS = 1_000
"""Characters of the longest text that counts as an answer; longer ones are not even parsed."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED_END = re.compile(r"[$\n]")
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_WHOLE_NUMBER = re.compile(rf"[-+]?(?:{_NUMBER})")
# The minus in `10-3` is an operator, not a sign.
ANY_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])-)?(?:{_NUMBER})")


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
    for match in ANY_NUMBER.finditer(text):
        last = match.group()
    return None if last is None else number(last)


def gsm8k_answer(solution: str) -> str | None:
    """Return the text after the last `####` of a GSM8K solution, without thousands separators; None without one."""
    _, mark, answer = solution.rpartition("####")
    return answer.strip().replace(",", "") or None if mark else None


_REFLECTION = (
    # Backtracking. The first is an interjection, not the verb as in `wait five minutes`.
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
    # Self-verification.
    "let(?: me|'s| us) (?:check|verify|double[- ]check|test)",
    "double[- ]check(?:ing)?",
    "re-?check(?:ing)?",
    "verify(?:ing)?",
    # Exploration.
    "alternatively",
    "another (?:way|approach|method|idea)",
    "(?:try|trying) (?:again|another|a different|something)",
    "what if",
)
_WORDS = re.compile(rf"\b(?:{'|'.join(_REFLECTION)})\b", re.IGNORECASE)


def reflects(response: str) -> bool:
    """Return whether a response has a word of backtracking, self-verification or exploration.

    The paper reports that these behaviours develop during RL (section on reinforcement learning). A plain solution may
    contain the words too, so compare rates, not single responses.
    """
    return _WORDS.search(response.replace("\u2019", "'")) is not None


_WORKER = Path(__file__).with_name("grading_worker.py")
_START_SECONDS = 60
# The worker's own limit is CPU time, so that a busy machine makes no answer wrong; this one ends a worker that sleeps.
_WALL_PER_CPU_SECOND = 10

_LAYOUT = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|(?<!\\)\\[!,;:> ]|\\?\$|~|\s")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")

# How the answer of a response is read, by the kinds of sets whose answers are bare numbers; other sets want a box.
_NUMBERS = {"arithmetic": lambda response: number(response.strip()), "gsm_symbolic": last_number, "number": last_number}


class Grader:
    """Grades responses to the problems of a kind of set. As a context manager it ends its workers on exit.

    - `arithmetic`: the whole response must be the number.
    - `gsm_symbolic`, `number`: the last number of the response counts.
    - the sets of the hub, `boxed`: the content of the last box counts; it must equal the answer as text without layout,
      as a number, or according to math-verify (which accepts a decimal that agrees with a fraction to six decimals, and
      `9\\%` for both 9 and 0.09).
    """

    def __init__(self, kind: str, workers: int = 1, seconds: float = 2.0) -> None:
        """`kind` is the `grader` of a problem set; boxed answers are compared by processes that start when needed, and
        after so many seconds of CPU time a comparison is given up, and the answer counts as wrong."""
        self._kind = kind
        self._workers = [_Worker(seconds) for _ in range(workers)]
        self._idle: LifoQueue[_Worker] = LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return for each response whether it gives the answer at the same index of `answers`."""
        pairs = list(zip(responses, answers, strict=True))
        if self._kind in _NUMBERS:
            values = [(_NUMBERS[self._kind](response), number(answer)) for response, answer in pairs]
            return [given is not None and given == answer for given, answer in values]
        boxes = [(last_box(response), answer) for response, answer in pairs]
        # Samples of a problem often agree, so each distinct pair is compared once.
        verdicts = {pair: _plain_verdict(*pair) for pair in boxes}
        hard = [pair for pair, verdict in verdicts.items() if verdict is None]

        def compare(pair: tuple[str, str]) -> bool:
            worker = self._idle.get()
            try:
                return worker.equal(*pair)
            finally:
                self._idle.put(worker)

        with ThreadPoolExecutor(len(self._workers)) as threads:
            verdicts.update(zip(hard, threads.map(compare, hard), strict=True))
        return [bool(verdicts[pair]) for pair in boxes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._workers:
            worker.end()


def _plain_verdict(given: str | None, answer: str) -> bool | None:
    """Return whether a boxed answer is right, as far as that is clear without math-verify; else None."""
    if not given or len(given) > MAX_CHARS:
        return False
    # LaTeX without commands and spaces that only change its layout.
    left, right = (
        _FRACTION.sub(r"\\frac", _LAYOUT.sub("", latex.replace("{,}", ","))).removesuffix(".")
        for latex in (given, answer)
    )
    if left == right:
        return True
    first, second = number(left), number(right)
    if first is not None and second is not None and (first == second or first.denominator == second.denominator == 1):
        return first == second
    return None


class _Worker:
    """A process that compares pairs of answers; it is started when needed, and replaced when it has ended."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, given: str, answer: str) -> bool:
        """Return whether math-verify finds two LaTeX answers equal; False also if the comparison exceeds a limit."""
        if self._process is None or self._process.poll() is not None:
            self.end()
            # sympy iterates over sets, whose order depends on hashes: a fixed seed makes verdicts reproducible.
            environment, pipe = os.environ | {"PYTHONHASHSEED": "0"}, subprocess.PIPE
            command = [sys.executable, "-P", str(_WORKER), str(self._seconds)]
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
            if self._reply(_START_SECONDS) != b"true\n":
                self._process.kill()
                status = self._process.wait()
                raise RuntimeError(f"the grading worker {_WORKER} did not start (exit status {status})")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([given, answer]).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._reply(self._seconds * _WALL_PER_CPU_SECOND)
        except BrokenPipeError:
            reply = b""
        if not reply:
            self.end()
        return reply == b"true\n"

    def _reply(self, seconds: float) -> bytes:
        """Return the next line of the process, which it writes in one piece; empty if it ended or took too long."""
        assert self._process is not None
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        return os.read(self._process.stdout.fileno(), 64) if poll.poll(seconds * 1000) else b""

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with self._process:  # Leaving the context closes the pipes and waits.
                pass
            self._process = None
