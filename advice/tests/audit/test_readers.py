"""Files of each format are read as their frameworks read them; `cases.yaml` has them with the runs that they state."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from lora_advice.audit.config import TrainingConfig
from lora_advice.audit.files import READERS, recognizes
from lora_advice.audit.readers import adapter
from lora_advice.audit.readers.options import frameworks
from lora_advice.audit.readers.shell import UNKNOWN, read_commands
from lora_advice.errors import UserError

CASES = yaml.safe_load(Path(__file__).with_name("cases.yaml").read_text(encoding="utf-8"))
DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}


def written(config):
    """Return a record as `cases.yaml` has it."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
        if name not in ("path", "format", "lines", "findings") and value != DEFAULTS[name]
    }
    said = [f"{finding.code} {finding.level} {finding.line}: {finding.message}" for finding in config.findings]
    return fields | ({"findings": said} if said else {})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["about"])
def test_the_runs_of_a_file(case, tmp_path):
    for name, text in case["files"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    path, read = tmp_path / case["file"], READERS[case["format"]]
    text = path.read_text()
    assert recognizes(case["format"], path, text) == case.get("recognized", True)
    if "error" in case:
        with pytest.raises(UserError) as raised:
            read(path, text)
        assert str(raised.value) == case["error"]
    else:
        assert [written(config) for config in read(path, text)] == case["runs"]


def test_words_as_bash_makes_them() -> None:
    text = r"""A=(x "y z") B2=2 B= C=$(nproc)
run "${A[@]}" $B "$(echo "$(date)")" ${C:-1} "${D:-2 3}" 'c"d' "e\"f" $((2 * B2 + 1)) "$@"
run x <<EOF 2>&1 >log # comment
run inside
EOF
run `# comment` "${1:-v}" last
"""
    commands = [[word.text for word in command] for command in read_commands(text)]
    assert commands == [
        ["run", "x", "y z", UNKNOWN, UNKNOWN, "2 3", 'c"d', 'e"f', UNKNOWN],
        ["run", "x"],
        ["run", UNKNOWN, "last"],
    ]


@pytest.mark.slow  # imports TRL
def test_options_and_defaults_are_those_of_the_installed_classes():
    import peft
    import transformers
    import trl as installed

    table = frameworks()["trl"]
    defaults = dict(table["defaults"])
    model_defaults, lora_defaults = defaults.pop("ModelConfig"), defaults.pop("LoraConfig")
    classes = {name: getattr(installed, name, None) or getattr(transformers, name) for name in defaults}
    fields = {name: {field.name: field for field in dataclasses.fields(cls)} for name, cls in classes.items()}
    for name, own in fields.items():
        assert defaults[name] == {option: own[option].default for option in defaults[name]}
    model = {field.name: field.default for field in dataclasses.fields(installed.ModelConfig)}
    assert model | model_defaults == model
    assert model["use_peft"] is False
    assert {*table["lora_names"].values()} <= set(model)
    lora = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}
    assert lora | lora_defaults == lora
    every = set(model) | {name for own in fields.values() for name in own} | {"torch_dtype"}
    assert {name for names in table["names"].values() for name in names.split()} <= every
    options = peft.LoraConfig(r=2, target_modules=["q_proj"]).to_dict()
    assert {*frameworks()["peft"]["names"].values(), *adapter._OTHER_PATTERNS} <= set(options)
