"""The recommended settings as a folder for a trainer: its configuration, each line with its reason, and the data.

The configurations are the templates in `trainers/`, with the options of TRL 1.16, Axolotl 0.18, LLaMA-Factory 0.9.6,
torchtune 0.7 and verl 0.8. RL is by verl's GRPO without the division by the standard deviation of rewards. Its
importance ratios are 1, since each response is used for one update, so that this is the paper's policy gradient.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config.inputs import FileProblems, GgufModel, PathModel
from lorabench.custom.data import UserData, UserProblems
from lorabench.custom.model import UserModel
from lorabench.custom.preset import GROUP_SIZE, PROBLEMS_PER_STEP, RL_STEPS, splits, yaml_text
from lorabench.custom.recommend import Recommendation
from lorabench.data.chat import Messages, is_text
from lorabench.data.files import file_chats
from lorabench.data.grading import ANY_NUMBER
from lorabench.data.problems import make_problems
from lorabench.errors import UserError
from lorabench.models.base import model_location
from lorabench.models.specs import read_config, template_text
from lorabench.utils import formats
from lorabench.utils.files import atomic_path, write_json

_COMMANDS = {
    "trl": ("trl.yaml", "trl sft --config"),
    "axolotl": ("axolotl.yaml", "axolotl train"),
    "llamafactory": ("llamafactory.yaml", "llamafactory-cli train"),
    "torchtune": ("torchtune.yaml", "tune run {}_finetune_single_device --config"),
    "verl": ("verl.sh", "bash"),
}
"""For each trainer the name of its configuration, and the command that starts it."""

_MICRO_BATCH, _MAX_TOKENS, _HELD_OUT = 4, 4096, 0.1
_COMMENTS_FROM = 44
_DATA, _TEMPLATE = "train.jsonl", "chat_template.jinja"
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
"""The stacks of experts as transformers 5 names them, which are no linear layers."""
_TORCHTUNE = {
    ("llama", 2048, 16): ("llama3_2_1b", "LLAMA3_2"),
    ("llama", 3072, 28): ("llama3_2_3b", "LLAMA3_2"),
    ("llama", 4096, 32): ("llama3_1_8b", "LLAMA3"),
    ("qwen3", 1024, 28): ("qwen3_0_6b", "QWEN3"),
    ("qwen3", 2048, 28): ("qwen3_1_7b", "QWEN3"),
    # Its unembedding is not in its files, as with Qwen2.
    ("qwen3", 2560, 36): ("qwen3_4b", "QWEN2"),
    ("qwen3", 4096, 36): ("qwen3_8b", "QWEN3"),
    ("qwen3", 5120, 40): ("qwen3_14b", "QWEN3"),
}
"""torchtune's builder and type of checkpoint of a model, by family, hidden size and number of layers."""


@dataclass(frozen=True)
class _Rows:
    """The training data as a trainer finds them."""

    place: str
    """A file of JSON lines, or the id of a dataset on the hub."""
    local: bool
    form: Literal["messages", "conversations", "pair", "text"]
    """The columns; a `pair` has the turns up to the last one in `prompt`, and the last one in `completion`."""


def write_config(
    trainer: str,
    folder: Path,
    model: UserModel,
    recommendation: Recommendation,
    data: UserData | UserProblems | None,
    template: str | None,
    full: bool,
    steps: int | None = None,
) -> str:
    """Write a new folder with a trainer's configuration, and the data in a form that it reads.

    Args:
        trainer: trl, axolotl, llamafactory, torchtune or verl.
        folder: the folder to write.
        model: the model.
        recommendation: the settings.
        data: the examined examples, or problems for verl; without examples the configuration names a file that the
            user has to write.
        template: the `chat_template` that the model needs, as `examine` returns it.
        full: whether all weights are trained, in place of LoRA.
        steps: the number of steps that the user asked for; None for an epoch, or in RL for the usual number.

    Returns:
        The command that starts the training.

    Raises:
        UserError: the folder exists, or the trainer does not support the model or the data.
    """
    if trainer not in _COMMANDS:
        raise UserError(f"trainer {trainer!r}: allowed: {', '.join(_COMMANDS)}")
    if os.path.exists(folder):
        raise UserError(f"{folder} exists; --out names another folder")
    problems = data if isinstance(data, UserProblems) else None
    if (trainer == "verl") != (problems is not None):
        raise UserError("verl, and no other trainer here, is for problems, which --data and --grader name")
    _check_model(trainer, model, template, full)
    rows = _rows(trainer, folder, None if isinstance(data, UserProblems) else data, template)
    values = _values(model, recommendation, full, rl=problems is not None) | {"folder": str(folder), "steps": steps}
    if trainer == "torchtune":
        values |= _torchtune_model(model)
    if problems is not None:
        values |= {"problems": PROBLEMS_PER_STEP, "group": GROUP_SIZE, "response": problems.max_new_tokens}
        values |= {"grader": problems.source["grader"], "steps": steps or min(RL_STEPS)}
        _write_problems(problems, folder)
    if isinstance(data, UserData) and rows.local:
        with atomic_path(folder / _DATA) as partial, partial.open("w", encoding="utf-8") as file:
            for chat in file_chats(Path(data.source["path"]), data.source["format"], data.max_chars)[0]:
                file.write(json.dumps(_row(chat.messages, rows.form)) + "\n")
    if template is not None and rows.form != "text":
        values["template"] = str(folder / _TEMPLATE)
        _write(folder / _TEMPLATE, _marked(template_text(template)))
    if trainer == "llamafactory":
        write_json({"train": _llamafactory_dataset(rows)}, folder / "dataset_info.json")
    values |= {"data": rows.place, "local": rows.local, "form": rows.form, "out": str(folder / "out")}
    name, command = _COMMANDS[trainer]
    command = f"{command.format('full' if full else 'lora')} {shlex.quote(str(folder / name))}"
    title = (
        f"Written by `lorabench recommend --for {trainer}`: {'full fine-tuning' if full else 'LoRA'} of {model.name}."
    )
    # A comment must not leave its line.
    heading = [f"# {' '.join(line.split())}" for line in (title, f"Start with: {command}")]
    lines = [_aligned(line) for line in _rendered(name, values).splitlines()]
    _write(folder / name, "\n".join([*heading, *lines]) + "\n")
    return command


def _check_model(trainer: str, model: UserModel, template: str | None, full: bool) -> None:
    if isinstance(model.spec, GgufModel):
        raise UserError(f"{model.name} is a GGUF file; trainers need safetensors: `lorabench step convert` makes them")
    if model.sizes.experts and not full and trainer in ("llamafactory", "verl"):
        raise UserError(
            f"{model.name} is a mixture of experts, which get no LoRA from {trainer}: --full trains them, and in SFT "
            "--for trl and --for axolotl reach them"
        )
    if template is not None and trainer == "verl":
        raise UserError(f"{model.name} has no chat template, and verl takes the tokenizer's: save one there first")


def _rendered(name: str, values: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("trainers")),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"yaml": yaml_text, "shell": shlex.quote}
    return environment.get_template(f"{name}.j2").render(values)


def _aligned(line: str) -> str:
    """Return a line with its comment, which is what follows the last `#`, in a column."""
    setting, mark, comment = line.rpartition("  # ")
    return f"{setting:<{_COMMENTS_FROM}}{mark}{comment}" if mark else line


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _values(model: UserModel, recommendation: Recommendation, full: bool, rl: bool) -> dict[str, Any]:
    """Return what templates are filled with that is the same for every trainer, with the reasons."""
    settings, sizes = recommendation.settings, model.sizes
    recommended = settings[f"{'rl_' if rl else ''}{'fullft' if full else 'lora'}_lr"]
    lr = settings.get("converted_lr", recommended)
    rank, batch = (int(settings[name].value) for name in ("rank", "batch_size"))
    micro = math.gcd(batch, _MICRO_BATCH)
    why = {
        "lr": f"{formats.lr(lr.low, 2)} to {formats.lr(lr.high, 2)}: {lr.source}" if lr.low else lr.source,
        "schedule": settings["schedule"].source,
        "ours": "as in the runs of this project; the paper says nothing of it",
        "micro_batch": "examples at once on a GPU: raise it, and lower the next, where memory allows",
        "accumulation": f"{batch} examples a step on one GPU; divide it by their number",
        "checkpointing": "less memory for a third more time",
        "seed": "of the order of the examples and of LoRA's A",
        "rank": settings["rank"].source,
        "alpha": f"{settings['alpha'].source}; at every rank",
        "placement": settings["placement"].source,
        "length": "tokens; what is longer is cut",
        "bf16": "autocast; the weights that are trained are in fp32, since bf16 would lose small updates",
        "scored": "only the assistant's tokens are scored",
        "held_out": "held out, to see what was not trained on",
    }
    return {
        "why": why,
        "model": model_location(model.spec),
        "full": full,
        "lr": lr.value,
        "rank": rank,
        "alpha": f"{settings['alpha'].value:g}",
        "micro_batch": micro,
        "accumulation": batch // micro,
        "length": min(_MAX_TOKENS, model.max_length or _MAX_TOKENS),
        "experts": _EXPERTS if sizes.experts and not full else None,
        "active_experts": sizes.active_experts,
        "expert_rank": max(1, rank // (sizes.active_experts or 1)),
        "template": None,
    }


def _rows(trainer: str, folder: Path, data: UserData | None, template: str | None) -> _Rows:
    """Return where the data will be and in which form."""
    place, form = str(folder / _DATA), data.tally.format if data else "messages"
    if form == "text":
        return _Rows(place, True, "text")
    if data is not None and data.source["kind"] == "hub":
        return _Rows(data.name, False, "conversations" if form == "conversations" else "messages")
    if trainer == "trl" and data is not None and template is None:
        # TRL finds the assistant's turns in templates that it knows; the last turn it finds in every template.
        chats, _ = file_chats(Path(data.source["path"]), data.source["format"], data.max_chars)
        if all([turn["role"] for turn in chat.messages].count("assistant") == 1 for chat in chats):
            return _Rows(place, True, "pair")
    return _Rows(place, True, "messages")


def _row(messages: Messages, form: str) -> dict[str, Any]:
    if is_text(messages):
        return {"text": messages[0]["content"]}
    return {"prompt": messages[:-1], "completion": messages[-1:]} if form == "pair" else {"messages": messages}


def _marked(template: str) -> str:
    """Return the template `plain` with the marks by which TRL finds the assistant's tokens; others as they are."""
    text, end, of_assistant = "{{ message['content'] | trim }}", "{{ eos_token }}", "message['role'] == 'assistant'"
    marked = f"{{% if {of_assistant} %}}{{% generation %}}{text}{end}{{% endgeneration %}}"
    return template.replace(
        f"{text}{{% if {of_assistant} %}}{end}{{% endif %}}", f"{marked}{{% else %}}{text}{{% endif %}}"
    )


def _llamafactory_dataset(rows: _Rows) -> dict[str, Any]:
    """Return the entry of LLaMA-Factory's dataset_info.json for the data."""
    place = {"file_name": _DATA} if rows.local else {"hf_hub_url": rows.place}
    if rows.form == "text":
        return {**place, "columns": {"prompt": "text"}}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {**place, "formatting": "sharegpt", "columns": {"messages": rows.form}}
    return entry if rows.form == "conversations" else {**entry, "tags": {**tags, "system_tag": "system"}}


def _torchtune_model(model: UserModel) -> dict[str, Any]:
    """Return torchtune's names for a model in a local folder, and the names of its files."""
    if not isinstance(model.spec, PathModel):
        raise UserError(f"{model.name} is no local folder, which torchtune needs; `tune download` makes one")
    folder = Path(model.spec.path)
    config = read_config(folder)
    rope = config.rope_scaling or config.rope_parameters or {}
    known = _TORCHTUNE.get((model.family, config.hidden_size or 0, config.num_hidden_layers or 0))
    if known is None or (model.family == "llama" and rope.get("rope_type") != "llama3"):
        names = ", ".join(name for name, _ in _TORCHTUNE.values())
        raise UserError(f"{model.name} has not the sizes of a model of torchtune that is known here: {names}")
    builder, checkpoint = known
    package = builder.rpartition("_")[0]
    if model.family == "qwen3":
        # The two differ in the longest sequence only.
        package, builder = "qwen3", builder + ("_base" if model.max_length == 32768 else "_instruct")
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    return {"builder": builder, "package": package, "checkpoint": checkpoint, "files": files}


def _write_problems(problems: UserProblems, folder: Path) -> None:
    """Write problems as verl reads them, a tenth of them for validation and test, and the reward that it lacks."""
    rows = make_problems(FileProblems.model_validate(problems.source | splits(problems.usable, _HELD_OUT)))
    last_number = problems.source["grader"] == "number"
    for name, wanted in (("train", ("train",)), ("test", ("validation", "test"))):
        table = [
            {
                # verl grades this set of problems by the last box of a response.
                "data_source": "number" if last_number else "lighteval/MATH",
                "prompt": [{"role": "user", "content": row["question"]}],
                "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            }
            for row in rows
            if row["split"] in wanted
        ]
        with atomic_path(folder / f"{name}.parquet") as partial:
            pq.write_table(pa.Table.from_pylist(table), partial)
    if last_number:
        _write(folder / "reward.py", _rendered("verl_reward.py", {"number": repr(ANY_NUMBER.pattern)}))
