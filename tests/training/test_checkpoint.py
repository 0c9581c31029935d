"""How often a run writes its checkpoint: what a job that is killed can lose, whatever the disk."""

from itertools import pairwise

import pytest
import torch

from lorabench.training import checkpoint
from lorabench.training.checkpoint import Checkpoint


@pytest.mark.parametrize(
    ("writing", "between"),
    [
        (1.0, 300.0),  # A fast disk: `execution.checkpoint_minutes`.
        (480.0, 24_000.0),  # 96 GB at 200 MB/s, the weights and moments of full fine-tuning of 8B.
    ],
)
def test_a_killed_job_loses_at_most_fifty_times_what_a_checkpoint_takes(tmp_path, monkeypatch, writing, between):
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: clock[0])
    write = checkpoint.write_tensors

    def slow(*given):
        clock[0] += writing
        write(*given)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([parameter])
    saving, step, saved = Checkpoint(tmp_path / "checkpoint.safetensors", "a-run", 300.0), 60.0, []
    while len(saved) < 4:
        clock[0] += step
        if saving.due():
            started = clock[0]
            saving.save({"weight": parameter}, optimizer, {"step": 1})
            saved.append((started, clock[0]))
    assert saved[0][0] == 300
    lost = [end - begin for (_, begin), (_, end) in pairwise(saved)]
    assert between + writing <= max(lost) <= between + writing + step
    assert writing * len(lost) <= 0.02 * (saved[-1][1] - saved[0][1])
