"""A whole evaluation on the tiny base: its tables, agreement with the project's own NLL, determinism."""

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from lorabench.cli.commands import app
from lorabench.config.inputs import PathModel, TinyModel
from lorabench.data.sft import read_dataset
from lorabench.data.tokens import TokenizedSplit, encode_chat
from lorabench.errors import UserError
from lorabench.evaluation import catalog
from lorabench.evaluation.runner import SAMPLES, best_record, evaluate_job, run_tasks, transformers_model
from lorabench.models.base import load_model, load_tokenizer
from lorabench.models.lora import add_lora
from lorabench.runs import EvalJob
from lorabench.store.run_folder import RunFolder
from lorabench.store.schemas import EVALS
from lorabench.training.loss import mean_nll
from lorabench.training.run import Machine
from lorabench.utils.files import write_json

from ..training.conftest import write_tied
from .conftest import Prepared

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def scores(trained: Prepared, job: EvalJob) -> pd.DataFrame:
    assert pq.read_schema(trained.layout.evals(job)).equals(EVALS)
    assert pq.read_schema(trained.layout.samples(job)).equals(SAMPLES)
    return pq.read_table(trained.layout.evals(job)).to_pandas()


def row_of(frame: pd.DataFrame, task: str, filter_name: str = "none") -> Any:
    return frame[(frame["task"] == task) & (frame["filter"] == filter_name)].iloc[0]


def split_of(encoded: list[tuple[list[int], list[bool]]]) -> TokenizedSplit:
    ids, scored = ([np.array(part) for part in column] for column in zip(*encoded, strict=True))
    return TokenizedSplit(np.concatenate(ids), np.concatenate(scored), np.cumsum([0, *map(len, ids)]))


def bits(frame: pd.DataFrame, task: str) -> float:
    return frame.loc[(frame["task"] == task) & (frame["metric"] == "bits_per_byte"), "value"].item()


@pytest.fixture(scope="module")
def base(trained: Prepared) -> pd.DataFrame:
    job = trained.job(None)
    evaluate_job(trained.plan, job, trained.layout)
    return scores(trained, job)


@pytest.fixture(scope="module")
def adapted(trained: Prepared) -> pd.DataFrame:
    """The scores of the LoRA sweep's best run, evaluated by the command that the workflow calls."""
    job = trained.job("lora")
    command = ["step", "evaluate", "--preset", "mine.yaml"]
    assert CliRunner().invoke(app, [*command, "nothing"]).exit_code == 2
    result = CliRunner().invoke(app, [*command, job.eval_id])
    assert result.exit_code == 0, result.output
    return scores(trained, job)


def test_scores_of_a_base_have_all_settings_they_were_made_with_and_samples_are_the_test_split(trained, base):
    assert base[["run_id", "method", "lr", "dataset"]].isna().all().all()
    worked = base[base["task"] == "lorabench_worked"]
    assert set(worked["filter"]) == {"strict-match", "flexible-extract"}
    metrics = {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert set(base.loc[base["task"] == "lorabench_pretraining", "metric"]) == metrics
    assert base[["about", "value", "higher_is_better", "n_samples", "num_fewshot", "task_version"]].notna().all().all()
    assert (set(base["eval_batch_size"]), set(base["sampler"])) == ({4}, {"own"})
    assert base["stderr"].notna().equals(base["metric"] == "exact_match")
    assert base["template_sha256"].notna().equals(base["about"] == "learned")
    assert row_of(base, "lorabench_worked", "strict-match")["n_samples"] == 6
    assert row_of(base, "lorabench_pretraining")["n_samples"] == 8
    assert {"lm_eval", "torch", "transformers"} <= json.loads(base["versions"][0]).keys()
    assert json.loads(row_of(base, "lorabench_arithmetic")["task_config"])["generation_kwargs"]["max_gen_toks"] == 8
    samples = pq.read_table(trained.layout.samples(trained.job(None))).to_pandas()
    _, rows, _ = instruct_test(trained)
    answers = samples[samples["task"] == "lorabench_instruct"].sort_values("doc_id")
    assert answers["target"].tolist() == [row["messages"][1]["content"].strip() for row in rows[:6]]
    hits = [json.loads(text)["exact_match"] for text in answers["metrics"]]
    assert np.mean(hits) == row_of(base, "lorabench_instruct")["value"]
    assert hits == (answers["response"].str.strip() == answers["target"]).tolist()


def test_an_adapter_is_loaded_and_its_run_is_named(trained, base, adapted):
    record, first = best_record(trained.job("lora"), trained.layout), adapted.iloc[0]
    assert (first["method"], first["rank"], first["dataset"], first["seed"]) == ("lora", 4, "instruct", 0)
    assert (first["run_id"], first["lr"]) == (record["run_id"], record["spec"]["lr"])
    assert first["final_test_nll"] == record["outcome"]["final_test_nll"]
    assert bits(adapted, "lorabench_pretraining") != pytest.approx(bits(base, "lorabench_pretraining"), rel=1e-3)
    assert bits(adapted, "lorabench_instruct_bits") < bits(base, "lorabench_instruct_bits")


def instruct_test(trained: Prepared) -> tuple[Any, list[Any], list[tuple[list[int], list[bool]]]]:
    """Return the tokenizer, the test split, and its encoded rows."""
    tokenizer = load_tokenizer(trained.plan.preset.models["tiny"])
    rows = [row for row in read_dataset(trained.layout.dataset("instruct")) if row["split"] == "test"]
    return tokenizer, rows, [encode_chat(tokenizer, row["messages"]) for row in rows]


def nats_per_token(bits_per_byte: float, texts: list[str], split: TokenizedSplit) -> float:
    return bits_per_byte * math.log(2) * sum(len(text.encode()) for text in texts) / int(split.scored.sum())


@pytest.mark.parametrize("method", [None, "lora", "fullft"])
def test_nll_of_lm_eval_is_this_projects(trained, method):
    from lm_eval.api.instance import Instance

    record = best_record(trained.job(method), trained.layout) if method else None
    tokenizer, rows, encoded = instruct_test(trained)
    lm = transformers_model(trained.plan.preset.models["tiny"], record, trained.layout, tokenizer, 4, None, CPU)
    split = split_of(encoded)
    own = mean_nll(lm.model, split, Machine(CPU, 2048))
    requests = []
    for number, (question, answer) in enumerate(row["messages"] for row in rows):
        pair = lm.apply_chat_template([question]), answer["content"] + tokenizer.eos_token
        requests.append(Instance("loglikelihood", {}, pair, number))
    theirs = -sum(value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)) / split.scored.sum()
    assert theirs == pytest.approx(own, abs=1e-3)
    if record is not None:
        assert own == pytest.approx(record["outcome"]["final_test_nll"], abs=1e-3)


def test_likelihoods_of_texts_and_answers_are_their_nll(trained, base):
    model = load_model(trained.plan.preset.models["tiny"])
    tokenizer, rows, encoded = instruct_test(trained)
    # A rolling likelihood starts from the end token.
    texts = pq.read_table(trained.layout.pretraining)["text"].to_pylist()
    ids = [[tokenizer.eos_token_id, *tokenizer.encode(text)] for text in texts]
    split = split_of([(text, [False] + [True] * (len(text) - 1)) for text in ids])
    own = mean_nll(model, split, Machine(CPU, 2048))
    assert nats_per_token(bits(base, "lorabench_pretraining"), texts, split) == pytest.approx(own, abs=1e-3)
    # Bits of right answers do not count the end token.
    without = [[on and i != tokenizer.eos_token_id for i, on in zip(*text, strict=True)] for text in encoded]
    split = split_of([(ids, scored) for (ids, _), scored in zip(encoded, without, strict=True)])
    own = mean_nll(model, split, Machine(CPU, 2048))
    answers = [row["messages"][1]["content"] for row in rows]
    assert nats_per_token(bits(base, "lorabench_instruct_bits"), answers, split) == pytest.approx(own, abs=1e-3)


def test_an_adapter_on_an_unembedding_leaves_the_embedding_that_it_is_alone(tmp_path):
    """If the update were merged into the shared weight, it would change both layers."""
    folder = tmp_path / "tied"
    write_tied(folder)
    spec = PathModel(kind="path", path=str(folder), parameters=1, hidden_size=1)
    adapted = add_lora(load_model(spec), rank=4, placement="all", alpha=32.0, include_unembedding=True, seed=0).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    layout = SimpleNamespace(runs=tmp_path / "runs")
    adapted.save_pretrained(RunFolder(layout.runs, "run").weights, save_embedding_layers=False)
    record = {"run_id": "run", "spec": {"method": "lora"}, "outcome": {}}
    tokenizer = load_tokenizer(TinyModel(kind="tiny"))
    wrapped = transformers_model(spec, record, layout, tokenizer, 4, None, CPU).model.eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(wrapped(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def evaluated(trained: Prepared, batch_size: int, tokenizer: Any, names: list[str] | None = None) -> tuple[Any, Any]:
    """Return the scores and samples of the base on the tasks, or on those that are named."""
    plan, layout = trained.plan, trained.layout
    tasks = [task for task in plan.preset.evaluation.tasks if names is None or task.name in names]
    index = catalog.task_index(tasks)
    loaded = [catalog.load_task(index, task, layout) for task in tasks]
    lm = transformers_model(plan.preset.models["tiny"], None, layout, tokenizer, batch_size, None, CPU)
    return run_tasks(lm, index, loaded, plan.preset.evaluation, "own")


def test_scores_do_not_depend_on_batch_size_or_on_what_came_before_or_on_chance(trained, base, adapted):
    from langdetect import detect_langs

    tokenizer = load_tokenizer(trained.plan.preset.models["tiny"])
    # The fixtures evaluated first the base, then an adapter.
    frames = [base, *(pd.DataFrame(evaluated(trained, batch_size, tokenizer)[0]) for batch_size in (4, 3))]
    alone, same, other = (frame.set_index(["task", "metric", "filter"])["value"] for frame in frames)
    pd.testing.assert_series_equal(same, alone, check_exact=True)
    exact = alone.index.get_level_values("metric") == "exact_match"
    pd.testing.assert_series_equal(other[exact], alone[exact], check_exact=True)
    pd.testing.assert_series_equal(other, alone, rtol=1e-5)
    # IFEval's language detector draws at random; an evaluation seeds it.
    assert len({str(detect_langs("an in das")) for _ in range(20)}) == 1
    # A model without a chat template gets prompts as they are.
    tokenizer.chat_template = None
    rows, samples = evaluated(trained, 4, tokenizer, ["lorabench_arithmetic"])
    assert [row["template_sha256"] for row in rows] == [None]
    assert len(samples) == 6


def test_weights_that_are_missing_damaged_or_of_another_base_are_named(trained):
    job, layout = trained.job("lora"), trained.layout
    record = best_record(job, layout)
    folder = RunFolder(layout.runs, record["run_id"])
    path, text = folder.weights / "adapter_model.safetensors", folder.record.read_text()
    whole = path.read_bytes()

    def refused(message):
        with pytest.raises(UserError, match=f"run {record['run_id']} {message}"):
            evaluate_job(trained.plan, job, layout)

    try:
        path.unlink()
        refused("are missing")
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        refused(
            "is damaged .weights/adapter_model.safetensors is not the file that the run wrote.; delete .* to have it"
        )
        path.write_bytes(whole)
        other = record["environment"] | {"model_sha256": {"model.safetensors": "0" * 64}}
        write_json(record | {"environment": other}, folder.record)
        refused("was trained from the weights {'model.saf")
    finally:
        path.write_bytes(whole)
        folder.record.write_text(text)
