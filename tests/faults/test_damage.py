"""Damaged files are reported before anything is trained, or are not used."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from lorabench.config.inputs import PathModel
from lorabench.errors import UserError
from lorabench.models.base import load_model
from lorabench.models.passes import trained_parameters
from lorabench.models.specs import shipped_folder
from lorabench.training.checkpoint import Checkpoint
from lorabench.utils.checked_tensors import read_tensors, write_tensors


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, place: int = -9) -> None:
    """Flip one bit, by default of the last tensor."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def flip_header(path: Path) -> None:
    flip(path, path.read_bytes().index(b'"step":"') + len(b'"step":"'))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_token_cache_is_reported_before_training(damage, place):
    path = place.layout.tokens("tiny", "instruct")
    damage(place.path(path))
    message = place.train("sft", status=2).splitlines()[-1]
    assert message.startswith(f"lorabench: token cache {path} ")
    assert message.endswith("; delete it to have it made again")
    assert not place.path(place.layout.runs).exists()


@pytest.mark.slow
def test_a_damaged_dataset_is_reported_by_its_readers(place):
    path = place.layout.dataset("instruct")
    cut(place.path(path))
    message = place.run("step", "tokens", "tiny", "instruct", status=2).splitlines()[-1]
    assert message.startswith(f"lorabench: {path} is damaged; delete it to have it made again")
    # A cache made before the damage does not hide it.
    assert "was made with another dataset" in place.train("sft", status=2)


def test_damaged_weights_of_a_base_are_reported(tmp_path):
    shutil.copytree(shipped_folder("llama-64"), tmp_path / "base")
    cut(tmp_path / "base/model.safetensors")
    with pytest.raises(UserError, match=f"model {tmp_path}/base has a damaged .safetensors file .*; get it again"):
        load_model(PathModel(kind="path", path=str(tmp_path / "base"), parameters=1, hidden_size=64))


def rewrite(path: Path, **about: str) -> None:
    tensors, header = read_tensors(path)
    write_tensors(path, {name: tensor.clone() for name, tensor in tensors.items()}, header | about)


def of_another_model(path: Path) -> None:
    Checkpoint(path, "mine", 0).save(*trained_model(width=4)[:2], {"step": 7})


def trained_model(width: int = 3) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer, torch.nn.Module]:
    """Return the parameters of a model after one step of Adam, the optimizer and the model."""
    torch.manual_seed(width)
    model = torch.nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(width)).sum().backward()
    optimizer.step()
    return trained_parameters(model), optimizer, model


REASONS = {
    cut: "can't be read (",
    flip: "is damaged (its checksum is not that of its content)",
    flip_header: "is damaged (its checksum is not that of its content)",
    partial(rewrite, run_id="other"): "is of run other, protocol 2",
    partial(rewrite, protocol_version="1"): "is of run mine, protocol 1",
    of_another_model: "is of a model with other parameters",
}


@pytest.mark.parametrize(("damage", "reason"), REASONS.items())
def test_a_checkpoint_that_can_not_be_used_changes_nothing(damage, reason, tmp_path, caplog):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint = Checkpoint(path, "mine", 0)
    checkpoint.save(*trained_model()[:2], {"step": 7})
    parameters, optimizer, model = trained_model()
    assert checkpoint.load(parameters, optimizer) == {"step": 7}
    damage(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    caplog.clear()
    assert checkpoint.load(parameters, optimizer) is None
    [message] = caplog.messages
    assert message.startswith(f"run mine starts again from step 1: checkpoint {path} ")
    assert reason in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
