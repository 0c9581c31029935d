"""`lorabench recommend` gives learning rates with their interval and sources, and the numbers computed by hand."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from dataclasses import replace
from itertools import chain

import pandas as pd
import pytest
import yaml
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorabench.cli.commands import app
from lorabench.config.inputs import ModelSpec, model_catalogue
from lorabench.config.loading import load_preset
from lorabench.custom.data import examine
from lorabench.custom.learning_rates import known_optima, published_optima
from lorabench.custom.model import find_model
from lorabench.custom.recommend import KnownLr, recommend
from lorabench.custom.variants import lr_factor
from lorabench.errors import UserError
from lorabench.models.base import config_of, weights_sha256
from lorabench.models.specs import ARCHITECTURES, shipped_folder
from lorabench.planning.memory import USABLE
from lorabench.store.io import write_frame
from lorabench.utils import formats
from lorabench.utils.files import LR_OPTIMA
from lorabench.utils.gpus import GB, GPUS

from ..conftest import REPOSITORY
from ..handmade import make_sweep, runs_table
from .conftest import write_rows

LLAMA = "meta-llama/Llama-3.1-8B"
LRS = ("lora_lr", "fullft_lr")


def recommended(model, results, tokens=None, **changes):
    return recommend(find_model(model), tokens, None, "H100-80GB", results, **changes)


def test_llama_8b_by_hand(tmp_path):
    recommendation = recommended(LLAMA, tmp_path, 50e6)
    settings = recommendation.settings
    # The law stands next to the pooled LRs.
    assert {name: lr.law for name, lr in recommendation.sources_of_lr.items()} == {"lora": 2.856e-4, "fullft": 2.856e-5}
    assert (settings["alpha"].value, settings["batch_size"].value) == (32, 32)
    # At 2,753,792 parameters per rank, rank 19 is enough for 50 M tokens, so the default of 32 is recommended.
    assert (settings["rank"].value, settings["lora_parameters"].value) == (32, 32 * 2_753_792)
    assert recommended(LLAMA, tmp_path, 200e6).settings["rank"].value == 128
    # Weights, gradients and two moments in fp32 take 16 bytes per parameter: 128 GB, more than one GPU has.
    gpus = int(settings["fullft_gigabytes"].source.split()[2])
    assert gpus > 1
    assert 128.5 / gpus < settings["fullft_gigabytes"].value < 80
    assert 8.03 * 4 < settings["lora_gigabytes"].value < 80
    # 6 FLOPs a parameter and token, at 35% of 989.5 TFLOP/s: 1.9 hours, without attention, waiting and starting.
    hours = 6 * 7.5e9 * 50e6 / (0.35 * 989.5e12) / 3600
    fullft, lora = settings["fullft_gpu_hours"].value, settings["lora_gpu_hours"].value
    assert hours < fullft < 2 * hours
    assert hours * 2 / 3 < lora < fullft
    assert all(setting.source for setting in settings.values())
    for method, lr in recommendation.sources_of_lr.items():
        setting = settings[f"{method}_lr"]
        assert setting.low < setting.value < setting.high
        assert {"the paper's authors", "nhckdvrl", "Baseten", "lorabench"} <= {share.source for share in lr.sources}
        assert all(share.low <= share.high for share in lr.sources)
        assert lr.measured_by is None
        # All sources together decide the offset from the law, which has no prior.
        assert sum(share.weight for share in lr.sources) == pytest.approx(1, abs=0.1)
    assert not any("No source has measured" in note for note in recommendation.notes)
    [seen] = recommendation.seen
    assert (seen.method, seen.where) == ("lora", "published, tinker-cookbook: tulu3")
    assert 2e-4 < seen.lr < 6e-4


def test_batch_size_and_length_move_the_learning_rates_and_beyond_the_evidence_it_says_so(tmp_path):
    small, large, far = (
        recommended(LLAMA, tmp_path, batch_size=batch, steps=steps)
        for batch, steps in ((8, 1000), (512, 1000), (4096, 100_000))
    )
    assert (small.settings["batch_size"].value, small.settings["batch_size"].source) == (8, "your choice")
    assert any("No source has measured a batch size near 4,096; the nearest is 512" in note for note in far.notes)
    assert any("No source has measured a length, in steps, near 100,000" in note for note in far.notes)
    for name in LRS:
        few, many, beyond = (recommendation.settings[name] for recommendation in (small, large, far))
        # Between no effect and the square root of the batch size.
        assert 1 < many.value / few.value < 8
        assert beyond.high / beyond.low > many.high / many.low


def test_a_known_learning_rate_is_converted(tmp_path):
    def converted(**known):
        return recommended(LLAMA, tmp_path, batch_size=32, steps=1000, known=KnownLr(1e-4, **known)).settings

    settings = converted()
    assert settings["converted_lr"].value == 1e-4
    assert "from 0.0001 of LoRA at alpha 32, rank 32, 1000 steps of 32 examples" in settings["converted_lr"].source
    # Between no movement of A and nothing but its movement, an eighth of alpha asks for 1/8 to 1/sqrt(8) of the LR.
    eighth = converted(alpha=4.0)["converted_lr"].value
    assert 1e-4 / 8 <= eighth < 1e-4 / math.sqrt(8)
    assert converted(rank=1, to_rank=64)["converted_lr"].value > 1.3e-4
    # To a larger batch, by the pooled learning rates of full fine-tuning.
    assert converted(batch_size=8)["converted_lr"].value > 1.1e-4
    with pytest.raises(UserError, match="can't be converted without a number of steps"):
        recommended(LLAMA, tmp_path, known=KnownLr(1e-4, alpha=16.0))


def test_a_learning_rate_is_converted_to_a_variant(tmp_path):
    def converted(lr=2e-4, **known):
        known = KnownLr(lr, **{"rank": 16, "to_alpha": 16.0} | known)
        return recommended(LLAMA, tmp_path, batch_size=32, steps=1000, known=known).settings["converted_lr"]

    # rsLoRA is LoRA with 4 times the alpha at rank 16, and LoRA+ with 16 times.
    for variant, alpha in (("rslora", 64.0), ("lora_plus", 256.0)):
        lr = converted(to_variant=variant)
        assert (lr.value, lr.low) == (converted(to_alpha=alpha, alpha=16.0).value, None)
        assert converted(lr.value, variant=variant).value == pytest.approx(2e-4, rel=0.03)
    assert "from 0.0002 of LoRA at alpha 16, rank 16," in lr.source
    assert "LoRA+ counts, for the LR of A, as LoRA with 16 times the alpha" in lr.source
    assert converted(to_variant="dora").value == converted(variant="qlora").value == 2e-4
    pissa, factor = converted(to_variant="pissa"), lr_factor("pissa", 16)
    expected = [2e-4 * ratio for ratio in (factor.low, factor.value, factor.high)]
    assert [pissa.low, pissa.value, pissa.high] == pytest.approx(expected, rel=0.05)
    assert "to PiSSA at alpha 16" in pissa.source
    assert f"PiSSA was measured as {factor}" in pissa.source
    # Between settings of one variant nothing is uncertain that was measured of it.
    same = converted(variant="pissa", to_variant="pissa")
    assert (same.value, same.low, same.high) == (2e-4, None, None)
    # Without a learning rate, the recommended one is converted with its interval.
    settings = recommended(LLAMA, tmp_path, batch_size=32, steps=1000, known=KnownLr(to_variant="qlora")).settings
    lora, qlora = settings["lora_lr"], settings["converted_lr"]
    assert qlora.value == pytest.approx(lora.value, rel=0.03)
    assert qlora.high / qlora.low == pytest.approx(lora.high / lora.low, rel=0.1)
    with pytest.raises(UserError, match="without a number of steps: give --steps"):
        recommended(LLAMA, tmp_path, known=KnownLr(to_variant="qlora"))


def test_a_family_without_a_law_has_a_wider_interval(tmp_path, base):
    llama = recommended(str(base), tmp_path).settings["lora_lr"]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    recommendation = recommended(str(base), tmp_path)
    lr = recommendation.settings["lora_lr"]
    assert lr.high / lr.low > llama.high / llama.low
    assert any("The law has no exponent for the family 'mistral'" in note for note in recommendation.notes)


def test_finished_runs_are_shown_with_their_interval(tmp_path):
    weights = json.dumps(weights_sha256(find_model("tiny").spec))
    about = {"family": "llama", "hidden_size": 128, "base_params": 828_288, "model_sha256": weights}
    rows = [
        # Their optimal LRs are far from what other sources say.
        row | about | {"lr": 0.4 * row["lr"]}
        for rank in (None, 32)
        for row in make_sweep(rank=rank)
    ]
    other = [row | {"family": "llama", "hidden_size": 64, "base_params": 300_000} for row in make_sweep(rank=None)]
    write_frame(runs_table([*rows, *other]), "runs", tmp_path / "mine" / "tables")
    seen = recommended("tiny", tmp_path).seen
    assert [(optimum.method, optimum.rank) for optimum in seen] == [("fullft", None), ("lora", 32)]
    for optimum in seen:
        assert 0 < optimum.low <= optimum.lr <= optimum.high
        assert optimum.where.startswith(f"measured, {tmp_path / 'mine'}: ")
    # They are a source of their own, near which the recommendation for its batch size and length then lies.
    lrs = {optimum.method: optimum.lr for optimum in seen}
    length = {name: int(rows[0][name]) for name in ("batch_size", "steps")}
    before, after = (recommended("tiny", results, **length) for results in (tmp_path / "none", tmp_path))
    assert before.seen == ()
    for method, lr in lrs.items():
        sources = [recommendation.sources_of_lr[method].measured_by for recommendation in (before, after)]
        assert sources == ["lorabench", "your own presets"]
        was, now = (abs(math.log(advice.settings[f"{method}_lr"].value / lr)) for advice in (before, after))
        assert now < min(0.5, was)
    assert recommended("llama-64", tmp_path).seen == ()
    # A base of the same family and sizes with other weights was not measured.
    others, _, same = known_optima(find_model("llama-128-tenth"), tmp_path)
    assert [optimum.lr for optimum in others] == [optimum.lr for optimum in seen]
    assert all(optimum.where.startswith("measured on another model of this size, ") for optimum in others)
    assert not same
    # A table that is not valid, or lacks columns, is skipped.
    (tmp_path / "broken" / "tables").mkdir(parents=True)
    (tmp_path / "broken" / "tables" / "runs.csv").write_text("run_id,lr\na,1\na,2\n")
    assert recommended("tiny", tmp_path).seen == seen


def test_a_namesake_is_not_measured(tmp_path):
    shipped = shutil.copytree(shipped_folder("moe-128"), tmp_path / "copied")
    assert measured_by(shipped, tmp_path) == measured_by("moe-128", tmp_path) == "lorabench"
    # A random model of the family and width of the measured mixture of experts, and one of another file name.
    config = config_of(replace(find_model("qwen-128").sizes, layers=1), 64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "Qwen3-4B")
    assert measured_by(tmp_path / "Qwen3-4B", tmp_path) is None
    assert measured_by("qwen-128", tmp_path) is None
    path = shipped / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert measured_by(shipped, tmp_path) is None
    # Nor is a model published by its name.
    published = published_optima(find_model(str(tmp_path / "Qwen3-4B")), 32)
    assert published
    assert all(optimum.where.startswith("published for a model of this name, ") for optimum in published)


def measured_by(model, results):
    sources = {source for source, _ in known_optima(find_model(str(model)), results)[2]}
    return next(iter(sources), None)


def test_a_model_of_the_hub_is_known_by_its_id(tmp_path):
    about = {"family": "llama", "hidden_size": 4096, "base_params": 8_030_261_248}
    about["model_sha256"] = json.dumps({LLAMA: "0" * 40})
    rows = [row | about for rank in (None, 32) for row in make_sweep(rank=rank)]
    write_frame(runs_table(rows), "runs", tmp_path / "mine" / "tables")
    assert measured_by(LLAMA, tmp_path) == "your own presets"
    assert measured_by("somebody/Llama-3.1-8B", tmp_path) is None


def test_every_model_that_this_project_measured_is_in_the_catalogue():
    optima = pd.read_csv(LR_OPTIMA)
    names = set(optima["model"][optima["source"] == "lorabench"])
    folders = (path.parent for path in (REPOSITORY / "paper_figures/published").glob("*/fig2_lr_by_rank.csv"))
    presets = [load_preset(folder.name) for folder in folders]
    assert presets
    for preset in presets:
        for name in names & set(preset.models):
            assert preset.models[name].model_dump(exclude_defaults=True) == known_model(name)


def known_model(name):
    return TypeAdapter(ModelSpec).validate_python(model_catalogue()[name]).model_dump(exclude_defaults=True)


def test_a_mixture_of_experts_fits_where_activations_are_recomputed(tmp_path):
    settings = recommended("Qwen/Qwen3-30B-A3B", tmp_path).settings
    assert settings["fullft_gigabytes"].source == "estimated for 8 x H100-80GB"
    # An optimizer's state and weights of 30.5 billion parameters, what 8 GPUs do not divide, and activations that fit.
    available = USABLE * GPUS["H100-80GB"].memory / GB
    assert 16 * 30.53 / 8 < settings["fullft_gigabytes"].value <= round(available, 2)
    assert settings["lora_gigabytes"].source == "estimated for 2 x H100-80GB"


def lorabench(*arguments, cwd):
    with contextlib.chdir(cwd):
        return CliRunner().invoke(app, ["recommend", *arguments])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--variant eva", "variant 'eva' is not known; allowed: lora, rslora"),
        ("--variant dora --for trl", "--variant and --for"),
        ("--from-variant dora", "need --from-lr"),
        ("--rank 4", "--alpha and --rank need --from-lr or --variant"),
        ("--from-lr 1e-4 --steps 50 --for trl --full", "--from-lr is of LoRA"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, error):
    result = lorabench("--model", "tiny", *options.split(), cwd=tmp_path)
    assert result.exit_code == 2
    assert error in result.stderr


def test_a_folder_to_train_from_has_the_converted_learning_rate_with_its_alpha_and_rank(tmp_path):
    old, new = {"--from-lr": "2e-4", "--from-alpha": "16", "--from-rank": "8"}, {"--alpha": "64", "--rank": "4"}
    options = ["--model", "tiny", "--steps", "100", *chain(*(old | new).items())]
    settings = json.loads(lorabench(*options, "--json", cwd=tmp_path).stdout)["settings"]
    assert (settings["rank"]["value"], settings["alpha"]["value"]) == (4, 64)
    assert settings["converted_lr"]["value"] != settings["lora_lr"]["value"]
    assert lorabench(*options, "--for", "llamafactory", cwd=tmp_path).exit_code == 0
    written = yaml.safe_load((tmp_path / "finetune-llamafactory" / "llamafactory.yaml").read_text())
    assert float(written["learning_rate"]) == settings["converted_lr"]["value"]
    assert (written["lora_rank"], written["lora_alpha"]) == (4, 64)


def test_what_does_not_fit_is_said_and_the_settings_are_given(tmp_path, monkeypatch):
    config = json.loads((ARCHITECTURES / "llama-3.1-8b.json").read_text())
    config |= {"hidden_size": 32768, "intermediate_size": 114688, "num_attention_heads": 256, "num_hidden_layers": 4}
    monkeypatch.setattr("lorabench.custom.model.look_up", lambda wanted, file: json.dumps(config))
    recommendation = recommended("own/wide", tmp_path)
    for method, title in (("lora", "LoRA"), ("fullft", "FullFT")):
        assert recommendation.settings[f"{method}_lr"].value > 0
        size = recommendation.settings[f"{method}_gigabytes"]
        assert (size.value, size.source) == ("does not fit", "estimated for up to 1,024 x H100-80GB")
        [note] = [note for note in recommendation.notes if note.startswith(f"{title} does not fit on H100-80GB")]
        assert re.search(r"of 1,024 GPUs would need \d+ GB; more GPUs don't help, since \d+ GB are not divided", note)
    shown = lorabench("--model", "own/wide", cwd=tmp_path)
    assert shown.exit_code == 0
    assert "does not fit" in shown.stdout
    assert "m-d-" not in shown.stdout


def test_capacity_and_short_runs_are_noted(tmp_path):
    recommendation = recommended("tiny", tmp_path, 10_000_000)
    assert recommendation.settings["rank"].value == 64
    assert any("LoRA may run out of capacity" in note for note in recommendation.notes)
    assert any("10 Mbit in the data" in note and "1.06 Mbit in the adapter" in note for note in recommendation.notes)
    assert any("an extrapolation" in note for note in recommendation.notes)
    model = find_model("tiny")
    known, _ = examine(model, str(write_rows(tmp_path / "own.jsonl", 40)), None)
    few = recommend(model, 400.0, known, "A10", tmp_path)
    assert any("The run has 10 steps" in note for note in few.notes)


MISTAKES = (
    (("--data", "x.jsonl", "--dataset-tokens", "5"), "--dataset-tokens and --data: give one of them"),
    (("--json", "--for", "trl"), "--json and --for: give one of them"),
    (("--full",), "--out and --full need --for"),
    (("--gpu", "H9000"), "gpu 'H9000' is not known"),
    (("--data", "x.jsonl"), "data 'x.jsonl' is no file and no hub id"),
    (("--data", "own.jsonl", "--batch-size", "64"), "batch size 64 is more than the 20 training examples"),
)


def test_json_and_table_say_the_same_and_a_mistake_is_one_sentence(tmp_path):
    printed = json.loads(lorabench("--model", LLAMA, "--json", cwd=tmp_path).stdout)
    assert printed["model"] == {"name": LLAMA, "family": "llama", "parameters": 8_030_261_248, "hidden_size": 4096}
    lora = printed["settings"]["lora_lr"]
    assert lora["low"] < lora["value"] < lora["high"]
    assert printed["sources_of_lr"]["lora"]["law"] == 2.856e-4
    assert {"source", "widths", "low", "high", "weight"} == set(printed["sources_of_lr"]["lora"]["sources"][0])
    table = lorabench("--model", LLAMA, cwd=tmp_path).stdout
    assert all(text in table for text in (formats.lr(lora["value"]), "2.86e-4", "2.86e-5"))
    write_rows(tmp_path / "own.jsonl", 20)
    for arguments, message in MISTAKES:
        result = lorabench("--model", "tiny", *arguments, cwd=tmp_path)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"lorabench: {message}")
