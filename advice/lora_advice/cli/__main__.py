"""`python -m lora_advice.cli`, where the command is not on the path."""

from lora_advice.cli import run

run()
