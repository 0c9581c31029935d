"""The command line `lorabench`; its entry point is `app`."""

from lorabench.cli.main import app

__all__ = ["app"]
