"""`lorabench recommend` gives learning rates with their interval and sources, and the numbers computed by hand."""

from __future__ import annotations

import contextlib
import json
import math
import re

import pytest
from typer.testing import CliRunner

from lorabench.cli import app
from lorabench.custom.model import find_model
from lorabench.custom.recommend import recommend, script
from lorabench.errors import UserError
from lorabench.models.specs import ARCHITECTURES
from lorabench.store.io import write_frame
from lorabench.utils import formats

from ..handmade import make_sweep, runs_table
from .conftest import write_rows

LLAMA = "meta-llama/Llama-3.1-8B"


def recommended(model, tokens=None, results=None, tmp_path=None):
    return recommend(find_model(model), tokens, None, "H100-80GB", results or tmp_path)


def test_llama_8b_by_hand(tmp_path):
    recommendation = recommended(LLAMA, 50e6, tmp_path=tmp_path)
    # The law stands beside the pooled LRs.
    assert [(lr.method, lr.law) for lr in recommendation.lrs] == [("lora", 2.856e-4), ("fullft", 2.856e-5)]
    assert recommendation.setting("alpha").value == 32
    # At 2,753,792 parameters per rank, rank 19 is enough for 50 M tokens, so the default of 32 is recommended.
    assert (recommendation.rank, recommendation.setting("lora_parameters").value) == (32, 32 * 2_753_792)
    assert recommended(LLAMA, 200e6, tmp_path=tmp_path).rank == 128
    assert recommendation.batch_size == 32
    # Weights, gradients and two moments in fp32 take 16 bytes per parameter: 128 GB, more than one GPU has.
    gpus = int(recommendation.setting("fullft_gigabytes").source.split()[2])
    assert gpus > 1
    assert 128.5 / gpus < recommendation.setting("fullft_gigabytes").value < 80
    assert 8.03 * 4 < recommendation.setting("lora_gigabytes").value < 80
    # 6 FLOPs a parameter and token, at 35% of 989.5 TFLOP/s: 1.9 hours, without attention, waiting and starting.
    hours = 6 * 7.5e9 * 50e6 / (0.35 * 989.5e12) / 3600
    assert hours < recommendation.setting("fullft_gpu_hours").value < 2 * hours
    assert (
        hours * 2 / 3
        < recommendation.setting("lora_gpu_hours").value
        < recommendation.setting("fullft_gpu_hours").value
    )
    assert all(setting.source for setting in recommendation.settings)


def test_learning_rates_rest_on_every_source(tmp_path):
    recommendation = recommended(LLAMA, 50e6, tmp_path=tmp_path)
    for lr in recommendation.lrs:
        setting = recommendation.setting(f"{lr.method}_lr")
        assert (setting.value, setting.low, setting.high) == (lr.lr, lr.low, lr.high)
        assert lr.low < lr.lr < lr.high
        names = {share.source for share in lr.sources}
        assert {"the paper's authors", "nhckdvrl", "Baseten", "lorabench"} <= names
        assert all(share.low <= share.high for share in lr.sources)
        assert lr.measured_by is None
        # All sources together decide the offset from the law, which has no prior.
        assert sum(share.weight for share in lr.sources) == pytest.approx(1, abs=0.1)
    assert not any("No source has measured" in note for note in recommendation.notes)


def test_batch_size_and_length_move_the_learning_rates_and_beyond_the_evidence_it_says_so(tmp_path):
    model = find_model(LLAMA)
    small, large = (
        recommend(model, None, None, "H100-80GB", tmp_path, batch_size=batch, steps=1000) for batch in (8, 512)
    )
    for one, other in zip(small.lrs, large.lrs, strict=True):
        # Between no effect and the square root of the batch size.
        assert 1 < other.lr / one.lr < 8
    assert (small.batch_size, small.setting("batch_size").source) == (8, "your choice")
    far = recommend(model, None, None, "H100-80GB", tmp_path, batch_size=4096, steps=100_000)
    assert any("No source has measured a batch size near 4,096; the nearest is 512" in note for note in far.notes)
    assert any("No source has measured a length, in steps, near 100,000" in note for note in far.notes)
    for one, other in zip(large.lrs, far.lrs, strict=True):
        assert other.high / other.low > one.high / one.low


def test_published_sweeps_of_the_model_stand_beside_them(tmp_path):
    [seen] = recommended(LLAMA, tmp_path=tmp_path).seen
    assert (seen.method, seen.where) == ("lora", "published, tinker-cookbook: tulu3")
    assert 2e-4 < seen.lr < 6e-4
    assert recommended("tiny", tmp_path=tmp_path).seen == ()


def test_a_family_without_a_law_has_a_wider_interval(tmp_path, base):
    llama = recommended(str(base), tmp_path=tmp_path).setting("lora_lr")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    recommendation = recommended(str(base), tmp_path=tmp_path)
    lr = recommendation.setting("lora_lr")
    assert lr.high / lr.low > llama.high / llama.low
    assert any("The law has no exponent for the family 'mistral'" in note for note in recommendation.notes)
    assert f"LORA_LR = {lr.value}\n" in script(recommendation, None, None)


def test_finished_runs_are_shown_with_their_interval(tmp_path):
    rows = [
        row | {"family": "llama", "hidden_size": 128, "base_params": 828_288}
        for rank in (None, 32)
        for row in make_sweep(rank=rank)
    ]
    other = [row | {"family": "llama", "hidden_size": 64, "base_params": 300_000} for row in make_sweep(rank=None)]
    write_frame(runs_table([*rows, *other]), "runs", tmp_path / "mine" / "tables")
    seen = recommended("tiny", results=tmp_path).seen
    assert [(optimum.method, optimum.rank) for optimum in seen] == [("fullft", None), ("lora", 32)]
    for optimum in seen:
        assert optimum.low
        assert optimum.high
        assert optimum.low <= optimum.lr <= optimum.high
        assert optimum.where.startswith(f"measured, {tmp_path / 'mine'}: ")
    # They are a source of their own, near which the recommendation for its batch size and length then lies.
    by_method = {optimum.method: optimum.lr for optimum in seen}
    batch, steps = (int(rows[0][name]) for name in ("batch_size", "steps"))
    before, after = (
        recommend(find_model("tiny"), None, None, "H100-80GB", results, batch_size=batch, steps=steps)
        for results in (tmp_path / "none", tmp_path)
    )
    for was, now in zip(before.lrs, after.lrs, strict=True):
        assert (was.measured_by, now.measured_by) == ("lorabench", "your own presets")
        measured = math.log(by_method[now.method])
        assert abs(math.log(now.lr) - measured) < min(0.5, abs(math.log(was.lr) - measured))
    assert recommended("llama-64", results=tmp_path).seen == ()
    # A table that is not valid, or lacks columns, is skipped.
    (tmp_path / "broken" / "tables").mkdir(parents=True)
    (tmp_path / "broken" / "tables" / "runs.csv").write_text("run_id,lr\na,1\na,2\n")
    assert recommended("tiny", results=tmp_path).seen == seen


MIXTURE = "Qwen/Qwen3-30B-A3B"


def test_a_mixture_of_experts_fits_where_activations_are_recomputed(tmp_path):
    recommendation = recommended(MIXTURE, tmp_path=tmp_path)
    assert recommendation.setting("fullft_gigabytes").source == "estimated for 16 x H100-80GB"
    # An optimizer's state and weights of 30.5 billion parameters, and what 16 GPUs do not divide.
    assert 16 * 30.53 / 16 < recommendation.setting("fullft_gigabytes").value < 16 * 30.53 / 16 + 16
    assert recommendation.setting("lora_gigabytes").source == "estimated for 4 x H100-80GB"


def test_what_does_not_fit_is_said_and_the_settings_are_given(tmp_path, monkeypatch):
    config = json.loads((ARCHITECTURES / "llama-3.1-8b.json").read_text())
    config |= {"hidden_size": 32768, "intermediate_size": 114688, "num_attention_heads": 256, "num_hidden_layers": 4}
    monkeypatch.setattr("lorabench.custom.model.look_up", lambda wanted, file: json.dumps(config))
    recommendation = recommended("own/wide", tmp_path=tmp_path)
    for method, title in (("lora", "LoRA"), ("fullft", "FullFT")):
        assert recommendation.setting(f"{method}_lr").value > 0
        size = recommendation.setting(f"{method}_gigabytes")
        assert (size.value, size.source) == ("does not fit", "estimated for up to 1,024 x H100-80GB")
        [note] = [note for note in recommendation.notes if note.startswith(f"{title} does not fit on H100-80GB")]
        assert re.search(r"of 1,024 GPUs would need \d+ GB; more GPUs don't help, since \d+ GB are not divided", note)
    shown = lorabench("--model", "own/wide", cwd=tmp_path)
    assert shown.exit_code == 0
    assert "does not fit" in shown.stdout
    assert "m-d-" not in shown.stdout
    printed = json.loads(lorabench("--model", "own/wide", "--json", cwd=tmp_path).stdout)
    assert printed["settings"]["fullft_gigabytes"]["value"] == "does not fit"


def test_capacity_and_short_runs_are_noted(tmp_path):
    recommendation = recommended("tiny", 10_000_000, tmp_path=tmp_path)
    assert recommendation.rank == 64
    assert any("LoRA may run out of capacity" in note for note in recommendation.notes)
    assert any("10 Mbit in the data" in note and "1.06 Mbit in the adapter" in note for note in recommendation.notes)
    assert any("an extrapolation" in note for note in recommendation.notes)
    data = write_rows(tmp_path / "own.jsonl", 40)
    from lorabench.custom.data import examine

    model = find_model("tiny")
    known, _ = examine(model, str(data), None)
    few = recommend(model, 400.0, known, "A10", tmp_path)
    assert any("The run has 10 steps" in note for note in few.notes)


def lorabench(*arguments, cwd):
    with contextlib.chdir(cwd):
        return CliRunner().invoke(app, ["recommend", *arguments])


def test_json_and_table_say_the_same(tmp_path):
    printed = json.loads(lorabench("--model", LLAMA, "--json", cwd=tmp_path).stdout)
    assert printed["model"] == {"name": LLAMA, "family": "llama", "parameters": 8_030_261_248, "hidden_size": 4096}
    lora = printed["settings"]["lora_lr"]
    assert lora["low"] < lora["value"] < lora["high"]
    assert printed["sources_of_lr"]["lora"]["law"] == 2.856e-4
    assert {"source", "widths", "low", "high", "weight"} == set(printed["sources_of_lr"]["lora"]["sources"][0])
    table = lorabench("--model", LLAMA, cwd=tmp_path).stdout
    assert formats.lr(lora["value"]) in table
    assert "2.86e-4" in table
    assert "2.86e-5" in table


MISTAKES = {
    "two": (("--data", "x.jsonl", "--dataset-tokens", "5"), "--dataset-tokens and --data: give one of them"),
    "both": (("--json", "--script"), "--json and --script: give one of them"),
    "gpu": (("--gpu", "H9000"), "gpu 'H9000' is not known"),
    "data": (("--data", "x.jsonl"), "data 'x.jsonl' is no file and no hub id"),
    "batch": (("--data", "own.jsonl", "--batch-size", "64"), "batch size 64 is more than the 20 training examples"),
}


def test_a_mistake_is_one_sentence(tmp_path):
    write_rows(tmp_path / "own.jsonl", 20)
    for arguments, message in MISTAKES.values():
        result = lorabench("--model", "tiny", *arguments, cwd=tmp_path)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"lorabench: {message}")


def test_a_mixture_of_experts_and_a_gguf_file_have_no_script(tmp_path):
    with pytest.raises(UserError, match="is a mixture of experts, which the script does not cover"):
        script(recommended("moe-128", tmp_path=tmp_path), None, None)
