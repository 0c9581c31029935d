"""The recommended settings as a folder for a trainer: its configuration, each line with its reason, and the data.

The names are those of TRL 1.16, Axolotl 0.16, LLaMA-Factory 0.9.5, torchtune 0.7 and verl 0.7. All of them put LoRA on
the linear layers but not on the unembedding, and all but torchtune train fp32 weights under autocast to bf16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorabench.config.inputs import GgufModel, PathModel
from lorabench.custom.data import UserData
from lorabench.custom.model import UserModel
from lorabench.custom.preset import yaml_text
from lorabench.custom.recommend import Recommendation
from lorabench.data.chat import Messages, is_text
from lorabench.data.files import file_chats
from lorabench.errors import UserError
from lorabench.models.base import model_location
from lorabench.models.specs import template_text
from lorabench.utils import formats
from lorabench.utils.files import atomic_path, write_json

Line = tuple[str, Any, str]
"""A setting's key with its indentation, its value (null for none), and the reason, which becomes a comment."""
Settings = Mapping[str, tuple[Any, str]]
"""Values that are the same for every trainer, with their reasons, by this module's name."""

_MICRO_BATCH, _MAX_TOKENS, _HELD_OUT = 4, 4096, 0.1
_COMMENTS_FROM = 44
_OURS = "as in the runs of this project; the paper says nothing of it"
_DATA, _TEMPLATE, _RUN = "train.jsonl", "chat_template.jinja", "out"
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
"""The stacks of experts as transformers 5 names them, which are no linear layers."""

_TRANSFORMERS = {
    "lr": "learning_rate",
    "schedule": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "optimizer": "optim",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "decay": "weight_decay",
    "clip": "max_grad_norm",
    "micro_batch": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "checkpointing": "gradient_checkpointing",
    "seed": "seed",
}
"""The names of TrainingArguments of transformers."""
_AXOLOTL = _TRANSFORMERS | {
    "schedule": "lr_scheduler",
    "optimizer": "optimizer",
    "micro_batch": "micro_batch_size",
    "epochs": "num_epochs",
}
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
class Rows:
    """The training data as a trainer finds them."""

    place: str
    """A file of JSON lines, or the id of a dataset on the hub."""
    local: bool
    form: Literal["messages", "conversations", "pair", "text"]
    """The columns; a `pair` has the turns up to the last one in `prompt`, and the last one in `completion`."""
    own_template: bool = False
    """Whether the model has no chat template, so that the folder has one."""


@dataclass(frozen=True)
class Setup:
    """What a configuration is written from."""

    model: UserModel
    settings: Settings
    rows: Rows
    folder: Path
    full: bool
    """Whether all weights are trained, in place of LoRA."""

    @property
    def location(self) -> str:
        """The model's folder or id on the hub."""
        return model_location(self.model.spec)

    @property
    def experts(self) -> bool:
        """Whether LoRA has to reach experts."""
        return bool(self.model.sizes.experts) and not self.full

    def line(self, key: str, name: str) -> Line:
        """Return the line of a setting under the trainer's key."""
        return key, *self.settings[name]

    def lines(self, keys: Mapping[str, str]) -> list[Line]:
        """Return the lines of settings under a trainer's keys; a number of steps takes the place of epochs."""
        left_out = "epochs" if "steps" in self.settings else "steps"
        return [self.line(key, name) for name, key in keys.items() if name != left_out]


def write_config(
    trainer: str,
    folder: Path,
    model: UserModel,
    recommendation: Recommendation,
    data: UserData | None,
    template: str | None,
    full: bool,
    steps: int | None = None,
) -> str:
    """Write a new folder with a trainer's configuration and the data in a form that it reads.

    Args:
        trainer: a name in TRAINERS.
        folder: the folder to write.
        model: the model.
        recommendation: the settings.
        data: the examined data; without them the configuration names a file that the user has to write.
        template: the `chat_template` that the model needs, as `examine` returns it.
        full: whether all weights are trained, in place of LoRA.
        steps: the number of steps that the user asked for; None for an epoch.

    Returns:
        The command that starts the training.

    Raises:
        UserError: there is no such trainer, the folder exists, or the trainer does not support the model or data.
    """
    if trainer not in TRAINERS:
        raise UserError(f"trainer {trainer!r}: allowed: {', '.join(TRAINERS)}, verl")
    check_new(folder, model)
    rows = _rows(trainer, folder, data, template)
    settings = shared_settings(model, recommendation, "fullft_lr" if full else "lora_lr")
    settings |= {} if steps is None else {"steps": (steps, "the learning rate is for so many")}
    name, command, lines = TRAINERS[trainer](Setup(model, settings, rows, folder, full))
    if data is not None and rows.local:
        with atomic_path(folder / _DATA) as partial, partial.open("w", encoding="utf-8") as file:
            for chat in file_chats(Path(data.source["path"]), data.source["format"], data.max_chars)[0]:
                file.write(json.dumps(_row(chat.messages, rows.form)) + "\n")
    if rows.own_template and template:
        (folder / _TEMPLATE).parent.mkdir(parents=True, exist_ok=True)
        (folder / _TEMPLATE).write_text(_marked(template_text(template)), encoding="utf-8")
    if trainer == "llamafactory":
        write_json({"train": _llamafactory_dataset(rows)}, folder / "dataset_info.json")
    write_lines(folder / name, f"--for {trainer}", model, full, command, map(_with_comment, lines))
    return command


def check_new(folder: Path, model: UserModel) -> None:
    """Raise UserError if a folder exists, or if no trainer loads a model."""
    if folder.exists():
        raise UserError(f"{folder} exists; --out names another folder")
    if isinstance(model.spec, GgufModel):
        raise UserError(f"{model.name} is a GGUF file; trainers need safetensors: `lorabench step convert` makes them")


def write_lines(path: Path, option: str, model: UserModel, full: bool, command: str, lines: Iterable[str]) -> None:
    """Write a configuration with a heading that says what it is and how to start it."""
    title = f"Written by `lorabench recommend {option}`: {'full fine-tuning' if full else 'LoRA'} of {model.name}."
    # A comment must not leave its line.
    heading = [f"# {' '.join(line.split())}" for line in (title, f"Start with: {command}")]
    with atomic_path(path) as partial:
        partial.write_text("\n".join([*heading, *lines]) + "\n", encoding="utf-8")


def shared_settings(model: UserModel, recommendation: Recommendation, lr_name: str) -> dict[str, tuple[Any, str]]:
    """Return the values that are the same for every trainer, with the learning rate of a name."""
    settings = recommendation.settings
    lr, rank, alpha, batch = (settings[name] for name in (lr_name, "rank", "alpha", "batch_size"))
    assert isinstance(batch.value, int)
    micro = math.gcd(batch.value, _MICRO_BATCH)
    interval = f"{formats.lr(lr.low, 2)} to {formats.lr(lr.high, 2)}"
    return {
        "lr": (lr.value, f"{interval}: {lr.source}"),
        "schedule": ("constant", settings["schedule"].source),
        "warmup": (0, settings["schedule"].source),
        "optimizer": ("adamw_torch", "Adam, since the weight decay is 0"),
        "beta1": (0.9, _OURS),
        "beta2": (0.95, _OURS),
        "decay": (0.0, _OURS),
        "clip": (0.0, f"no clipping, {_OURS}"),
        "micro_batch": (micro, "examples at once on a GPU: raise it, and lower the next, where memory allows"),
        "accumulation": (batch.value // micro, f"{batch.value} examples a step on one GPU; divide it by their number"),
        "epochs": (1, "the learning rate is for an epoch"),
        "checkpointing": (True, "less memory for a third more time"),
        "seed": (0, "of the order of the examples and of LoRA's A"),
        "rank": (rank.value, rank.source),
        "alpha": (int(alpha.value), f"{alpha.source}; at every rank"),
        "dropout": (0.0, alpha.source),
        "length": (min(_MAX_TOKENS, model.max_length or _MAX_TOKENS), "tokens; what is longer is cut"),
        "bf16": (True, "autocast; the weights that are trained are in fp32, since bf16 would lose small updates"),
    }


def _rows(trainer: str, folder: Path, data: UserData | None, template: str | None) -> Rows:
    """Return where the data will be and in which form."""
    place, form = str(folder / _DATA), data.tally.format if data else "messages"
    if form == "text":
        return Rows(place, True, "text")
    if data is not None and data.source["kind"] == "hub":
        return Rows(data.name, False, "conversations" if form == "conversations" else "messages", template is not None)
    if trainer == "trl" and data is not None and template is None:
        # TRL finds the assistant's turns in templates that it knows; the last turn it finds in every template.
        chats, _ = file_chats(Path(data.source["path"]), data.source["format"], data.max_chars)
        if all([turn["role"] for turn in chat.messages].count("assistant") == 1 for chat in chats):
            return Rows(place, True, "pair")
    return Rows(place, True, "messages", template is not None)


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


def _with_comment(line: Line) -> str:
    key, value, reason = line
    text = f"{key}:" if value is None else f"{key}: {yaml_text(value)}"
    return f"{text:<{_COMMENTS_FROM}}  # {reason}" if reason else text


def _trl(setup: Setup) -> tuple[str, str, list[Line]]:
    rows, path = setup.rows, setup.folder / "trl.yaml"
    lines: list[Line] = [
        ("model_name_or_path", setup.location, "your model"),
        ("dtype", "float32", "of the weights"),
        ("bf16", *setup.settings["bf16"]),
        *setup.lines(_TRANSFORMERS),
        setup.line("max_length", "length"),
        ("use_peft", not setup.full, "full fine-tuning" if setup.full else "without it LoRA's options do nothing"),
    ]
    if not setup.full:
        lines += [
            *(setup.line(f"lora_{key}", name) for key, name in (("r", "rank"), ("alpha", "alpha"))),
            setup.line("lora_dropout", "dropout"),
            (
                "lora_target_modules",
                "all-linear",
                "the paper: attention alone is worse; TRL has none on the unembedding",
            ),
        ]
    if setup.experts:
        active = setup.model.sizes.active_experts
        why = f"experts, which all-linear misses; their rank is {active} times the paper's, since TRL has one rank only"
        lines.append(("lora_target_parameters", _EXPERTS, why))
    if rows.form == "pair":
        lines.append(("completion_only_loss", True, "only the assistant's tokens are scored"))
    elif rows.form != "text":
        lines.append(("assistant_only_loss", True, "only the assistant's tokens are scored"))
    if rows.own_template:
        lines.append(("chat_template_path", str(setup.folder / _TEMPLATE), "the model has no chat template"))
    lines += [
        ("datasets", None, ""),
        ("  - path", "json" if rows.local else rows.place, "your data"),
        *([("    data_files", rows.place, "one example a line")] if rows.local else []),
        ("test_split_size", _HELD_OUT, "held out, to see a loss that was not trained on"),
        ("eval_strategy", "epoch", "the loss after training"),
        ("eval_on_start", True, "and before"),
        ("logging_steps", 1, "the loss of each step"),
        ("output_dir", str(setup.folder / _RUN), "where the result is saved"),
    ]
    return path.name, f"trl sft --config {path}", lines


def _axolotl(setup: Setup) -> tuple[str, str, list[Line]]:
    rows, path = setup.rows, setup.folder / "axolotl.yaml"
    kept = "Axolotl would keep trained weights in bf16, which loses small updates"
    lines: list[Line] = [
        ("base_model", setup.location, "your model"),
        ("bf16", not setup.full, kept if setup.full else "of the frozen weights; LoRA's are in fp32"),
        ("tf32", True, "faster products in fp32"),
        *setup.lines(_AXOLOTL),
        setup.line("sequence_len", "length"),
        ("sample_packing", False, "a batch counts examples"),
    ]
    if not setup.full:
        lines += [
            ("adapter", "lora", "not quantized"),
            *(setup.line(f"lora_{key}", name) for key, name in (("r", "rank"), ("alpha", "alpha"))),
            setup.line("lora_dropout", "dropout"),
            ("lora_target_linear", True, "the paper: attention alone is worse; Axolotl has none on the unembedding"),
        ]
    if setup.experts:
        sizes, rank = setup.model.sizes, setup.settings["rank"][0]
        lines += [
            ("lora_target_parameters", _EXPERTS, "experts, which lora_target_linear misses"),
            (
                "lora_rank_pattern",
                {r"experts\..+": max(1, rank // sizes.active_experts)},
                "the paper: the rank, divided by the active experts",
            ),
        ]
    lines += [
        ("datasets", None, ""),
        ("  - path", rows.place, "your data"),
        *([("    ds_type", "json", "one example a line")] if rows.local else []),
    ]
    if rows.form == "text":
        lines.append(("    type", "completion", "all tokens are scored"))
    else:
        lines += [
            ("    type", "chat_template", "the model's own template" if not rows.own_template else "see below"),
            ("    field_messages", rows.form, "the column of the turns"),
            ("    roles_to_train", ["assistant"], "only the assistant's tokens are scored"),
        ]
    if rows.form == "conversations":
        lines.append(("    message_property_mappings", {"role": "from", "content": "value"}, "the names in a turn"))
    if rows.own_template:
        lines += [
            ("chat_template", "jinja", "the model has no chat template"),
            ("chat_template_jinja", str(setup.folder / _TEMPLATE), "the template `plain`"),
        ]
    lines += [
        ("val_set_size", _HELD_OUT, "held out, to see a loss that was not trained on"),
        ("evals_per_epoch", 1, "the loss after training"),
        ("logging_steps", 1, "the loss of each step"),
        ("output_dir", str(setup.folder / _RUN), "where the result is saved"),
    ]
    return path.name, f"axolotl train {path}", lines


def _llamafactory(setup: Setup) -> tuple[str, str, list[Line]]:
    rows, path = setup.rows, setup.folder / "llamafactory.yaml"
    if setup.experts:
        raise UserError(
            f"{setup.model.name} is a mixture of experts, which get no LoRA from LLaMA-Factory; "
            "--for trl and --for axolotl reach them"
        )
    lines: list[Line] = [
        ("model_name_or_path", setup.location, "your model"),
        (
            "stage",
            "pt" if rows.form == "text" else "sft",
            "all tokens are scored" if rows.form == "text" else "only the assistant's tokens are scored",
        ),
        ("do_train", True, "LLaMA-Factory does nothing without it"),
        ("finetuning_type", "full" if setup.full else "lora", "your choice"),
        ("bf16", *setup.settings["bf16"]),
        *setup.lines({name: key for name, key in _TRANSFORMERS.items() if name != "checkpointing"}),
        ("disable_gradient_checkpointing", False, setup.settings["checkpointing"][1]),
        setup.line("cutoff_len", "length"),
        ("packing", False, "a batch counts examples"),
    ]
    if not setup.full:
        lines += [
            *(setup.line(f"lora_{name}", name) for name in ("rank", "alpha", "dropout")),
            ("lora_target", "all", "the paper: attention alone is worse; LLaMA-Factory has none on the unembedding"),
        ]
    if rows.own_template:
        lines.append(("template", "default", "the model has no chat template"))
    lines += [
        ("dataset_dir", str(setup.folder), "of dataset_info.json, which says how to read the data"),
        ("dataset", "train", "your data"),
        ("val_size", _HELD_OUT, "held out, to see a loss that was not trained on"),
        ("eval_strategy", "epoch", "the loss after training"),
        ("eval_on_start", True, "and before"),
        ("logging_steps", 1, "the loss of each step"),
        ("output_dir", str(setup.folder / _RUN), "where the result is saved"),
    ]
    return path.name, f"llamafactory-cli train {path}", lines


def _llamafactory_dataset(rows: Rows) -> dict[str, Any]:
    """Return the entry of LLaMA-Factory's dataset_info.json for the data."""
    place = {"file_name": _DATA} if rows.local else {"hf_hub_url": rows.place}
    if rows.form == "text":
        return {**place, "columns": {"prompt": "text"}}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {**place, "formatting": "sharegpt", "columns": {"messages": rows.form}}
    return entry if rows.form == "conversations" else {**entry, "tags": {**tags, "system_tag": "system"}}


def _torchtune(setup: Setup) -> tuple[str, str, list[Line]]:
    rows, path, model = setup.rows, setup.folder / "torchtune.yaml", setup.model
    if not isinstance(model.spec, PathModel):
        raise UserError(f"{model.name} is no local folder, which torchtune needs; `tune download` makes one")
    folder = Path(model.spec.path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    known = _TORCHTUNE.get((model.family, config["hidden_size"], config.get("num_hidden_layers")))
    if known is None or (model.family == "llama" and rope.get("rope_type") != "llama3"):
        names = ", ".join(name for name, _ in _TORCHTUNE.values())
        raise UserError(f"{model.name} has no sizes of a model that is known here of torchtune: {names}")
    builder, checkpoint = known
    package = builder.partition("_")[0] if model.family == "qwen3" else builder.rpartition("_")[0]
    if model.family == "qwen3":
        # The two differ in the longest sequence only.
        builder += "_base" if config["max_position_embeddings"] == 32768 else "_instruct"
        tokenizer: list[Line] = [
            ("  _component_", "torchtune.models.qwen3.qwen3_tokenizer", "with torchtune's chat template of the family"),
            ("  path", str(folder / "vocab.json"), "of your model"),
            ("  merges_file", str(folder / "merges.txt"), "of your model"),
        ]
    else:
        tokenizer = [
            (
                "  _component_",
                "torchtune.models.llama3.llama3_tokenizer",
                "with torchtune's chat template of the family",
            ),
            ("  path", str(folder / "original" / "tokenizer.model"), "of your model"),
        ]
    lora: list[Line] = [
        ("  lora_attn_modules", ["q_proj", "k_proj", "v_proj", "output_proj"], "the paper: attention alone is worse"),
        ("  apply_lora_to_mlp", True, "the paper: MLP layers matter most"),
        *(setup.line(f"  lora_{name}", name) for name in ("rank", "alpha", "dropout")),
    ]
    constant: list[Line] = [
        ("lr_scheduler", None, ""),
        ("  _component_", "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "the recipe wants one"),
        setup.line("  num_warmup_steps", "warmup"),
        ("  num_cycles", 0.0, f"{setup.settings['schedule'][1]}: constant, which a cosine without a cycle is"),
    ]
    source: list[Line] = [
        ("  source", "json" if rows.local else rows.place, "your data"),
        *([("  data_files", rows.place, "one example a line")] if rows.local else []),
    ]
    text: list[Line] = [
        ("  _component_", "torchtune.datasets.text_completion_dataset", "all tokens are scored"),
        *source,
        ("  column", "text", "the column of the text"),
    ]
    style = "sharegpt" if rows.form == "conversations" else "openai"
    chats: list[Line] = [
        ("  _component_", "torchtune.datasets.chat_dataset", "chats"),
        *source,
        ("  conversation_column", rows.form, "the column of the turns"),
        ("  conversation_style", style, "the names in a turn"),
        ("  train_on_input", False, "only the assistant's tokens are scored"),
    ]
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    lines: list[Line] = [
        ("model", None, ""),
        ("  _component_", f"torchtune.models.{package}.{'' if setup.full else 'lora_'}{builder}", "your model"),
        *([] if setup.full else lora),
        ("tokenizer", None, ""),
        *tokenizer,
        setup.line("  max_seq_len", "length"),
        ("checkpointer", None, ""),
        ("  _component_", "torchtune.training.FullModelHFCheckpointer", "safetensors"),
        ("  checkpoint_dir", str(folder), "your model"),
        ("  checkpoint_files", files, "your model"),
        ("  model_type", checkpoint, "your model"),
        ("  output_dir", str(setup.folder / _RUN), "where the result is saved"),
        ("resume_from_checkpoint", False, "from the beginning"),
        ("dataset", None, ""),
        *(text if rows.form == "text" else chats),
        ("shuffle", True, "the order of the examples"),
        setup.line("seed", "seed"),
        setup.line("batch_size", "micro_batch"),
        setup.line("gradient_accumulation_steps", "accumulation"),
        setup.line("epochs", "epochs"),
        setup.line("max_steps_per_epoch", "steps")
        if "steps" in setup.settings
        else ("max_steps_per_epoch", None, "all"),
        ("optimizer", None, ""),
        ("  _component_", "torch.optim.AdamW", setup.settings["optimizer"][1]),
        setup.line("  lr", "lr"),
        ("  betas", [setup.settings[name][0] for name in ("beta1", "beta2")], setup.settings["beta2"][1]),
        setup.line("  weight_decay", "decay"),
        *([("optimizer_in_bwd", False, "it allows no accumulation")] if setup.full else constant),
        ("loss", None, ""),
        ("  _component_", "torchtune.modules.loss.LinearCrossEntropyLoss", "the mean over all scored tokens of a step"),
        ("compile", False, "raise the speed with true"),
        ("device", "cuda", "a GPU"),
        ("dtype", "fp32", "torchtune has no autocast, and bf16 would lose small updates"),
        setup.line("enable_activation_checkpointing", "checkpointing"),
        ("metric_logger", None, ""),
        ("  _component_", "torchtune.training.metric_logging.DiskLogger", "writes the losses to a file"),
        ("  log_dir", str(setup.folder / "logs"), "where they are"),
        ("log_every_n_steps", 1, "the loss of each step"),
        ("log_level", "INFO", "messages to the terminal"),
        ("output_dir", str(setup.folder / _RUN), "where the result is saved"),
    ]
    recipe = "full_finetune_single_device" if setup.full else "lora_finetune_single_device"
    return path.name, f"tune run {recipe} --config {path}", lines


TRAINERS: dict[str, Callable[[Setup], tuple[str, str, list[Line]]]] = {
    "trl": _trl,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "torchtune": _torchtune,
}
"""The trainers by name; each function returns the name of a file, the command that starts it, and the file's lines."""
