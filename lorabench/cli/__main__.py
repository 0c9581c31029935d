"""Run the command line by `python -m lorabench.cli`."""

from lorabench.cli import app

if __name__ == "__main__":
    app()
