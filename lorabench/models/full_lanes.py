"""Full fine-tuning of several lanes: every weight of a model, once for each lane, computed lane by lane.

Linear layers compute all lanes as one stacked product, embeddings look each lane's rows up in that lane's table, and
every other module with parameters goes through its own forward pass with the lanes' weights. Gradients are added where
they lie, on the shelf. The model's own parameters are those of the last lane: they keep the names, and tell type and
device.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorabench.models.lanes import Lane, Rows, Shelf, Stack, add_products, by_lane, even
from lorabench.models.lora import in_expert


def can_stack(model: nn.Module) -> bool:
    """Whether rows of several lanes can go through the model, each with its lane's weights.

    They can where each module with parameters computes one tensor from one; experts see tokens without their rows.
    """
    return not any(in_expert(f"{name}.weight") or not _is_plain(module) for name, module in _with_weights(model))


def stack_full(model: nn.Module, names: Sequence[str]) -> Stack:
    """Lanes that start with a model's weights, all of them trained. The model's parameters are let go.

    Args:
        model: a model without lanes, all its parameters of one type.
        names: of the lanes, in the order of their rows.

    Raises:
        ValueError: several lanes of a model that can't be stacked (see `can_stack`).
    """
    if len(names) > 1 and not can_stack(model):
        raise ValueError(f"{len(names)} lanes of {type(model).__name__}, whose weights can't be dealt by rows")
    weights = dict(model.named_parameters())
    keys = {parameter: name for name, parameter in weights.items()}
    shelf, rows = Shelf([weights] * len(names), [list(weights)]), Rows(len(names))
    for lane in range(len(names)):
        for name, parameter in weights.items():
            shelf.mirror(lane, name, parameter)
    for _, module in _with_weights(model):
        own = {name: keys[parameter] for name, parameter in module.named_parameters(recurse=False)}
        module.forward = _forward(module, shelf, own, rows)
    return Stack(model, {name: Lane(shelf.places(lane)) for lane, name in enumerate(names)}, rows, shelf)


def lane_state(model: nn.Module, lane: Lane) -> dict[str, Tensor]:
    """A copy of a lane's weights, and of the model's buffers, for `model.save_pretrained(folder, state_dict=...)`.

    Tied weights are one tensor under all their names, as in the model's own state.
    """
    weights = {name: place.of(place.parameter.detach()).clone() for name, place in lane.places.items()}
    first = {parameter: name for name, parameter in model.named_parameters()}
    tied = {name: weights[first[p]] for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: tied[name] if name in tied else tensor.clone() for name, tensor in model.state_dict().items()}


def _with_weights(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with parameters of their own."""
    return [(name, module) for name, module in model.named_modules() if any(True for _ in module.parameters(False))]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes something from one input with its own parameters and no others."""
    inputs = inspect.signature(module.forward).parameters
    return len(inputs) == 1 and len(list(module.parameters())) == len(list(module.parameters(recurse=False)))


def _forward(module: nn.Module, shelf: Shelf, keys: Mapping[str, str], rows: Rows) -> Callable[..., Any]:
    """The forward pass of a module for the rows of all lanes.

    Args:
        keys: names of the module's own parameters on the shelf.
    """
    if type(module) is nn.Linear:
        return _Linear(shelf, keys, rows)
    if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
        return _Embedding(shelf, keys["weight"], rows, module.padding_idx)
    return (_Elementwise if _is_elementwise(module) else _Lanewise)(module, shelf, keys, rows)


def _dealt(rows: Rows, x: Tensor) -> list[int]:
    """How much of a tensor's first dimension is each lane's.

    Raises:
        ValueError: the tensor is not of the batch's rows.
    """
    counts = rows.tokens(len(x))
    if sum(counts) != len(x):
        raise ValueError(f"a tensor of shape {tuple(x.shape)} can't be dealt to lanes of {rows.counts} rows")
    return counts


class _Linear:
    """The forward pass of a linear layer."""

    def __init__(self, shelf: Shelf, keys: Mapping[str, str], rows: Rows) -> None:
        self._shelf, self._keys, self._rows = shelf, keys, rows
        self._cast: tuple[object, list[Tensor | None]] = (None, [])

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002  # as PyTorch calls it
        """(rows, ..., d_in) to (rows, ..., d_out)."""
        x = input
        leaves = [self._shelf.leaves[self._keys[name]] if name in self._keys else None for name in ("weight", "bias")]
        used: Sequence[Tensor | None] = leaves
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, used = x.to(dtype), self._in(dtype, leaves)
        counts = [count * x.shape[1:-1].numel() for count in _dealt(self._rows, x)]
        y: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), *used, *leaves, counts)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])

    def _in(self, dtype: torch.dtype, leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The weights in another type. Passes without a gradient, of which sampling has many, share one cast.

        An optimizer steps after a pass with a gradient, which drops it; fused ones leave the versions as they are.
        Other changes, as when a checkpoint is read, raise the versions.
        """
        key = dtype, [parameter._version for lane in self._shelf.parameters for parameter in lane]
        learns = torch.is_grad_enabled()
        if not learns and self._cast[0] == key:
            return self._cast[1]
        cast = [None if leaf is None else leaf.detach().to(dtype) for leaf in leaves]
        self._cast = (None, []) if learns else (key, cast)
        return cast


class _Product(torch.autograd.Function):
    """x W' + b with each lane's W and b.

    x (tokens, d_in), W (lanes, d_out, d_in), b (lanes, d_out), these two in the type of x; the tokens of a lane lie
    side by side. The gradients of W and b are added to those of the leaves that W and b are cast from, on the shelf.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor,
        bias_leaf: Tensor | None,
        counts: list[int],
    ) -> Tensor:
        ctx.gradients, ctx.counts = (weight_leaf.grad, None if bias_leaf is None else bias_leaf.grad), counts
        ctx.save_for_backward(x, weight)
        if even(counts):
            xs = by_lane(x, counts)
            y = torch.bmm(xs, weight.mT) if bias is None else torch.baddbmm(bias[:, None], xs, weight.mT)
            return y.flatten(0, 1)
        y = x.new_empty(len(x), weight.shape[1])
        for lane, (xs, ys) in enumerate(zip(x.split(counts), y.split(counts), strict=True)):
            if bias is None:
                torch.mm(xs, weight[lane].t(), out=ys)
            else:
                torch.addmm(bias[lane], xs, weight[lane].t(), out=ys)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g, counts = gradients[0].contiguous(), ctx.counts
        to_weight, to_bias = ctx.gradients
        if even(counts):
            xs, gs = by_lane(x, counts), by_lane(g, counts)
            add_products(to_weight, gs.mT, xs)
            if to_bias is not None:
                to_bias.add_(gs.sum(1))
            gx = torch.bmm(gs, weight).flatten(0, 1) if ctx.needs_input_grad[0] else None
            return gx, *(None,) * 5
        gx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for lane, (xs, gs) in enumerate(zip(x.split(counts), g.split(counts), strict=True)):
            add_products(to_weight[lane : lane + 1], gs.t()[None], xs[None])
            if to_bias is not None:
                to_bias[lane].add_(gs.sum(0))
            if gx is not None:
                torch.mm(gs, weight[lane], out=gx.split(counts)[lane])
        return gx, *(None,) * 5


class _Embedding:
    """The forward pass of an embedding."""

    def __init__(self, shelf: Shelf, key: str, rows: Rows, padding: int | None) -> None:
        self._shelf, self._key, self._rows = shelf, key, rows
        self._padding = -1 if padding is None else padding

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002  # as PyTorch calls it
        """Ids (rows, ...) to (rows, ..., d). One row of ids, as of positions, is every row's."""
        ids = input
        if len(ids) == 1:
            ids = ids.expand(sum(self._rows.counts), *ids.shape[1:])
        counts = [count * ids.shape[1:].numel() for count in _dealt(self._rows, ids)]
        table = self._shelf.leaves[self._key]
        y: Tensor = _Lookup.apply(table, ids.reshape(-1), counts, self._padding)  # type: ignore[no-untyped-call]
        return y.view(*ids.shape, -1)


class _Lookup(torch.autograd.Function):
    """Rows of each lane's table (lanes, ids, d) for ids (tokens), those of a lane side by side.

    The gradient is added to `table.grad` where it lies, but for the row of the id `padding`.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, counts: list[int], padding: int) -> Tensor:
        ctx.gradient, ctx.counts, ctx.padding = table.grad, counts, padding
        ctx.save_for_backward(ids)
        y = table.new_empty(len(ids), table.shape[2])
        for lane, (own, ys) in enumerate(zip(ids.split(counts), y.split(counts), strict=True)):
            torch.index_select(table[lane], 0, own, out=ys)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        g, counts = gradients[0], ctx.counts
        for to, own, gs in zip(ctx.gradient, ids.split(counts), g.split(counts), strict=True):
            to.add_(torch.ops.aten.embedding_dense_backward(gs, own, len(to), ctx.padding, False))
        return None, None, None, None


class _Lanewise:
    """The forward pass of any module, one lane after the other."""

    def __init__(self, module: nn.Module, shelf: Shelf, keys: Mapping[str, str], rows: Rows) -> None:
        self._module, self._bare = module, _bare(module)
        self._shelf, self._keys, self._rows = shelf, keys, rows

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """What the module gives; of several lanes for one tensor (rows, ...)."""
        if len(self._rows.counts) == 1:
            return self._compute(self._weights(0), *inputs, **options)
        (x,) = (*inputs, *options.values())
        parts = x.split(_dealt(self._rows, x))
        return torch.cat([self._compute(self._weights(lane), part) for lane, part in enumerate(parts)])

    def _weights(self, lane: int | slice) -> dict[str, Tensor]:
        """Weights of a lane, or of several stacked."""
        leaves = self._shelf.leaves
        return {
            name: _Weight.apply(leaves[key], lane)  # type: ignore[no-untyped-call]
            for name, key in self._keys.items()
        }

    def _compute(self, weights: Mapping[str, Tensor], *inputs: Any, **options: Any) -> Any:
        self._bare.training = self._module.training
        return _with(self._bare, weights, *inputs, **options)


class _Elementwise(_Lanewise):
    """The forward pass of a module whose weights scale or shift vectors, as those of norms; all lanes at once."""

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """(rows, ..., d) to (rows, ..., d)."""
        (x,) = (*inputs, *options.values())
        counts = _dealt(self._rows, x)
        if not even(counts):
            return super().__call__(x)
        weights = {name: weight[:, None] for name, weight in self._weights(slice(None)).items()}
        return self._compute(weights, x.reshape(len(counts), -1, x.shape[-1])).view(x.shape)


class _Weight(torch.autograd.Function):
    """One lane's part of a weight, or that of all lanes; its gradient is added where it lies, on the shelf."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, lane: int | slice) -> Tensor:
        assert leaf.grad is not None
        ctx.gradient = leaf.grad[lane]
        return leaf[lane]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        ctx.gradient.add_(gradients[0])
        return None, None


def _bare(module: nn.Module) -> nn.Module:
    """A module like another, without its parameters and without a forward pass put on later."""
    bare = copy.copy(module)
    bare._parameters = {name: None for name, parameter in module._parameters.items() if parameter is None}
    return bare


def _with(bare: nn.Module, weights: Mapping[str, Tensor], *inputs: Any, **options: Any) -> Any:
    """What a bare module computes with weights, which it has for that long. Faster than `torch.func.functional_call`,
    which counts in small models."""
    vars(bare).update(weights)
    try:
        return bare(*inputs, **options)
    finally:
        for name in weights:
            del vars(bare)[name]


@torch.no_grad()
def _is_elementwise(module: nn.Module) -> bool:
    """Whether a module computes vectors one by one, and takes weights (2, 1, d) for two stacks of vectors (2, n, d)."""
    parameter, *others = module.parameters()
    if parameter.ndim != 1 or any(other.shape != parameter.shape for other in others):
        return False
    bare, generator = _bare(module), torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, len(parameter), generator=generator).to(parameter)

    x, weights = draw(2, 3), {name: draw(2, 1) for name, _ in module.named_parameters()}
    try:
        together = _with(bare, weights, x)
        for lane, vectors in enumerate(x):
            own = {name: weight[lane, 0] for name, weight in weights.items()}
            apart = torch.cat([_with(bare, own, vector) for vector in vectors.split(1)])
            if not torch.allclose(together[lane], apart, rtol=1e-4, atol=1e-5):
                return False
    except (RuntimeError, TypeError, ValueError):
        return False
    return True
