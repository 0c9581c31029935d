"""The recommended settings as a folder for a trainer: its configuration, each line with its reason, and the data.

The configurations are the templates in `trainers/`, with the options of TRL 1.16, Axolotl 0.18, LLaMA-Factory 0.9.6
and verl 0.8. RL is by verl's GRPO without the division by the standard deviation of rewards. Its importance ratios are
1, since each response is used for one update, so that this is the paper's policy gradient.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from lora_advice.data import UserData, examples
from lora_advice.errors import UserError
from lora_advice.files import write_text
from lora_advice.models import ModelFacts, shipped_base
from lora_advice.recommend import GROUP_SIZE, PROBLEMS_PER_STEP, RL_STEPS, Recommendation

TRAINERS = {
    "trl": ("trl.yaml", "trl sft --config"),
    "axolotl": ("axolotl.yaml", "axolotl train"),
    "llamafactory": ("llamafactory.yaml", "llamafactory-cli train"),
    "verl": ("verl.sh", "bash"),
}
"""For each trainer the name of its configuration, and the command that starts it."""

_TEMPLATES = Path(__file__).with_name("trainers")
_MICRO_BATCH, _MAX_TOKENS, _RESPONSE_TOKENS = 4, 4096, 1024
_COMMENTS_FROM = 44
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
"""The stacks of experts as transformers 5 names them, which are no linear layers."""


@dataclass(frozen=True)
class Choices:
    """What the user chose for a folder."""

    lr: float | None = None  # none for the recommended learning rate
    rank: int | None = None
    alpha: float | None = None
    steps: int | None = None  # none for an epoch, or in RL for the usual number
    full: bool = False  # whether all weights are trained, in place of LoRA
    columns: str | None = None  # the column of the turns of a dataset on the hub, `messages` or `conversations`


def write_folder(
    trainer: str,
    folder: Path,
    model: ModelFacts,
    recommendation: Recommendation,
    data: UserData | str,
    choices: Choices,
) -> str:
    """Write a new folder with a trainer's configuration and the data; return the command that starts the training.

    The data are examples, the id of a dataset on the hub, or an empty text, with which the user has to write them.
    """
    if trainer not in TRAINERS:
        raise UserError(f"trainer {trainer!r}: allowed: {', '.join(TRAINERS)}")
    if folder.exists():
        raise UserError(f"{folder} exists; --out names another folder")
    # A folder with a tokenizer, which has no chat template; of the hub's models it is not known.
    tokenizer, template = Path(model.name) / "tokenizer_config.json", False
    if tokenizer.is_file() and not tokenizer.with_name("chat_template.jinja").is_file():
        template = '"chat_template"' not in tokenizer.read_text(encoding="utf-8")
    if shipped_base(model.name):
        raise UserError(f"{model.name} is a base of the suite, which no trainer knows by this name; name its folder")
    if trainer == "verl" and data:
        raise UserError("verl reads problems in a format of its own: leave --data out, and put them into the folder")
    if choices.lr is None and (choices.rank or choices.alpha):
        raise UserError("--rank and --alpha need --lr, which `lora-advice convert` gives")
    if model.mixture and not choices.full and trainer in ("llamafactory", "verl"):
        reached = "--full trains them, and in SFT trl and axolotl reach them"
        raise UserError(f"{model.name} is a mixture of experts, which get no LoRA from {trainer}: {reached}")
    if template and trainer == "verl":
        raise UserError(f"{model.name} has no chat template, and verl takes the tokenizer's: save one there first")
    local, form = isinstance(data, UserData) or not data, choices.columns or "messages"
    if isinstance(data, UserData):
        # TRL finds the assistant's turns in templates that it knows; the last turn it finds in every template.
        pair = trainer == "trl" and data.one_answer and not template
        form = "text" if data.form == "text" else "pair" if pair else "messages"
        rows = []
        for messages in examples(data.path, data.form):
            row: dict[str, Any] = {"messages": messages}
            if form == "text":
                row = {"text": messages[0]["content"]}
            elif form == "pair":
                row = {"prompt": messages[:-1], "completion": messages[-1:]}
            rows.append(json.dumps(row) + "\n")
        write_text("".join(rows), folder / "train.jsonl")
    values = _values(model, recommendation, choices, rl=trainer == "verl")
    values |= {"folder": str(folder), "out": str(folder / "out"), "form": form, "local": local}
    values["data"] = str(folder / "train.jsonl") if local else data
    if template and form != "text":
        folder.mkdir(parents=True, exist_ok=True)
        values["template"] = str(folder / "chat_template.jinja")
        shutil.copyfile(_TEMPLATES / "chat_template.jinja", values["template"])
    if trainer == "llamafactory":
        write_text(_rendered("dataset_info.json", values), folder / "dataset_info.json")
    name, command = TRAINERS[trainer]
    command = f"{command} {shlex.quote(str(folder / name))}"
    method = "full fine-tuning" if choices.full else "LoRA"
    title = f"Written by `lora-advice trainer {trainer}`: {method} of {model.name}."
    # A comment must not leave its line.
    lines = [f"# {' '.join(line.split())}" for line in (title, f"Start with: {command}")]
    for line in _rendered(name, values).splitlines():
        # The comment is what follows the last `#`.
        setting, mark, comment = line.rpartition("  # ")
        lines.append(f"{setting:<{_COMMENTS_FROM}}{mark}{comment}" if mark else line)
    write_text("\n".join(lines) + "\n", folder / name)
    return command


def _rendered(name: str, values: dict[str, Any]) -> str:
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"yaml": _yaml_text, "shell": shlex.quote}
    return environment.get_template(f"{name}.j2").render(values)


def _yaml_text(value: object) -> str:
    """Return a value as YAML of one line: a plain word without quotes, any other text in quotes."""
    style = '"' if isinstance(value, str) and not re.fullmatch(r"[A-Za-z][\w./-]*", value) else None
    text = yaml.safe_dump(value, default_style=style, default_flow_style=True, width=math.inf, sort_keys=False)
    return str(text).removesuffix("...\n").strip()


def _values(model: ModelFacts, recommendation: Recommendation, choices: Choices, rl: bool) -> dict[str, Any]:
    """Return what templates are filled with that is the same for every trainer, with the reasons."""
    settings = recommendation.settings
    lr = settings[f"{'rl_' if rl else ''}{'fullft' if choices.full else 'lora'}_lr"]
    batch, rank = int(settings["batch_size"].value), choices.rank or int(settings["rank"].value)
    micro, own, longest = math.gcd(batch, _MICRO_BATCH), "your choice", model.max_length or _MAX_TOKENS
    why = yaml.safe_load((_TEMPLATES / "reasons.yaml").read_text()) | {
        "lr": own if choices.lr else f"{lr.interval}: {lr.source}",
        "schedule": settings["schedule"].source,
        "accumulation": f"{batch} examples a step on one GPU; divide it by their number",
        "rank": own if choices.rank else settings["rank"].source,
        "alpha": f"{own if choices.alpha else settings['alpha'].source}; at every rank",
        "placement": settings["placement"].source,
    }
    return {
        "why": why,
        "model": model.name,
        "full": choices.full,
        "lr": choices.lr or lr.value,
        "rank": rank,
        "alpha": f"{choices.alpha or settings['alpha'].value:g}",
        "steps": choices.steps or (RL_STEPS if rl else None),
        "micro_batch": micro,
        "accumulation": batch // micro,
        "length": min(_MAX_TOKENS, longest),
        "experts": _EXPERTS if model.mixture and not choices.full else None,
        "active_experts": model.active_experts or 0,
        "expert_rank": max(1, rank // (model.active_experts or 1)),
        "template": None,
        "problems": PROBLEMS_PER_STEP,
        "group": GROUP_SIZE,
        "response": min(_RESPONSE_TOKENS, longest // 2),
    }
