"""SFT datasets in the form of Tulu3 (chat messages): making, splitting, writing and reading them, row by row."""

from __future__ import annotations

import json
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from random import Random
from string import ascii_lowercase
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config.inputs import (
    ChatDataset,
    DatasetSpec,
    FactsDataset,
    FileDataset,
    GeneratedSplits,
    HubDataset,
    ShippedDataset,
)
from lorabench.data.chat import CHATS, SPLITS, Chat, Row, Split, is_first, prompt, take, text_digest, wanted
from lorabench.data.files import Tally, file_chats, part_rows, row_chat, usable
from lorabench.data.identity import SHIPPED
from lorabench.data.reasoning import INSTRUCT_TASKS, mixture, worked_solutions
from lorabench.errors import UserError
from lorabench.utils.files import atomic_path, damage_explained, file_sha256
from lorabench.utils.hub import FetchedRepository

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_SCHEMA = pa.schema([("split", pa.string()), ("source", pa.string()), ("messages", pa.list_(_MESSAGE))])
_ABOUT = b"lorabench"

# Limits of a row group, which is held in memory, in examples and in characters; the last example may exceed the latter.
_GROUP_ROWS, _GROUP_CHARS = 4096, 16_000_000
# Rows of a batch that is read.
_BATCH_ROWS = 256
_REPEATED = "with the prompt of another"
# The most validation or test examples of a package of shipped text: a few packages must not decide a loss.
_MOST_OF_A_PACKAGE = 10
# Problem i of reasoning-gym with one seed is problem i - 1 with the next seed. So other test examples are made with
# seeds that are further apart than any dataset is long.
_APART = 1_000_000


def build_dataset(
    spec: DatasetSpec, path: Path, fetched: Mapping[str, FetchedRepository] = MappingProxyType({})
) -> None:
    """Make a dataset and write it as parquet, from the hub or shipped with a note of what was left out (`about`).

    The repository of a dataset of the hub is `fetched`, by id. UserError says that there are too few distinct chats.
    """
    if isinstance(spec, HubDataset | ShippedDataset):
        chosen, note = choose_chats(spec, fetched) if isinstance(spec, HubDataset) else choose_shipped(spec)
        write_dataset((_row(split, chat) for split, chat in chosen), path, note)
    else:
        write_dataset(make_dataset(spec), path)


def make_dataset(spec: ChatDataset | FactsDataset | FileDataset) -> Iterator[Row]:
    """Yield the rows of a generated dataset or a file, distinct by prompt; UserError says that there are too few.

    Random facts are the exception: all splits hold the same facts, since validation measures what was stored.
    """
    is_new: Callable[[Chat], bool] = is_first(lambda chat: text_digest(prompt(chat.messages)))
    if isinstance(spec, FactsDataset):
        # Random names and numbers do not generalize, so a model predicts only what it stored.
        rng = Random(spec.seed)
        endless = (
            Chat.of(
                "facts",
                f"number of {''.join(rng.choices(ascii_lowercase, k=6))}?",
                "".join(rng.choices("0123456789", k=spec.digits)),
            )
            for _ in count()
        )
        facts = list(take(wanted(endless, is_new), spec.facts, "facts"))
        yield from (_row(split, fact) for split in SPLITS for fact in facts)
        return
    what = f"of at most {spec.max_chars} characters in a dataset of kind {spec.kind!r}"
    if isinstance(spec, FileDataset):
        chats = iter(file_chats(spec)[0])
    else:

        def generated(seed: int, apart: int = 1) -> Iterator[Chat]:
            is_instruct = spec.kind == "instruct"
            problems = mixture(INSTRUCT_TASKS, apart * seed) if is_instruct else worked_solutions("odd", seed)
            made = (Chat.of(problem.source, problem.question, problem.response) for problem in problems)
            return wanted(made, lambda chat: chat.chars() <= spec.max_chars and is_new(chat))

        chats = generated(spec.seed)
    for split in SPLITS:
        examples = take(chats, getattr(spec, split), f"{split} examples {what}")
        if split == "test" and isinstance(spec, GeneratedSplits) and spec.test_seed is not None:
            # The test examples of `seed` are passed over, so that none of the others is among them.
            deque(examples, maxlen=0)
            examples = take(generated(spec.test_seed, _APART), spec.test, f"other test examples {what}")
        yield from (_row(split, chat) for chat in examples)


def choose_chats(
    spec: HubDataset, fetched: Mapping[str, FetchedRepository]
) -> tuple[Iterator[tuple[Split, Chat]], dict[str, Any]]:
    """Choose the rows of each split at random by the spec's seed; each prompt once, so that splits share none.

    The files are read twice, a batch of rows at a time: to see which rows are usable, and to read the chosen ones.
    Tulu3 has the columns `messages` (`content`, `role`) and `source`, OpenThoughts3 `conversations` (`from`, `value`).

    The held-out splits are drawn first, so that they do not depend on the number of training examples. The chats with
    their splits are in the order of the files; with them comes a note: the dataset's id and commit, its number of rows
    and of usable rows, and what was left out by reason.
    """

    def parse(content: dict[str, Any]) -> Chat:
        form = next(form for form in CHATS if form in content)
        source = spec.id if spec.group else str(content.get("source") or spec.id)
        return row_chat(content, form, source, spec.max_chars, spec.group)

    def usable_chats(tally: Tally) -> Iterator[tuple[int, Chat]]:
        needed = [CHATS, *([[spec.group]] if spec.group else [])]
        return usable(part_rows(files, f"dataset {spec.id}", needed, ["source"]), parse, tally)

    repository = fetched[spec.id]
    files = repository.data_files(spec.config, spec.split)
    tally = Tally("chats")
    numbers, digests = array("q"), array("Q")
    for number, chat in usable_chats(tally):
        numbers.append(number)
        digests.append(text_digest(prompt(chat.messages)))
    order = np.random.default_rng(spec.seed).permutation(len(numbers))
    shuffled = np.asarray(numbers)[order]
    firsts = np.sort(np.unique(np.asarray(digests)[order], return_index=True)[1])
    chosen, repeated = shuffled[firsts], np.delete(shuffled, firsts)
    if len(repeated):
        tally.leave_out(int(repeated.min()), _REPEATED, len(repeated))
        tally.usable -= len(repeated)
    sizes = {split: int(getattr(spec, split)) for split in SPLITS}
    if tally.usable < sum(sizes.values()):
        raise UserError(f"dataset {spec.id}: {tally}; {sum(sizes.values())} are needed for train, validation and test")
    split_of, start = dict[int, Split](), 0
    for split in reversed(SPLITS):
        split_of |= dict.fromkeys(chosen[start : start + sizes[split]].tolist(), split)
        start += sizes[split]
    note = {
        "id": spec.id,
        "commit": repository.commit,
        "rows": tally.rows,
        "usable": tally.usable,
        "left_out": {reason: count for reason, (count, _) in tally.bad.items()} | {_REPEATED: len(repeated)},
    }
    chats = usable_chats(Tally("chats"))
    return ((split_of[row], chat) for row, chat in chats if row in split_of), note


def choose_shipped(spec: ShippedDataset) -> tuple[Iterator[tuple[Split, Chat]], dict[str, Any]]:
    """Choose the examples of each split at random by the spec's seed, from that split's packages of the spec's edition.

    The shipped file has the columns `split`, `package`, `prompt`, `text` and `words`. With the examples comes a note:
    the packages with their versions, owners, licences and the hashes of their archives, the number of examples that
    were read, that of usable ones, and what was left out by reason. UserError says that the file was changed, or a
    split's packages have too few usable examples.
    """
    path = Path(__file__).with_name(f"{spec.kind}.parquet")
    if file_sha256(path) != SHIPPED[spec.kind][2]:
        raise UserError(f"{path} was changed after it was installed; install the package again")
    table = pq.read_table(path)
    stored = json.loads(table.schema.metadata[_ABOUT])
    note = stored["editions"][str(spec.edition)]
    note["packages"] = {name: entry for name, entry in stored["packages"].items() if entry["edition"] <= spec.edition}
    read = [row for row in table.to_pylist() if row["package"] in note["packages"]]
    of_enough_words = [row for row in read if row["words"] >= spec.min_words]
    short = [row for row in of_enough_words if len(row["prompt"]) + len(row["text"]) <= spec.max_chars]
    left_out = note["left_out"]
    left_out["of too few words"] += len(read) - len(of_enough_words)
    left_out["too long"] += len(of_enough_words) - len(short)
    chosen: list[tuple[Split, Chat]] = []
    for split in SPLITS:
        pool = [Chat.of(row["package"], row["prompt"], row["text"]) for row in short if row["split"] == split]
        rng = Random(spec.seed)
        rng.shuffle(pool)
        limit = ""
        if split != "train":
            # The first example of each package, the packages in a random order, then the second of each, and so on.
            by_package: dict[str, list[Chat]] = defaultdict(list)
            for chat in pool:
                by_package[chat.source].append(chat)
            packages = list(by_package.values())
            rng.shuffle(packages)
            pool = [chats[turn] for turn in range(_MOST_OF_A_PACKAGE) for chats in packages if turn < len(chats)]
            limit = f", and at most {_MOST_OF_A_PACKAGE} of a package,"
        needed = getattr(spec, split)
        if len(pool) < needed:
            rules = f"at least {spec.min_words} words and at most {spec.max_chars} characters{limit}"
            raise UserError(f"found {len(pool)} {split} examples of {rules} in the {spec.kind}; {needed} are needed")
        chosen += [(split, chat) for chat in pool[:needed]]
    return iter(chosen), note | {"rows": len(short) + sum(left_out.values()), "usable": len(short)}


def _row(split: Split, chat: Chat) -> Row:
    return {"split": split, "source": chat.source, "messages": chat.messages}


def write_dataset(rows: Iterable[Row], path: Path, about: dict[str, Any] | None = None) -> None:
    """Write rows as parquet, a row group at a time, whole or not at all, with the note that `about` reads."""
    schema = _SCHEMA if about is None else _SCHEMA.with_metadata({_ABOUT: json.dumps(about)})
    with atomic_path(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        group, chars = list[Row](), 0
        for row in rows:
            group.append(row)
            chars += sum(len(message["content"]) for message in row["messages"])
            if len(group) == _GROUP_ROWS or chars >= _GROUP_CHARS:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group, chars = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def read_dataset(path: Path) -> Iterator[Row]:
    """Yield the rows of a dataset file; UserError if it is damaged."""
    with damage_explained(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS):
            yield from batch.to_pylist()


def about(path: Path) -> dict[str, Any] | None:
    """Return the note in a dataset file; None if it has none, as datasets that are generated or from a file.

    The note has the dataset's `id`, its number of `rows` and of `usable` rows, and under `left_out` the number of rows
    for each reason; on the hub also its `commit`, in shipped text the `packages`.
    """
    note = (pq.read_schema(path).metadata or {}).get(_ABOUT)
    return None if note is None else json.loads(note)
