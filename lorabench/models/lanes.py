"""Lanes: runs that go through one model together, each with weights of its own.

The rows of a batch are dealt to lanes, those of one lane side by side, and every layer that is trained computes each
lane's rows with that lane's weights; all other layers see one larger batch. What is trained lies lane by lane on a
`Shelf`: a layer reads the weights of all lanes as one stacked tensor, an optimizer steps those of one lane as one.

Where a model has one lane that needs none of this (full fine-tuning, sharded models), `alone` takes its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class Rows:
    """How many rows of a batch are each lane's, in the order of the lanes. Layers read it while they compute."""

    def __init__(self, lanes: int) -> None:
        self.counts: tuple[int, ...] = (1,) * lanes

    @contextmanager
    def are(self, counts: Sequence[int]) -> Iterator[None]:
        """Within, also in the backward pass, the first dimension of what goes through layers is dealt like this."""
        before, self.counts = self.counts, tuple(counts)
        try:
            yield
        finally:
            self.counts = before

    def tokens(self, total: int) -> list[int]:
        """How many are each lane's of so many vectors that a layer has in front of it."""
        if len(self.counts) == 1:
            return [total]
        per_row = total // max(1, sum(self.counts))
        return [count * per_row for count in self.counts]


@dataclass(frozen=True)
class Place:
    """Where a weight lies: in a tensor that an optimizer steps, from `start` on; None where it is that tensor."""

    parameter: nn.Parameter
    shape: torch.Size
    start: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The weight's part, as a view, of a tensor laid out like the parameter."""
        if self.start is None:
            return tensor
        return tensor[self.start : self.start + self.shape.numel()].view(self.shape)


@dataclass(frozen=True)
class Lane:
    """What one run trains: weights by name, and LoRA's factors A, B and scaling by layer (none in full fine-tuning)."""

    places: Mapping[str, Place]
    pairs: Mapping[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The tensors that an optimizer steps."""
        return list(dict.fromkeys(place.parameter for place in self.places.values()))

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return sum(place.shape.numel() for place in self.places.values())

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for place in self.places.values():
            if place.start is None:
                place.parameter.grad = None
        for parameter in self.parameters:
            # On a shelf layers add to it where it lies.
            if parameter.grad is not None:
                parameter.grad.zero_()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def lane_name(name: str, adapter: str) -> str:
    """A parameter's name, whatever its adapter is called."""
    return name.replace(f".{adapter}.", ".default.")


class Shelf:
    """Weights of lanes, all of the same shapes, side by side: `values` and `gradients`, both (lanes, weights).

    Attributes:
        leaves: each weight of all lanes by name, (lanes, *shape): what layers compute with. They stay the same tensors.
        parameters: of each lane the tensors that an optimizer steps, one for each group of names.
    """

    def __init__(self, starts: Sequence[Mapping[str, Tensor]], groups: Sequence[Sequence[str]]) -> None:
        """
        Args:
            starts: initial weights of each lane by name.
            groups: the names, in groups whose LR may differ.
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
        """The gradient of a weight of all lanes, (lanes, *shape), where it lies."""
        gradient = self.leaves[name].grad
        assert gradient is not None
        return gradient

    def mirror(self, lane: int, name: str, parameter: nn.Parameter) -> None:
        """Have a parameter of a module be a lane's weight from now on, gradient and all."""
        self._mirrors[lane][name] = parameter
        _point(parameter, self.leaves[name].data[lane], self.gradients_of(name)[lane])

    def places(self, lane: int) -> dict[str, Place]:
        """Where a lane's weights lie."""
        found = {}
        for parameter, (part, names) in zip(self.parameters[lane], self._groups, strict=True):
            for name in names:
                start, shape = self._where[name]
                found[name] = Place(parameter, shape, start - part.start)
        return found

    def keep(self, lanes: Sequence[int]) -> None:
        """Let all other lanes go; those that stay go on with the same parameters."""
        self.parameters = [self.parameters[lane] for lane in lanes]
        self._mirrors = [self._mirrors[lane] for lane in lanes]
        self._lay(self.values[list(lanes)].clone())


def _point(parameter: Tensor, value: Tensor, gradient: Tensor) -> None:
    parameter.grad = None
    parameter.data = value
    parameter.grad = gradient


@dataclass
class Stack:
    """A model that the rows of several lanes go through at once.

    Attributes:
        lanes: what each run trains, by the run's name, in the order of their rows.
        shelf: what the weights lie on; None where the one lane's weights are the model's parameters.
    """

    model: nn.Module
    lanes: dict[str, Lane]
    rows: Rows
    shelf: Shelf | None = None

    def drop(self, name: str) -> None:
        """Let a lane go whose run has ended, if there are others."""
        if self.shelf is None or len(self.lanes) == 1:
            return
        names = list(self.lanes)
        del self.lanes[name]
        self.shelf.keep([names.index(other) for other in self.lanes])
        self.rows.counts = (1,) * len(self.lanes)


def alone(
    model: nn.Module,
    name: str,
    adapter: str | None = None,
    pairs: Mapping[str, tuple[Tensor, Tensor, float]] | None = None,
) -> Stack:
    """A model's one run, which trains the model's parameters as they are.

    Args:
        adapter: name of the adapter that is trained, if any.
        pairs: its factors.
    """
    places = {
        lane_name(key, adapter) if adapter else key: Place(parameter, parameter.shape)
        for key, parameter in trained_parameters(model).items()
    }
    return Stack(model, {name: Lane(places, pairs or {})}, Rows(1))


def even(counts: Sequence[int]) -> bool:
    """Whether all lanes have as many tokens."""
    return len(set(counts)) == 1


def by_lane(tensor: Tensor, counts: Sequence[int]) -> Tensor:
    """(tokens, width) as (lanes, tokens of each, width) where all lanes have as many; there may be no tokens at all."""
    return tensor.view(len(counts), counts[0], tensor.shape[-1])


def add_products(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Add products, one for each lane, to what is there, in its type."""
    if to.dtype == left.dtype:
        to.baddbmm_(left, right)
    else:
        to.add_(torch.bmm(left, right))
