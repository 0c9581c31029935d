"""Losses: the two columns by which runs of both tasks are compared.

The estimators of this package pick a learning rate by the column `validation_loss` and report the column `test_loss`.
Lower is better. What they hold depends on the task:

- supervised fine-tuning: the NLL in nats per scored token, from the columns `final_valid_nll` and `final_test_nll`
- reinforcement learning: the error rate from 0 to 1, which is 1 - accuracy, from `rewards.with_error_rates`

Tables on disk do not have these columns; a table given to an estimator may lack them for supervised fine-tuning.
"""

from __future__ import annotations

import pandas as pd

_NLL_COLUMNS = {"validation_loss": "final_valid_nll", "test_loss": "final_test_nll"}


def with_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with `validation_loss` and `test_loss`; a column that they lack is taken from the final NLLs.

    Args:
        runs: columns validation_loss and test_loss, as from `with_error_rates`, or final_valid_nll and final_test_nll.
    """
    lacking = {loss: runs[nll] for loss, nll in _NLL_COLUMNS.items() if loss not in runs and nll in runs}
    return runs.assign(**lacking)
