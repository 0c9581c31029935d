"""The page beside a run's weights: what hubs read of it, and what was trained."""

from __future__ import annotations

import pytest
import yaml

from lorabench.config.inputs import HubModel
from lorabench.training.card import model_card


def parts(card: str) -> tuple[dict, dict[str, str]]:
    """Return the head of a page, and its table."""
    _, head, body = card.split("---\n", 2)
    rows = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ")]
    return yaml.safe_load(head), dict(rows)


@pytest.fixture
def record() -> dict:
    spec = {"method": "fullft", "task": "sft", "lr": 2e-5, "steps": 1000, "batch_size": 8, "seed": 3}
    spec |= {"dataset": "notes", "protocol": {"precision": "bf16", "schedule": "linear"}}
    outcome = {"final_test_nll": 1.5, "trainable_params": 1234567, "status": "done"}
    environment = {"git_sha": "abc", "git_dirty_patch": "f00", "dataset_sha256": "123"}
    return {"run_id": "r1", "spec": spec, "outcome": outcome, "environment": environment}


def test_full_fine_tuning_of_a_hubs_model(record):
    base = HubModel(kind="hub", id="own/base", revision="r", parameters=1, hidden_size=1)
    head, rows = parts(model_card(record, base))
    assert head["base_model"] == "own/base"
    assert (head["library_name"], head["tags"]) == ("transformers", ["lorabench"])
    assert rows["test loss"] == "1.5000 nats per token"
    assert rows["base model"] == "own/base at r"
    assert rows["commit of lorabench"] == "abc, with local changes"
    assert rows["learning rate"] == "2e-05, falling linearly to zero"
    assert "rank" not in rows
