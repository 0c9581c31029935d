"""About the same scores from lm-eval's model of vLLM as from transformers, in fp32 on the tiny base."""

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lorabench.config.loading import load_preset
from lorabench.evaluation.runner import evaluate_job
from lorabench.models.vllm_support import LORA_RANKS
from lorabench.planning.plan import make_plan

from .conftest import RAW, Prepared

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; docs/cluster.md says how"),
]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End a test's engine, which would otherwise end in the middle of the next one, and undo what it changed."""
    from vllm.distributed import cleanup_dist_env_and_memory

    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)
    yield
    gc.collect()
    cleanup_dist_env_and_memory()


def test_vllm_computes_what_is_said_of_it():
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == LORA_RANKS


@pytest.mark.parametrize("method", ["lora", pytest.param("fullft", marks=pytest.mark.long)])
def test_a_run_has_the_same_scores(trained: Prepared, method: str):
    # A preset's results are in a folder of its file's name.
    preset = Path("vllm/mine.yaml")
    preset.parent.mkdir(exist_ok=True)
    preset.write_text(yaml.safe_dump(RAW | {"execution": RAW["execution"] | {"sampler": "vllm"}}))
    other = Prepared(make_plan(load_preset(str(preset))), trained.layout)
    evaluate_job(trained.plan, trained.job(method), trained.layout)
    command = ["step", "evaluate", other.job(method).eval_id, "--preset", str(preset)]
    subprocess.run([sys.executable, "-m", "lorabench.cli", *command], check=True)
    own, vllm = (
        pq.read_table(prepared.layout.evals(prepared.job(method))).to_pandas() for prepared in (trained, other)
    )
    assert (set(own["sampler"]), set(vllm["sampler"])) == ({"own"}, {"vllm"})
    keys = ["run_id", "task", "metric", "filter"]
    assert own[keys].equals(vllm[keys])
    # Likelihoods have no standard error here.
    assert own["stderr"].notna().any()
    assert ((vllm["value"] - own["value"]).abs() <= own["stderr"].fillna(1e-3 * own["value"])).all()
    assert "vllm" in json.loads(vllm["versions"][0])
