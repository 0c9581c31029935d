"""SFT datasets that need no download are deterministic, distinct and disjoint: generated, shipped, of facts."""

import json
import math
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scipy import stats

from lorabench.config.inputs import ChatDataset, FactsDataset, ShippedDataset
from lorabench.config.loading import load_preset
from lorabench.data import sft
from lorabench.data.chat import prompt
from lorabench.data.identity import dataset_id
from lorabench.data.reasoning import INSTRUCT_TASKS, PRETRAIN_TASKS
from lorabench.data.sft import about, build_dataset, choose_shipped, make_dataset, read_dataset
from lorabench.errors import UserError
from lorabench.utils.files import digest


def made(**changes):
    sizes = {"train": 40, "validation": 10, "test": 10}
    return list(make_dataset(ChatDataset(**{"kind": "instruct", "max_chars": 300} | sizes | changes)))


@pytest.mark.parametrize("kind", ["instruct", "worked"])
def test_splits_are_whole_distinct_and_short_and_other_test_examples_leave_the_rest(kind):
    rows, others = made(kind=kind), made(kind=kind, test_seed=100)
    splits = ["train"] * 40 + ["validation"] * 10 + ["test"] * 10
    assert [row["split"] for row in rows] == [row["split"] for row in others] == splits
    assert others[:50] == rows[:50]
    assert len({prompt(row["messages"]) for row in rows + others[50:]}) == 70
    assert all(sum(len(m["content"]) for m in row["messages"]) <= 300 for row in rows)
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
    assert rows == made(kind=kind) != made(kind=kind, seed=1)
    assert others == made(kind=kind, test_seed=100) != made(kind=kind, test_seed=101)
    if kind == "worked":
        assert all("####" in row["messages"][1]["content"] for row in rows)
        assert all(int(row["source"].partition("/")[2]) % 2 == 1 for row in rows), "of odd templates"


def test_too_few_examples_and_the_identity_of_data_without_other_tests():
    with pytest.raises(
        UserError, match=r"found \d+ distinct train examples of at most 32 characters .*; 40 are needed"
    ):
        made(max_chars=32)
    assert not set(INSTRUCT_TASKS) & set(PRETRAIN_TASKS), "fine-tuning tasks are unseen in pretraining"
    spec = ChatDataset(kind="worked", train=40, validation=10, test=10)
    # The ids of runs that are stored hang on the id of data without other test examples.
    assert dataset_id(spec) == "a719ecea"
    assert dataset_id(spec) != dataset_id(spec.model_copy(update={"test_seed": 100}))


def test_held_out_tests_are_found_beyond_training_splits_of_any_length():
    # With seed 1, the problems of reasoning-gym with seed 100 are the later ones of these splits.
    spec = load_preset("laptop_more@100").datasets["batches"]
    assert (spec.seed, [row["split"] for row in make_dataset(spec)].count("test")) == (1, spec.test)


def test_facts_are_the_same_in_every_split_and_uniform(tmp_path):
    spec = FactsDataset(kind="facts", facts=300, digits=6)
    build_dataset(spec, tmp_path / "facts.parquet")
    answers = {split: {} for split in ("train", "validation", "test")}
    for row in read_dataset(tmp_path / "facts.parquet"):
        answers[row["split"]][prompt(row["messages"])] = row["messages"][-1]["content"]
    assert answers["train"] == answers["validation"] == answers["test"]
    assert len(answers["train"]) == spec.facts == spec.train == spec.test
    assert {len(number) for number in answers["train"].values()} == {6}
    digits = Counter("".join(answers["train"].values()))
    assert stats.chisquare([digits[digit] for digit in "0123456789"]).pvalue > 1e-4
    assert spec.entropy_bits == pytest.approx(300 * 6 * math.log2(10))


KINDS = ["docstrings", "documentation"]


def shipped(kind="docstrings", **changes) -> ShippedDataset:
    return ShippedDataset(**{"kind": kind, "train": 40, "validation": 8, "test": 8} | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_files_keep_owners_texts_and_prompts_in_one_split(kind):
    table = pq.read_table(Path(sft.__file__).with_name(f"{kind}.parquet"))
    rows, packages = table.to_pandas(), json.loads(table.schema.metadata[b"lorabench"])["packages"]
    counted = rows.groupby("split")["package"].nunique()
    assert (counted >= 20).all()
    assert rows["split"].tolist() == [packages[name]["split"] for name in rows["package"]]
    owners = [{read["owner"] for read in packages.values() if read["split"] == split} for split in counted.index]
    assert sum(map(len, owners)) == len(set.union(*owners))
    notice = (Path(__file__).parents[2] / "NOTICE").read_text()
    assert all(f"  {name} {read['version']}: {read['licence']}\n" in notice for name, read in packages.items())
    assert not rows["text"].duplicated().any()
    assert not rows["prompt"].duplicated().any()


@pytest.mark.parametrize("edition", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_no_package_decides_the_losses_of_shipped_text(kind, edition):
    sizes = {"train": 1500, "validation": 64, "test": 192}
    chosen, note = choose_shipped(shipped(kind, **sizes, max_chars=500, edition=edition))
    chats = list(chosen)
    assert Counter(split for split, _ in chats) == sizes
    assert all(chat.chars() <= 500 for _, chat in chats)
    for split in ("validation", "test"):
        packages = Counter(chat.source for name, chat in chats if name == split)
        even = sizes[split] / sum(row["split"] == split for row in note["packages"].values())
        assert set(packages.values()) <= {math.floor(even), math.ceil(even)}
    assert note["rows"] == note["usable"] + sum(note["left_out"].values())
    others, _ = choose_shipped(shipped(kind, **sizes, max_chars=500, edition=edition, seed=1))
    assert {chat.messages[1]["content"] for _, chat in others} != {chat.messages[1]["content"] for _, chat in chats}


@pytest.mark.parametrize(
    ("kind", "first", "known"), [("docstrings", "a01451e04333", 33), ("documentation", "078fcca5639d", 34)]
)
def test_the_first_edition_stays_as_it_was_and_the_second_adds_test_packages(kind, first, known):
    sizes = {"train": 400, "validation": 64, "test": 10 * known}
    before, note = choose_shipped(shipped(kind, **sizes))
    old = [(split, chat.source, chat.messages) for split, chat in before]
    assert digest(old) == first, "the examples of edition 1, on which runs are published, must stay as they were"
    assert f" of {len(note['packages'])} Python packages" in note["id"]
    after, note = choose_shipped(shipped(kind, **sizes | {"test": 830}, edition=2))
    new = [(split, chat.source, chat.messages) for split, chat in after]
    assert f" of {len(note['packages'])} Python packages" in note["id"]
    assert new[:464] == old[:464]
    packages = [Counter(source for split, source, _ in rows if split == "test") for rows in (old, new)]
    assert [len(counts) for counts in packages] == [known, 83]
    assert packages[0].keys() < packages[1].keys()
    assert {*packages[0].values(), *packages[1].values()} == {10}
    with pytest.raises(UserError, match=f"found 830 test examples .* in the {kind}; 831 are needed"):
        choose_shipped(shipped(kind, test=831, edition=2))


def test_shipped_text_has_an_identity_and_too_few_examples_are_refused(tmp_path, monkeypatch):
    assert [dataset_id(shipped(kind)) for kind in KINDS] == ["beff78e5", "881d54f7"]
    assert [dataset_id(shipped(kind, edition=2)) for kind in KINDS] == ["8cc27566", "be108885"]
    assert dataset_id(shipped(seed=1)) != dataset_id(shipped())
    build_dataset(shipped(), tmp_path / "made.parquet")
    note = about(tmp_path / "made.parquet")
    assert note["packages"]["rich"]["licence"] == "MIT"
    asked, answered = (turn["content"] for turn in next(read_dataset(tmp_path / "made.parquet"))["messages"])
    assert asked.startswith("What does this Python function do?\n\ndef ")
    assert answered.endswith(".")
    with pytest.raises(UserError, match=r"and at most 10 of a package, in the documentation; 9000 are needed"):
        choose_shipped(shipped("documentation", test=9000))
    monkeypatch.setattr(sft, "__file__", str(tmp_path / "sft.py"))
    (tmp_path / "docstrings.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="docstrings.parquet was changed after it was installed"):
        choose_shipped(shipped())
