"""The folders that `lora-advice trainer` writes: trainers know every key, and TRL trains as the suite does."""

import json
import re
from pathlib import Path

import pytest
import yaml
from lora_advice.audit import check_run
from lora_advice.audit.files import read_paths
from lora_advice.audit.settings import compare_runs
from lora_advice.cli import app
from lora_advice.errors import UserError
from lora_advice.models import find_model
from lora_advice.recommend import recommend
from lora_advice.trainer_files import Choices, write_folder
from typer.testing import CliRunner

QWEN = "Qwen/Qwen3-8B"
TRAINERS = ("trl", "axolotl", "llamafactory")
KNOWN = {
    trainer: set(keys.split())
    for trainer, keys in yaml.safe_load(Path(__file__).with_name("known_keys.yaml").read_text()).items()
}


def audit(configs):
    return [*(finding for config in configs for finding in check_run(config)), *compare_runs(configs)]


def written(trainer, folder, model, *options):
    """Write a folder by the command; return its settings, its text, and the rows of its data."""
    arguments = [trainer, model, "--out", folder, *options]
    result = CliRunner().invoke(app, ["trainer", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    text = (folder / f"{trainer}.yaml").read_text()
    start = next(line for line in text.splitlines() if line.startswith("# Start with: "))
    assert " ".join(result.stdout.split()).endswith(start.removeprefix("# Start with: "))
    data = folder / "train.jsonl"
    lines = data.read_text().splitlines() if data.exists() else []
    return yaml.safe_load(text), text, [json.loads(line) for line in lines]


@pytest.mark.parametrize("full", [False, True])
def test_trainers_know_every_key_and_the_audit_reads_what_was_recommended(tmp_path, monkeypatch, full):
    monkeypatch.chdir(tmp_path)  # results of a checkout would count
    recommended = recommend(QWEN, batch_size=8, steps=400).settings
    options = ["--steps", 400, "--batch-size", 8, *(["--full"] if full else [])]
    for trainer in TRAINERS:
        settings, text, _ = written(trainer, tmp_path / trainer, QWEN, *options)
        assert trainer == "trl" or settings.keys() <= KNOWN[trainer]
        assert any("lora" in key or value == "lora" for key, value in settings.items()) != full
        assert all(re.fullmatch(r"\w+:", line) for line in text.splitlines() if "# " not in line)
    configs = read_paths([tmp_path])[0]
    assert {config.format for config in configs} == {*TRAINERS}
    for config in configs:
        assert (config.task, config.method) == ("sft", "fullft" if full else "lora")
        # A learning rate such as 1e-4 would be text to PyYAML.
        assert config.lr == recommended["fullft_lr" if full else "lora_lr"].value
        assert (config.rank, config.alpha) == ((None, None) if full else (recommended["rank"].value, 32))
        assert (config.model, config.schedule, config.steps) == (QWEN, "constant", 400)
        assert config.batch_size == 8
    findings = audit(configs)
    assert {finding.level for finding in findings} <= {"note"}
    assert all("about the recommended" in finding.message for finding in findings if finding.code == "lr")


TURNS = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
CHATS = {
    "messages": {"messages": TURNS * 2},
    "conversations": {"conversations": [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]},
    "instruction/output": {"instruction": "2+2", "input": "", "output": "4"},
    "text": {"text": "2+2 is 4"},
}


@pytest.mark.parametrize("form", CHATS)
def test_each_form_of_data_becomes_one_that_the_trainers_read(tmp_path, shipped, form):
    data = tmp_path / "a'b\"c  # \n{x}.jsonl"
    data.write_text(json.dumps(CHATS[form]) + "\n{}\n")
    for name in TRAINERS:
        folder = tmp_path / f"# {name}"
        settings, _, [row] = written(name, folder, shipped / "llama-128", "--data", data)
        chats = {"messages": TURNS * (1 + (form == "messages"))}
        if name == "trl":
            scored = {"messages": (None, True), "text": (None, None)}.get(form, (True, None))
            assert (settings.get("completion_only_loss"), settings.get("assistant_only_loss")) == scored
            assert settings["datasets"] == [{"path": "json", "data_files": str(folder / "train.jsonl")}]
            chats = chats if form == "messages" else {"prompt": TURNS[:1], "completion": TURNS[1:]}
        elif name == "axolotl":
            kind = {"type": "completion"} if form == "text" else {"type": "chat_template", "field_messages": "messages"}
            assert kind.items() <= settings["datasets"][0].items()
            assert settings["datasets"][0]["path"] == str(folder / "train.jsonl")
        else:
            info = json.loads((folder / "dataset_info.json").read_text())[settings["dataset"]]
            assert (settings["dataset_dir"], info["file_name"]) == (str(folder), "train.jsonl")
            columns = {"prompt": "text"} if form == "text" else {"messages": "messages"}
            assert (settings["stage"], info["columns"]) == ("pt" if form == "text" else "sft", columns)
        assert row == ({"text": "2+2 is 4"} if form == "text" else chats)


def test_data_of_the_hub_are_named_and_not_read(tmp_path):
    settings, _, _ = written("trl", tmp_path / "trl", QWEN, "--data", "owner/chats")
    assert (settings["datasets"], settings["assistant_only_loss"]) == ([{"path": "owner/chats"}], True)
    settings, _, _ = written("axolotl", tmp_path / "ax", QWEN, "--data", "owner/chats", "--format", "conversations")
    assert settings["datasets"][0]["message_property_mappings"] == {"role": "from", "content": "value"}
    written("llamafactory", tmp_path / "lf", QWEN, "--data", "owner/chats")
    info = json.loads((tmp_path / "lf/dataset_info.json").read_text())["train"]
    assert (info["hf_hub_url"], info["columns"]) == ("owner/chats", {"messages": "messages"})


def test_experts_get_lora(tmp_path, shipped):
    stacks, model = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], shipped / "moe-128"
    settings, text, _ = written("trl", tmp_path / "trl", model)
    assert settings["lora_target_parameters"] == stacks
    assert "their rank is 2 times the paper's" in text
    settings, _, _ = written("axolotl", tmp_path / "axolotl", model)
    assert settings["lora_target_parameters"] == stacks
    assert settings["lora_rank_pattern"] == {r"experts\..+": settings["lora_r"] // 2}
    assert {finding.level for finding in audit(read_paths([tmp_path])[0])} == {"note"}
    written("llamafactory", tmp_path / "llamafactory", model, "--full")


@pytest.mark.parametrize("full", [False, True])
def test_verl_gets_settings_of_rl(tmp_path, shipped, full):
    folder, model = tmp_path / "verl", str(shipped / "llama-128")
    result = CliRunner().invoke(app, ["trainer", "verl", model, "--out", str(folder), *(["--full"] if full else [])])
    assert result.exit_code == 0, result.stderr
    text = (folder / "verl.sh").read_text()
    keys = re.findall(r"^  '?(?:actor_rollout_ref\.)?([\w.]+)=.*  # .+$", text, re.MULTILINE)
    assert set(keys) <= KNOWN["verl"]
    # Beside them there are a heading of two lines, the ends of the array, and the command.
    assert len(keys) == len(text.splitlines()) - 5
    [[config], _, _] = read_paths([folder])
    settings = recommend(model).settings
    assert (config.task, config.lr) == ("rl", settings["rl_fullft_lr" if full else "rl_lora_lr"].value)
    assert (config.rank, config.batch_size, config.steps) == (None if full else settings["rank"].value, 256, 50)
    assert {finding.level for finding in audit([config])} <= {"note"}


def test_what_a_trainer_cannot_do_is_one_sentence(tmp_path, base, shipped):
    new, tiny = tmp_path / "new", str(shipped / "llama-128")
    for trainer, folder, model, choices, message in (
        ("trl", tmp_path, tiny, {}, "exists; --out names another folder"),
        ("nemo", new, tiny, {}, "trainer 'nemo': allowed: trl, axolotl, llamafactory, verl"),
        ("verl", new, str(base), {}, "has no chat template, and verl takes the tokenizer's"),
        ("llamafactory", new, str(shipped / "moe-128"), {}, "is a mixture of experts, which get no LoRA from llamafac"),
        ("trl", new, "tiny", {}, "tiny is a base of the suite, which no trainer knows by this name"),
        ("trl", new, tiny, {"rank": 4}, "--rank and --alpha need --lr"),
    ):
        described = find_model(model)
        with pytest.raises(UserError, match=message):
            write_folder(trainer, folder, described, recommend(described), "", Choices(**choices))
        assert not new.exists()


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_trl_trains_as_the_reference_of_the_suite_does(tmp_path, base, full, monkeypatch):
    """TRL trains as `trl sft --config` does, but in fp32 on the CPU."""
    reference = pytest.importorskip("lorabench.training.reference")
    sft = pytest.importorskip("trl.scripts.sft")
    from lorabench.config.inputs import PathModel
    from lorabench.data.tokens import encode_chat
    from lorabench.models.base import load_tokenizer

    data = tmp_path / "own.jsonl"
    examples = ({"prompt": f"Reverse {n}: red tiger", "completion": "tiger red"} for n in range(8))
    data.write_text("".join(json.dumps(row) + "\n" for row in examples))
    # Each step has all examples, so that their order does not matter.
    options = ["--data", data, "--steps", 4, "--batch-size", 8, *(["--full"] if full else [])]
    settings, text, rows = written("trl", tmp_path / "trl", base, *options)
    path = tmp_path / "trl/trl.yaml"
    held_out = ("test_split_size", "eval_strategy", "eval_on_start")
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith(held_out)))
    arguments = ("--config", str(path), "--use_cpu", "--bf16", "false")
    sft.main(*sft.make_parser().parse_args_and_config(arguments, fail_with_unknown_args=True))
    [state] = (tmp_path / "trl/out").glob("checkpoint-*/trainer_state.json")
    log = [step for step in json.loads(state.read_text())["log_history"] if "loss" in step]
    losses = [step["loss"] for step in log]
    assert {step["learning_rate"] for step in log} == {settings["learning_rate"]}
    # TRL puts no LoRA on the unembedding.
    monkeypatch.setattr(reference, "LAYERS", [name for name in reference.LAYERS if name != "lm_head"])
    rank = None if full else settings["lora_r"]
    tokenizer = load_tokenizer(
        PathModel(kind="path", path=str(base), chat_template="plain", parameters=1, hidden_size=1)
    )
    chats = [encode_chat(tokenizer, row["messages"]) for row in rows]
    expected, _ = reference.train_sft(base, chats, 4, 8, settings["learning_rate"], rank, 32.0, seed=0)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0] - 2
