"""The printed training script runs unchanged, lowers the loss, and saves an adapter that PEFT loads."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from lorabench.config.fields import SUFFIXES
from lorabench.config.inputs import TinyModel
from lorabench.custom import finetune
from lorabench.custom.data import examine
from lorabench.custom.model import find_model
from lorabench.custom.recommend import recommend, script
from lorabench.data.chat import file_messages
from lorabench.data.tokens import encode_chat
from lorabench.errors import UserError
from lorabench.models.base import load_tokenizer

from .conftest import write_rows


def written(tmp_path, data, model="tiny"):
    """Write the script for a data file and return its path."""
    described = find_model(model)
    examined, template = examine(described, str(data), None)
    tokens = examined.usable * examined.mean_completion_tokens
    settings = recommend(described, tokens, examined, "A10", tmp_path)
    path = tmp_path / "finetune.py"
    path.write_text(script(described, settings, examined, template))
    return path


def run(path, *arguments):
    """Run the script; return the test loss before and after, and the training loss of each step."""
    result = subprocess.run(
        [sys.executable, path.name, *arguments],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(path.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    before, after = (float(loss) for loss in re.findall(r"test loss \w+: ([\d.]+)", result.stdout))
    return before, after, re.findall(r"training loss ([\d.]+)", result.stdout)


@pytest.mark.slow
def test_it_learns_and_its_adapter_loads(tmp_path, base):
    path = written(tmp_path, write_rows(tmp_path / "own.jsonl", 60), str(base))
    before, after, steps = run(path)
    assert len(steps) == 13
    assert after < before - 1
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "finetuned")
    config = model.active_peft_config
    assert (config.r, config.lora_alpha) == (32, 32)
    adapted = {name.partition(".lora_B")[0] for name, _ in model.named_parameters() if ".lora_B" in name}
    assert len(adapted) == 3 * 7 + 1
    assert any(name.endswith("lm_head") for name in adapted)
    # PEFT initializes A uniformly within 1/sqrt(d_in); after 13 steps it is still close to that.
    a = next(p for name, p in model.named_parameters() if ".q_proj.lora_A" in name)
    assert 0.9 / 128**0.5 < a.abs().max() < 1 / 128**0.5 + 0.1
    assert any(torch.any(p != 0) for name, p in model.named_parameters() if ".lora_B" in name)


@pytest.mark.slow
def test_full_fine_tuning_is_its_other_arm(tmp_path):
    before, after, _ = run(written(tmp_path, write_rows(tmp_path / "own.jsonl", 60)), "--full")
    assert after < before - 0.5
    assert (tmp_path / "finetuned-full" / "model.safetensors").is_file()


CHATS = {
    "messages": {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}] * 2},
    "conversations": {"conversations": [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]},
    "instruction/output": {"instruction": "add", "input": "2+2", "output": "4"},
    "question/answer": {"question": "2+2", "answer": 4},
    "text": {"text": "2+2 is 4"},
}


def test_it_adapts_the_layers_and_scores_the_tokens_that_the_suite_does(monkeypatch):
    assert set(finetune.LAYERS) == set(SUFFIXES["all"])
    tokenizer = load_tokenizer(TinyModel(kind="tiny"))
    for form, row in CHATS.items():
        monkeypatch.setattr(finetune, "FORMAT", form)
        encoded = finetune.encode(row, tokenizer)
        ids, mask = encode_chat(tokenizer, file_messages(row, form))
        assert encoded["ids"] == ids
        assert encoded["labels"] == [i if scored else finetune.IGNORED for i, scored in zip(ids, mask, strict=True)]


def test_what_it_prints_is_python_whatever_the_names_are_and_rows_that_it_would_stumble_on_are_named(tmp_path):
    odd = write_rows(tmp_path / "a'b\"c  # \n{x}.jsonl", 20)
    printed = runpy.run_path(str(written(tmp_path, odd)))
    assert str(odd) == printed["DATA"]
    assert (printed["FORMAT"], printed["BATCH_SIZE"]) == ("prompt/completion", 4)
    assert 1e-4 < printed["FULL_LR"] < printed["LORA_LR"] < 1e-2
    odd.write_text(odd.read_text() + "{}\n")
    with pytest.raises(UserError, match="rows that the script would not leave out: 1 no text .line 21.; remove them"):
        written(tmp_path, odd)
