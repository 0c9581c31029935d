"""The columns of the tidy tables and their types; docs/tables.md describes each column."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class CurvePoint:
    """A value of a metric at a step of a run, one row of `curves` without the run_id.

    `examples` and `tokens` are the numbers trained on up to this step; `value` is None if it is not finite.
    """

    step: int
    examples: int
    tokens: int
    split: str
    metric: str
    value: float | None


@dataclass(frozen=True)
class ExampleLoss:
    """The loss of one test example: its NLL in nats over its `tokens` scored tokens; in RL 0 or 1 over one token."""

    loss: float
    tokens: int


def _schema(lines: str) -> pa.Schema:
    """Return the columns that lines describe: on each line a type, and the names of the columns that have it."""
    fields = []
    for line in lines.strip().splitlines():
        kind, *names = line.split()
        values = pa.list_(pa.string()) if kind == "words" else pa.type_for_alias(kind)
        fields += [(name, values) for name in names]
    return pa.schema(fields)


RUNS = _schema(
    """
    string run_id
    words experiments
    string model dataset data_kind base_kind task method
    int64 rank
    string placement
    float64 alpha init_a lr_ratio
    string alpha_convention
    bool unembedding
    string precision schedule
    float64 eps lr
    int64 batch_size steps seed n_seeds
    string status
    int64 diverged_at
    float64 final_valid_nll final_test_nll final_test_nll_sd final_train_nll
    int64 test_scored_tokens
    float64 first_epoch_nats
    int64 first_epoch_scored_tokens
    float64 entropy_bits
    int64 group_size max_new_tokens
    float64 base_reward final_valid_reward final_reward best_reward constant_reward rule_reward
    string rule
    float64 final_entropy final_truncated
    string family
    int64 hidden_size trainable_params base_params train_tokens
    float64 train_flops wall_s
    int64 peak_mem_bytes
    string device
    int64 threads
    string host started git_sha git_dirty_patch versions
    string model_sha256 dataset_sha256 tokenizer_sha256 template_sha256 protocol
    """
)

_CURVE = _schema(
    """
    int64 step examples tokens
    string split metric
    float64 value
    """
)
CURVES = pa.schema([("run_id", pa.string()), *_CURVE])

_TEST_LOSS = pa.schema([("loss", pa.float32()), ("tokens", pa.int32())])
RUN_TEST_LOSSES = pa.schema([("run_id", pa.string()), ("example", pa.int32()), *_TEST_LOSS])
"""The columns of a run's own file of losses; the groups of examples are those of the data."""
TEST_LOSSES = pa.schema([*RUN_TEST_LOSSES, ("group", pa.string())])

COMPUTE = _schema(
    """
    string model method
    int64 rank
    string placement
    int64 batch_size sequence_length
    float64 effective_width linear_flops total_flops step_s
    int64 peak_mem_bytes trainable_params base_params
    string device
    int64 threads
    """
)

COUNTS = _schema(
    """
    string architecture placement part
    int64 rank
    bool include_unembedding
    int64 trainable_params base_params
    """
)

EVALS = _schema(
    """
    string run_id model dataset method
    int64 rank
    string placement
    float64 alpha init_a lr_ratio eps lr
    int64 batch_size steps seed
    float64 final_test_nll final_reward
    string about task source metric filter
    float64 value stderr
    bool higher_is_better
    int64 n_samples num_fewshot
    string sampler
    int64 eval_batch_size
    string task_version task_config template_sha256 versions
    """
)

CLAIMS = _schema(
    """
    string claim_id kind fact statement figure criterion verdict
    float64 p_again margin_low margin_high
    string margin_rule
    float64 estimate ci_low ci_high
    int64 n_hold n_parts
    float64 part_low part_high
    string unit
    float64 detectable
    string scope missing would_decide
    int64 decide_seeds
    bool decide_around
    int64 decide_test_examples
    words decide_lrs
    int64 n_runs n_seeds
    string lr_chosen_on reason paper_value published rules
    words run_ids
    """
)

JOB = pa.schema([*RUNS, ("curve", pa.list_(pa.struct(_CURVE))), ("test_losses", pa.list_(pa.struct(_TEST_LOSS)))])
"""The columns of the file of a job: its runs with curves and test losses nested, since a job has one output."""

SCHEMAS = {
    "runs": RUNS,
    "curves": CURVES,
    "test_losses": TEST_LOSSES,
    "compute": COMPUTE,
    "counts": COUNTS,
    "evals": EVALS,
    "claims": CLAIMS,
}
"""The columns of each tidy table, by its name."""

WHERE_ABSENT: dict[str, dict[str, str | None]] = {
    "evals": {"sampler": "own"},
    "claims": dict.fromkeys(
        ("p_again", "n_hold", "n_parts", "part_low", "part_high", "n_seeds", "lr_chosen_on", "rules")
    ),
    "test_losses": {"group": None},
}
"""The value of a column in tables that were written before the column was; there is no other in them."""

PARQUET_ONLY = ("test_losses",)
"""The tables that are not written as CSV as well, since they are large."""
