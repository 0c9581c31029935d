"""The tiny bases: models of 0.3M to 2.8M parameters, pretrained by this project and shipped with the package.

    python workflow/scripts/tiny_bases.py NAME OUT        # 10 to 20 minutes on 2 cores
    snakemake --cores all tiny_bases                      # all of them

With them every comparison runs without a hub or a GPU on models that were really pretrained, of two families,
in widths of 64 to 256, dense and as a mixture of experts. `RECIPES` determines them, `build` follows a recipe, and
`lorabench/models/shipped/NAME/` holds the result (safetensors in bf16, tokenizer, chat template, and the recipe with
the weights' hash and held-out loss). All share a tokenizer and are trained on the same tasks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lorabench.data.reasoning import Writers, written_sums
from lorabench.evaluation.pretraining import ASSISTANT, END, SYSTEM, USER, documents, pretraining_problems
from lorabench.models.base import config_of
from lorabench.models.specs import Dimensions, shipped_folder
from lorabench.utils.exhaustion import keep_freed_memory

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

PAD = "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class PretrainingRecipe:
    """Everything that determines a tiny base. Lengths are in tokens unless the name says otherwise."""

    family: Literal["llama", "qwen3", "qwen3_moe"] = "llama"
    # The shipped base whose tokenizer this one shares; None to train one.
    tokenizer: str | None = None
    vocab_size: int = 1024
    hidden_size: int = 128
    # Width of a dense MLP, or of an expert.
    intermediate_size: int = 320
    # Zero in a dense model.
    experts: int = 0
    active_experts: int = 0
    # Weight of the load-balancing loss, without which half of the experts are never used.
    balance: float = 0.0
    layers: int = 3
    heads: int = 4
    context: int = 512
    worked_share: float = 0.5
    # Share of the fine-tuning tasks in pretraining, as a base trained on the web has seen a little of everything.
    rare_share: float = 0.01
    chat_share: float = 0.2
    max_document_chars: int = 500
    tokenizer_documents: int = 20_000
    train_tokens: int = 16_000_000
    heldout_tokens: int = 200_000
    block: int = 192
    batch: int = 32
    lr: float = 4e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 20250929


@dataclass(frozen=True)
class SumsRecipe(PretrainingRecipe):
    """The recipe of a base that is pretrained further, on worked sums alone (see `lorabench.data.reasoning`)."""

    start: str = "llama-64"
    """The shipped base that it goes on from."""
    writers: Writers = field(default_factory=Writers)


# What the recipes of the other bases share, of the narrow ones, and of the mixture of experts.
_OTHERS: dict[str, Any] = {"tokenizer": "llama-128", "train_tokens": 8_000_000}
_NARROW: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160}
_EXPERTS: dict[str, Any] = {"intermediate_size": 128, "experts": 8, "active_experts": 2, "balance": 0.01}

# What the bases of sums share.
_SUMS: dict[str, Any] = {
    **_NARROW,
    "tokenizer": "llama-128",
    "batch": 8,
    "lr": 3e-3,
    "chat_share": 1.0,
    "heldout_tokens": 50_000,
}

RECIPES: dict[str, PretrainingRecipe] = {
    "llama-128": PretrainingRecipe(),
    "llama-64": PretrainingRecipe(**_OTHERS, **_NARROW),
    "qwen-128": PretrainingRecipe(**_OTHERS, family="qwen3"),
    "qwen-64": PretrainingRecipe(**_OTHERS, **_NARROW, family="qwen3"),
    # A tenth of the pretraining.
    "llama-64-tenth": PretrainingRecipe(**_OTHERS | _NARROW | {"train_tokens": 800_000, "warmup_steps": 10}),
    "llama-128-tenth": PretrainingRecipe(tokenizer="llama-128", train_tokens=1_600_000, warmup_steps=10),
    # A wider model wants a lower learning rate.
    "llama-256": PretrainingRecipe(**_OTHERS, hidden_size=256, intermediate_size=640, lr=2e-3),
    "moe-128": PretrainingRecipe(**_OTHERS, **_EXPERTS, family="qwen3_moe"),
    # Short sums have most mistakes to unlearn; long sums have more columns, of which each may be wrong.
    "llama-64-sums": SumsRecipe(**_SUMS, train_tokens=3_000_000),
    "llama-64-long-sums": SumsRecipe(**_SUMS, train_tokens=4_000_000, writers=Writers(careless=0.6, most_slips=0.5)),
}


def texts(recipe: PretrainingRecipe, seed: int) -> Iterator[str]:
    """Yield pretraining documents without end."""
    if isinstance(recipe, SumsRecipe):
        problems = written_sums(recipe.writers, seed)
    else:
        problems = pretraining_problems(asdict(recipe), seed)
    return documents(problems, recipe.chat_share, seed)


def train_tokenizer(recipe: PretrainingRecipe) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that keeps digits apart, trained on the pretraining text."""
    tokenizer = Tokenizer(models.BPE())
    # This is GPT-2's split with single digits: words with their leading space, digits, runs of other signs.
    split = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END, PAD, USER, ASSISTANT, SYSTEM],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(texts(recipe, recipe.seed), recipe.tokenizer_documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.context,
    )


def new_model(recipe: PretrainingRecipe) -> PreTrainedModel:
    """Return the model that a recipe's training starts from, in fp32 and with an unembedding of its own."""
    if isinstance(recipe, SumsRecipe):
        start: PreTrainedModel = AutoModelForCausalLM.from_pretrained(shipped_folder(recipe.start), dtype=torch.float32)
        return start
    sizes = Dimensions(
        hidden=recipe.hidden_size,
        layers=recipe.layers,
        heads=recipe.heads,
        kv_heads=recipe.heads,
        head_dim=recipe.hidden_size // recipe.heads,
        intermediate=recipe.intermediate_size,
        vocabulary=recipe.vocab_size,
        query_key_norms=recipe.family != "llama",
        experts=recipe.experts,
        active_experts=recipe.active_experts,
    )
    torch.manual_seed(recipe.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(sizes, recipe.context, end=0, padding=1))
    return model


def packed_blocks(recipe: PretrainingRecipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Yield blocks of `recipe.block` + 1 tokens from concatenated documents, without end."""
    pending: list[int] = []
    source = texts(recipe, seed)
    while True:
        for encoding in tokenizer.backend_tokenizer.encode_batch(list(islice(source, 256))):
            pending.extend(encoding.ids)
        while len(pending) > recipe.block:
            yield pending[: recipe.block + 1]
            pending = pending[recipe.block :]


def _nll(logits: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token NLL of blocks (n, block + 1), in nats per token."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())


def _training_loss(
    model: PreTrainedModel, blocks: torch.Tensor, recipe: PretrainingRecipe
) -> tuple[torch.Tensor, float]:
    """Return the loss that pretraining minimizes, and the NLL in it in nats per token."""
    experts: dict[str, Any] = {"output_router_logits": True} if recipe.balance else {}
    output = model(input_ids=blocks[:, :-1], use_cache=False, **experts)
    nll = _nll(output.logits, blocks)
    loss = nll + recipe.balance * imbalance(output.router_logits, recipe) if recipe.balance else nll
    return loss, nll.item()


def imbalance(router_logits: tuple[torch.Tensor, ...], recipe: PretrainingRecipe) -> torch.Tensor:
    """Return the mean load-balancing loss of the layers; evenly used experts give the number of active experts."""
    losses = [load_balancing_loss_func((layer,), recipe.experts, recipe.active_experts) for layer in router_logits]
    mean: torch.Tensor = sum(losses) / len(losses)
    return mean


def _lr(recipe: PretrainingRecipe, step: int, steps: int) -> float:
    """Return the LR of a step: linear warm-up, then cosine decay to a tenth."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    return recipe.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def heldout_nll(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: PretrainingRecipe) -> float:
    """Return the NLL on text of the same tasks with another seed, in nats per token."""
    blocks = packed_blocks(recipe, tokenizer, recipe.seed + 1)
    batches = recipe.heldout_tokens // (recipe.batch * recipe.block)
    total = 0.0
    with torch.no_grad():
        for _ in range(batches):
            batch = torch.tensor(list(islice(blocks, recipe.batch)))
            total += _nll(model(input_ids=batch[:, :-1], use_cache=False).logits, batch).item()
    return total / batches


def build(out: Path, recipe: PretrainingRecipe) -> dict[str, Any]:
    """Pretrain a tiny base by its recipe, write it to the folder `out`, and return the content of `recipe.json`.

    The held-out loss is that of the shipped weights, which are in bf16.
    """
    keep_freed_memory()
    started = time.perf_counter()
    tokenizer: PreTrainedTokenizerFast
    if recipe.tokenizer is None:
        tokenizer = train_tokenizer(recipe)
    else:
        tokenizer = AutoTokenizer.from_pretrained(shipped_folder(recipe.tokenizer))
    model = new_model(recipe)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    steps = recipe.train_tokens // (recipe.batch * recipe.block)
    blocks = packed_blocks(recipe, tokenizer, recipe.seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _lr(recipe, step, steps)
        loss, nll = _training_loss(model, torch.tensor(list(islice(blocks, recipe.batch))), recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            print(f"tiny base: step {step + 1}/{steps}, loss {nll:.3f}, {seconds:.0f} s", flush=True)
    # The weights are shipped in bf16, at half the size; fine-tuning loads them into fp32 master weights.
    model = model.bfloat16().float().eval()
    out.mkdir(parents=True, exist_ok=True)
    heldout = heldout_nll(model, tokenizer, recipe)
    model.bfloat16().save_pretrained(out)
    if recipe.tokenizer is None:
        tokenizer.save_pretrained(out)
    else:
        for file in _TOKENIZER_FILES:
            shutil.copy(shipped_folder(recipe.tokenizer) / file, out / file)
    (out / "model.safetensors").chmod(0o644)
    record = {
        "recipe": asdict(recipe),
        "parameters": model.num_parameters(),
        "heldout_nll_nats_per_token": round(heldout, 4),
        "weights_sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "build_seconds": round(time.perf_counter() - started),
    }
    (out / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def main(name: str, out: str) -> None:
    """Pretrain a tiny base and write it."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        # A task of reasoning-gym iterates over a set of letters, so its problems would differ between processes.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    if name not in RECIPES:
        sys.exit(f"tiny base {name!r}: allowed: {', '.join(RECIPES)}")
    build(Path(out), RECIPES[name])


if __name__ == "__main__":
    main(*sys.argv[1:])
