"""No file hangs an audit, takes all memory, or ends the reading of the others."""

import json
import math
import os
import re
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from lora_advice.audit import audit
from lora_advice.limits import in_limits, matching

AXOLOTL = (
    "base_model: Qwen/Qwen3-8B\nadapter: lora\nlora_r: 16\nlora_alpha: 32\nlearning_rate: 0.0002\n"
    "micro_batch_size: 2\ndatasets: []\n"
)
VERL = "actor_rollout_ref:\n  model: {path: Qwen/Qwen3-8B, lora_rank: 8}\n  actor: {optim: {lr: 1.0e-5}}\n"
LLAMA_FACTORY = (
    "model_name_or_path: Qwen/Qwen3-8B\nstage: sft\ndo_train: true\nfinetuning_type: lora\nlearning_rate: 1.0e-4\n"
    "dataset: a\ndataset_dir: .\n"
)
TRL = "trl sft --model_name_or_path Qwen/Qwen3-8B --use_peft --learning_rate 2e-4"
PYTHON = "from trl import SFTConfig, SFTTrainer\nx = {}\nSFTTrainer(model='a/b', args=SFTConfig(learning_rate=x))\n"
NESTED = "it is nested too deeply"
LONG = "a" * 5000
ALIASES = "".join(f"l{n}: &l{n} {{{', '.join(f'k{i}: *l{n - 1}' for i in range(9))}}}\n" for n in range(1, 30))

# By the path: what once ended or hung an audit, and why it is not read; null if it is.
ONCE_FAILED: dict[str, tuple[str, str | None]] = {
    "self.yaml": (f"{VERL}x: &a {{b: *a}}\n", NESTED),
    "aliases.yaml": (f"l0: &l0 {{a: 1}}\n{ALIASES}{VERL}", "it has more than 200,000 options"),
    "list-of-itself.py": (PYTHON.format("[x]"), None),
    "minus.py": (PYTHON.format("-y\ny = -x"), None),
    "dashes.py": (PYTHON.format("-" * 9000 + "1"), "it is not valid Python: "),
    "data/a.yaml": (LLAMA_FACTORY, None),
    "data/dataset_info.json": ("[" * 9000, ""),
    "default.sh": (f"A={'${A:-' * 500}{'}' * 500}\n{TRL}\n", None),
    "arithmetic.sh": (f"A=$(({'1+' * 20_000}1))\n{TRL}\n", None),
    "config.sh": (f"{TRL} --config {LONG}.yaml\n", None),
    "program.sh": (f"python {LONG}.py --model_name_or_path a --learning_rate 1 --config_file {LONG}\n", None),
    "examples.yml": (AXOLOTL.replace("[]", f"[{{path: {LONG}.jsonl}}]"), None),
    "tag.yml": (f"{AXOLOTL}x: !!timestamp foo\n", "it is not valid YAML"),
    "digits.yml": (f"{AXOLOTL}x: 1{'0' * 5000}\n", "it is not valid YAML: Exceeds the limit"),
    "small-lr.yml": (AXOLOTL.replace("0.0002", "1.0e-320"), None),
    "places.yml": (AXOLOTL + "x: " + "{{" * 60_000 + "'\n", "it is a Jinja template"),
    "keys.yml": (AXOLOTL + "".join(f"k{number}: 1\n" for number in range(20_000)), None),
    "repeated.yml": (AXOLOTL + "k: 1\n" * 20_000, None),
    "references.yaml": ("".join(f"z{n}: ${{z{n + 1}}}${{z{n + 1}}}{{}}\n" for n in range(40)) + VERL, None),
    "wide-references.yaml": ("".join(f"z{n}: '{f'${{z{n + 1}}}' * 99}'\n" for n in range(9)) + f"z9: b\n{VERL}", None),
    "array.sh": ("A=(a a)\n" + "A=(${A[@]} ${A[@]})\n" * 40 + f"{TRL} ${{A[@]}}\n", None),
    "double.sh": ("A=a\n" + "A=$A$A\n" * 40 + f"{TRL} $A\n", None),
    "newlines.yml": ("\n" * 200_000, ""),
}


def test_every_file_stands_on_its_own(tmp_path):
    for name, (text, _) in ONCE_FAILED.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "right.yml").write_text(AXOLOTL.replace("adapter: lora", "adapter:"))
    report = audit(tmp_path)
    reasons = {Path(missing.path).relative_to(tmp_path).as_posix(): missing.reason for missing in report.not_read}
    read = {Path(config.path).relative_to(tmp_path).as_posix() for config in report.configs}
    for name, (_, reason) in ONCE_FAILED.items():
        assert reasons.get(name, "").startswith(reason or ""), name
        assert (name in reasons, name in read) == (bool(reason), reason is None), name
    assert next(finding.code for finding in report.findings if finding.path.endswith("right.yml")) == "no-effect"
    assert json.dumps(asdict(report), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", VERL.replace("8}", "-8}"), "the rank is -8; allowed: whole numbers from 1 to 1e+09"),
        ("a.yml", AXOLOTL.replace("16", "1" + "0" * 400), "the rank is 10000"),
        ("a.yml", AXOLOTL.replace("0.0002", ".nan"), "the learning rate is nan; allowed: numbers from 1e-20 to 1000"),
        ("a.yml", f"{AXOLOTL}gradient_accumulation_steps: 0\n", "the number of accumulated batches is 0; allowed: "),
        ("a.sh", f"{TRL} --lora_alpha -16\n", "the alpha is -16; allowed: numbers from 0 to 1e+09"),
        ("a.py", PYTHON.format("-1e-4"), "the learning rate is -0.0001; allowed: "),
    ],
)
def test_numbers_without_meaning_are_errors(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    report = audit(tmp_path)
    assert [f.message[: len(message)] for f in report.findings if f.code == "number"] == [message]
    assert json.dumps(asdict(report), allow_nan=False)


HOSTILE = {
    "hang": (lambda: re.fullmatch("(a+)+$", "a" * 64 + "b"), "it takes more than 0.3 s to read"),
    "sleep": (lambda: time.sleep(60), "it takes more than 0.3 s to read"),
    "memory": (lambda: len(bytearray(4_000_000_000)), "it takes more than 0.7 GB of memory to read"),
    "crash": (lambda: os.kill(os.getpid(), signal.SIGKILL), "reading it ended with Killed"),
    "recursion": (lambda: work("recursion"), "it is nested too deeply, or refers to itself"),
    "nan": (lambda: math.nan, "it is not understood (ValueError: Out of range float values are not JSON compliant"),
    "much": (lambda: ["a" * 1_000_000] * 11, "it states too many runs"),
    "bad": (lambda: matching(["("], ["a"]), "the regular expression '(': it is not valid"),
    "stumble": (lambda: {}["key"], "it is not understood (KeyError: 'key')"),
}
"""What a reader of a hostile file would do, and what is said of it."""


def work(item):
    if item == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    return HOSTILE[item][0]() if item in HOSTILE else [item]


def test_time_memory_and_errors_are_limited_for_each_item():
    items = ["first", *(item for hostile in HOSTILE for item in (hostile, f"after {hostile}")), "interrupt"]
    answers = in_limits(work, items, seconds=0.3)
    for item, answer in zip(items, answers, strict=True):
        if item in HOSTILE:
            assert str(answer).startswith(HOSTILE[item][1]), item
        else:
            assert answer == [item]
    assert in_limits(work, []) == []
