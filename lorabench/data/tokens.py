"""Token caches: a dataset's examples as token ids with the mask of scored tokens.

A cache is keyed by dataset, tokenizer and chat template: the file holds the three hashes, and `read_tokens` refuses a
file that is damaged or was made from another dataset, tokenizer or template.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pyarrow.parquet as pq

from lorabench.data.chat import SPLITS, Messages, Split, is_text
from lorabench.errors import UserError
from lorabench.utils.checked_tensors import DamagedTensorsError, read_header, read_tensors, write_tensors
from lorabench.utils.files import atomic_path, damage_explained, file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Leaving out more than this share of a split would change the dataset: it is an error.
_MOST_LEFT_OUT = 0.1
_TYPES = {"ids": np.int32, "scored": np.bool_}


@dataclass(frozen=True)
class TokenizedSplit:
    """The concatenated examples of a split; example i is `ids[offsets[i]:offsets[i+1]]`."""

    ids: np.ndarray  # Token ids, (tokens,).
    scored: np.ndarray  # Whether the loss is taken on a token, (tokens,).
    offsets: np.ndarray  # Start of each example and the end of the last, (examples + 1,).

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids and the scored mask of an example, both (length,)."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[span], self.scored[span]

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each example, (examples,)."""
        return np.diff(self.offsets)

    def chosen(self, examples: np.ndarray) -> TokenizedSplit:
        """Return a split of some examples, given by index, in that order."""
        ids, scored = (np.concatenate(parts) for parts in zip(*map(self.example, examples), strict=True))
        return TokenizedSplit(ids, scored, np.concatenate([[0], np.cumsum(self.lengths()[examples])]))


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    """Return a chat's token ids and which of them are scored: assistant turns with their end token, or all of a text.

    The span of a turn is what the template adds between its generation prompt and the turn's end, which holds for any
    template that only appends; UserError says that it rewrites earlier turns or refuses the roles. What a template puts
    after the end token (such as a line break) is not part of the assistant's turn, and is not scored.
    """
    if is_text(messages):
        plain = list(tokenizer(messages[0]["content"])["input_ids"])
        # Some tokenizers append the end token themselves.
        plain += [] if plain[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
        return plain, [True] * len(plain)
    ids: list[int] = _render(tokenizer, messages)
    scored = [False] * len(ids)
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:position], generation=True)
        through = _render(tokenizer, messages[: position + 1]) if messages[position + 1 :] else ids
        if ids[: len(through)] != through or through[: len(before)] != before:
            raise UserError("the chat template rewrites earlier turns, so assistant tokens can't be identified")
        turn = through[len(before) :]
        if tokenizer.eos_token_id in turn:
            turn = turn[: len(turn) - turn[::-1].index(tokenizer.eos_token_id)]
        scored[len(before) : len(before) + len(turn)] = [True] * len(turn)
    return ids, scored


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, generation: bool = False) -> list[int]:
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set the model's chat_template")
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=generation, return_dict=True)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template refuses turns of {roles}: {error}") from error
    return list(encoded["input_ids"])


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the tokenizer's vocabulary, merges and normalization."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def template_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the tokenizer's chat template."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def cache_key(tokenizer: PreTrainedTokenizerBase, dataset: Path) -> dict[str, str]:
    """Return the hashes that identify a token cache: of the dataset, the tokenizer and the chat template."""
    keys = {"tokenizer": tokenizer_key(tokenizer), "template": template_key(tokenizer)}
    return {"dataset": file_sha256(dataset)[:16]} | keys


def write_tokens(
    dataset: Path,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    context: int,
    max_tokens: int | None = None,
    processes: int = 1,
) -> None:
    """Tokenize a dataset file into a cache file.

    Examples of more than `max_tokens` are left out and counted. UserError says that the tokenizer has no chat template,
    an example has no scored token or is longer than the model's `context`, or more than a tenth of a split is left out.
    """
    if max_tokens is not None and max_tokens > context:
        raise UserError(f"max_tokens = {max_tokens} is more than the {context} tokens that the model takes")
    kept: dict[Split, list[dict[str, np.ndarray]]] = {split: [] for split in SPLITS}
    left_out: dict[Split, list[int]] = {split: [] for split in SPLITS}
    encode = partial(_encode, dataset, tokenizer, None if max_tokens else context)
    with damage_explained(dataset):
        groups = range(pq.read_metadata(dataset).num_row_groups)
    # Processes are not forked: a fork would lack the threads of the libraries that are loaded by now.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        encoded = map(encode, groups) if min(processes, len(groups)) == 1 else pool.map(encode, groups)
        for split, example in chain.from_iterable(encoded):
            if max_tokens is not None and len(example["ids"]) > max_tokens:
                left_out[split].append(len(kept[split]) + len(left_out[split]))
            else:
                kept[split].append(example)
    tensors: dict[str, np.ndarray] = {}
    for split in SPLITS:
        count, total = len(left_out[split]), len(left_out[split]) + len(kept[split])
        text = f"{count} of {total} examples of split {split!r} have more than max_tokens = {max_tokens} tokens"
        if count > total * _MOST_LEFT_OUT:
            raise UserError(f"{text}; lower max_chars, so that the examples chosen are shorter")
        if count:
            logging.warning("left out: %s", text)
        for name, dtype in _TYPES.items():
            tensors[f"{split}.{name}"] = np.concatenate([np.empty(0, dtype), *(part[name] for part in kept[split])])
        tensors[f"{split}.offsets"] = np.cumsum([0, *(len(part["ids"]) for part in kept[split])], dtype=np.int64)
    metadata = cache_key(tokenizer, dataset)
    if max_tokens is not None:
        counts = {split: len(numbers) for split, numbers in left_out.items()}
        metadata |= {"left_out": json.dumps(counts), "left_out_of_test": json.dumps(left_out["test"])}
    with atomic_path(path) as unfinished:
        write_tensors(unfinished, tensors, metadata)


def _encode(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, context: int | None, group: int
) -> list[tuple[Split, dict[str, np.ndarray]]]:
    """Return the split of each example of a row group, and its token ids and which are scored, both (length,)."""
    encoded = []
    with pq.ParquetFile(dataset) as file:
        for row in file.read_row_group(group).to_pylist():
            ids, scored = encode_chat(tokenizer, row["messages"])
            where = f"an example of split {row['split']!r}"
            if not any(scored):
                raise UserError(f"{where} has no assistant token: {tokenizer.decode(ids)[:80]!r}")
            if context is not None and len(ids) > context:
                raise UserError(f"{where} has {len(ids)} tokens; the model takes {context}")
            encoded.append((row["split"], {"ids": np.array(ids, np.int32), "scored": np.array(scored, np.bool_)}))
    return encoded


def read_tokens(path: Path, key: dict[str, str]) -> dict[Split, TokenizedSplit]:
    """Return the splits of a cache file, memory-mapped: pages are loaded when they are read.

    UserError says that it is damaged, or of another dataset, tokenizer or template than the `key` (see `cache_key`).
    """
    # safetensors maps tensors of torch on a CPU, but reads those of numpy whole.
    try:
        tensors, header = read_tensors(path)
    except DamagedTensorsError as error:
        raise UserError(f"token cache {error}; delete it to have it made again") from error
    different = ", ".join(name for name in key if header.get(name) != key[name])
    if different:
        raise UserError(f"token cache {path} was made with another {different}; delete it to have it made again")
    return {
        split: TokenizedSplit(*(tensors[f"{split}.{name}"].numpy() for name in ("ids", "scored", "offsets")))
        for split in SPLITS
    }


def count_left_out(path: Path) -> dict[Split, int]:
    """Return for each split the number of examples over the dataset's limit, which a cache lacks; empty if no limit."""
    counts: dict[Split, int] = json.loads(read_header(path).get("left_out", "{}"))
    return counts


def groups_of_tests(dataset: Path, tokens: Path | None) -> list[str]:
    """Return the group of each test example of a dataset's file with groups, in the order of a run's losses.

    Those that are too long for the runs' model are missing in its `tokens`, None where no example is. UserError says
    that the dataset's file is damaged.
    """
    if not dataset.is_file():
        raise UserError(f"{dataset} is missing, which names the groups of its test examples: make it again")
    with damage_explained(dataset), pq.ParquetFile(dataset) as file:
        rows = file.read(["split", "source"]).to_pylist()
    groups = [row["source"] for row in rows if row["split"] == "test"]
    left_out = set(json.loads(read_header(tokens).get("left_out_of_test", "[]"))) if tokens is not None else set()
    return [group for number, group in enumerate(groups) if number not in left_out]
