"""Merged tables: rows of several folders are united, and a contradiction is refused in one sentence."""

from pathlib import Path

import pandas as pd
import pytest

from lorabench.config.loading import load_preset
from lorabench.data.identity import dataset_id, id_of_test
from lorabench.errors import UserError
from lorabench.figures.catalog import save_figure
from lorabench.store.io import write_csv
from lorabench.store.tables import Tables, merge

from ..handmade import evals_table, make_eval, make_run, make_sweep, runs_table

SETTINGS = [("fullft", None, None, 3.0e9, 0.3), ("lora", 1, "all", 2.1e9, 0.2), ("lora", 8, "all", 2.4e9, 0.2)]
COMPUTE = pd.DataFrame(SETTINGS, columns=["method", "rank", "placement", "linear_flops", "step_s"]).assign(model="tiny")
COMPUTE["rank"] = COMPUTE["rank"].astype("Int64")
RUNS = runs_table(make_sweep(None) + make_sweep(8) + make_sweep(8, dataset="worked"))
TEST_LOSSES = pd.DataFrame(
    [
        {"run_id": run_id, "example": number, "loss": 10.5 + number, "tokens": 4}
        for run_id in RUNS["run_id"].iloc[:2]
        for number in range(3)
    ]
)


def write(folder: Path, kind: str = "parquet", **tables: pd.DataFrame) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        if kind == "csv":
            write_csv(frame, folder / f"{name}.csv")
        else:
            frame.to_parquet(folder / f"{name}.parquet", index=False)
    return folder


def merged(*folders: Path) -> Tables:
    out = folders[0].parent / "out"
    merge(list(folders), out)
    return Tables.read(out)


def test_merging_again_changes_nothing(tmp_path):
    first = write(tmp_path / "first", "csv", runs=RUNS.iloc[:7], compute=COMPUTE.iloc[:2])
    second = write(tmp_path / "second", runs=RUNS.iloc[4:], compute=COMPUTE.iloc[1:], test_losses=TEST_LOSSES)
    once = tmp_path / "once"
    merge([first, second], once)
    files = {path.name: path.read_bytes() for path in once.iterdir()}
    names = {f"{name}.{kind}" for name in ("runs", "compute") for kind in ("csv", "parquet")}
    assert set(files) == names | {"test_losses.parquet"}
    merge([once, first, second], once)
    assert {path.name: path.read_bytes() for path in once.iterdir()} == files


def test_an_older_table_without_groups_takes_them_from_a_newer_one_of_the_same_runs(tmp_path):
    older = write(tmp_path / "older", test_losses=TEST_LOSSES)
    newer = write(tmp_path / "newer", test_losses=TEST_LOSSES.iloc[:3].assign(group=["a", "a", "b"]))
    groups = merged(older, newer).test_losses["group"]
    assert groups[:3].tolist() == ["a", "a", "b"]
    assert groups[3:].isna().all()
    other = write(tmp_path / "other", test_losses=TEST_LOSSES.assign(group="b"))
    with pytest.raises(UserError, match="has group = 'a' in .*newer and 'b' in .*other"):
        merged(newer, other)


def test_a_run_has_the_experiments_of_all_and_the_first_machine(tmp_path):
    here = runs_table([make_run(8, 1e-3, experiments=["rank"], host="here", wall_s=10.0)])
    there = runs_table([make_run(8, 1e-3, experiments=["batch_size", "rank"], host="there", wall_s=20.0)])
    [run] = merged(write(tmp_path / "a", runs=here), write(tmp_path / "b", runs=there)).runs.to_dict("records")
    assert list(run["experiments"]) == ["rank", "batch_size"]
    assert (run["host"], run["wall_s"]) == ("here", 10.0)


RUN = runs_table([make_run(8, 1e-3, run_id="abc", final_test_nll=2.25, tokenizer_sha256="aaa")])
NOT_ALIKE = "of tiny/instruct have different tokenizers, aaa, bbb: not comparable"
SAMPLERS = "scores of tiny have different samplers, own, vllm: not comparable"
SCORE, BASE = evals_table([make_eval(8, 0.5)]), evals_table([make_eval("base", 0.1)])


@pytest.mark.parametrize(
    ("name", "table", "other", "message"),
    [
        ("runs", RUN, RUN.assign(final_test_nll=2.5), "run_id abc has final_test_nll = 2.25 in {a} and 2.5 in {b}"),
        ("runs", RUN, RUN.assign(run_id="x", tokenizer_sha256="bbb"), NOT_ALIKE),
        ("compute", COMPUTE.assign(device="cpu"), COMPUTE, "the table compute in {b} has no column device"),
        ("evals", BASE, BASE.assign(value=0.2), "has value = 0.1 in {a} and 0.2 in {b}"),
        ("evals", SCORE, SCORE.assign(sampler="vllm"), SAMPLERS),
    ],
)
def test_tables_that_contradict_or_can_not_be_compared_are_refused(name, table, other, message, tmp_path):
    a, b = write(tmp_path / "a", **{name: table}), write(tmp_path / "b", **{name: other})
    with pytest.raises(UserError) as refused:
        merge([a, b], tmp_path / "out")
    assert str(refused.value).endswith(message.format(a=a, b=b))
    assert not (tmp_path / "out").exists()


def batch(folder: Path, number: int, test_data: str, **columns: str) -> Path:
    """Write the tables of a batch of runs, whose dataset differs in its test examples and whose base was evaluated."""
    first = 100 * number
    runs = runs_table([make_run(8, lr, first + n) for lr in (1e-3, 3e-3) for n in range(2)])
    runs = runs.assign(dataset_sha256=f"file {number}", test_data=test_data, **columns)
    scores = [make_eval("base", number / 8), make_eval(8, 0.5, run_id=runs["run_id"].iloc[0], seed=first)]
    losses = TEST_LOSSES.assign(run_id=runs["run_id"].iloc[0], example=range(len(TEST_LOSSES)), test_data=test_data)
    evals = evals_table(scores).assign(test_data=test_data)
    # A task whose data no seed changes, read from the batch's own folder.
    shared = {"task": "wikitext", "about": "forgotten", "source": None, "test_data": None}
    other = evals_table([make_eval("base", 0.5, task_config=f"{folder}/{number}", **shared)])
    evals = pd.concat([evals, other], ignore_index=True)
    return write(folder / str(number), runs=runs, evals=evals, test_losses=losses)


def test_batches_of_seeds_are_merged_with_the_scores_of_the_base_on_the_test_examples_of_each(tmp_path):
    tables = merged(batch(tmp_path, 1, "data@100"), batch(tmp_path, 2, "data@200"))
    assert tables.runs["seed"].tolist() == [100, 101, 100, 101, 200, 201, 200, 201]
    base = tables.evals[tables.evals["method"].isna() & tables.evals["source"].notna()]
    assert (tables.evals["task"] == "wikitext").sum() == 1
    assert base[["value", "test_data"]].to_numpy().tolist() == [[0.125, "data@100"], [0.25, "data@200"]]
    save_figure("learned_forgotten", [tmp_path / "1", tmp_path / "2"], tmp_path / "figures")
    plotted = pd.read_csv(tmp_path / "figures/learned_forgotten.csv")
    assert plotted.loc[plotted["arm"] == "base", "learned"].tolist() == pytest.approx([0.1875])


@pytest.mark.parametrize("test_data", ["other@200", "data@100", None])
def test_other_data_under_one_name_are_no_batch(tmp_path, test_data):
    folders = [batch(tmp_path, 1, "data@100"), batch(tmp_path, 2, test_data)]
    (folders[1] / "evals.parquet").unlink()
    with pytest.raises(UserError, match="runs of instruct have different datasets under one name"):
        merged(*folders)


def test_test_examples_are_identified_by_the_first_seed_where_they_depend_on_it():
    explored, held_out = load_preset("laptop"), load_preset("laptop@100")
    for name, spec in explored.sources.items():
        assert id_of_test(spec, 0) == dataset_id(spec)
        assert id_of_test(held_out.sources[name], 100) == f"{dataset_id(spec)}@100"
    [docstrings] = [spec for spec in load_preset("overnight@100").sources.values() if spec.kind == "docstrings"]
    assert id_of_test(docstrings, 100) == dataset_id(docstrings)
