"""Lanes of full fine-tuning: each computes and learns what a separate model would."""

from __future__ import annotations

import copy
import gc
from itertools import pairwise

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lorabench.config.models import TinyModel
from lorabench.models.base import load_model
from lorabench.models.lanes.full import can_stack_full, lane_state, stack_full
from lorabench.models.passes import recompute_activations
from lorabench.custom.finetune import nll_sum

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = ("llama-128", "qwen-64", "mistral", "qwen2", "tied", "gemma3", "gpt2")
NAMES = ("a", "b", "c")
EVEN, UNEVEN = (2, 2, 2), (1, 3, 2)
# The warning that a gradient's layout differs from its parameter's, in which case torch would copy it.
pytestmark = pytest.mark.filterwarnings("error")


def base(family):
    """Return a new model of a family; biases and norms are randomized, so that every weight matters."""
    torch.manual_seed(0)
    match family:
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**SIZES))
        case "qwen2" | "tied":
            model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=family == "tied"))
        case "gemma3":
            model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8))
        case "gpt2":
            off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, **off))
        case _:
            return load_model(TinyModel(kind="tiny", name=family)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.train()


def perturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    return model


def stacked(family, names=NAMES):
    """Return lanes with different weights, and a separate model for each."""
    model = base(family)
    alone = {name: perturb(copy.deepcopy(model), seed) for seed, name in enumerate(names)}
    stack = stack_full(model, names)
    with torch.no_grad():
        for name, lane in stack.lanes.items():
            for key, parameter in alone[name].named_parameters():
                place = lane.places[key]
                place.of(place.parameter).copy_(parameter)
    return stack, alone


def batch(rows, seed=1, width=13):
    # Some tokens are the padding token, whose embedding gets no gradient.
    return torch.randint(0, 96, (rows, width), generator=torch.Generator().manual_seed(seed))


def losses_of(stack, ids, counts):
    """Return the summed NLL of each lane, in nats."""
    with stack.rows.are(counts):
        hidden = stack.model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    with stack.rows.are([count * hidden.shape[1] for count in counts]):
        logits = stack.model.get_output_embeddings()(hidden.flatten(0, 1)).float()
    nll = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    return torch.stack([part.sum() for part in nll.view(len(ids), -1).split(counts)])


def backward(stack, ids, counts, dtype=None):
    with stack.rows.are(counts), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        losses = losses_of(stack, ids, counts)
        losses.sum().backward()
    return losses.detach()


def backward_alone(model, ids, dtype=None):
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = nll_sum(model, ids[:, :-1], ids[:, 1:])
        loss.backward()
    return loss.detach()


def assert_gradients(lane, model, tolerance):
    parameters = dict(model.named_parameters())
    assert list(lane.places) == list(parameters)
    for name, place in lane.places.items():
        gradient, expected = place.of(place.parameter.grad), parameters[name].grad
        assert expected.any(), name
        assert (gradient - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("counts", [EVEN, UNEVEN])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_lane_has_the_loss_and_gradients_of_a_model_of_its_own(family, counts):
    stack, alone = stacked(family)
    ids = batch(6)
    losses = backward(stack, ids, counts)
    for loss, part, (name, lane) in zip(losses, ids.split(counts), stack.lanes.items(), strict=True):
        torch.testing.assert_close(loss, backward_alone(alone[name], part), rtol=1e-5, atol=0)
        assert_gradients(lane, alone[name], 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_autocast_they_are_alike_to_the_precision_of_bf16(family):
    stack, alone = stacked(family)
    ids = batch(6)
    losses = backward(stack, ids, UNEVEN, torch.bfloat16)
    for loss, part, (name, lane) in zip(losses, ids.split(UNEVEN), stack.lanes.items(), strict=True):
        torch.testing.assert_close(loss, backward_alone(alone[name], part, torch.bfloat16), rtol=2e-3, atol=0)
        assert_gradients(lane, alone[name], 2e-2)


def test_gradients_of_parts_of_a_batch_add_up():
    stack, alone = stacked("tied")
    for seed in (1, 2):
        ids = batch(6, seed)
        backward(stack, ids, EVEN)
        for part, model in zip(ids.split(EVEN), alone.values(), strict=True):
            backward_alone(model, part)
    for name, lane in stack.lanes.items():
        assert_gradients(lane, alone[name], 1e-5)
        lane.zero_grad()
        assert not any(place.of(place.parameter.grad).any() for place in lane.places.values())


@pytest.mark.parametrize("counts", [EVEN, UNEVEN])
def test_recomputed_activations_change_nothing(counts):
    stack, alone = stacked("qwen-64")
    recompute_activations(stack.model)
    computed = []
    layer = stack.model.get_decoder().layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: computed.append(stack.rows.counts))
    ids = batch(6)
    backward(stack, ids, counts)
    assert computed == [counts, counts]
    for part, (name, lane) in zip(ids.split(counts), stack.lanes.items(), strict=True):
        backward_alone(alone[name], part)
        assert_gradients(lane, alone[name], 1e-5)


@pytest.mark.parametrize("gone", NAMES)
def test_the_others_go_on_when_one_is_dropped(gone):
    stack, alone = stacked("tied")
    parameters = {name: lane.parameters for name, lane in stack.lanes.items()}
    old = [StorageWeakRef(tensor.untyped_storage()) for tensor in (stack.shelf.values, stack.shelf.gradients)]
    stack.drop(gone)
    del alone[gone], parameters[gone]
    gc.collect()
    assert all(storage.expired() for storage in old)
    assert list(stack.lanes) == list(alone)
    ids = batch(4)
    backward(stack, ids, (2, 2))
    for part, (name, lane) in zip(ids.split(2), stack.lanes.items(), strict=True):
        assert all(a is b for a, b in zip(lane.parameters, parameters[name], strict=True))
        backward_alone(alone[name], part)
        assert_gradients(lane, alone[name], 1e-5)
    left, _ = list(stack.lanes)
    stack.drop(left)
    (last,) = stack.lanes
    stack.lanes[last].zero_grad()
    alone[last].zero_grad()
    backward(stack, ids, (4,))
    backward_alone(alone[last], ids)
    assert_gradients(stack.lanes[last], alone[last], 1e-5)


@pytest.mark.parametrize("family", ["qwen-64", "qwen2", "tied", "gpt2"])
def test_a_saved_lane_is_loaded_as_any_model(family, tmp_path):
    stack, alone = stacked(family)
    for name, lane in stack.lanes.items():
        stack.model.save_pretrained(tmp_path / name, state_dict=lane_state(stack.model, lane))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        expected = alone[name].state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        for key, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected[key]), key
        # Not larger than the model by itself.
        alone[name].save_pretrained(tmp_path / "alone")
        sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in (name, "alone")]
        assert sizes[0] == sizes[1]


def storages():
    """Return the bytes of the storages of all live tensors, by address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_nothing_but_the_shelf_is_held():
    model = base("llama-128")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    old = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
    before = storages()
    stack = stack_full(model, NAMES)
    assert all(storage.expired() for storage in old)
    shelf = {tensor.untyped_storage().data_ptr() for tensor in (stack.shelf.values, stack.shelf.gradients)}
    after = storages()
    assert sum(after[address] for address in shelf) == 2 * len(NAMES) * weights
    added = sum(size for address, size in after.items() if address not in shelf and address not in before)
    assert added <= buffers
    backward(stack, batch(6), EVEN)
    after = storages()
    assert sum(size for address, size in after.items() if address not in shelf and address not in before) <= buffers


@pytest.mark.parametrize("family", ["llama-128", "qwen-64", "tied"])
def test_training_in_lanes_is_training_alone(family):
    stack, alone = stacked(family)
    lrs = dict(zip(NAMES, (1e-3, 3e-3, 1e-4), strict=True))

    def adam(parameters, lr):
        return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    together = {name: adam(lane.parameters, lrs[name]) for name, lane in stack.lanes.items()}
    apart = {name: adam(model.parameters(), lrs[name]) for name, model in alone.items()}
    for step in range(20):
        ids = batch(6, seed=step)
        counts = UNEVEN if step % 5 == 4 else EVEN
        losses = backward(stack, ids, counts)
        for loss, part, (name, lane) in zip(losses, ids.split(counts), stack.lanes.items(), strict=True):
            torch.testing.assert_close(loss, backward_alone(alone[name], part), rtol=1e-5, atol=0)
            together[name].step()
            apart[name].step()
            lane.zero_grad()
            apart[name].zero_grad()
    for name, lane in stack.lanes.items():
        expected = torch.nn.utils.parameters_to_vector(alone[name].parameters()).detach()
        (weights,) = lane.parameters
        assert (weights - expected).norm() <= 1e-5 * expected.norm()


def test_with_autocast_weights_are_cast_again_when_they_have_changed():
    stack, alone = stacked("qwen2")
    steppers = [torch.optim.AdamW(lane.parameters, lr=1e-2, fused=True) for lane in stack.lanes.values()]
    steppers += [torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True) for model in alone.values()]
    ids = batch(6)

    def assert_alike():
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            losses = losses_of(stack, ids, EVEN)
            parts = zip(alone.values(), ids.split(EVEN), strict=True)
            expected = torch.stack([nll_sum(model, part[:, :-1], part[:, 1:]) for model, part in parts])
        torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
        return losses

    seen = [assert_alike()]
    for _ in range(2):
        backward(stack, ids, EVEN, torch.bfloat16)
        for model, part in zip(alone.values(), ids.split(EVEN), strict=True):
            backward_alone(model, part, torch.bfloat16)
        for stepper in steppers:
            stepper.step()
        seen.append(assert_alike())
    # Loading a checkpoint does the same.
    with torch.no_grad():
        for place, parameter in zip(stack.lanes["a"].places.values(), alone["a"].parameters(), strict=True):
            place.of(place.parameter).mul_(1.2)
            parameter.mul_(1.2)
    seen.append(assert_alike())
    # The change must be far above the tolerance.
    assert all((before[0] - after[0]).abs() > 0.02 * after[0] for before, after in pairwise(seen))


def test_with_autocast_weights_are_cast_once_for_many_passes():
    stack, _ = stacked("qwen2")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), stack.rows.are((1, 1, 1)):
        stack.model(input_ids=batch(3), use_cache=False)
        with torch.profiler.profile(record_shapes=True) as profile:
            stack.model(input_ids=batch(3), use_cache=False)
    casts = [event.input_shapes[0] for event in profile.events() if event.name == "aten::_to_copy"]
    weights = {(len(NAMES), *parameter.shape) for parameter in stack.model.parameters()}
    assert casts
    assert not weights & {tuple(shape) for shape in casts}


def test_a_lane_may_have_no_rows():
    stack, alone = stacked("gpt2")
    ids = batch(6)
    counts = (0, 4, 2)
    losses = backward(stack, ids, counts)
    assert losses[0] == 0
    assert not any(place.of(place.parameter.grad).any() for place in stack.lanes["a"].places.values())
    for part, (name, lane) in list(zip(ids.split(counts), stack.lanes.items(), strict=True))[1:]:
        backward_alone(alone[name], part)
        assert_gradients(lane, alone[name], 1e-5)


def test_the_model_keeps_names_type_and_sizes():
    model = base("tied")
    before = {name: (p.shape, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)}
    stack_full(model, NAMES)
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)} == before
    assert model.dtype == torch.float32


def test_experts_are_refused_but_for_one_lane():
    model = base("moe-128")
    assert not can_stack_full(model)
    with pytest.raises(ValueError, match="2 lanes can't share a Qwen3MoeForCausalLM"):
        stack_full(model, ("a", "b"))
    assert can_stack_full(base("llama-128"))
    stack, alone = stacked("moe-128", ("a",))
    ids = batch(4)
    losses = backward(stack, ids, (4,))
    torch.testing.assert_close(losses[0], backward_alone(alone["a"], ids), rtol=1e-5, atol=0)


def test_a_tensor_that_is_not_of_the_rows_is_refused():
    stack, _ = stacked("qwen2")
    with (
        stack.rows.are(EVEN),
        pytest.raises(ValueError, match=r"of shape \(7, 32\) can't be split among lanes of \(2, 2"),
    ):
        stack.model.lm_head(torch.zeros(7, 32))
