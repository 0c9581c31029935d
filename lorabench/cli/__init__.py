from lorabench.cli.main import app

__all__ = ["app"]
