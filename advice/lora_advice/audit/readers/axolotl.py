"""Configurations of Axolotl, as its schemas (axolotl/utils/schemas) read them."""

from __future__ import annotations

import re
from pathlib import Path

from lora_advice.audit.config import Method, Task, TrainingConfig, say
from lora_advice.audit.readers.options import Options, at, examples, names_of, read_yaml, record
from lora_advice.finding import Finding, Level

_LORA = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear", "lora_target_parameters"),
    *("peft_use_dora", "peft_use_rslora", "peft_init_lora_weights", "loraplus_lr_ratio"),
)
# With these, some of the weights are trained, whole.
_PARTIAL = ("unfrozen_parameters", "lisa_n_layers", "spectrum_top_fraction")
_PREFERENCE = ("dpo", "ipo", "orpo", "kto", "simpo")


def matches(path: Path, text: str) -> bool:
    """Return whether a file has the options that every configuration of Axolotl has."""
    others = r"^(micro_batch_size|sequence_len|datasets|pretraining_dataset|num_epochs|learning_rate)\s*:"
    return path.suffix in (".yml", ".yaml") and all(
        re.search(pattern, text, re.MULTILINE) for pattern in (r"^base_model\s*:", others)
    )


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return the run of a file."""
    options = read_yaml(text)
    if not any(name in options for name in ("learning_rate", "datasets", "pretraining_dataset", "adapter")):
        return []
    adapter, continued = options.text("adapter"), options.text("lora_model_dir")
    method: Method | None = None
    if adapter in ("lora", "qlora"):
        method = "lora"
    elif adapter is None and not any(map(options.has, _PARTIAL)):
        method = "fullft"
    findings = _lr_findings(options)
    if adapter is None:
        reason = "`adapter` is not set: all weights are trained"
        level: Level = "error" if options.has("lora_r") else "warning"
        findings += options.without_effect(_LORA, reason, level)
    elif continued is not None:
        reason = f"training goes on from the adapter in lora_model_dir, {continued}, which has its own"
        findings += options.without_effect(_LORA, reason, "warning")
    micro, accumulation = options.count("micro_batch_size") or 1, options.count("gradient_accumulation_steps")
    if accumulation is None:
        # `batch_size` is that of a device; a file sets only one of the two.
        accumulation = max(1, (options.count("batch_size") or micro) // micro)
    bits = 4 if options.flag("load_in_4bit") or options.flag("gptq") else 8 if options.flag("load_in_8bit") else None
    # `auto` is bf16 on every GPU since Ampere; `full` evaluates in bf16 too.
    bf16 = any(options.get(name) in ("auto", "full") or options.flag(name) for name in ("bf16", "bfloat16"))
    sharded = any(map(options.has, ("deepspeed", "fsdp", "fsdp_config")))
    keys, targets = names_of("axolotl"), options.names("lora_target_modules")
    if options.flag("lora_target_linear"):
        keys = keys | {"targets": "lora_target_linear"}
        targets = ("all-linear", *(name for name in targets or () if name in ("lm_head", "embed_tokens")))
    elif targets is None and options.names("lora_target_parameters"):
        targets = ()
    initialization = options.get("peft_init_lora_weights")
    if isinstance(initialization, str):
        variant = None if initialization == "gaussian" else initialization
    else:
        variant = "loftq" if options.has("peft.loftq_config") else "relora" if options.flag("relora") else None
    task: Task | None = "sft"
    objective, datasets = options.text("rl"), options.get("datasets")
    datasets = datasets if isinstance(datasets, list) else []
    if objective in ("grpo", "gdpo", "ebft"):
        task = "rl"
    elif objective in _PREFERENCE or options.flag("reward_model"):
        task = "preference"
    elif objective is not None or options.flag("process_reward_model"):
        task = None
    elif options.has("pretraining_dataset") or (
        # Of plain texts, every token is scored.
        datasets and all(at(dataset, "type") == "completion" for dataset in datasets)
    ):
        task = "pretraining"
    return [
        record(
            shown,
            "axolotl",
            options,
            keys,
            findings,
            lora=method == "lora" and continued is None,
            task=task,
            method=method,
            bits=bits,
            # The model is loaded in bf16. DeepSpeed keeps an fp32 copy, FSDP in accelerate holds what is trained in
            # fp32, and optimi's optimizers add what rounding loses to the next step.
            rounded=bf16 and not sharded and not (options.text("optimizer") or "").startswith("optimi"),
            schedule=options.text("lr_scheduler") or "cosine",
            epochs=options.number("num_epochs") or 1.0,
            micro_batch=micro,
            accumulation=accumulation,
            # In GRPO, the examples of a batch are responses.
            group_size=options.count("trl.num_generations") if objective in ("grpo", "gdpo") else None,
            examples=None
            if options.flag("sample_packing")
            else examples(path, [at(dataset, "path") for dataset in datasets]),
            dropout=options.number("lora_dropout") or 0.0,
            targets=targets,
            variant=variant,
        )
    ]


def _lr_findings(options: Options) -> list[Finding]:
    """Return what a learning rate as PyYAML reads it calls for, which Axolotl makes a number itself."""
    value, line = options.get("learning_rate"), options.line("learning_rate")
    if not isinstance(value, str) or options.text("learning_rate") is None:
        return []
    number = options.number("learning_rate")
    if number is None:
        return [say("no-number", line, value=value)]
    # YAML 1.1 asks for a dot, and a sign of the exponent.
    mantissa, exponent = f"{number:e}".split("e")
    return [say("text-number", line, value=value, number=f"{float(mantissa)}e{exponent[0]}{int(exponent[1:])}")]
