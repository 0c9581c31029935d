"""Configurations that other people wrote are understood, and what must be said about them is said, and no more."""

import json
from pathlib import Path

import pytest
import yaml
from lora_advice.audit import check_run
from lora_advice.audit.files import read_paths

CASES = yaml.safe_load(Path(__file__).with_name("real_configs.yaml").read_text(encoding="utf-8"))


def _name(case):
    return case["from"].get("repo") or case["from"]["about"]


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_real_config(case, tmp_path):
    is_adapter = case["format"] == "peft"
    path = tmp_path / ("adapter_config.json" if is_adapter else case.get("file", "config.yaml"))
    as_text = json.dumps if is_adapter else yaml.safe_dump
    path.write_text(case["text"] if "text" in case else as_text(case["facts"]), encoding="utf-8")
    configs, _, not_read = read_paths([path])
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
