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


RUNS = pa.schema(
    [
        ("run_id", pa.string()),
        ("experiments", pa.list_(pa.string())),
        ("model", pa.string()),
        ("dataset", pa.string()),
        ("data_kind", pa.string()),
        ("base_kind", pa.string()),
        ("task", pa.string()),
        ("method", pa.string()),
        ("rank", pa.int64()),
        ("placement", pa.string()),
        ("alpha", pa.float64()),
        ("init_a", pa.float64()),
        ("lr_ratio", pa.float64()),
        ("alpha_convention", pa.string()),
        ("unembedding", pa.bool_()),
        ("precision", pa.string()),
        ("schedule", pa.string()),
        ("eps", pa.float64()),
        ("lr", pa.float64()),
        ("batch_size", pa.int64()),
        ("steps", pa.int64()),
        ("seed", pa.int64()),
        ("n_seeds", pa.int64()),
        ("status", pa.string()),
        ("diverged_at", pa.int64()),
        ("final_valid_nll", pa.float64()),
        ("final_test_nll", pa.float64()),
        ("final_test_nll_sd", pa.float64()),
        ("final_train_nll", pa.float64()),
        ("test_scored_tokens", pa.int64()),
        ("first_epoch_nats", pa.float64()),
        ("first_epoch_scored_tokens", pa.int64()),
        ("entropy_bits", pa.float64()),
        ("group_size", pa.int64()),
        ("max_new_tokens", pa.int64()),
        ("base_reward", pa.float64()),
        ("final_valid_reward", pa.float64()),
        ("final_reward", pa.float64()),
        ("best_reward", pa.float64()),
        ("constant_reward", pa.float64()),
        ("rule_reward", pa.float64()),
        ("rule", pa.string()),
        ("final_entropy", pa.float64()),
        ("final_truncated", pa.float64()),
        ("family", pa.string()),
        ("hidden_size", pa.int64()),
        ("trainable_params", pa.int64()),
        ("base_params", pa.int64()),
        ("train_tokens", pa.int64()),
        ("train_flops", pa.float64()),
        ("wall_s", pa.float64()),
        ("peak_mem_bytes", pa.int64()),
        ("device", pa.string()),
        ("threads", pa.int64()),
        ("host", pa.string()),
        ("started", pa.string()),
        ("git_sha", pa.string()),
        ("git_dirty_patch", pa.string()),
        ("versions", pa.string()),
        ("model_sha256", pa.string()),
        ("dataset_sha256", pa.string()),
        ("tokenizer_sha256", pa.string()),
        ("template_sha256", pa.string()),
        ("protocol", pa.string()),
    ]
)

_CURVE = [
    ("step", pa.int64()),
    ("examples", pa.int64()),
    ("tokens", pa.int64()),
    ("split", pa.string()),
    ("metric", pa.string()),
    ("value", pa.float64()),
]

CURVES = pa.schema([("run_id", pa.string()), *_CURVE])

_TEST_LOSS = [("loss", pa.float32()), ("tokens", pa.int32())]

TEST_LOSSES = pa.schema([("run_id", pa.string()), ("example", pa.int32()), *_TEST_LOSS])


COMPUTE = pa.schema(
    [
        ("model", pa.string()),
        ("method", pa.string()),
        ("rank", pa.int64()),
        ("placement", pa.string()),
        ("batch_size", pa.int64()),
        ("sequence_length", pa.int64()),
        ("effective_width", pa.float64()),
        ("linear_flops", pa.float64()),
        ("total_flops", pa.float64()),
        ("step_s", pa.float64()),
        ("peak_mem_bytes", pa.int64()),
        ("trainable_params", pa.int64()),
        ("base_params", pa.int64()),
        ("device", pa.string()),
        ("threads", pa.int64()),
    ]
)

COUNTS = pa.schema(
    [
        ("architecture", pa.string()),
        ("placement", pa.string()),
        ("part", pa.string()),
        ("rank", pa.int64()),
        ("include_unembedding", pa.bool_()),
        ("trainable_params", pa.int64()),
        ("base_params", pa.int64()),
    ]
)

EVALS = pa.schema(
    [
        ("run_id", pa.string()),
        ("model", pa.string()),
        ("dataset", pa.string()),
        ("method", pa.string()),
        ("rank", pa.int64()),
        ("placement", pa.string()),
        ("alpha", pa.float64()),
        ("init_a", pa.float64()),
        ("lr_ratio", pa.float64()),
        ("eps", pa.float64()),
        ("lr", pa.float64()),
        ("batch_size", pa.int64()),
        ("steps", pa.int64()),
        ("seed", pa.int64()),
        ("final_test_nll", pa.float64()),
        ("final_reward", pa.float64()),
        ("about", pa.string()),
        ("task", pa.string()),
        ("source", pa.string()),
        ("metric", pa.string()),
        ("filter", pa.string()),
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("higher_is_better", pa.bool_()),
        ("n_samples", pa.int64()),
        ("num_fewshot", pa.int64()),
        ("sampler", pa.string()),
        ("eval_batch_size", pa.int64()),
        ("task_version", pa.string()),
        ("task_config", pa.string()),
        ("template_sha256", pa.string()),
        ("versions", pa.string()),
    ]
)

CLAIMS = pa.schema(
    [
        ("claim_id", pa.string()),
        ("kind", pa.string()),
        ("fact", pa.string()),
        ("statement", pa.string()),
        ("figure", pa.string()),
        ("criterion", pa.string()),
        ("verdict", pa.string()),
        ("borderline", pa.bool_()),
        ("margin_low", pa.float64()),
        ("margin_high", pa.float64()),
        ("margin_rule", pa.string()),
        ("estimate", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("unit", pa.string()),
        ("detectable", pa.float64()),
        ("scope", pa.string()),
        ("missing", pa.string()),
        ("would_decide", pa.string()),
        ("decide_seeds", pa.int64()),
        ("decide_around", pa.bool_()),
        ("decide_test_examples", pa.int64()),
        ("decide_lrs", pa.list_(pa.string())),
        ("n_runs", pa.int64()),
        ("reason", pa.string()),
        ("paper_value", pa.string()),
        ("published", pa.string()),
        ("run_ids", pa.list_(pa.string())),
    ]
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

WHERE_ABSENT: dict[str, dict[str, str | None]] = {"evals": {"sampler": "own"}, "claims": {"borderline": None}}
"""The value of a column in tables that were written before the column was; there is no other in them."""

PARQUET_ONLY = ("test_losses",)
"""The tables that are not written as CSV as well, since they are large."""
