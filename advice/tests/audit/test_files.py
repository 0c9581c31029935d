"""Files are found, recognized and read with their lines, and what is not understood is said."""

import os

import pytest
import yaml
from lora_advice.audit import files
from lora_advice.audit.files import read_paths
from lora_advice.audit.readers.options import load, read_yaml
from lora_advice.errors import UserError

AXOLOTL = "base_model: org/model-8b\nadapter: lora\nlora_r: 8\nlearning_rate: 0.0002\nmicro_batch_size: 2\n"


def test_yaml_has_the_line_of_each_key():
    data, lines = load("a: 1\nb:\n  - c: 2\n    d: [3, 4]\n  - &x {e: 5}\nf: *x\n")
    assert data == {"a": 1, "b": [{"c": 2, "d": [3, 4]}, {"e": 5}], "f": {"e": 5}}
    assert [lines[key] for key in ("a", "b", "b.0.d", "b.1.e", "f")] == [1, 2, 4, 5, 6]


@pytest.mark.parametrize(
    ("text", "pyyaml", "omegaconf"),
    [("2e-4", "2e-4", 2e-4), ("2.0e-4", 2e-4, 2e-4), ("1.0e5", "1.0e5", 1e5), ("2e", "2e", "2e"), ("no", False, False)],
)
def test_numbers_are_read_as_the_framework_reads_them(text, pyyaml, omegaconf):
    assert load(f"lr: {text}")[0] == {"lr": pyyaml}
    assert load(f"lr: {text}", as_omegaconf=True)[0] == {"lr": omegaconf}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"not valid YAML: .* \(line \d\)"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: !include other.yaml", "not valid YAML: could not determine a constructor for the tag '!include'"),
        ("a: &a [*a]\n" + "[" * 5000, "not valid YAML"),
        ("{% if x %}\na: 1\n{% endif %}", "Jinja template"),
        ("lr: {{ lr }}", "Jinja template"),
    ],
)
def test_what_is_no_yaml_is_one_sentence(text, message):
    with pytest.raises(UserError, match=message):
        load(text)


def test_simple_references_are_resolved():
    others = {"env": "${oc.env:HOME}", "missing": "${nothing}", "section": "${x}", "loop": "${loop}"}
    text = "dir: /a\nx: {y: '${dir}/b', n: 3}\nz: '${x.y}/c'\nn: ${x.n}\n" + yaml.safe_dump(others)
    values = read_yaml(text, as_omegaconf=True).values
    assert {key: values[key] for key in ("z", "n", "x.y")} == {"z": "/a/b/c", "n": 3, "x.y": "/a/b"}
    assert {key: values[key] for key in others} == others


def test_a_folder_is_read_without_what_is_hidden_or_large(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "LARGEST", 1000)
    for name in ("b/run.yml", "a.yaml", ".git/run.yml", "node_modules/x/run.yml", "run.txt"):
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(AXOLOTL)
    (tmp_path / "configs/large.yaml").write_text(AXOLOTL + "#" * 1000)
    (tmp_path / "configs/other.yaml").write_text("a: 1")
    (tmp_path / "configs/bad.yaml").write_text(AXOLOTL + "a: [")
    os.symlink(tmp_path / "configs", tmp_path / "configs/loop")
    os.symlink(tmp_path / "nowhere", tmp_path / "configs/broken.yaml")
    configs, _, not_read = read_paths([tmp_path.joinpath("configs").relative_to(tmp_path)])
    assert [config.path for config in configs] == ["configs/a.yaml", "configs/b/run.yml"]
    (bad,) = not_read
    assert bad.path == "configs/bad.yaml"
    assert bad.reason.startswith("it is not valid YAML")
    # A file that is named twice is read once.
    assert len(read_paths([tmp_path / "configs", tmp_path / "configs/a.yaml"])[0]) == 2
