"""Configurations that other people wrote are understood, and what must be said about them is said, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from lora_advice.audit import check_run
from lora_advice.audit.files import read_paths

CASES = yaml.safe_load(Path(__file__).with_name("real_configs.yaml").read_text(encoding="utf-8"))
COMMAND_WORDS = {"verl": "{}={}", "trl": "--{} {}", "llamafactory": "--{} {}"}


def _name(case):
    return case["from"].get("repo") or case["from"]["about"]


def _words(options, pattern):
    """Yield the words of options on a command line."""
    for name, value in options.items():
        value = " ".join(value) if isinstance(value, list) else "" if value is None else str(value)
        yield pattern.format(name, value).rstrip()


def _expression(value):
    return value[1:] if isinstance(value, str) and value.startswith("=") else repr(value)


def _call(name, options):
    return f"{name}({', '.join(f'{option}={_expression(value)}' for option, value in options.items())})"


def _python(facts):
    settings = dict(facts["settings"])
    made = _call(settings.pop("class"), settings)
    lines, arguments = [], {"model": facts.get("model", "=model"), "args": f"={made}"}
    if not facts.get("inline"):
        lines.append(f"settings = {made}")
        arguments["args"] = "=settings"
    lora_by = facts.get("lora_by", "")
    unsloth = lora_by.startswith("FastLanguageModel")
    if "loaded" in facts:
        options = dict(facts["loaded"])
        options = {"model_name" if unsloth else "pretrained_model_name_or_path": options.pop("name"), **options}
        loader = "FastLanguageModel" if unsloth else "AutoModelForCausalLM"
        lines.append(f"model{', tokenizer' if unsloth else ''} = {_call(f'{loader}.from_pretrained', options)}")
    if unsloth:
        lines.append(f"model = {_call(lora_by, {'model': '=model', **facts['lora']})}")
    elif "lora" in facts:
        lines.append(f"lora = {_call('LoraConfig', facts['lora'])}")
        if lora_by == "peft_config":
            arguments["peft_config"] = "=lora"
        else:
            lines.append("model = get_peft_model(model, lora)")
    return "\n".join([*lines, f"trainer = {_call(facts['trainer'], arguments)}", "trainer.train()\n"])


def write(case, folder):
    """Write the file that states the facts of a case in its format."""
    kind, facts = case["format"], case["facts"]
    if kind == "peft":
        path, text = folder / "adapter_config.json", json.dumps(facts, indent=1)
    elif "command" in case:
        path, pattern = folder / "train.sh", COMMAND_WORDS[kind]
        between = " \\\n  " + (f"{case['comment']} \\\n  " if "comment" in case else "")
        text = between.join([case["command"], *_words(facts, pattern)]) + "\n"
        if "within" in case:
            text = f'COMMAND="{text}"\n{case["within"]} "$COMMAND"\n'
        if "cut" in case:
            text = text.rstrip() + " \\\n  # a comment\n  " + " \\\n  ".join(_words(case["cut"], pattern)) + "\n"
    elif "settings" in facts:
        path, text = folder / "train.py", _python(facts)
    else:
        path, text = folder / "config.yaml", yaml.safe_dump(facts, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_real_config(case, tmp_path):
    configs, _, not_read = read_paths([write(case, tmp_path)])
    if "record" not in case:
        assert configs == []
        assert "states no training run" in not_read[0].reason
        return
    (config,) = configs
    assert config.format == case["format"]
    for field, value in case["record"].items():
        expected = tuple(value) if isinstance(value, list) else value
        assert (field, getattr(config, field)) == (field, expected)
    findings = check_run(config)
    said = {f"{finding.code} {finding.level}" for finding in findings} | {finding.code for finding in findings}
    assert set(case.get("says", ())) - said == set()
    assert set(case["silent"]) & said == set()
