"""What `lora-advice check` finds in the files of an adapter, on adapters with one thing wrong."""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_advice.audit.readers import adapter as reader
from lora_advice.check import plain, read_adapter
from lora_advice.errors import UserError
from safetensors.numpy import save_file

Write = Callable[..., Path]
LAYER = "base_model.model.model.layers"


def factors(d_in: int = 12, d_out: int = 10, rank: int = 4) -> dict[str, np.ndarray]:
    """Return A and B of q_proj and v_proj in two layers."""
    rng, tensors = np.random.default_rng(0), {}
    for layer in (0, 1):
        for name in ("q_proj", "v_proj"):
            stem = f"{LAYER}.{layer}.self_attn.{name}"
            a = rng.uniform(-1, 1, (rank, d_in)) / np.sqrt(d_in)
            tensors[f"{stem}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(d_out, rank)).astype(np.float32)
    return tensors


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(tensors: dict[str, np.ndarray], **changes: Any) -> Path:
        config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 8}
        config |= {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": True} | changes
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return write


Q0 = f"{LAYER}.0.self_attn.q_proj"


def codes(adapter) -> list[tuple[str, str]]:
    return [(finding.code, finding.level) for finding in adapter.findings]


def test_a_whole_adapter_is_described_as_numpy_computes_it(write: Write):
    tensors = factors()
    adapter = read_adapter(write(tensors))
    assert adapter.findings == ()
    assert (adapter.scale, adapter.parameters, adapter.dtypes) == (2.0, 4 * 4 * 22, {"F32": 8})
    json.dumps(asdict(adapter), allow_nan=False)
    [q0] = [module for module in adapter.modules if module.module == "model.layers.0.self_attn.q_proj"]
    a, b = (tensors[f"{Q0}.lora_{part}.weight"].astype(float) for part in "AB")
    values = np.linalg.svd(b @ a, compute_uv=False)[:4]
    shares = values / values.sum()
    assert q0.norm == pytest.approx(2 * np.linalg.norm(b @ a))
    assert q0.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert (q0.numerical_rank, plain(f"{q0.module}.base_layer")) == (4, q0.module)


def test_patterns_and_rslora_set_a_modules_scale(write: Write):
    tensors = factors()
    tensors |= {f"{Q0}.lora_A.weight": np.ones((2, 12), "f4"), f"{Q0}.lora_B.weight": np.ones((10, 2), "f4")}
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {r"layers\.0\..*q_proj": 6}}
    adapter = read_adapter(write(tensors, use_rslora=True, **patterns))
    assert {module.scale for module in adapter.modules if module.rank == 2} == {6 / math.sqrt(2)}
    assert {module.scale for module in adapter.modules if module.rank == 4} == {8 / 2}
    assert codes(adapter) == [("rank", "warning")]
    assert "q_proj (1 of 2)" in adapter.findings[0].message


def test_bf16_is_read_as_its_upper_bits(write: Write):
    tensors = factors()
    folder = write(tensors)
    # bf16 has the upper half of the bits of fp32.
    halves = {name: (value.view(np.uint32) >> 16).astype(np.uint16) for name, value in tensors.items()}
    save_file(halves, folder / "adapter_model.safetensors")
    content = (folder / "adapter_model.safetensors").read_bytes().replace(b'"U16"', b'"BF16"')
    length = int.from_bytes(content[:8], "little") + len(halves)
    (folder / "adapter_model.safetensors").write_bytes(length.to_bytes(8, "little") + content[8:])
    adapter = read_adapter(folder)
    b, a = ((halves[f"{Q0}.lora_{part}.weight"].astype(np.uint32) << 16).view(np.float32) for part in "BA")
    assert adapter.dtypes == {"BF16": 8}
    assert adapter.modules[0].norm == pytest.approx(2 * float(np.linalg.norm(b.astype(float) @ a)))


@pytest.mark.parametrize(
    ("change", "expected", "words"),
    [
        (lambda t: t[f"{Q0}.lora_B.weight"].fill(0), [("no-effect", "warning")], "zero in 1 of 4 modules"),
        (lambda t: [b.fill(0) for n, b in t.items() if "lora_B" in n], [("no-effect", "error")], "no effect"),
        (lambda t: t[f"{Q0}.lora_B.weight"][:, 2:].fill(0), [("rank", "warning")], "q_proj (2 of 4)"),
        (lambda t: t[f"{Q0}.lora_A.weight"][:1].fill(np.nan), [("not-finite", "error")], "1 modules"),
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), [("missing", "error")], "have A but no B"),
        (lambda t: t.update({f"{Q0}.lora_B.default.weight": np.ones(1, "f4")}), [("keys", "error")], "1 names"),
        (lambda t: t.update({f"{LAYER}.0.norm.weight": np.ones(3, "f4")}), [("whole", "note")], "no LoRA"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": np.ones((3, 12), "f4")}), [("shape", "error")], "rank 4"),
    ],
    ids=["zero B", "all zero", "low rank", "NaN", "missing", "foreign key", "whole", "shape"],
)
def test_what_is_wrong_is_found_and_nothing_else(write: Write, change, expected, words):
    tensors = factors()
    change(tensors)
    adapter = read_adapter(write(tensors))
    assert codes(adapter) == expected
    assert words in adapter.findings[0].message
    assert adapter.saved_whole == ({"model.layers.0.norm.weight": 3} if expected[0][0] == "whole" else {})


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        ({"target_modules": ["q_proj"]}, [("keys", "error")], "PEFT ignores them: model.layers.0.self_attn.v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "Wqkv"]}, [("keys", "warning")], "no weights in the file: Wqkv"),
        ({"target_modules": r".*\.(q|v)_proj"}, [], ""),
    ],
)
def test_names_are_compared_with_the_configuration(write: Write, changes, expected, words):
    adapter = read_adapter(write(factors(), **changes))
    assert codes(adapter) == expected
    assert not words or words in adapter.findings[0].message


def test_a_regular_expression_that_would_take_years_is_one_sentence(write: Write):
    folder = write(factors(), rank_pattern={r"(\w+\.?)+!": 2})
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^the regular expression .*: it takes more than 1 s to read$"):
        read_adapter(folder)
    assert time.monotonic() - started < 20
    with pytest.raises(UserError, match=r"^the regular expression '\(q': it is not valid: missing \), unterminated"):
        read_adapter(write(factors(), target_modules="(q"))


NONSENSE = (
    *(("r", value) for value in ("0", "1.5", "null", '"8"', "1" + "0" * 30)),
    *(("lora_alpha", value) for value in ("0", "NaN", "Infinity", "1e400")),
    *(("target_modules", value) for value in ("[1, 2]", '["' + "x" * 2000 + '"]')),
    *(("rank_pattern", '{"q_proj": 0}'), ("alpha_pattern", '{"q_proj": NaN}'), ("use_rslora", '"yes"')),
)


@pytest.mark.parametrize(("key", "value"), NONSENSE, ids=[f"{key} {value[:20]}" for key, value in NONSENSE])
def test_nonsense_in_a_configuration_is_one_sentence_of_both_readers(write: Write, key, value):
    path = write(factors()) / "adapter_config.json"
    entries = {name: json.dumps(entry) for name, entry in json.loads(path.read_text()).items()} | {key: value}
    path.write_text("{" + ", ".join(f'"{name}": {entry}' for name, entry in entries.items()) + "}")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: {key} = [^\n]*: [^\n]*$"):
        read_adapter(path.parent)
    with pytest.raises(UserError, match=rf"^adapter_config.json: {key} = [^\n]*: [^\n]*$"):
        reader.read(path, path.read_text())


def test_many_names_take_seconds_and_not_hours(write: Write):
    """Comparing each target with each module took minutes."""
    tensors = {f"{LAYER}.{number}.k{number}.lora_A.weight": np.ones((4, 1), "f4") for number in range(3000)}
    folder = write(tensors, target_modules=[f"m{number}" for number in range(30_000)])
    started = time.process_time()
    findings = read_adapter(folder).findings
    assert time.process_time() - started < 5
    assert any(finding.message.endswith(f" and {30_000 - 5} more") for finding in findings)


def test_each_expert_of_a_stack_has_an_update_of_its_own(write: Write):
    rng = np.random.default_rng(1)
    own_a, own_b = rng.normal(size=(3, 2, 6)), rng.normal(size=(3, 5, 2))
    own_b[1] = 0
    stem = f"{LAYER}.0.mlp.experts"
    # PEFT keeps the rows of A by expert, and the columns of B by direction.
    tensors = {
        f"{stem}.lora_A.weight": own_a.reshape(6, 6).astype("f4"),
        f"{stem}.lora_B.weight": own_b.transpose(1, 2, 0).reshape(5, 6).astype("f4"),
    }
    config = {"r": 4, "rank_pattern": {r"experts\..+": 2}, "target_modules": []}
    adapter = read_adapter(write(tensors, **config, target_parameters=["experts.down_proj"]))
    [module] = adapter.modules
    norm = 4 * math.sqrt(sum(np.linalg.norm(b @ a) ** 2 for a, b in zip(own_a, own_b, strict=True)))
    assert (module.experts, module.rank, module.scale) == (3, 2, 4.0)
    assert module.norm == pytest.approx(norm, rel=1e-5)


def test_what_cannot_be_read_is_said(write: Write):
    for name in ("a." * 600, "a\x1b[31m"):
        with pytest.raises(UserError, match="allowed: names of up to 1,000 printable characters"):
            read_adapter(write({f"base_model.model.{name}.lora_A.weight": np.ones((4, 2), "f4")}))
    folder = write(factors())
    (folder / "adapter_model.safetensors").write_text("no")
    with pytest.raises(UserError, match="is not a safetensors file"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(UserError, match="peft_type = 'LOHA': Input should be 'LORA'"):
        read_adapter(folder)
