"""Variants of LoRA train as in a plain loop with PEFT, start from the base, and are saved for the base as it was."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer

from lorabench.config.experiments import Protocol
from lorabench.config.fields import LORA_PLUS_RATIO
from lorabench.evaluation.runner import transformers_model
from lorabench.models.base import load_model, load_tokenizer
from lorabench.models.lora import round_to_nf4
from lorabench.models.specs import shipped_folder
from lorabench.store.run_folder import RunFolder
from lorabench.training import reference
from lorabench.training.loss import example_nlls
from lorabench.training.run import Machine

from ..conftest import slow_but
from .conftest import TINY, condition_of, series, train, trained
from .test_reference import assert_same_weights, examples_of

STEPS, RANK, LR, EPS = 4, 8, 2e-4, 1e-4


def loraplus(model, lr, eps):
    options = {"loraplus_lr_ratio": LORA_PLUS_RATIO, "betas": (0.9, 0.95), "eps": eps, "weight_decay": 0.0}
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr, **options)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        # This rank is computed with merged weights.
        ({"method": "dora", "rank": 64}, {"use_dora": True}),
        ({"method": "pissa"}, {"init_lora_weights": "pissa"}),
        ({"method": "olora"}, {"init_lora_weights": "olora"}),
        ({"method": "qlora"}, {}),
        ({"alpha": 32.0 * math.sqrt(RANK)}, {"use_rslora": True}),
        ({"lr_ratio": LORA_PLUS_RATIO}, {}),
    ],
)
def test_steps_are_those_of_a_plain_loop(changes, options, data, tmp_path, monkeypatch):
    """Among the runs of the plan, rsLoRA is LoRA with another alpha, and LoRA+ is LoRA with another LR of B."""
    condition = replace(condition_of("lora", RANK, STEPS, batch_size=2), eps=EPS, **changes)
    outcome, model = train(condition, data, tmp_path, LR, protocol=Protocol(curve_points=2))
    monkeypatch.setattr(reference, "LoraConfig", partial(LoraConfig, **options))
    if condition.lr_ratio:
        monkeypatch.setattr(reference, "adam", loraplus)
    folder, examples = shipped_folder("llama-128"), examples_of(data["train"])
    if condition.method == "qlora":
        rounded, folder = load_model(TINY), tmp_path / "rounded"
        round_to_nf4(rounded)
        rounded.save_pretrained(folder)
    losses, expected = reference.train_sft(folder, examples, STEPS, 2, LR, condition.rank, eps=EPS)
    np.testing.assert_allclose(series(outcome, "nll"), losses, rtol=1e-5)
    assert outcome.final_valid_nll < outcome.curve[0].value
    assert_same_weights(model, expected, atol=5e-6)
    # The change of DoRA's weights is not that of a product of two factors.
    assert bool(series(outcome, "update_norm")) == (condition.method != "dora")


@pytest.mark.parametrize("method", slow_but("pissa", ["pissa", "olora", "dora", "qlora"]))
def test_a_sweep_starts_each_run_from_the_base_as_it_was(method, raw_preset, ready, data):
    """All but DoRA change the base's weights, so that the second run would else start from what the first one left."""
    [block] = raw_preset["experiments"].pop("rank")
    raw_preset["experiments"]["variants"] = [block | {"variants": [method], "seeds": 1}]
    plan, layout = ready("here", {"keep_weights": "all"}, ranks=(RANK,), fullft=[], lora=[1e-3, 2e-3])
    [sweep] = plan.sweeps
    trained(plan, layout, sweep)
    for run in sweep.grid():
        folder = RunFolder(layout.runs, run.run_id)
        record = folder.read_record()
        assert record["spec"]["method"] == method
        loaded = PeftModel.from_pretrained(load_model(TINY), folder.weights)
        if method == "qlora":
            machine = None, torch.device("cpu")
            loaded = transformers_model(TINY, record, layout, load_tokenizer(TINY), 4, *machine).model
        nats = example_nlls(loaded, data["test"], Machine(torch.device("cpu"), 4096)).sum()
        outcome = record["outcome"]
        assert nats / outcome["test_scored_tokens"] == pytest.approx(outcome["final_test_nll"], rel=1e-5)
