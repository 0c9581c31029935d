"""The command line `lorabench`: commands for people, and under `lorabench step` those that the rules call.

Each can be run by hand. A command imports what it needs when it runs, so that the help and a plan appear at once.
"""

from lorabench.cli.commands import app

__all__ = ["app"]
