"""A hundred thousand chats in the form of Tulu3 are made and tokenized in bounded memory; this takes minutes."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ..hub.repositories import TULU3, tulu3_row, write_card

pytestmark = pytest.mark.long

# Reports the peak of the process's anonymous memory, and the seconds, of making a dataset and its token cache. Pages of
# mapped files do not count, since the system reclaims them when it needs memory.
WORK = """
import json, sys, threading, time
from pathlib import Path
from lorabench.config.inputs import HubDataset
from lorabench.config.inputs import TinyModel
from lorabench.data.sft import build_dataset
from lorabench.data.tokens import Limits, cache_key, read_tokens, write_tokens
from lorabench.models.base import load_tokenizer
from lorabench.training.loss import collate
from lorabench.training.run import data_order

def own():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

peak, done = 0.0, False
def watch():
    global peak
    while not done:
        peak = max(peak, own())
        time.sleep(0.02)

folder, rows, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tokenizer = load_tokenizer(TinyModel(kind="tiny"))
spec = HubDataset(kind="hub", id="allenai/tulu-3-sft-mixture", path=str(folder), train=rows * 8 // 10,
                  validation=500, test=500, max_chars=20_000, mean_tokens=300)
report = {}
threading.Thread(target=watch, daemon=True).start()
def stage(name, work):
    global peak
    peak, start = own(), time.perf_counter()
    result = work()
    report[name] = {"MB": round(peak), "s": time.perf_counter() - start}
    return result
data, cache = folder / "made.parquet", folder / "cache.safetensors"
stage("dataset", lambda: build_dataset(spec, data))
stage("tokens", lambda: write_tokens(data, tokenizer, cache, Limits(100_000), processes))
split = stage("read", lambda: read_tokens(cache, cache_key(tokenizer, data)))["train"]
order = data_order(len(split), 20, 32, 0)
stage("batches", lambda: [collate(split, order[step]) for step in range(20)])
report["rows"], report["tokens_in_all"] = len(split), int(split.offsets[-1])
print(json.dumps(report))
"""


def write_rows(root, count):
    """Write chats of 600 characters on average, a few of them ten times as long."""
    rng = random.Random(0)
    words = [f"w{number:x}" for number in range(1, 30)]

    def text(number):
        length = round(rng.lognormvariate(4.3, 0.8))
        return f"{number} " + " ".join(rng.choices(words, k=length))

    folder = root / "allenai/tulu-3-sft-mixture"
    write_card(folder, {"default": {"train": "data/train-*"}})
    (folder / "data").mkdir()
    rows = (tulu3_row(number, text(number), text(number)) for number in range(count))
    schema = pa.schema(list(TULU3.items()))
    with pq.ParquetWriter(folder / "data/train-00000-of-00001.parquet", schema) as writer:
        while chunk := list(islice(rows, 1000)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))


def measured(root, rows, processes=1):
    write_rows(root, rows)
    command = [sys.executable, "-c", WORK, str(root), str(rows), str(processes)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(result.stdout)
    logging.info("%d rows: %s", rows, report)
    return report


def test_memory_does_not_grow_with_the_dataset(tmp_path):
    few, many = (measured(tmp_path / str(rows), rows) for rows in (10_000, 100_000))
    assert many["rows"] == 80_000
    assert many["tokens_in_all"] > 8 * few["tokens_in_all"]
    for stage in ("dataset", "tokens", "read", "batches"):
        assert many[stage]["MB"] - few[stage]["MB"] < 100, stage
    # A cache is mapped, not read.
    assert many["read"]["s"] < 1.0
