"""The model card of an adapter: what is read of its training, and that nothing of a user's card is lost."""

import json
import math
from pathlib import Path

import pytest
import yaml
from lora_advice.card import END, START, escaped, highest_lr, read_training, write_card
from lora_advice.cli import app
from lora_advice.errors import UserError
from typer.testing import CliRunner

ADAPTER = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "base_model_name_or_path": "meta-llama/Llama-3.1-8B"}
ADAPTER |= {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": True}


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter with the state of a run of 500 steps, logged every tenth, at a linear schedule from 2e-4."""
    log = [{"step": step, "loss": 2.0, "learning_rate": 2e-4 * (1 - (step - 1) / 500)} for step in range(10, 501, 10)]
    state = {"global_step": 500, "max_steps": 500, "log_history": [*log, {"step": 500, "eval_loss": math.nan}]}
    folder = tmp_path / "my_adapter"
    for place, steps in ((folder, 500), (folder / "checkpoint-250", 250)):
        place.mkdir()
        (place / "trainer_state.json").write_text(json.dumps(state | {"global_step": steps}))
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    return folder


def rows(card: str) -> dict[str, str]:
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return dict(cells)


def test_a_new_card_has_metadata_settings_an_interval_and_the_findings(folder):
    result = CliRunner().invoke(app, ["card", str(folder)])
    assert (result.exit_code, result.output) == (0, f"{folder}/README.md is written\n")
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "meta-llama/Llama-3.1-8B",
        "library_name": "peft",
        "tags": ["base_model:adapter:meta-llama/Llama-3.1-8B", "lora", "lora-advice"],
    }
    assert body.startswith(f"\n# my\\_adapter\n\n{START}\n## How this adapter was trained\n")
    said = rows(body)
    interval = said.pop("optimal learning rate of such runs")
    assert said == {
        "setting": "value", "base model": "meta-llama/Llama-3.1-8B", "method": "LoRA", "rank": "16", "alpha": "32",
        "modules with LoRA": "q\\_proj, v\\_proj", "learning rate": "2e-4 (linear)", "steps": "500",
    }  # fmt: skip
    # The interval is that of the finding.
    low, high = interval.partition("95% interval ")[2].split(" to ")
    assert f"95% interval of the optimal learning rate {float(low):.2g} to {float(high):.2g}" in body
    assert 1e-5 < float(low) < float(high) < 1e-2
    assert "- **warning** `attention-only`: LoRA is on queries and values alone" in body


def test_a_card_that_is_there_keeps_all_but_the_commands_own_part(folder):
    card = folder / "README.md"
    card.write_bytes(
        b"---\r\nlicense: mit\r\n---\r\nMine.\r\n\r\n- learning_rate: 0.0003\n- train_batch_size: 4\n- seed: 7\n"
    )
    own = card.read_bytes().decode()
    write_card(folder)
    first = card.read_bytes().decode()
    assert first.startswith(f"{own}\n{START}\n")
    assert {"learning rate": "3e-4 (linear)", "batch size": "4", "seed": "7"}.items() <= rows(first).items()
    # What a user writes below stays as well, and the part is renewed where it is.
    card.write_bytes(f"{first}Below.\n".encode())
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | {"r": 64}))
    write_card(folder)
    second = card.read_bytes().decode()
    assert second.startswith(f"{own}\n{START}\n")
    assert second.endswith(f"{END}\nBelow.\n")
    assert (rows(second)["rank"], second.count(START)) == ("64", 1)
    card.write_text(second.replace(END, ""))
    with pytest.raises(UserError, match="has one of the lines .* without the other: mend it, or use --overwrite"):
        write_card(folder)
    write_card(folder, overwrite=True)
    assert "Mine." not in card.read_text()


def test_names_are_shown_as_they_are_and_break_nothing(folder):
    name = "a|b\n---\nlicense: x: <img src=x> `c` **d** [e](f) <!-- end of lora-advice -->"
    (folder / "adapter_config.json").write_text(
        json.dumps(ADAPTER | {"base_model_name_or_path": name, "target_modules": [f"x|{END}\n# y"]})
    )
    text = write_card(folder).read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "peft", "tags": ["lora", "lora-advice"]}
    assert body.count(END) == 1
    assert body.endswith(f"{END}\n")
    assert not any(line.startswith(("---", "# y", "license")) for line in body.splitlines())
    assert r"a\|b --- license: x: \<img src=x\> \`c\` \*\*d\*\* \[e\](f) \<\!-- end" in body
    assert escaped("\x1b[2J__a__ $x$ &lt; ~~b~~") == r"\\x1b\[2J\_\_a\_\_ \$x\$ \&lt; \~\~b\~\~"


def test_the_task_is_told_by_the_log_and_a_record_of_the_suite_counts(folder):
    for logged, task in (({"reward": 0.5, "loss": 0.1}, "rl"), ({"rewards/chosen": 1.0, "loss": 0.7}, "preference")):
        state = {"global_step": 900, "max_steps": 900, "log_history": [{"step": 1, **logged}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        config = read_training(folder).config
        assert (config.task, config.steps, config.lr) == (task, 900, None)
    weights = folder / "run/weights"
    weights.mkdir(parents=True)
    (weights / "adapter_config.json").write_text(json.dumps(ADAPTER | {"use_dora": True}))
    spec = {"task": "sft", "lr": 1e-3, "batch_size": 8, "steps": 200, "seed": 3, "dataset": "a*b", "method": "dora"}
    (weights.parent / "record.json").write_text(json.dumps({"run_id": "x", "spec": spec}))
    assert {
        "method": "DoRA", "learning rate": "1e-3", "batch size": "8", "steps": "200", "seed": "3", "data": r"a\*b",
    }.items() <= rows(write_card(weights).read_text()).items()  # fmt: skip


def test_the_highest_learning_rate_is_told_from_its_log():
    def cosine(step):
        return 3e-4 * (1 + math.cos(math.pi * step / 40)) / 2

    steps = (10, 20, 30)
    assert highest_lr(dict.fromkeys(steps, 3e-4), 40) == (3e-4, "constant")
    assert highest_lr({step: cosine(step) for step in steps}, 40) == (3e-4, "cosine")
    assert highest_lr({step: cosine(step - 1) for step in steps}, 40) == (3e-4, "cosine")
    # Of a warmup and of a single value, the highest that was logged is known.
    assert highest_lr({10: 1e-4, 20: 3e-4, 30: 1e-4}, 40) == (3e-4, None)
    assert highest_lr({10: 1e-4}, 40) == (1e-4, None)
    assert highest_lr({}, 40) == (None, None)


def test_what_is_no_adapter_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="has no adapter_config.json; the folder of an adapter that PEFT has saved"):
        write_card(tmp_path)
    (folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="README.md can't be read: 'utf-8' codec"):
        write_card(folder)
    (folder / "README.md").unlink()
    (folder / "trainer_state.json").write_text('{"global_step": 1, "max_steps": 0, "log_history": []}')
    with pytest.raises(
        UserError, match="trainer_state.json: max_steps = 0: Input should be greater than or equal to 1"
    ):
        write_card(folder)
