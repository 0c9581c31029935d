"""Recommended settings and conversions: the answers of before, and what moves them."""

import csv
import json
import math
import re
from hashlib import sha256
from pathlib import Path

import pytest
from lora_advice.cli import app
from lora_advice.errors import UserError
from lora_advice.models import find_model, public_models
from lora_advice.recommend import LoraRun, convert, recommend
from lora_advice.variants import lr_factor
from typer.testing import CliRunner

LLAMA = "meta-llama/Llama-3.1-8B"
LRS = ("lora_lr", "fullft_lr")
HERE = Path(__file__).parent


def table(name):
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("known", table("known_answers.csv"), ids=lambda row: f"{row['model']} {row['steps']}")
def test_the_settings_are_those_of_before(tmp_path, known):
    given = {name: int(known[name]) for name in ("tokens", "batch_size", "steps") if known[name]}
    advice = recommend(known["model"], results=tmp_path, **given)
    for name in (*LRS, "rl_lora_lr", "rl_fullft_lr"):
        setting = advice.settings[name]
        expected = [float(known[f"{name}{end}"]) for end in ("", "_low", "_high")]
        assert [setting.value, setting.low, setting.high] == expected
    counts = {"rank": "rank", "lora_parameters": "lora_parameters", "batch_size": "recommended_batch"}
    assert {name: str(advice.settings[name].value) for name in counts} == {n: known[c] for n, c in counts.items()}
    sources = advice.sources_of_lr["lora"]
    assert (sources.measured_by or "", sources.sources[0].source) == (known["measured_by"], known["heaviest_source"])


@pytest.mark.parametrize("known", table("known_conversions.csv"), ids=lambda row: row["options"])
def test_the_conversions_are_those_of_before(tmp_path, monkeypatch, known):
    monkeypatch.chdir(tmp_path)
    result = command("convert", known["model"], *known["options"].split(), "--json")
    setting = json.loads(result.stdout)
    assert all(str(setting[name] or "") == known[name] for name in ("value", "low", "high"))


def test_batch_size_and_length_move_the_learning_rates_and_beyond_the_evidence_it_says_so(tmp_path):
    small, large, far = (
        recommend(LLAMA, batch_size=batch, steps=steps, results=tmp_path)
        for batch, steps in ((8, 1000), (512, 1000), (4096, 100_000))
    )
    assert (small.settings["batch_size"].value, small.settings["batch_size"].source) == (8, "your choice")
    assert any("No source has measured a batch size near 4,096; the nearest is 512" in note for note in far.notes)
    assert any("No source has measured a length, in steps, near 100,000" in note for note in far.notes)
    assert not any("No source has measured" in note for note in small.notes)
    for name in LRS:
        few, many, beyond = (recommendation.settings[name] for recommendation in (small, large, far))
        # Between no effect and the square root of the batch size.
        assert 1 < many.value / few.value < 8
        assert beyond.high / beyond.low > many.high / many.low


def test_a_learning_rate_is_converted_to_an_alpha_a_rank_and_a_variant(tmp_path):
    model = find_model(LLAMA)

    def converted(lr=2e-4, here=None, there=None):
        settled = {"rank": 16, "alpha": 16.0, "steps": 1000, "batch_size": 32} | (there or {})
        return convert(model, lr, LoraRun(**here or {}), LoraRun(**settled), results=tmp_path)

    # Between no movement of A and nothing but its movement, an eighth of alpha asks for 1/8 to 1/sqrt(8) of the LR.
    assert 2e-4 / 8 <= converted(here={"alpha": 2.0}).value < 2e-4 / math.sqrt(8)
    assert converted(here={"rank": 1}, there={"rank": 64}).value > 2.5e-4
    # rsLoRA is LoRA with 4 times the alpha at rank 16, and LoRA+ with 16 times.
    for variant, alpha in (("rslora", 64.0), ("lora_plus", 256.0)):
        lr = converted(there={"variant": variant})
        assert (lr.value, lr.low) == (converted(here={"alpha": 16.0}, there={"alpha": alpha}).value, None)
        assert converted(lr.value, here={"variant": variant}).value == pytest.approx(2e-4, rel=0.03)
    assert "from 0.0002 of LoRA at alpha 16, rank 16," in lr.source
    assert converted(there={"variant": "dora"}).value == converted(here={"variant": "qlora"}).value == 2e-4
    pissa, factor = converted(there={"variant": "pissa"}), lr_factor("pissa", 16)
    expected = [2e-4 * ratio for ratio in (factor.low, factor.value, factor.high)]
    assert [pissa.low, pissa.value, pissa.high] == pytest.approx(expected, rel=0.05)
    assert f"PiSSA was measured as {factor}" in pissa.source
    # Between settings of one variant nothing is uncertain that was measured of it.
    same = converted(here={"variant": "pissa"}, there={"variant": "pissa"})
    assert (same.value, same.low, same.high) == (2e-4, None, None)


def test_a_model_of_given_sizes_has_the_rates_of_one_that_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ("--width", 4096, "--params", 8.03e9, "--family", "llama")
    known, given = (command("recommend", *model, "--steps", 500, "--json") for model in ([LLAMA], sizes))
    known, given = json.loads(known.stdout), json.loads(given.stdout)
    assert all(known["settings"][name] == given["settings"][name] for name in LRS)
    assert given["model"] == {"name": "given by its sizes", "family": "llama", "parameters": 8030000000} | {
        "hidden_size": 4096
    }
    convert = ("convert", "--steps", 500, "--alpha", 8)
    assert command(*convert, LLAMA).stdout == command(*convert, "x/own", *sizes).stdout


def test_a_name_of_each_public_model_is_known():
    for pattern, model in public_models():
        assert pattern.search(model.name)
        assert find_model(model.name).width > 0


def write_optima(results, weights, **changes):
    """Write the optima of a preset, far from what other sources say, as the suite does."""
    own = {"family": "llama", "width": 128, "alpha": 32, "batch_size": 16, "steps": 200, "rl": False, "counts": True}
    own |= {"model": weights, "weights": weights}
    rows = [
        own | {"method": "fullft", "lr": 1e-2, "error": 0.14},
        own | {"method": "lora", "lr": 5e-2, "error": "", "counts": False},
    ]
    (results / "mine/tables").mkdir(parents=True)
    with (results / "mine/tables/optima.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | changes for row in rows)


def test_own_optima_are_pooled(tmp_path, shipped):
    weights = {"model.safetensors": sha256((shipped / "llama-128/model.safetensors").read_bytes()).hexdigest()}
    write_optima(tmp_path, json.dumps(weights))
    near = {"batch_size": 16, "steps": 200}
    before = recommend("tiny", results=tmp_path / "none", **near)
    for name in ("tiny", str(shipped / "llama-128")):
        after = recommend(name, results=tmp_path, **near)
        assert after.sources_of_lr["fullft"].measured_by == "your own presets"
        # Without an error it does not count.
        assert after.settings["lora_lr"] == before.settings["lora_lr"]
        was, now = (abs(math.log(advice.settings["fullft_lr"].value / 1e-2)) for advice in (before, after))
        assert now < was / 2
    # A base of the same family and sizes with other weights was not measured.
    assert recommend("llama-128-tenth", results=tmp_path, **near).sources_of_lr["fullft"].measured_by is None
    write_optima(tmp_path / "bad", "w", error=-1)
    with pytest.raises(UserError, match=r"optima.csv is not a table of optima: an optimum that counts has an LR"):
        recommend("tiny", results=tmp_path / "bad")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("recommend nosuch", "model 'nosuch' is not known here: give its folder, --hub to look it up there, or,"),
        ("trainer trl meta-llama/Llama-4-70B", " (close: llama-3-70b, llama-2-70b, llama-7b): give its folder, "),
        (
            "recommend tiny --width 64",
            "give the name or the folder of a model, or all of --width, --params and --family",
        ),
        ("convert --lr 1e-4 --steps 9", "give the name or the folder of a model, or all of --width, --params and --f"),
        ("recommend tiny --data x.json", "x.json can't be read: No such file"),
        ("recommend tiny --data own.jsonl --batch-size 64", "batch size 64 is more than the 20 training examples"),
        ("convert tiny --variant eva", "variant 'eva' is not known; allowed: lora, rslora"),
        ("convert tiny --from-variant dora --steps 9", "need --lr"),
        ("convert tiny --lr 1e-4 --alpha 16", "can't be converted without a number of steps: give --steps"),
        ("convert tiny --lr 0", "--lr 0: must be above 0"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("own.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(20)))
    result = command(*arguments.split())
    assert result.exit_code == 2
    assert re.search(re.escape(message), result.stderr)
    assert result.stderr.count("\n") == 1
