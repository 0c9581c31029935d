"""The plan's seconds of a step on a GPU against the kernels that the project's own gradient starts.

The models have no content: they are built on the meta device and computed with `FakeTensorMode`. A kernel takes the
time of its FLOPs or of the bytes that it reads and writes, whichever is longer.
"""

import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM

from lorabench.config.loading import load_preset
from lorabench.models import fused
from lorabench.models.base import config_of
from lorabench.models.lora import add_lora, use_fast_products
from lorabench.models.passes import without_peft
from lorabench.models.specs import Dimensions, dimensions
from lorabench.planning.roofline import Parts, arm_seconds
from lorabench.training.loss import Batch, _nlls, add_gradient, of_tokens
from lorabench.utils.gpus import GPUS

H100 = GPUS["H100-80GB"]
ROWS, LENGTH = 8, 512
LLAMA = Dimensions(
    hidden=1024, layers=6, heads=16, kv_heads=4, head_dim=64, intermediate=3072, vocabulary=8192, in_bf16=True
)
QWEN = replace(LLAMA, heads=8, head_dim=128, query_key_norms=True)
# They compute nothing on a GPU, or reserve memory.
FREE = {"prim.device", "aten.detach", "aten.alias", "aten._local_scalar_dense", "aten._unsafe_view"}
FREE |= {f"aten.{name}" for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")}


class Kernels(TorchDispatchMode):
    """Adds up the seconds of all kernels in `parts`, by what takes them; a fused function is one kernel.

    Attention reaches a share of other products' FLOP/s.
    """

    def __init__(self, share):
        super().__init__()
        self.parts, self.inside, self.share = Counter(), False, share

    def add(self, part, inputs, outputs, flops=0.0):
        tensors = [leaf for leaf in tree_leaves((inputs, outputs)) if isinstance(leaf, torch.Tensor)]
        # What is expanded is read once.
        size = sum(tensor.untyped_storage().nbytes() if 0 in tensor.stride() else tensor.nbytes for tensor in tensors)
        self.parts[part] += max(flops / H100.products, size / H100.streaming)

    def one_kernel(self, function, *arguments):
        self.inside = True
        results = function(*arguments)
        self.inside = False
        # An argument that is returned is not written.
        new = [result for result in tree_leaves(results) if not any(result is argument for argument in arguments)]
        self.add("elementwise", arguments, new)
        return results

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results, packet, kwargs = func(*args, **(kwargs or {})), func._overloadpacket, kwargs or {}
        if self.inside or func.is_view or str(packet) in FREE:
            return results
        if "attention" in str(packet):
            # Two products forward and five backward with half of the keys.
            products = 5 if "backward" in str(packet) else 2
            self.add("attention", args, results, products * 2 * args[0].numel() * (LENGTH / 2) / self.share)
        elif packet is torch.ops.aten.addmm_:
            self.add("products", args, results, 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1])
        elif packet in flop_registry:
            self.add("products", args, results, flop_registry[packet](*args, **kwargs, out_val=results))
        else:
            self.add("elementwise", args, results)
        return results


def counted(sizes, rank, fuse, backward, monkeypatch):
    """Return the seconds of a pass for each token, all of them scored, and of each part."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(sizes, LENGTH), dtype=torch.float32).train()
        if fuse:
            fused.fuse(model)
        if rank is not None:
            for layer in model.modules():
                if isinstance(layer, torch.nn.Linear):
                    # As hold_in_bf16 does, which looks at the weights.
                    layer.weight.data, layer.compute_dtype = layer.weight.detach().bfloat16(), torch.float32
            model = add_lora(model, rank, "all", 32.0, True, 0)
            use_fast_products(model)
    base, tokens = without_peft(model), ROWS * LENGTH
    # transformers leaves out a mask that is plainly causal, but not where tensors have no content.
    monkeypatch.setattr(sys.modules[type(base).__module__], "create_causal_mask", lambda **_: None)
    with FakeTensorMode():
        for module in model.modules():
            for group in (module._parameters, module._buffers):
                for name, old in [(name, old) for name, old in group.items() if old is not None]:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    group[name] = torch.nn.Parameter(new, old.requires_grad) if group is module._parameters else new
        ids, places = torch.zeros(ROWS, LENGTH, dtype=torch.long), torch.zeros(tokens, dtype=torch.long)
        monkeypatch.setattr("lorabench.training.loss._scored", lambda batch: (places, places))

        def compute():
            if backward:
                add_gradient(model, Batch(ids, ids), tokens, torch.bfloat16, None)
                return
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                of_tokens(model, {"input_ids": ids}, places, _nlls(model, places), tokens)

        # Weights are cast once for all passes without a gradient, and gradients are added up from the second pass.
        compute()
        # FlashAttention-4 belongs to the fused layers.
        with Kernels({64: 0.68, 128: 0.83}[sizes.head_dim] if fuse else 0.5) as kernels:
            monkeypatch.setattr(fused, "one_kernel", kernels.one_kernel)
            compute()
    return Parts(*(kernels.parts[name] / tokens for name in Parts._fields))


@pytest.mark.parametrize(
    ("sizes", "rank", "fuse", "backward"),
    [
        (QWEN, 16, True, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (LLAMA, None, True, True),
                (QWEN, None, True, True),
                (LLAMA, 64, True, True),
                (LLAMA, 16, True, False),
                (LLAMA, 16, False, True),
                (QWEN, None, False, True),
                (QWEN, 16, False, False),
            ]
        ),
    ],
)
def test_seconds_are_those_of_the_kernels_that_a_pass_starts(sizes, rank, fuse, backward, monkeypatch):
    preset, tokens = load_preset("core").with_execution(fused_kernels=fuse), ROWS * LENGTH
    planned = arm_seconds(preset, sizes, rank, rank and "all", tokens, LENGTH / 2, LENGTH / 2)
    whole, apart = planned.trained if backward else planned.evaluated, planned.each_pass / tokens * backward
    expected = whole.token.plus(whole.scored).plus(Parts(elementwise=apart))
    kernels = counted(sizes, rank, fuse, backward, monkeypatch)
    assert kernels.products == pytest.approx(expected.products, rel=0.03)
    assert kernels.elementwise == pytest.approx(expected.elementwise, rel=0.05)
    assert kernels.attention == pytest.approx(expected.attention, rel=0.05)


@pytest.mark.parametrize(
    ("model", "rank", "eager"),
    # The microseconds of products, elementwise kernels and attention that another count gave (8,192 tokens).
    [
        ("qwen3-0-6b-base", 16, (4.5, 14.2)),
        ("llama-3-2-1b-base", 16, (7.9, 8.4)),
        ("llama-3-1-8b-base", 16, (47.6, 29.3)),
    ],
)
def test_a_count_by_other_hands_agrees(model, rank, eager):
    core = load_preset("paper").with_execution(gpu="H100-80GB", fused_kernels=False)
    each = arm_seconds(core, dimensions(core.models[model]), rank, "all", 8192, 256, 256).trained
    parts = each.token.plus(each.scored, 0.5)
    assert 1e6 * parts.products == pytest.approx(eager[0], rel=0.15)
    assert 1e6 * parts.elementwise == pytest.approx(eager[1], rel=0.15)
