"""What rounding to bf16 takes from an adapter when it is merged into its base.

    python -m advice.benchmarks.merging

An adapter of rank 16 and alpha 32 on all linear layers but the unembedding is trained by the loops of
lorabench/training/reference.py for 50 steps of 8 examples, at some learning rates with one seed. The base's weights are
rounded to bf16 before, as published ones are; the adapter and all computing are in fp32. Then the base gets the sum of
both, W + (alpha/r) B A, rounded to bf16, and is compared with base and adapter apart on the test examples.

The table is written into advice/docs/questions.md. The base is the tiny one of the preset `laptop`, with its examples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lorabench.config.inputs import DatasetSpec, ModelSpec
from lorabench.data.sft import build_dataset
from lorabench.data.tokens import TokenizedSplit, cache_key, read_tokens, write_tokens
from lorabench.models.base import load_model, load_tokenizer, max_length
from lorabench.store.layout import Layout
from lorabench.training.reference import LAYERS, Example, adam, batches, nll
from lorabench.utils.markdown import table, write_part

PAGE = Path("advice/docs/questions.md")
PRESET, MODEL, DATASET, LRS = "laptop", "tiny", "instruct", (1e-5, 1e-4, 1e-3, 1e-2)
RANK, ALPHA, STEPS, BATCH_SIZE, SEED = 16, 32.0, 50, 8, 0


def examples_of(spec: DatasetSpec, model: ModelSpec, folder: Path) -> list[list[Example]]:
    """Return the training and the test examples of a dataset."""

    def listed(split: TokenizedSplit) -> list[Example]:
        examples = [split.example(index) for index in range(len(split))]
        return [(ids.tolist(), scored.tolist()) for ids, scored in examples]

    tokenizer, data = load_tokenizer(model), folder / "data.parquet"
    build_dataset(spec, data)
    write_tokens(data, tokenizer, folder / "tokens", max_length(model))
    splits = read_tokens(folder / "tokens", cache_key(tokenizer, data))
    return [listed(splits["train"]), listed(splits["test"])]


def train(base: Any, examples: Sequence[Example], lr: float) -> Any:
    """Train an adapter on a base, and return the model of PEFT."""
    torch.manual_seed(SEED)
    settings = {"target_modules": LAYERS[:-1], "lora_dropout": 0.0}
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, **settings))
    optimizer = adam(model, lr, 1e-8)
    for batch in batches(len(examples), STEPS, BATCH_SIZE, SEED):
        nll(model, [examples[index] for index in batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def merge(model: Any) -> dict[str, float]:
    """Merge an adapter into its base, rounded to bf16, in place, and return what share of the update is left.

    `kept` is what is left along the update, and `unchanged` the share of weights that rounding sets back.
    """
    along = size = unchanged = count = 0.0
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            weight: Tensor = layer.base_layer.weight.data
            update = layer.get_delta_weight("default")
            merged = (weight + update).bfloat16().float()
            along += float(((merged - weight) * update).sum())
            size += float((update * update).sum())
            unchanged += int((merged == weight).sum())
            count += weight.numel()
            weight.copy_(merged)
    return {"kept": along / size, "unchanged": unchanged / count}


def likeliest(model: Any, examples: Sequence[Example]) -> Tensor:
    """Return the most likely token at each scored place of some examples, (scored tokens,)."""
    chosen = []
    for ids, scored in examples:
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1]
        chosen.append(logits.argmax(-1)[torch.tensor(list(scored[1:]))])
    return torch.cat(chosen)


def main() -> None:
    """Measure, and write the table into the page."""
    layout, rows = Layout.of(PRESET), []
    spec = layout.model(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        training, test = examples_of(layout.preset.datasets[DATASET], spec, Path(folder))
    for lr in LRS:
        model = train(load_model(spec).bfloat16().float(), training, lr)
        with torch.no_grad():
            with model.disable_adapter():
                base = nll(model, test).item()
            apart, tokens = nll(model, test).item(), likeliest(model, test)
            left = merge(model)
            with model.disable_adapter():
                merged, differ = nll(model, test).item(), (likeliest(model, test) != tokens).float().mean().item()
        losses = f"{base:.4f}", f"{apart:.4f}", f"{merged:.4f}"
        rows.append([f"{lr:.0e}", f"{left['unchanged']:.0%}", f"{left['kept']:.0%}", *losses, f"{differ:.1%}"])
        print(*rows[-1], flush=True)
    header = ["LR", "weights unchanged", "update kept", "loss: base", "adapter", "merged", "other top token"]
    lines = ["", *table(header, rows), ""]
    write_part(PAGE, "merging", "`python -m advice.benchmarks.merging`", "\n".join(lines))


if __name__ == "__main__":
    main()
