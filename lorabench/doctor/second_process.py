"""The second process of the checks of folder and lock: `python -m lorabench.doctor.second_process FOLDER`.

It copies what the first process wrote, waits for the lock that the first process holds, and says each on a line.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lorabench.utils.lock import locked

SENT, RETURNED, LOCK = "sent.txt", "returned.txt", "doctor.lock"
"""The files of both processes."""
WAITS, HAS_LOCK = "waits", "has the lock"
"""The lines that the second process prints."""


def main(folder: Path) -> None:
    """Copy the first process's file, and take the lock."""
    (folder / RETURNED).write_text((folder / SENT).read_text())
    with locked(folder / LOCK, "the check of locks", lambda line: print(WAITS, flush=True)):
        print(HAS_LOCK, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
