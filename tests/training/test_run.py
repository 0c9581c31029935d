"""Gradients and kernels; runs that diverge or are resumed; bases held in bf16; the record of the code; a GPU."""

import math
import random
import subprocess
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lorabench.config.experiments import Protocol
from lorabench.config.inputs import PathModel, TinyModel
from lorabench.config.loading import load_preset
from lorabench.doctor.bench import random_split
from lorabench.errors import UserError
from lorabench.models import fused
from lorabench.models.attention import attend_in_blocks
from lorabench.models.base import config_of, load_model
from lorabench.models.lora import hold_in_bf16
from lorabench.models.passes import trained_parameters, without_peft
from lorabench.models.specs import Dimensions
from lorabench.planning.plan import make_plan
from lorabench.runs import Run
from lorabench.store.layout import Layout
from lorabench.training import context, loss
from lorabench.training.context import Base, SweepContext
from lorabench.training.distributed import Processes
from lorabench.training.loss import scored_by_example
from lorabench.training.run import NONDETERMINISTIC, Machine, clip_gradient, deterministic, machine_of
from lorabench.utils.gpus import ON_CPU

from .conftest import DEVICES, BrokenError, breaking_at, condition_of, needs_gpu, series, sweep_of, train, write_tied


@pytest.mark.parametrize("sizes", [[], [(2000, 500), 2_000_000]])
def test_the_norm_is_exact_however_long_a_tensor_and_limits_the_gradient_but_never_raises_it(sizes):
    """Some tensors are long in one dimension, and one has no gradient."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (*sizes, 3)]
    before = [torch.randn_like(parameter) for parameter in parameters[:-1]]
    for parameter, gradient in zip(parameters, before, strict=False):
        parameter.grad = gradient.clone()
    norm = sum(float(gradient.double().square().sum()) for gradient in before) ** 0.5
    for limit in (None, 2 * norm + 1):
        assert clip_gradient(parameters, limit) == pytest.approx(norm, rel=1e-6)
        assert all(torch.equal(p.grad, old) for p, old in zip(parameters, before, strict=False))
    assert clip_gradient(parameters, 0.5) == pytest.approx(norm, rel=1e-6)
    for parameter, old in zip(parameters, before, strict=False):
        torch.testing.assert_close(parameter.grad, 0.5 * old / norm, rtol=1e-5, atol=0)


def modes() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


# The CPU has operations with and without deterministic kernels too, so what is done for a GPU is tested on it.
def test_kernels_are_deterministic_on_a_gpu_and_an_operation_without_such_is_named(monkeypatch):
    monkeypatch.delenv(NONDETERMINISTIC, raising=False)
    with deterministic(torch.device("cpu")):
        assert modes() == (False, False, True)
    gpu, values = torch.device("cuda"), torch.zeros(3)
    # Fused attention's backward pass is deterministic only if the mode is strict.
    with deterministic(gpu):
        assert modes() == (True, False, False)
    with pytest.raises(RuntimeError, match="illegal"), deterministic(gpu):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    sentence = "^put_ has no deterministic kernel on this GPU; with LORABENCH_NONDETERMINISTIC=1 in the environment"
    with pytest.raises(UserError, match=sentence), deterministic(gpu):
        values.put_(torch.tensor([1]), torch.ones(1))
    assert modes() == (False, False, True)
    monkeypatch.setenv(NONDETERMINISTIC, "1")
    with deterministic(gpu):
        assert values.put_(torch.tensor([1]), torch.ones(1)).tolist() == [0, 1, 0]


def test_a_preset_for_a_gpu_is_not_computed_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(ON_CPU, raising=False)
    plan = make_plan(load_preset("smollm2"))
    with pytest.raises(UserError, match=r"^execution\.gpu is A100-80GB, .* set gpu to null and gflops to"):
        machine_of(plan, Processes(1, 2))
    monkeypatch.setenv(ON_CPU, "1")
    assert machine_of(plan).device == torch.device("cpu")
    monkeypatch.delenv(ON_CPU)
    assert machine_of(make_plan(load_preset("smoke"))).device == torch.device("cpu")


def test_a_loss_that_is_not_a_number_ends_as_diverged(data, tmp_path, monkeypatch):
    real, calls = loss.add_gradient, []

    def broken(*arguments):
        calls.append(None)
        # A batch of one example is one part, so that calls count steps.
        return real(*arguments) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(loss, "add_gradient", broken)
    outcome, model = train(condition_of("lora", 4, steps=20, batch_size=1), data, tmp_path, lr=1e-3)
    assert (outcome.status, outcome.diverged_at) == ("diverged", 3)
    assert (outcome.final_valid_nll, outcome.final_test_nll) == (None, None)
    assert max(point.step for point in outcome.curve) == 3
    assert series(outcome, "nll")[-1] is None
    # The poisoned gradient was never applied.
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_run_that_gets_no_gradient_ends_with_one_sentence(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "add_gradient", lambda model, *others: torch.tensor(3.0))
    with pytest.raises(UserError, match=r"the gradient of step 1 is exactly 0 at a loss of 3\.0000 nats"):
        train(condition_of("lora", 4, steps=2, batch_size=1), data, tmp_path, lr=1e-3)


@pytest.mark.parametrize(
    ("method", "rank", "device"),
    [
        ("fullft", None, "cpu"),
        ("pissa", 4, "cpu"),
        pytest.param("fullft", None, "cuda", marks=needs_gpu),
        pytest.param("lora", 4, "cuda", marks=needs_gpu),
    ],
)
def test_resumed_equals_unbroken(method, rank, device, data, tmp_path):
    """The 5 steps of 8 are an epoch, so the description length is among the numbers."""
    condition = condition_of(method, rank, steps=5, batch_size=8)
    options = {"lr": 3e-3, "spec": TinyModel(kind="tiny", name="llama-64"), "device": torch.device(device)}
    if device == "cuda":
        options["protocol"] = Protocol(precision="bf16")
    whole, model = train(condition, data, tmp_path / "whole", **options)
    with pytest.raises(BrokenError):
        train(condition, data, tmp_path / "broken", checkpoint_seconds=0, tick=breaking_at(4), **options)
    resumed_steps = []
    resumed, resumed_model = train(condition, data, tmp_path / "broken", tick=resumed_steps.append, **options)
    assert resumed_steps == [4, 5]
    assert {**vars(resumed), "wall_s": 0} == {**vars(whole), "wall_s": 0}
    assert whole.first_epoch_nats > 0
    assert whole.first_epoch_scored_tokens == scored_by_example(data["train"]).sum()
    for (name, a), (_, b) in zip(model.named_parameters(), resumed_model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize(("method", "rank"), [("fullft", None), ("lora", 16)])
@pytest.mark.parametrize("device", DEVICES)
def test_steps_on_long_sequences_come_out_again_bit_for_bit(device, method, rank, fault, tmp_path, monkeypatch):
    """Attention adds over many blocks. As a fault one number of each gradient differs in its last bits."""
    sizes, length = Dimensions(1024, 4, 16, 8, 128, 3072, 32_768, query_key_norms=True), 4096
    if device == "cpu":
        sizes, length = Dimensions(64, 2, 4, 2, 16, 96, 1024, query_key_norms=True), 200
    data = {"train": random_split(8, length, sizes.vocabulary)}
    data |= dict.fromkeys(("validation", "test"), random_split(1, length, sizes.vocabulary))
    real = loss.add_gradient

    def broken(model, *arguments):
        value, weight = real(model, *arguments), trained_parameters(model).popitem()[1]
        weight.grad.view(-1)[0] += weight.grad.norm() * 1e-6 * random.random()
        return value

    if fault:
        monkeypatch.setattr(loss, "add_gradient", broken)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config_of(sizes, context=8192), dtype=torch.float32)
        attend_in_blocks(model.train())
        if device == "cuda":
            fused.fuse(model)
        condition, options = condition_of(method, rank, steps=4, batch_size=2), {"max_batch_tokens": length}
        options |= {"protocol": Protocol(precision="bf16"), "device": torch.device(device), "model": model}
        outcome, trained = train(condition, data, tmp_path, 1e-3, **options)
        assert outcome.status == "done"
        weights = {name: weight.detach().clone() for name, weight in trained_parameters(trained).items()}
        results.append((series(outcome, "nll"), outcome.test_losses, weights))
    (losses, tests, first), (others, other_tests, second) = results
    same = losses == others and tests == other_tests and all(torch.equal(first[name], second[name]) for name in first)
    assert same is not fault


def test_changes_of_the_code_that_are_no_utf_8_are_kept_byte_for_byte(tmp_path, monkeypatch):
    repository, patches = tmp_path / "repository", tmp_path / "patches"
    file = repository / "lorabench/note.txt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"before\n")
    monkeypatch.setattr(context, "_REPOSITORY", repository)
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for arguments in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "first")):
        subprocess.run(["git", "-C", str(repository), *arguments], check=True)
    clean = context.code_state(patches)
    assert (bool(clean["git_sha"]), clean["git_dirty_patch"]) == (True, None)
    file.write_bytes("größer\r\n".encode("latin-1"))
    state = context.code_state(patches)
    assert state["git_sha"] == clean["git_sha"]
    assert b"+gr\xf6\xdfer\r\n" in (patches / f"{state['git_dirty_patch']}.patch").read_bytes()


def layers_of(model):
    return without_peft(model).get_decoder().layers


def types_of(model):
    """Return the types of a model's weights by the last part of their modules' names."""
    return {name.split(".")[-2]: parameter.dtype for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("base", "placement"), [("moe-128", "all"), ("tied", "mlp")])
def test_training_gives_the_same_bits_with_a_base_in_bf16_and_recomputed_activations(base, placement, data, tmp_path):
    spec = TinyModel(kind="tiny", name="moe-128")
    if base == "tied":
        write_tied(tmp_path / "tied")
        spec = PathModel(kind="path", path=str(tmp_path / "tied"), parameters=1, hidden_size=1)
    condition = replace(condition_of("lora", 4, steps=2, batch_size=2), placement=placement)
    results = []
    for held in (False, True):
        model = load_model(spec)
        if base == "tied":
            # It has random weights, and those of published models are bf16 numbers.
            model.load_state_dict({name: weight.bfloat16() for name, weight in model.state_dict().items()})
        if held:
            hold_in_bf16(model)
            types = types_of(model)
            in_fp32 = {"embed_tokens", "input_layernorm"} | ({"experts", "gate"} if base == "moe-128" else set())
            assert {types[name] for name in in_fp32} == {torch.float32}
            in_bf16 = {"q_proj", "lm_head"} if base == "moe-128" else {"q_proj", "down_proj"}
            assert {types[name] for name in in_bf16} == {torch.bfloat16}
        options = {"protocol": Protocol(precision="bf16"), "keeping": 1 if held else None}
        results.append(train(condition, data, tmp_path / str(held), 3e-3, model=model, **options))
    (plain, trained), (other, held) = results
    recomputed = [[layer.gradient_checkpointing for layer in layers_of(model)] for model in (trained, held)]
    assert recomputed == [[False] * 3, [True, True, False]]
    assert other.curve == plain.curve
    assert other.test_losses == plain.test_losses
    own = trained_parameters(held)
    for name, weight in trained_parameters(trained).items():
        assert own[name].dtype == torch.float32
        assert torch.equal(own[name], weight), name


def test_weights_that_bf16_would_round_stay_in_fp32():
    model = load_model(TinyModel(kind="tiny", name="llama-64"))
    layer, other = (layer.mlp.up_proj for layer in layers_of(model)[:2])
    with torch.no_grad():
        layer.weight[3, 4] = 1 + 2**-12
    hold_in_bf16(model)
    assert (layer.weight.dtype, other.weight.dtype) == (torch.float32, torch.bfloat16)


def test_full_fine_tuning_starts_from_the_published_weights_after_lora_held_them_in_bf16():
    preset = load_preset("laptop").model_copy(update={"protocol": Protocol(precision="bf16")})
    machine = Machine(torch.device("cpu"), 4096, autocast=torch.bfloat16)
    plan, base, layout = make_plan(preset), Base(), Layout("laptop", preset)
    lora = sweep_of(plan, "lora")
    fullft = next(s for s in plan.sweeps if (s.condition.model, s.condition.rank) == (lora.condition.model, None))
    with base.trainable(SweepContext(plan, lora, layout, machine), Run(lora.condition, 1e-3, 0)) as model:
        assert types_of(model)["base_layer"] == torch.bfloat16
    with base.trainable(SweepContext(plan, fullft, layout, machine), Run(fullft.condition, 1e-3, 0)) as model:
        published = load_model(preset.models[lora.condition.model])
        for own, weight in zip(model.parameters(), published.parameters(), strict=True):
            assert own.dtype == torch.float32
            assert torch.equal(own, weight)
