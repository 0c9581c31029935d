"""Token caches: a dataset's examples as token ids with the mask of scored tokens.

A cache is keyed by dataset, tokenizer and chat template: the three hashes stand in the file and
`read_tokens` refuses a file that belongs to others.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from lorabench.data.chat import Messages, is_text
from lorabench.data.sft import SPLITS, Split
from lorabench.errors import UserError
from lorabench.records import atomic_path, file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizedSplit:
    """Examples laid end to end: example i is `ids[offsets[i]:offsets[i+1]]`, scored where `scored` is True."""

    ids: np.ndarray
    scored: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and scored mask of one example, both (length,)."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[span], self.scored[span]

    def lengths(self) -> np.ndarray:
        """Tokens of each example, (n,)."""
        return np.diff(self.offsets)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    """Token ids of a chat and which of them are scored: every assistant turn with its end token, or a whole plain text.

    The span of a turn is what the template adds between its generation prompt and the turn's end, so
    this holds for any template that only ever appends. What a template puts after the end token (a
    line break, say) is not the assistant's and not scored.

    Raises:
        UserError: the template rewrites earlier turns, so spans can't be told.
    """
    if is_text(messages):
        plain = list(tokenizer(messages[0]["content"])["input_ids"])
        # Some tokenizers end every text themselves.
        plain += [] if plain[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
        return plain, [True] * len(plain)
    ids: list[int] = _render(tokenizer, messages)
    scored = [False] * len(ids)
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:position], generation=True)
        through = _render(tokenizer, messages[: position + 1])
        if ids[: len(through)] != through or through[: len(before)] != before:
            raise UserError("the chat template rewrites earlier turns, so assistant tokens can't be told apart")
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
    """Hash of vocabulary, merges and normalisation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def template_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the chat template."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def cache_key(tokenizer: PreTrainedTokenizerBase, dataset: Path) -> dict[str, str]:
    """What a token cache depends on."""
    return {
        "dataset": file_sha256(dataset)[:16],
        "tokenizer": tokenizer_key(tokenizer),
        "template": template_key(tokenizer),
    }


def write_tokens(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, dataset: Path, path: Path, max_length: int
) -> None:
    """Tokenize a dataset's rows into a cache file.

    Raises:
        UserError: no chat template, an example without a scored token, or one longer than `max_length`.
    """
    if not tokenizer.chat_template and not all(is_text(row["messages"]) for row in rows):
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; give the model a `chat_template`: "
            "plain, or the path of a Jinja file"
        )
    tensors: dict[str, np.ndarray] = {}
    for split in SPLITS:
        encoded = [encode_chat(tokenizer, row["messages"]) for row in rows if row["split"] == split]
        for ids, scored in encoded:
            if not any(scored):
                raise UserError(f"an example of split {split!r} has no assistant token: {tokenizer.decode(ids)[:80]!r}")
            if len(ids) > max_length:
                raise UserError(f"an example of split {split!r} has {len(ids)} tokens; the model takes {max_length}")
        tensors[f"{split}.ids"] = np.concatenate([np.asarray(ids, np.int32) for ids, _ in encoded])
        tensors[f"{split}.scored"] = np.concatenate([np.asarray(scored, np.bool_) for _, scored in encoded])
        tensors[f"{split}.offsets"] = np.cumsum([0, *(len(ids) for ids, _ in encoded)], dtype=np.int64)
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata=cache_key(tokenizer, dataset))


def read_tokens(path: Path, key: dict[str, str]) -> dict[Split, TokenizedSplit]:
    """The splits of a cache file.

    Raises:
        UserError: the file was made from another dataset, tokenizer or template than `key` says.
    """
    with safe_open(path, framework="numpy") as file:
        found = file.metadata()
        if found != key:
            wrong = ", ".join(name for name in key if found.get(name) != key[name])
            raise UserError(f"token cache {path} was made with another {wrong}; delete it to have it made again")
        return {
            split: TokenizedSplit(*(file.get_tensor(f"{split}.{name}") for name in ("ids", "scored", "offsets")))
            for split in SPLITS
        }
