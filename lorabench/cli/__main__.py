"""Run the command line by `python -m lorabench.cli`."""

from lorabench.cli.main import app

if __name__ == "__main__":
    app()
