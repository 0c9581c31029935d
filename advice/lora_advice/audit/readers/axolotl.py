"""Configurations of Axolotl, as its schemas (axolotl/utils/schemas) read them."""

from __future__ import annotations

from pathlib import Path

from lora_advice.audit.config import Method, Task, TrainingConfig, say
from lora_advice.audit.readers.options import (
    Options,
    count,
    flag,
    frameworks,
    misspelt,
    names,
    number,
    read_yaml,
    record,
    text,
)
from lora_advice.finding import Finding

# With these, some of the weights are trained, whole.
_PARTIAL = ("unfrozen_parameters", "lisa_n_layers", "spectrum_top_fraction")


def read(path: Path, content: str) -> list[TrainingConfig]:
    """Return the run of a file."""
    options = read_yaml(content)
    options.values = {name: value for name, value in options.values.items() if value is not None}
    if not any(name in options for name in ("learning_rate", "datasets", "pretraining_dataset", "adapter")):
        return []
    adapter, continued = text(options["adapter"]), text(options["lora_model_dir"])
    method: Method | None = "lora" if adapter in ("lora", "qlora") else None
    findings = [*_lr_findings(options), *misspelt("axolotl", options)]
    if adapter is None:
        method = None if any(map(options.has, _PARTIAL)) else "fullft"
        reason = "`adapter` is not set: all weights are trained"
        findings += options.without_effect("axolotl", reason, "error" if options.has("lora_r") else "warning")
    elif continued is not None:
        reason = f"training goes on from the adapter in lora_model_dir, {continued}, which has its own"
        findings += options.without_effect("axolotl", reason, "warning")
    options.fill(frameworks()["axolotl"]["defaults"])
    micro, accumulation = count(options["micro_batch_size"]) or 1, count(options["gradient_accumulation_steps"])
    if accumulation is None:
        # `batch_size` is that of a device; a file sets only one of the two.
        accumulation = max(1, (count(options["batch_size"]) or micro) // micro)
    # `auto` is bf16 on every GPU since Ampere; `full` evaluates in bf16 too.
    bf16 = any(options[name] in ("auto", "full") or flag(options[name]) for name in ("bf16", "bfloat16"))
    four_bits = flag(options["load_in_4bit"]) or flag(options["gptq"])
    sharded = any(map(options.has, ("deepspeed", "fsdp", "fsdp_config")))
    keys, targets = frameworks()["axolotl"]["names"], names(options["lora_target_modules"])
    if flag(options["lora_target_linear"]):
        keys = keys | {"targets": "lora_target_linear"}
        targets = ("all-linear", *(name for name in targets or () if name in ("lm_head", "embed_tokens")))
    elif targets is None and names(options["lora_target_parameters"]):
        targets = ()
    initialization = options["peft_init_lora_weights"]
    if isinstance(initialization, str):
        variant = None if initialization == "gaussian" else initialization
    else:
        variant = "loftq" if options.has("peft.loftq_config") else "relora" if flag(options["relora"]) else None
    objective, datasets = text(options["rl"]), options["datasets"]
    kinds = [isinstance(part, dict) and part.get("type") for part in datasets] if isinstance(datasets, list) else []
    task: Task | None = "sft" if objective is None else frameworks()["axolotl"]["tasks"].get(objective)
    if flag(options["reward_model"]):
        task = "preference"
    elif flag(options["process_reward_model"]):
        task = None
    elif objective is None and (
        options.has("pretraining_dataset") or (kinds and all(kind == "completion" for kind in kinds))
    ):
        task = "pretraining"  # of plain texts, every token is scored
    return [
        record(
            path,
            "axolotl",
            options,
            keys,
            findings,
            lora=method == "lora" and continued is None,
            task=task,
            method=method,
            bits=4 if four_bits else 8 if flag(options["load_in_8bit"]) else None,
            # The model is loaded in bf16. DeepSpeed keeps an fp32 copy, FSDP in accelerate holds what is trained in
            # fp32, and optimi's optimizers add what rounding loses to the next step.
            rounded=bf16 and not sharded and not (text(options["optimizer"]) or "").startswith("optimi"),
            micro_batch=micro,
            accumulation=accumulation,
            # In GRPO, the examples of a batch are responses.
            group_size=count(options["trl.num_generations"]) if objective in ("grpo", "gdpo") else None,
            targets=targets,
            variant=variant,
        )
    ]


def _lr_findings(options: Options) -> list[Finding]:
    """Return what a learning rate as PyYAML reads it calls for, which Axolotl makes a number itself."""
    if "learning_rate" not in options:
        return [say("no-lr")]
    value, line = options["learning_rate"], options.line("learning_rate")
    if not isinstance(value, str) or text(value) is None:
        return []
    if number(value) is None:
        return [say("no-number", line, value=value)]
    # YAML 1.1 asks for a dot, and a sign of the exponent.
    mantissa, exponent = f"{number(value):e}".split("e")
    return [say("text-number", line, value=value, number=f"{float(mantissa)}e{exponent[0]}{int(exponent[1:])}")]
