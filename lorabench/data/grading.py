"""Graders: whether the final answer of a response is right. The reward of RL and the accuracy of its evaluation.

What a model writes is never trusted. Numbers are read here, exactly. Boxed answers that are not plainly equal go to
math-verify in worker processes (see grading_worker.py) with hard limits on time and memory; an answer that breaks a
limit is wrong, and the worker is replaced.
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
from pathlib import Path
from queue import LifoQueue
from types import TracebackType
from typing import Self

from lorabench.config import HUB_PROBLEMS
from lorabench.data.answers import MAX_CHARS, last_box, last_number, number

_WORKER = Path(__file__).with_name("grading_worker.py")
_START_SECONDS = 60
# The worker's limit is CPU time, so that a busy machine makes no answer wrong; this is for a worker that sleeps.
_WALL_PER_CPU_SECOND = 10

_LAYOUT = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|(?<!\\)\\[!,;:> ]|\\?\$|~|\s")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")


class Grader:
    """Grades responses to the problems of one kind of set. A context manager: its workers end with it.

    - `arithmetic`: the whole response is the number.
    - `gsm_symbolic`, `number`: the last number of the response.
    - the sets of the hub, `boxed`: the content of the last box, equal as text without layout, as a number, or to
      math-verify (which takes a decimal for a fraction when they agree to six decimals, and `9\\%` for both 9 and
      0.09).
    """

    def __init__(self, kind: str, workers: int = 1, seconds: float = 2.0) -> None:
        """
        Args:
            kind: a kind of problem set, of a file its grader (see config.ProblemSpec).
            workers: processes that compare boxed answers; each starts when it is first needed.
            seconds: CPU time after which a comparison is given up, and the answer wrong.
        """
        if kind not in ("arithmetic", "gsm_symbolic", "number", "boxed", *HUB_PROBLEMS):
            raise ValueError(f"no grader for problems of kind {kind!r}")
        self._kind = kind
        self._workers = [_Worker(seconds) for _ in range(workers)]
        self._idle: LifoQueue[_Worker] = LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Whether each response gives the right answer of the same place."""
        pairs = list(zip(responses, answers, strict=True))
        match self._kind:
            case "arithmetic":
                return [_same(number(response.strip()), number(answer)) for response, answer in pairs]
            case "gsm_symbolic" | "number":
                return [_same(last_number(response), number(answer)) for response, answer in pairs]
            case _:
                return self._grade_boxes([(last_box(response), answer) for response, answer in pairs])

    def _grade_boxes(self, pairs: list[tuple[str | None, str]]) -> list[bool]:
        # Samples of one problem agree often: each pair is compared once.
        verdicts = {pair: _plain_verdict(*pair) for pair in pairs}
        hard = [pair for pair, verdict in verdicts.items() if verdict is None]
        with ThreadPoolExecutor(len(self._workers)) as threads:
            verdicts.update(zip(hard, threads.map(self._compare, hard), strict=True))
        return [bool(verdicts[pair]) for pair in pairs]

    def _compare(self, pair: tuple[str, str]) -> bool:
        worker = self._idle.get()
        try:
            return worker.equal(*pair)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the workers. A later comparison starts them anew."""
        for worker in self._workers:
            worker.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _same(given: object, answer: object) -> bool:
    return given is not None and given == answer


def _plain_verdict(given: str | None, answer: str) -> bool | None:
    """What can be said of a boxed answer without math-verify: right, wrong, or None for not known."""
    if not given or len(given) > MAX_CHARS:
        return False
    left, right = _plain(given), _plain(answer)
    if left == right:
        return True
    first, second = number(left), number(right)
    if first is not None and second is not None and (first == second or first.denominator == second.denominator == 1):
        return first == second
    return None


def _plain(latex: str) -> str:
    """LaTeX without what only changes its looks."""
    return _FRACTION.sub(r"\\frac", _LAYOUT.sub("", latex.replace("{,}", ","))).removesuffix(".")


class _Worker:
    """A process that compares two answers at a time; started when it is needed, replaced when it has ended."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, given: str, answer: str) -> bool:
        """Whether math-verify takes two LaTeX answers for the same; False too if it does not come to an end.

        Raises:
            RuntimeError: the process does not start.
        """
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([given, answer]).encode() + b"\n")
            process.stdin.flush()
            reply = _reply(process, self._seconds * _WALL_PER_CPU_SECOND)
        except BrokenPipeError:
            reply = b""
        if not reply:
            self.end()
        return reply == b"true\n"

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # sympy walks through sets: the same verdict every time needs the same hashes.
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )
        if _reply(process, _START_SECONDS) != b"true\n":
            process.kill()
            raise RuntimeError(f"the grading worker {_WORKER} did not start (exit status {process.wait()})")
        return process

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            with self._process:  # closes the pipes and waits
                pass
            self._process = None


def _reply(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The process's next line, which it writes at once; empty if it ended or took too long."""
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    return os.read(process.stdout.fileno(), 64) if poll.poll(seconds * 1000) else b""
