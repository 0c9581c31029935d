"""The record of the attempts of a job that may have ended for lack of the host's memory.

On a cluster the next attempt of such a job requests more memory. An attempt that was killed leaves no explanation, so
each attempt records that it runs, and strikes that out when it ends in any other way: at its time limit or another
signal, by an error, or out of memory on the GPU, none of which more memory of the host would help.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lorabench.utils.exhaustion import NoMemoryError, NoSpaceError
from lorabench.utils.files import write_json

_PER_DEATH, _MOST = 0.5, 3.0


@dataclass
class Attempts:
    """The record of one job, in a file that exists until the job succeeds."""

    path: Path

    def killed(self) -> int:
        """Return the number of attempts so far that were killed or ran out of the host's memory."""
        return sum(self._read())

    def memory_factor(self) -> float:
        """Return the factor on the estimated memory that the next attempt requests: half as much again for each attempt
        that was killed, at most three times as much."""
        return min(_MOST, 1 + _PER_DEATH * self.killed())

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the attempt that is made within the context.

        A SystemExit stands for a process that was killed, since the launcher of several processes raises it then.
        """
        self._write(self.killed(), running=True)
        try:
            yield
        except (NoMemoryError, SystemExit):
            raise
        except BaseException:
            self.explain()
            raise
        self.path.unlink(missing_ok=True)

    def explain(self) -> None:
        """Record that the present attempt ends for a reason that has nothing to do with the host's memory."""
        killed, _ = self._read()
        self._write(killed, running=False)

    def _read(self) -> tuple[int, bool]:
        """Return the number of earlier attempts that were killed, and whether one runs or was killed since then."""
        try:
            record = json.loads(self.path.read_text())
        except FileNotFoundError:
            return 0, False
        return record["killed"], record["running"]

    def _write(self, killed: int, running: bool) -> None:
        # A full disk must end the job where it loses something, not here.
        with suppress(NoSpaceError):
            write_json({"killed": killed, "running": running}, self.path)
