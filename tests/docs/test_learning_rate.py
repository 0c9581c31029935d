"""The page of learning rates in a real browser: its numbers are those of the commands, to the digits that they print.

Skipped where Chromium is not installed.
"""

import json
from functools import cache
from itertools import product
from urllib.parse import urlencode

import pytest
from lora_advice import formats, optima
from lora_advice.cli import app
from lora_advice.errors import UserError
from lora_advice.models import find_model, lora_parameters, public_models
from lora_advice.pooled_lr import PooledLr
from lora_advice.recommend import GROUP_SIZE, PROBLEMS_PER_STEP
from lora_advice.theory import LoraSetting, movement_ratio
from typer.testing import CliRunner

from ..conftest import REPOSITORY

pytestmark = pytest.mark.slow

PAGE = (REPOSITORY / "docs/learning-rate.html").as_uri()
SIZES = {"width": "1536", "params": "3.1e9", "family": "qwen9"}
MODELS = (
    *({"model": name} for name in ("tiny", "moe", "sums", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B")),
    *({"model": name} for name in ("google/gemma-3-12b-it", "openai/gpt-oss-20b", "Qwen2.5-0.5B", "x/Llama-3.1-70B")),
    SIZES,
    {"model": "someone/own-9B", "width": "4095", "params": "9000000000", "family": "llama"},
)
STEPS, BATCHES, LORAS = (40, 1000, 30_000), (4, 32, 1024), (("32", 1), ("32", 300), ("2", 32), ("48.5", 7))

READ = """
const [entries, names] = arguments;
const texts = (selector) => [...document.querySelectorAll(selector)].map((part) => part.textContent);
for (const [name, value] of Object.entries(entries)) document.forms[0].elements[name].value = value;
document.forms[0].dispatchEvent(new Event("input", {bubbles: true}));
return {
  ...Object.fromEntries(names.map((name) => [name, document.getElementById(name).textContent])),
  notes: texts("#notes li"),
  sources: [...document.querySelectorAll("#sources tr")].map((row) => [...row.cells].map((cell) => cell.textContent)),
};
"""
NAMES = ("message", "lora-lr", "lora-interval", "fullft-lr", "fullft-interval", "ratio", "theory", "command")
DEFAULTS = {"model": "", "task": "sft", "steps": "1000", "batch": "32", "alpha": "32", "rank": "32"}
DEFAULTS |= dict.fromkeys(SIZES, "")


@pytest.fixture(scope="module")
def pooled_once():
    """Pool the same optima, and predict for the same place, once."""
    pools = {}

    def pooled(known):
        key = repr(known)
        if key not in pools:
            pools[key] = PooledLr(known)
            pools[key].predict = cache(pools[key].predict)
        return pools[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optima, "PooledLr", pooled)
        yield


@pytest.fixture
def page(browser):
    """Return a function that opens the page with entries in its address."""

    def opened(entries, pixels=1200):
        size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": pixels < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get("about:blank")
        browser.get(f"{PAGE}#{urlencode(entries)}")
        return read(browser)

    return opened


def read(browser, entries=None):
    """Return what the open page says, of other entries if some are given."""
    said = browser.execute_script(READ, DEFAULTS | entries if entries else {}, NAMES)
    assert browser.get_log("browser") == []
    return said


@cache
def command(*words):
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def times(value):
    return f"{value:.0f}" if value >= 10 else f"{float(f'{value:.2g}'):g}"


def expected(case, tmp_path):
    """Return the numbers of the page, a count, notes and sources as the commands have them, and the commands."""
    named = [case["model"]] if "model" in case else []
    named += [word for name in SIZES if name in case for word in (f"--{name}", case[name])]
    rl, alpha = case["task"] == "rl", float(case["alpha"])
    size = [] if rl else ["--batch-size", case["batch"]]
    commands = [["recommend", *named, "--steps", case["steps"], *size, "--results", str(tmp_path)]]
    advice = command(*commands[0])
    rates = {name: advice["settings"][f"{'rl_' if rl else ''}{name}_lr"] for name in ("lora", "fullft")}
    model = find_model(case.get("model"), False, *(kind(case[name]) for name, kind in KINDS.items() if name in case))
    if not rl and alpha != 32:
        given = ["--alpha", case["alpha"], "--rank", case["rank"]]
        commands.append(["convert", *named, "--steps", case["steps"], *size, *given])
        rates["lora"] = command(*commands[1])
    said = {}
    for name, rate in rates.items():
        said[f"{name}-lr"] = formats.lr(rate["value"])
        said[f"{name}-interval"] = f"{formats.lr(rate['low'], 2)} to {formats.lr(rate['high'], 2)}"
    said["ratio"] = f"{times(rates['lora']['value'] / rates['fullft']['value'])} times"
    setting = LoraSetting(model.width, float(case["steps"]), alpha, float(case["rank"]))
    by_theory = f"A theory says {times(movement_ratio(setting, rates['fullft']['value']))} times."
    said["theory"] = "No theory of the ratio holds in RL." if rl else by_theory
    counted = f"has {lora_parameters(model, int(case['rank'])):,} parameters at rank {case['rank']}"
    notes = [note for note in advice["notes"] if note.startswith(("No source", "The law", "The run has"))]
    by_source = {}
    shares = advice["sources_of_lr"]
    if rl:
        known, batch = optima.KnownOptima(model, tmp_path), GROUP_SIZE * PROBLEMS_PER_STEP
        said_by = {name: known.recommend(name, batch, float(case["steps"]), rl=True)[1] for name in ("lora", "fullft")}
        shares = {name: {"sources": [vars(share) for share in each.sources]} for name, each in said_by.items()}
    for method, of_method in shares.items():
        for share in of_method["sources"]:
            weights = by_source.setdefault(share["source"], {"widths": share["widths"]})
            weights |= {"widths": share["widths"], method: f"{share['weight']:.0%}".replace("-0%", "0%")}
    rows = [
        [source, row["widths"], *(row.get(method, "\N{EN DASH}") for method in rates)]
        for source, row in by_source.items()
    ]
    return said, counted, [] if rl else notes, sorted(rows), commands


KINDS = {"width": int, "params": float, "family": str}


def test_the_page_says_what_the_commands_say(browser, page, tmp_path, monkeypatch, pooled_once):
    monkeypatch.chdir(tmp_path)
    page({})
    runs = [("sft", steps, batch, *lora) for steps, batch, lora in product(STEPS, BATCHES, LORAS)]
    runs += [("rl", steps, 32, "32", 16) for steps in STEPS]
    names = ("task", "steps", "batch", "alpha", "rank")
    cases = [model | dict(zip(names, map(str, run), strict=True)) for model in MODELS for run in runs]
    assert len(cases) == 429
    for case in cases:
        numbers, counted, notes, sources, commands = expected(case, tmp_path)
        said = read(browser, case)
        assert said["message"] == "", case
        assert {name: said[name] for name in numbers} == numbers, case
        assert any(counted in note for note in said["notes"]), case
        assert [note for note in said["notes"] if note.startswith(("No source", "The law", "The run has"))] == notes, (
            case
        )
        assert sorted(said["sources"]) == sources, case
        # The commands that it names are those, with the options in another order.
        named = [set(line.split()[1:]) for line in said["command"].splitlines()]
        assert named == [{*words} - {"--results", str(tmp_path)} for words in commands], case


def test_the_page_knows_the_models_that_the_command_knows(browser, page):
    page({})
    for name in [model.name for _, model in public_models()] + ["Qwen2.5-Coder-7B-Instruct", "models/smollm-360m"]:
        assert (read(browser, {"model": name})["message"], find_model(name).width > 0) == ("", True), name
    for name in ("nosuch", "axolotl-ai-co/DeepSeek-V3-11M", "x/Own-7B", "<img src=x onerror=alert(1)>", "constructor"):
        assert read(browser, {"model": name})["message"].startswith(f"{name} is not known here"), name
        with pytest.raises(UserError, match="is not known here"):
            find_model(name)
    assert read(browser, {"model": ""})["message"] == "Give a model's name, or its sizes below."
    assert "(close: llama-2-70b, llama-3-70b, " in read(browser, {"model": "meta-llama/Llama-4-70B"})["message"]


def test_the_address_has_the_entries_and_nothing_scrolls_sideways(browser, page):
    for pixels, entries in ((1200, {}), (400, {}), (400, SIZES), (400, {"model": "x" * 300}), (400, {"task": "rl"})):
        said = page(entries, pixels)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= pixels
        assert said == read(browser, {"model": "" if "width" in entries else "meta-llama/Llama-3.1-8B"} | entries)
    cases = ({"steps": "0"}, {"alpha": "-1"}, {"rank": "1.5"}, {"width": "64"}, SIZES | {"params": "many"})
    for entries, word in zip(cases, ("Steps", "Alpha", "Rank", "Parameters", "Parameters"), strict=True):
        assert page(entries)["message"].startswith(f"{word}: ")
        assert not browser.find_element("id", "answer").is_displayed()


def test_a_slider_changes_the_field_the_answer_and_the_address(browser, page):
    from selenium.webdriver.support.wait import WebDriverWait

    before = page({})
    move = "arguments[0].value = '8'; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    browser.execute_script(move, browser.find_element("css selector", "input[data-of=alpha]"))
    assert browser.find_element("name", "alpha").get_attribute("value") == "256"
    assert float(read(browser)["lora-lr"]) < float(before["lora-lr"])
    WebDriverWait(browser, 10).until(lambda driver: "alpha=256" in driver.current_url)
    unlabelled = "return [...document.querySelectorAll('input')].filter((e) => !e.labels.length && !e.ariaLabel).length"
    assert browser.execute_script(unlabelled) == 0
