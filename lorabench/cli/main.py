"""The command line `lorabench`, put together from the commands for users and the steps of the workflow.

Each shell line of the workflow's rules is one of these commands and can be run by hand. A command imports what it needs
when it runs, so that the help and a plan appear at once.
"""

from __future__ import annotations

import gc

import typer

from lorabench.cli import doctor, evidence, user_commands, workflow_steps

# A command's imports make many objects and little garbage: collecting it less often takes a tenth off each start.
gc.set_threshold(20_000)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help='Rerun the comparisons of "LoRA Without Regret" and judge its claims from the results.',
)
app.add_typer(user_commands.app)
app.add_typer(doctor.app)
app.add_typer(evidence.app)
app.add_typer(workflow_steps.app)
