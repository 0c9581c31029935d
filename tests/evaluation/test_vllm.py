"""The same scores from vLLM as from this project's own backend, in fp32 on the tiny base."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lorabench.config.loading import load_preset
from lorabench.config.models import PathModel
from lorabench.evaluation import catalog
from lorabench.evaluation.pretraining import heldout_documents
from lorabench.evaluation.runner import evaluate_job, lm_eval_model, run_tasks, vllm_lm_eval_model
from lorabench.models.base import load_model, load_tokenizer, model_folder
from lorabench.models.vllm_support import CPU_HEAD_SIZES, LORA_RANKS
from lorabench.planning.plan import make_plan

from .conftest import RAW, Prepared

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; docs/vllm.md says how"),
]

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End a test's engine, which would otherwise end in the middle of the next one, and undo what it changed."""
    from vllm.distributed import cleanup_dist_env_and_memory

    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)
    yield
    gc.collect()
    cleanup_dist_env_and_memory()


def agree(own: pd.DataFrame, vllm: pd.DataFrame) -> None:
    """Compare scores: likelihoods, which have no standard error here, and accuracies."""
    keys = ["task", "metric", "filter"]
    own, vllm = (frame.set_index(keys) for frame in (own, vllm))
    assert own.index.equals(vllm.index)
    assert own["stderr"].notna().any()
    difference = (vllm["value"] - own["value"]).abs()
    assert (difference <= own["stderr"].fillna(1e-3 * own["value"])).all()


def test_vllm_computes_what_is_said_of_it():
    from vllm.config.lora import MaxLoRARanks
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()
    assert get_args(MaxLoRARanks) == LORA_RANKS


@pytest.mark.parametrize("method", ["lora", "fullft"])
def test_a_run_has_the_same_scores(trained: Prepared, method: str):
    # A preset's results are in a folder of its file's name.
    preset = Path("vllm/mine.yaml")
    preset.parent.mkdir(exist_ok=True)
    preset.write_text(yaml.safe_dump(RAW | {"execution": RAW["execution"] | {"sampler": "vllm"}}))
    other = Prepared(make_plan(load_preset(str(preset))), trained.layout)
    evaluate_job(trained.plan, trained.job(method), trained.layout)
    command = ["step", "evaluate", other.job(method).eval_id, "--preset", str(preset)]
    subprocess.run([sys.executable, "-m", "lorabench.cli", *command], check=True)
    tables = {}
    for name, prepared in (("own", trained), ("vllm", other)):
        job = prepared.job(method)
        tables[name] = [
            pq.read_table(path(job)).to_pandas() for path in (prepared.layout.evals, prepared.layout.samples)
        ]
        assert (tables[name][0]["sampler"] == name).all()
    agree(tables["own"][0], tables["vllm"][0])
    assert "vllm" in json.loads(tables["vllm"][0]["versions"][0])
    assert tables["own"][0]["run_id"].equals(tables["vllm"][0]["run_id"])
    generated = [samples[samples["filter"] != "none"]["response"].tolist() for _, samples in tables.values()]
    assert generated[0] == generated[1]


def test_a_base_reads_the_same_prompts_and_ends_its_answers_alike(trained: Prepared, tmp_path):
    """Prompts are longer than the model takes, and its configuration has a penalty and a second token that ends."""
    from lm_eval.api.instance import Instance

    tiny, evaluation, layout = trained.plan.preset.models["tiny"], trained.plan.preset.evaluation, trained.layout
    folder = shutil.copytree(model_folder(tiny), tmp_path / "base")
    tokenizer = load_tokenizer(tiny)
    texts = list(islice(heldout_documents(), 40))
    [*_, end] = tokenizer.encode(" the")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end], "repetition_penalty": 1.2}))
    spec = PathModel(kind="path", path=str(folder), parameters=1, hidden_size=1)
    backends = {
        "own": lm_eval_model(load_model(spec), tokenizer, 4, None),
        "vllm": vllm_lm_eval_model(spec, None, layout, 4, None, CPU),
    }
    index = catalog.task_index(evaluation.tasks)
    loaded = [catalog.load_task(index, task, layout) for task in evaluation.tasks]
    tables = {}
    for name, lm in backends.items():
        rows, _ = run_tasks(lm, index, loaded, evaluation, name)
        tables[name] = pd.DataFrame(rows)
    agree(tables["own"], tables["vllm"])

    long = ["".join(texts[:n]) for n in (1, 5, 10, 40)]
    kinds: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood_rolling": [(text,) for text in long],
        "loglikelihood": [(text, texts[-1]) for text in long],
        "generate_until": [
            (text, {"until": until, "max_gen_toks": 40, "do_sample": False})
            for text in [*long, *(text[:30] for text in texts[:8])]
            for until in (["<|end|>"], [" a", "."])
        ],
    }
    for kind, arguments in kinds.items():
        requests = [Instance(kind, {}, arguments_of, i) for i, arguments_of in enumerate(arguments)]
        own, vllm = (getattr(lm, kind)(requests, disable_tqdm=True) for lm in backends.values())
        if kind == "generate_until":
            assert own == vllm
            assert len({len(answer) for answer in own}) > 3
        else:
            assert vllm == [pytest.approx(value, rel=1e-4) for value in own]
