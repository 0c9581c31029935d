"""Full fine-tuning of several lanes (runs that share a model), each with a copy of every weight.

Linear layers compute all lanes as one stacked product, embeddings look up each lane's rows in that lane's table, and
every other module with parameters uses its own forward pass with the lanes' weights. Gradients are accumulated in
place, on the shelf. The model's own parameters mirror the last lane: they still provide names, type and device.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorabench.models.lanes.shelf import Lane, RowCounts, Shelf, Stack, add_products, by_lane, have_equal_tokens
from lorabench.models.lora import in_expert


def can_stack_full(model: nn.Module) -> bool:
    """Return whether several lanes can share the model.

    They can if each module with parameters computes one tensor from one tensor; experts receive tokens without their
    rows, so they can't.
    """
    return not any(in_expert(f"{name}.weight") or not _is_plain(module) for name, module in _with_weights(model))


def stack_full(model: nn.Module, names: Sequence[str]) -> Stack:
    """Return lanes that start with a model's weights and train all of them; the memory of the model's own is freed.

    Args:
        model: a model without lanes, whose parameters are all of one type.
        names: the names of the lanes, in the order of their rows.

    Raises:
        ValueError: there are several lanes, and they can't share the model (see `can_stack_full`).
    """
    if len(names) > 1 and not can_stack_full(model):
        raise ValueError(
            f"{len(names)} lanes can't share a {type(model).__name__}: its weights can't be chosen by rows"
        )
    weights = dict(model.named_parameters())
    keys = {parameter: name for name, parameter in weights.items()}
    shelf, rows = Shelf([weights] * len(names), [list(weights)]), RowCounts(len(names))
    for lane in range(len(names)):
        for name, parameter in weights.items():
            shelf.mirror(lane, name, parameter)
    for _, module in _with_weights(model):
        own = {name: keys[parameter] for name, parameter in module.named_parameters(recurse=False)}
        module.forward = _forward(module, shelf, own, rows)
    return Stack(model, {name: Lane(shelf.places(lane)) for lane, name in enumerate(names)}, rows, shelf)


def lane_state(model: nn.Module, lane: Lane) -> dict[str, Tensor]:
    """Return a copy of a lane's weights and the model's buffers, for `model.save_pretrained(folder, state_dict=...)`.

    Tied weights are the same tensor under each of their names, as in the model's own state.
    """
    weights = {name: place.of(place.parameter.detach()).clone() for name, place in lane.places.items()}
    first = {parameter: name for name, parameter in model.named_parameters()}
    tied = {name: weights[first[p]] for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: tied[name] if name in tied else tensor.clone() for name, tensor in model.state_dict().items()}


def _with_weights(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules with parameters of their own, by name."""
    return [(name, module) for name, module in model.named_modules() if any(True for _ in module.parameters(False))]


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module takes one input, and no submodule of it has parameters."""
    inputs = inspect.signature(module.forward).parameters
    return len(inputs) == 1 and len(list(module.parameters())) == len(list(module.parameters(recurse=False)))


def _forward(module: nn.Module, shelf: Shelf, keys: Mapping[str, str], rows: RowCounts) -> Callable[..., Any]:
    """Return a module's forward pass for the rows of all lanes.

    Args:
        module: the module.
        shelf: the weights of the lanes.
        keys: the names on the shelf of the module's own parameters, by their names in the module.
        rows: the number of rows of each lane.
    """
    if type(module) is nn.Linear:
        return _Linear(shelf, keys, rows)
    if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
        return _Embedding(shelf, keys["weight"], rows, module.padding_idx)
    return (_Elementwise if _is_elementwise(module) else _Lanewise)(module, shelf, keys, rows)


def _lane_counts(rows: RowCounts, x: Tensor) -> list[int]:
    """Return each lane's share of a tensor's first dimension.

    Raises:
        ValueError: the first dimension is not a multiple of the batch's rows.
    """
    counts = rows.tokens(len(x))
    if sum(counts) != len(x):
        raise ValueError(f"a tensor of shape {tuple(x.shape)} can't be split among lanes of {rows.counts} rows")
    return counts


class _Linear:
    """The forward pass of a linear layer."""

    def __init__(self, shelf: Shelf, keys: Mapping[str, str], rows: RowCounts) -> None:
        self._shelf, self._keys, self._rows = shelf, keys, rows
        self._cast: tuple[object, list[Tensor | None]] = (None, [])

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002  # PyTorch's name
        """Compute the layer, (rows, ..., d_in) to (rows, ..., d_out)."""
        x = input
        leaves = [self._shelf.leaves[self._keys[name]] if name in self._keys else None for name in ("weight", "bias")]
        used: Sequence[Tensor | None] = leaves
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, used = x.to(dtype), self._in(dtype, leaves)
        counts = [count * x.shape[1:-1].numel() for count in _lane_counts(self._rows, x)]
        y: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), *used, *leaves, counts)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])

    def _in(self, dtype: torch.dtype, leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the weights in another type. Passes without gradients, of which sampling has many, share a cast.

        A pass with gradients discards the shared cast, since an optimizer steps after it, and fused optimizers do not
        increase the versions of the tensors. Other changes, such as loading a checkpoint, do.
        """
        key = dtype, [parameter._version for lane in self._shelf.parameters for parameter in lane]
        training = torch.is_grad_enabled()
        if not training and self._cast[0] == key:
            return self._cast[1]
        cast = [None if leaf is None else leaf.detach().to(dtype) for leaf in leaves]
        self._cast = (None, []) if training else (key, cast)
        return cast


class _Product(torch.autograd.Function):
    """Computes x W' + b with each lane's W and b.

    The shapes are x (tokens, d_in), W (lanes, d_out, d_in) and b (lanes, d_out), all of the same type; the tokens of a
    lane are contiguous. The gradients of W and b are added to those of the leaves from which they were cast.
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
        if have_equal_tokens(counts):
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
        if have_equal_tokens(counts):
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

    def __init__(self, shelf: Shelf, key: str, rows: RowCounts, padding: int | None) -> None:
        self._shelf, self._key, self._rows = shelf, key, rows
        self._padding = -1 if padding is None else padding

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002  # PyTorch's name
        """Look up ids, (rows, ...) to (rows, ..., d); a single row of ids, such as positions, holds for all rows."""
        ids = input
        if len(ids) == 1:
            ids = ids.expand(sum(self._rows.counts), *ids.shape[1:])
        counts = [count * ids.shape[1:].numel() for count in _lane_counts(self._rows, ids)]
        table = self._shelf.leaves[self._key]
        y: Tensor = _Lookup.apply(table, ids.reshape(-1), counts, self._padding)  # type: ignore[no-untyped-call]
        return y.view(*ids.shape, -1)


class _Lookup(torch.autograd.Function):
    """Looks up ids (tokens), contiguous for each lane, in each lane's table (lanes, ids, d).

    The gradient is added to `table.grad` in place, except in the row of the id `padding`.
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
    """The forward pass of any module, computed one lane after the other."""

    def __init__(self, module: nn.Module, shelf: Shelf, keys: Mapping[str, str], rows: RowCounts) -> None:
        self._module, self._bare = module, _bare(module)
        self._shelf, self._keys, self._rows = shelf, keys, rows

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Compute the module; with several lanes it has a single input, (rows, ...)."""
        if len(self._rows.counts) == 1:
            return self._compute(self._weights(0), *inputs, **options)
        (x,) = (*inputs, *options.values())
        parts = x.split(_lane_counts(self._rows, x))
        return torch.cat([self._compute(self._weights(lane), part) for lane, part in enumerate(parts)])

    def _weights(self, lane: int | slice) -> dict[str, Tensor]:
        """Return the weights of a lane, or the stacked weights of several."""
        leaves = self._shelf.leaves
        return {
            name: _Weight.apply(leaves[key], lane)  # type: ignore[no-untyped-call]
            for name, key in self._keys.items()
        }

    def _compute(self, weights: Mapping[str, Tensor], *inputs: Any, **options: Any) -> Any:
        self._bare.training = self._module.training
        return _with(self._bare, weights, *inputs, **options)


class _Elementwise(_Lanewise):
    """The forward pass of a module whose weights scale or shift vectors, as in norms; it computes all lanes at once."""

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Compute the module, (rows, ..., d) to (rows, ..., d)."""
        (x,) = (*inputs, *options.values())
        counts = _lane_counts(self._rows, x)
        if not have_equal_tokens(counts):
            return super().__call__(x)
        weights = {name: weight[:, None] for name, weight in self._weights(slice(None)).items()}
        return self._compute(weights, x.reshape(len(counts), -1, x.shape[-1])).view(x.shape)


class _Weight(torch.autograd.Function):
    """Selects a weight of one lane, or of several; its gradient is added in place, on the shelf."""

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
    """Return a copy of a module without its parameters, and with the forward pass of its class."""
    bare = copy.copy(module)
    bare._parameters = {name: None for name, parameter in module._parameters.items() if parameter is None}
    return bare


def _with(bare: nn.Module, weights: Mapping[str, Tensor], *inputs: Any, **options: Any) -> Any:
    """Compute a module without parameters with the given weights.

    This is faster than `torch.func.functional_call`, which matters in small models.
    """
    vars(bare).update(weights)
    try:
        return bare(*inputs, **options)
    finally:
        for name in weights:
            del vars(bare)[name]


@torch.no_grad()
def _is_elementwise(module: nn.Module) -> bool:
    """Return whether a module treats vectors independently, and accepts weights (2, 1, d) for vectors (2, n, d)."""
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
