"""Token caches: a dataset's examples as token ids with the mask of scored tokens.

A cache is keyed by dataset, tokenizer and chat template: the file holds the three hashes, and `read_tokens` refuses a
file that is damaged or was made from another dataset, tokenizer or template.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import tempfile
from array import array
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pyarrow.parquet as pq

from lorabench.data.chat import SPLITS, Messages, Split, is_text
from lorabench.data.sft import read_dataset
from lorabench.errors import UserError
from lorabench.utils.checked_tensors import DamagedTensorsError, read_header, read_tensors, write_tensors
from lorabench.utils.exhaustion import space_for
from lorabench.utils.files import atomic_path, file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Leaving out more than this share of a split would change the dataset: it is an error.
_MOST_LEFT_OUT = 0.1
_TYPES = {"ids": np.dtype(np.int32), "scored": np.dtype(np.bool_)}
_Encoded = tuple[Split, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class TokenizedSplit:
    """The concatenated examples of a split; example i is `ids[offsets[i]:offsets[i+1]]`.

    Attributes:
        ids: token ids, (tokens,).
        scored: whether the loss is taken on a token, (tokens,).
        offsets: start of each example and the end of the last, (examples + 1,).
    """

    ids: np.ndarray
    scored: np.ndarray
    offsets: np.ndarray

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
    template that only appends. What a template puts after the end token (such as a line break) is not part of the
    assistant's turn, and is not scored.

    Raises:
        UserError: the template rewrites earlier turns, so that the spans can't be determined, or it refuses the roles.
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


@dataclass(frozen=True)
class Limits:
    """Limits of an example's length, in tokens."""

    model: int
    """The model's context; a longer example is an error."""
    dataset: int | None = None
    """The dataset's own limit; longer examples are left out and counted."""

    def __post_init__(self) -> None:
        if self.dataset is not None and self.dataset > self.model:
            raise UserError(f"max_tokens = {self.dataset} is more than the {self.model} tokens that the model takes")


def write_tokens(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, path: Path, limits: Limits, processes: int = 1
) -> None:
    """Tokenize a dataset file into a cache file, a row group at a time.

    Raises:
        UserError: the tokenizer has no chat template, splits share an example, an example has no scored token or is
            longer than the model's context, or more than a tenth of a split is longer than the dataset's limit.
    """
    # Reading the whole dataset also checks that its splits are disjoint.
    chats = sum(not is_text(row["messages"]) for row in read_dataset(dataset))
    if chats and not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; give the model a `chat_template`: "
            "plain, or the path of a Jinja file"
        )
    lengths, left_out = {split: array("q") for split in SPLITS}, dict.fromkeys(SPLITS, 0)
    left_out_of_test: list[int] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with space_for(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        # Tokens wait in temporary files, so that memory holds a row group at a time.
        waiting = {(split, name): Path(scratch, f"{split}.{name}") for split in SPLITS for name in _TYPES}
        with ExitStack() as stack:
            files = {key: stack.enter_context(file.open("wb")) for key, file in waiting.items()}
            for split, ids, scored in _encoded(dataset, tokenizer, limits, processes):
                if limits.dataset is not None and len(ids) > limits.dataset:
                    if split == "test":
                        left_out_of_test.append(len(lengths[split]) + left_out[split])
                    left_out[split] += 1
                else:
                    lengths[split].append(len(ids))
                    files[split, "ids"].write(ids.tobytes())
                    files[split, "scored"].write(scored.tobytes())
        for split, count in left_out.items():
            total = count + len(lengths[split])
            text = f"{count} of {total} examples of split {split!r} have more than max_tokens = {limits.dataset} tokens"
            if count > total * _MOST_LEFT_OUT:
                raise UserError(f"{text}; lower max_chars, so that the examples chosen are shorter")
            if count:
                logging.warning("left out: %s", text)
        tensors: dict[str, np.ndarray] = {}
        for split in SPLITS:
            for name, dtype in _TYPES.items():
                tensors[f"{split}.{name}"] = np.memmap(waiting[split, name], dtype, "r")
            tensors[f"{split}.offsets"] = np.concatenate([[0], np.cumsum(lengths[split], dtype=np.int64)])
        metadata = cache_key(tokenizer, dataset)
        if limits.dataset is not None:
            metadata |= {"left_out": json.dumps(left_out), "left_out_of_test": json.dumps(left_out_of_test)}
        with atomic_path(path) as partial:
            write_tensors(partial, tensors, metadata)


def _encoded(dataset: Path, tokenizer: PreTrainedTokenizerBase, limits: Limits, processes: int) -> Iterator[_Encoded]:
    """Yield the split, token ids and scored mask of each example, in order; several processes encode a group each."""
    with pq.ParquetFile(dataset) as file:
        groups = range(file.num_row_groups)
    encode = partial(_encode, dataset, tokenizer, limits)
    if min(processes, len(groups)) == 1:
        yield from chain.from_iterable(map(encode, groups))
        return
    # Processes are not forked: a fork would lack the threads of the libraries that are loaded by now.
    with ProcessPoolExecutor(min(processes, len(groups)), multiprocessing.get_context("spawn")) as pool:
        # Examples are written faster than they are encoded, so few groups wait in memory.
        yield from chain.from_iterable(pool.map(encode, groups))


def _encode(dataset: Path, tokenizer: PreTrainedTokenizerBase, limits: Limits, group: int) -> list[_Encoded]:
    encoded = []
    with pq.ParquetFile(dataset) as file:
        for row in file.read_row_group(group).to_pylist():
            ids, scored = encode_chat(tokenizer, row["messages"])
            where = f"an example of split {row['split']!r}"
            if not any(scored):
                raise UserError(f"{where} has no assistant token: {tokenizer.decode(ids)[:80]!r}")
            if len(ids) > limits.model and limits.dataset is None:
                raise UserError(f"{where} has {len(ids)} tokens; the model takes {limits.model}")
            encoded.append((row["split"], np.asarray(ids, _TYPES["ids"]), np.asarray(scored, _TYPES["scored"])))
    return encoded


def read_tokens(path: Path, key: dict[str, str]) -> dict[Split, TokenizedSplit]:
    """Return the splits of a cache file, memory-mapped: pages are loaded when they are read.

    Raises:
        UserError: the file is damaged, or was made from another dataset, tokenizer or template than `key` says (see
            `cache_key`).
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


def left_out_of_test(path: Path) -> set[int]:
    """Return the numbers, in the dataset's test split, of the examples that a cache lacks since they are too long."""
    return set(json.loads(read_header(path).get("left_out_of_test", "[]")))
