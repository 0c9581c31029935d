"""Chats from a dataset of the Hugging Face hub, in the two forms that Tulu3 and OpenThoughts3 have.

    allenai/tulu-3-sft-mixture     id: string, messages: [{content: string, role: string}], source: string
    open-thoughts/OpenThoughts3-1.2M
                                   difficulty: int64, source: string, domain: string,
                                   conversations: [{from: string, value: string}]

The files are read twice, a batch of rows at a time: first to see which rows are usable and to choose among them, then
to read the chosen ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorabench.config.inputs import HubDataset
from lorabench.data.chat import CHATS, SPLITS, Chat, Split, prompt, text_digest
from lorabench.data.files import RawRow, Tally, json_lines, parquet_rows, row_chat, usable
from lorabench.errors import UserError
from lorabench.utils.hub import FetchedRepository

_REPEATED = "with the prompt of another"


def part_rows(
    files: Iterable[Path], name: str, needed: Sequence[Sequence[str]], optional: Sequence[str] = ()
) -> Iterator[RawRow]:
    """Yield the rows of a part of a dataset, of all its files.

    Of the columns, those are read that are `needed`, of several names for one the first that is there, and those of
    the `optional` ones that are there. UserError calls the dataset `name`, and says that a file is of another kind, a
    row can't be read, or a column is missing.
    """

    def choose(columns: Collection[str], where: str) -> list[str]:
        chosen = [column for column in optional if column in columns]
        for names in needed:
            present = [column for column in names if column in columns]
            if not present:
                raise UserError(
                    f"{name} has the columns {', '.join(columns)} in {where}; {' or '.join(names)} is needed"
                )
            chosen.append(present[0])
        return chosen

    for file in files:
        if file.suffix not in (".parquet", ".jsonl"):
            raise UserError(f"{file} is neither .parquet nor .jsonl, the kinds of data files that are read")
        rows = parquet_rows(file, choose) if file.suffix == ".parquet" else json_lines(file)
        for number, content in enumerate(rows, 1):
            if isinstance(content, str):
                raise UserError(f"{file}:{number} is {content}")
            yield {column: content[column] for column in choose(content, f"{file}:{number}")}


def choose_chats(
    spec: HubDataset, fetched: Mapping[str, FetchedRepository]
) -> tuple[Iterator[tuple[Split, Chat]], dict[str, Any]]:
    """Choose the rows of each split at random by the spec's seed; each prompt once, so that splits share none.

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
        wanted = ", ".join(f"{count} {split}" for split, count in sizes.items())
        raise UserError(
            f"dataset {spec.id} has {tally.usable} usable examples in {tally.rows} rows; {sum(sizes.values())} are "
            f"needed ({wanted}); left out: {tally.reasons() or 'none'}"
        )
    split_of, start = dict[int, Split](), 0
    for split in reversed(SPLITS):
        split_of |= dict.fromkeys(chosen[start : start + sizes[split]].tolist(), split)
        start += sizes[split]
    left_out = {reason: count for reason, (count, _) in tally.bad.items()} | {_REPEATED: len(repeated)}
    about = {"id": spec.id, "commit": repository.commit, "rows": tally.rows, "usable": tally.usable}
    chats = usable_chats(Tally("chats"))
    return ((split_of[row], chat) for row, chat in chats if row in split_of), about | {"left_out": left_out}
