"""The record of a job's attempts: how often it was killed, and how often it has failed in a row.

On a cluster the next attempt of a job that was killed requests more memory. A killed attempt leaves no explanation, so
each attempt records that it runs, and strikes that out when it ends in any other way: at its time limit or another
signal, by an error, or out of memory on the GPU, none of which more memory of the host would help.

Jobs that are longer than a time limit are started again very often, which would repeat a failure as often. So a job
that fails at each attempt soon refuses to begin.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lorabench.errors import UserError
from lorabench.utils.exhaustion import NoMemoryError, NoSpaceError
from lorabench.utils.files import write_json
from lorabench.utils.signals import Stopped

_PER_DEATH, _MOST_MEMORY = 0.5, 3.0
_MOST_FAILURES = 4


@dataclass
class _Record:
    killed: int = 0
    """Attempts that were killed or ran out of the host's memory, without the present one."""
    failed: int = 0
    """Attempts that were killed or ended by an error since one ended by a signal, without the present one."""
    running: bool = False
    """Whether an attempt runs, or was killed since the record was written."""


@dataclass
class Attempts:
    """The record of one job, in a file that exists until the job succeeds."""

    path: Path

    def killed(self) -> int:
        """Return the number of attempts so far that were killed or ran out of the host's memory."""
        return self._ended().killed

    def memory_factor(self) -> float:
        """Return the factor on the estimated memory that the next attempt requests: half as much again for each attempt
        that was killed, at most three times as much."""
        return min(_MOST_MEMORY, 1 + _PER_DEATH * self.killed())

    @contextmanager
    def recorded(self, number: int = 1) -> Iterator[None]:
        """Record the attempt that is made within the context.

        A SystemExit stands for a process that was killed, since the launcher of several processes raises it then.

        Args:
            number: the attempt's number since the workflow was started, from 1. At the first, failures are forgotten.

        Raises:
            UserError: the job has failed too often in a row.
        """
        before = self._ended()
        if number == 1:
            before.failed = 0
        if before.failed >= _MOST_FAILURES:
            raise UserError(
                f"the job has failed {before.failed} times in a row and is not tried again: its first log says why; "
                "when the cause is mended, start the workflow again"
            )
        self._write(replace(before, running=True))
        try:
            yield
        except (NoMemoryError, SystemExit):
            raise
        except Stopped:
            self.explain()
            raise
        except BaseException:
            self._write(replace(before, failed=before.failed + 1))
            raise
        self.path.unlink(missing_ok=True)

    def explain(self) -> None:
        """Record that the present attempt ends by a signal, whatever may still happen to it."""
        self._write(_Record(killed=self._read().killed))

    def _ended(self) -> _Record:
        """Return the record with an attempt that was killed counted."""
        record = self._read()
        return _Record(record.killed + record.running, record.failed + record.running)

    def _read(self) -> _Record:
        try:
            return _Record(**json.loads(self.path.read_text()))
        except FileNotFoundError:
            return _Record()

    def _write(self, record: _Record) -> None:
        # A full disk must end the job where it loses something, not here.
        with suppress(NoSpaceError):
            write_json(asdict(record), self.path)
