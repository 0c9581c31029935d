"""Lanes: runs that share the passes through one model, each with weights of its own.

The rows of a batch are split among the lanes, contiguous for each lane. Each trained layer computes a lane's rows with
that lane's weights; all other layers see one larger batch. The trained weights are stored on a `Shelf`, lane by lane: a
layer reads those of all lanes as one stacked tensor, an optimizer steps those of a lane as one tensor.

A single run that does not need this (full fine-tuning, sharded models) trains the model's own parameters
(`single_lane`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class RowCounts:
    """The number of rows in a batch of each lane, in the order of the lanes, which layers read while they compute."""

    def __init__(self, lanes: int) -> None:
        self.counts: tuple[int, ...] = (1,) * lanes

    @contextmanager
    def are(self, counts: Sequence[int]) -> Iterator[None]:
        """Set the row counts within the context, which must include the backward pass of what is computed in it."""
        before, self.counts = self.counts, tuple(counts)
        try:
            yield
        finally:
            self.counts = before

    def tokens(self, total: int) -> list[int]:
        """Return the number of vectors of each lane, of the `total` vectors that a layer computes."""
        if len(self.counts) == 1:
            return [total]
        per_row = total // max(1, sum(self.counts))
        return [count * per_row for count in self.counts]


@dataclass(frozen=True)
class WeightSlot:
    """The storage of a weight in a tensor that an optimizer steps.

    Attributes:
        parameter: the tensor that the optimizer steps.
        shape: the weight's shape.
        start: the index of the weight's first element; None if the weight is the whole tensor.
    """

    parameter: nn.Parameter
    shape: torch.Size
    start: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of the weight's part of a tensor that is laid out like the parameter."""
        if self.start is None:
            return tensor
        return tensor[self.start : self.start + self.shape.numel()].view(self.shape)


@dataclass(frozen=True)
class Lane:
    """The weights that a run trains.

    Attributes:
        places: the storage of each weight, by name.
        pairs: LoRA's A, B and scaling by layer; empty in full fine-tuning.
    """

    places: Mapping[str, WeightSlot]
    pairs: Mapping[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The tensors that an optimizer steps."""
        return list(dict.fromkeys(place.parameter for place in self.places.values()))

    @property
    def size(self) -> int:
        """The number of trained parameters."""
        return sum(place.shape.numel() for place in self.places.values())

    def zero_grad(self) -> None:
        """Discard the gradients."""
        for place in self.places.values():
            if place.start is None:
                place.parameter.grad = None
        for parameter in self.parameters:
            # On a shelf layers add to the gradient in place, so it has to stay the same tensor.
            if parameter.grad is not None:
                parameter.grad.zero_()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a model, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def lane_name(name: str, adapter: str) -> str:
    """Return a parameter's name with the adapter's name replaced by `default`, so that it is the same in all lanes."""
    return name.replace(f".{adapter}.", ".default.")


class Shelf:
    """The stacked weights of lanes, whose weights all have the same shapes.

    Attributes:
        values: the weights, (lanes, weights of a lane).
        gradients: their gradients, of the same shape.
        leaves: each weight of all lanes by name, (lanes, *shape), with which layers compute; the tensors' identities
            stay the same.
        parameters: for each lane the tensors that an optimizer steps, one for each group of names.
    """

    def __init__(self, starts: Sequence[Mapping[str, Tensor]], groups: Sequence[Sequence[str]]) -> None:
        """
        Args:
            starts: the initial weights of each lane, by name.
            groups: the names, in groups that may differ in LR.
        """
        shapes = {name: starts[0][name].shape for group in groups for name in group}
        ends = torch.tensor([0, *(shape.numel() for shape in shapes.values())]).cumsum(0).tolist()
        self._where = {name: (start, shape) for (name, shape), start in zip(shapes.items(), ends[:-1], strict=True)}
        sizes = [sum(shapes[name].numel() for name in group) for group in groups]
        bounds = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._groups = [(slice(a, b), names) for a, b, names in zip(bounds[:-1], bounds[1:], groups, strict=True)]
        first = next(iter(starts[0].values()))
        values = torch.empty((len(starts), ends[-1]), device=first.device, dtype=first.dtype)
        for row, weights in zip(values, starts, strict=True):
            for name, (start, shape) in self._where.items():
                row[start : start + shape.numel()] = weights[name].detach().flatten()
        self.parameters = [[nn.Parameter(row[part]) for part, _ in self._groups] for row in values]
        self._mirrors: list[dict[str, nn.Parameter]] = [{} for _ in starts]
        self.leaves: dict[str, Tensor] = {}
        self._lay(values)

    def _lay(self, values: Tensor) -> None:
        self.values, self.gradients = values, torch.zeros_like(values)
        for name, (start, shape) in self._where.items():
            part, stacked = slice(start, start + shape.numel()), (len(values), *shape)
            value, gradient = (tensor[:, part].view(stacked) for tensor in (values, self.gradients))
            leaf = self.leaves.setdefault(name, value.detach().requires_grad_())
            _point(leaf, value, gradient)
        for lane, parameters in enumerate(self.parameters):
            for parameter, (part, _) in zip(parameters, self._groups, strict=True):
                _point(parameter, values[lane, part], self.gradients[lane, part])
            for name, mirror in self._mirrors[lane].items():
                _point(mirror, self.leaves[name].data[lane], self.gradients_of(name)[lane])

    def gradients_of(self, name: str) -> Tensor:
        """Return the gradient of a weight of all lanes, (lanes, *shape), not a copy."""
        gradient = self.leaves[name].grad
        assert gradient is not None
        return gradient

    def mirror(self, lane: int, name: str, parameter: nn.Parameter) -> None:
        """Make a module's parameter share the memory of a lane's weight and of its gradient."""
        self._mirrors[lane][name] = parameter
        _point(parameter, self.leaves[name].data[lane], self.gradients_of(name)[lane])

    def places(self, lane: int) -> dict[str, WeightSlot]:
        """Return the storage of each weight of a lane, by name."""
        places = {}
        for parameter, (part, names) in zip(self.parameters[lane], self._groups, strict=True):
            for name in names:
                start, shape = self._where[name]
                places[name] = WeightSlot(parameter, shape, start - part.start)
        return places

    def keep(self, lanes: Sequence[int]) -> None:
        """Remove all other lanes; the optimizers' parameters of the remaining ones stay the same objects."""
        self.parameters = [self.parameters[lane] for lane in lanes]
        self._mirrors = [self._mirrors[lane] for lane in lanes]
        self._lay(self.values[list(lanes)].clone())


def _point(parameter: Tensor, value: Tensor, gradient: Tensor) -> None:
    parameter.grad = None
    parameter.data = value
    parameter.grad = gradient


@dataclass
class Stack:
    """A model and the lanes that share it.

    Attributes:
        model: the model.
        lanes: the lane of each run, by the run's name, in the order of their rows.
        rows: the number of rows of each lane.
        shelf: the weights of the lanes; None where the single lane trains the model's own parameters.
    """

    model: nn.Module
    lanes: dict[str, Lane]
    rows: RowCounts
    shelf: Shelf | None = None

    def zero_grad(self) -> None:
        """Discard the gradients of all lanes."""
        for lane in self.lanes.values():
            lane.zero_grad()

    def drop(self, name: str) -> None:
        """Remove the lane of a run that has ended, unless it is the last one."""
        if self.shelf is None or len(self.lanes) == 1:
            return
        names = list(self.lanes)
        del self.lanes[name]
        self.shelf.keep([names.index(other) for other in self.lanes])
        self.rows.counts = (1,) * len(self.lanes)


def single_lane(
    model: nn.Module,
    name: str,
    adapter: str | None = None,
    pairs: Mapping[str, tuple[Tensor, Tensor, float]] | None = None,
) -> Stack:
    """Return the stack of a single run that trains the model's own parameters.

    Args:
        model: the model.
        name: the run's name.
        adapter: the name of the trained adapter; None in full fine-tuning.
        pairs: the adapter's A, B and scaling by layer.
    """
    places = {
        lane_name(key, adapter) if adapter else key: WeightSlot(parameter, parameter.shape)
        for key, parameter in trained_parameters(model).items()
    }
    return Stack(model, {name: Lane(places, pairs or {})}, RowCounts(1))


def have_equal_tokens(counts: Sequence[int]) -> bool:
    """Return whether all lanes have the same number of tokens."""
    return len(set(counts)) == 1


def by_lane(tensor: Tensor, counts: Sequence[int]) -> Tensor:
    """Return (tokens, width) as (lanes, tokens of each, width), for lanes with equal numbers of tokens, even none."""
    return tensor.view(len(counts), counts[0], tensor.shape[-1])


def add_products(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of each lane to `to` in place, in the type of `to`."""
    if to.dtype == left.dtype:
        to.baddbmm_(left, right)
    else:
        to.add_(torch.bmm(left, right))
