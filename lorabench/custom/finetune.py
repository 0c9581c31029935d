"""Fine-tune a model with LoRA, or fully with `--full`, with the settings of "LoRA Without Regret".

LoRA is on all layers and the unembedding, with alpha 32 at every rank, A uniform in +-1/sqrt(d_in) and B zero (PEFT's
own initialization). The learning rate is constant, without warm-up. The optimizer is Adam with betas 0.9 and 0.95.
Weights are in fp32 and autocast to bf16 with both methods. The loss is the mean over the assistant's tokens of a batch.
Written by `lorabench recommend --script`.

The script needs torch, transformers, peft and datasets.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "meta-llama/Llama-3.2-1B"
DATA = "train.jsonl"
FORMAT = "messages"  # a column of turns, or two columns such as prompt/completion, or text
CHAT_TEMPLATE = None  # for a base without one
RANK = 32
ALPHA = 32
LORA_LR = 5e-4
FULL_LR = 5e-5
BATCH_SIZE = 32
MICRO_BATCH_SIZE = 4  # examples that go through the model at once
EPOCHS = 1
MAX_TOKENS = 4096  # longer examples are left out
SEED = 0
OUT = "finetuned"

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"]
IGNORED = -100


def messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row's turns, each with its role and content."""
    if "/" not in FORMAT:
        names = {"human": "user", "gpt": "assistant"}
        turns = [(turn.get("role") or turn["from"], turn.get("content") or turn["value"]) for turn in row[FORMAT]]
        return [{"role": names.get(role, role), "content": content} for role, content in turns]
    prompt, completion = FORMAT.split("/")
    question = f"{row[prompt]}\n\n{row['input']}" if prompt == "instruction" and row.get("input") else row[prompt]
    return [{"role": "user", "content": str(question)}, {"role": "assistant", "content": str(row[completion])}]


def encode(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Return the token ids of an example, and its labels: the ids of the assistant's tokens, IGNORED elsewhere."""
    if FORMAT == "text":
        ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        return {"ids": ids, "labels": ids}

    def render(turns: list[dict[str, str]], generation: bool = False) -> list[int]:
        rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=generation, return_dict=True)
        return list(rendered["input_ids"])

    turns = messages(row)
    ids = render(turns)
    labels: list[int] = []
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant":
            start, end = len(render(turns[:place], generation=True)), len(render(turns[: place + 1]))
            # The assistant's turn ends with the end token; the template may put more after it.
            while tokenizer.eos_token_id in ids[start:end] and ids[end - 1] != tokenizer.eos_token_id:
                end -= 1
            labels += [IGNORED] * (start - len(labels)) + ids[start:end]
    return {"ids": ids, "labels": labels + [IGNORED] * (len(ids) - len(labels))}


def micro_batches(rows: Any, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids and labels of MICRO_BATCH_SIZE rows at a time, padded on the right, which causal attention ignores."""
    for start in range(0, len(rows["ids"]), MICRO_BATCH_SIZE):
        part = slice(start, start + MICRO_BATCH_SIZE)
        width = max(map(len, rows["ids"][part]))
        ids = [row + [0] * (width - len(row)) for row in rows["ids"][part]]
        labels = [row + [IGNORED] * (width - len(row)) for row in rows["labels"][part]]
        yield torch.tensor(ids, device=device), torch.tensor(labels, device=device)


def nll_sum(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the NLL in nats, summed over the scored tokens."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def scored(rows: Any) -> int:
    """Return the number of scored tokens; the first token of an example is never predicted."""
    return sum(label != IGNORED for labels in rows["labels"] for label in labels[1:])


@torch.no_grad()
def test_nll(model: Any, rows: Any, device: torch.device) -> float:
    """Return the mean NLL of the test split in nats per scored token."""
    return sum(nll_sum(model, *part).item() for part in micro_batches(rows, device)) / scored(rows)


def main() -> None:
    """Train, and save the adapter or the model."""
    full = "--full" in sys.argv[1:]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = CHAT_TEMPLATE or tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)
    if not full:
        [head] = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[*LAYERS, head]))

    kind = {"jsonl": "json"}.get(DATA.rpartition(".")[2], DATA.rpartition(".")[2])
    loaded = load_dataset(kind, data_files=DATA, split="train")
    rows = loaded.map(encode, fn_kwargs={"tokenizer": tokenizer}, remove_columns=loaded.column_names)
    rows = rows.filter(lambda row: len(row["ids"]) <= MAX_TOKENS and any(x != IGNORED for x in row["labels"][1:]))
    split = rows.train_test_split(test_size=0.1, seed=SEED)
    train, test = split["train"], split["test"][:]
    print(f"{len(train)} examples to train on, {len(test['ids'])} to test on, {len(loaded) - len(rows)} left out")

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=FULL_LR if full else LORA_LR, betas=(0.9, 0.95), weight_decay=0.0)
    print(f"test loss before: {test_nll(model, test, device):.4f} nats per token")
    for epoch in range(EPOCHS):
        shuffled = train.shuffle(seed=SEED + epoch)
        for step in range(1, len(train) // BATCH_SIZE + 1):
            batch = shuffled[(step - 1) * BATCH_SIZE : step * BATCH_SIZE]
            tokens, loss = scored(batch), 0.0
            for ids, labels in micro_batches(batch, device):
                part = nll_sum(model, ids, labels) / tokens
                part.backward()
                loss += part.item()
            optimizer.step()
            optimizer.zero_grad()
            print(f"epoch {epoch + 1}, step {step}: training loss {loss:.4f}", flush=True)
    print(f"test loss after: {test_nll(model, test, device):.4f} nats per token")
    out = f"{OUT}-full" if full else OUT
    # PEFT would also save a copy of the unembedding, which is not trained.
    model.save_pretrained(out, **({} if full else {"save_embedding_layers": False}))
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
