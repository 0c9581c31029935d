"""Stacked weights of lanes: values, gradients and identities survive when lanes are removed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lorabench.models.lanes.shelf import Lane, RowCounts, Shelf, Stack, WeightSlot, lane_name, single_lane

shapes = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), min_size=2, max_size=6)


def shelf_of(shapes, lanes):
    """Return a shelf with two groups of weights, and the initial weights of each lane."""
    torch.manual_seed(0)
    names = [f"w{number}" for number in range(len(shapes))]
    starts = [{name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)} for _ in range(lanes)]
    return Shelf(starts, [names[::2], names[1::2]]), starts


def fill_gradients(shelf):
    with torch.no_grad():
        shelf.gradients.copy_(torch.randn_like(shelf.gradients))


@given(shapes, st.integers(1, 4))
def test_leaves_places_and_parameters_are_the_same_numbers(shapes, lanes):
    shelf, starts = shelf_of(shapes, lanes)
    fill_gradients(shelf)
    for lane, weights in enumerate(starts):
        places = shelf.places(lane)
        assert places.keys() == weights.keys()
        assert Lane(places).size == sum(weight.numel() for weight in weights.values())
        assert [id(p) for p in Lane(places).parameters] == [id(p) for p in shelf.parameters[lane]]
        for name, weight in weights.items():
            place = places[name]
            assert torch.equal(place.of(place.parameter.detach()), weight)
            assert torch.equal(shelf.leaves[name].detach()[lane], weight)
            assert torch.equal(place.of(place.parameter.grad), shelf.gradients_of(name)[lane])
            # Not a copy: what is written through the place is what layers read.
            place.of(place.parameter.detach()).fill_(7.0)
            assert (shelf.leaves[name][lane] == 7.0).all()


@given(shapes)
def test_a_place_is_where_a_tensor_laid_out_alike_has_the_weight(shapes):
    shelf, _ = shelf_of(shapes, 2)
    for place in shelf.places(1).values():
        moment = torch.zeros_like(place.parameter)
        wanted = torch.randn(place.shape)
        place.of(moment).copy_(wanted)
        assert torch.equal(place.of(moment), wanted)
        assert moment.count_nonzero() == wanted.count_nonzero()
    whole = nn.Parameter(torch.randn(3, 2))
    assert WeightSlot(whole, whole.shape).of(whole) is whole


@given(shapes, st.integers(1, 5), st.data())
def test_lanes_that_stay_keep_their_weights_and_parameters(shapes, lanes, data):
    shelf, starts = shelf_of(shapes, lanes)
    mirrors = [{name: nn.Parameter(torch.zeros(())) for name in starts[0]} for _ in range(lanes)]
    for lane, of_lane in enumerate(mirrors):
        for name, mirror in of_lane.items():
            shelf.mirror(lane, name, mirror)
    before = [list(of_lane) for of_lane in shelf.parameters]
    kept = list(range(lanes))
    for _ in range(2):
        chosen = sorted(data.draw(st.sets(st.sampled_from(range(len(kept))), min_size=1)))
        shelf.keep(chosen)
        kept = [kept[place] for place in chosen]
    assert shelf.values.shape[0] == len(kept)
    fill_gradients(shelf)
    for lane, was in enumerate(kept):
        assert [id(p) for p in shelf.parameters[lane]] == [id(p) for p in before[was]]
        for name, place in shelf.places(lane).items():
            assert torch.equal(place.of(place.parameter.detach()), starts[was][name])
            assert torch.equal(shelf.leaves[name].detach()[lane], starts[was][name])
            assert torch.equal(place.of(place.parameter.grad), shelf.gradients_of(name)[lane])
            assert torch.equal(mirrors[was][name].detach(), starts[was][name])
            assert torch.equal(mirrors[was][name].grad, shelf.gradients_of(name)[lane])


def test_a_step_of_one_lane_moves_that_lane_alone_also_after_another_left():
    shelf, starts = shelf_of([(2, 3), (4,)], 3)
    optimizers = [torch.optim.AdamW(parameters, lr=0.1) for parameters in shelf.parameters]
    fill_gradients(shelf)
    for optimizer in optimizers:
        optimizer.step()
    moments = [optimizers[2].state[parameter]["exp_avg"].clone() for parameter in shelf.parameters[2]]
    shelf.keep([0, 2])
    assert not shelf.gradients.any()
    values = shelf.values.clone()
    fill_gradients(shelf)
    optimizers[2].step()
    assert torch.equal(shelf.values[0], values[0])
    assert (shelf.values[1] != values[1]).all()
    # The optimizer keeps its moments.
    for parameter, moment in zip(shelf.parameters[1], moments, strict=True):
        expected = 0.9 * moment + 0.1 * parameter.grad
        torch.testing.assert_close(optimizers[2].state[parameter]["exp_avg"], expected)
    assert not torch.equal(shelf.leaves["w0"].detach()[1], starts[2]["w0"])


def test_gradients_are_dropped_where_layers_add_to_them():
    shelf, _ = shelf_of([(2, 3), (4,)], 2)
    fill_gradients(shelf)
    first, second = (Lane(shelf.places(lane)) for lane in range(2))
    gradient = first.parameters[0].grad
    first.zero_grad()
    assert first.parameters[0].grad is gradient
    assert not shelf.gradients[0].any()
    assert shelf.gradients[1].all()
    second.zero_grad()
    assert not shelf.gradients.any()


def test_a_model_alone_lets_its_gradients_go():
    stack = single_lane(nn.Linear(2, 3), "it")
    lane = stack.lanes["it"]
    assert lane.size == 9
    stack.model(torch.ones(1, 2)).sum().backward()
    lane.zero_grad()
    assert all(parameter.grad is None for parameter in stack.model.parameters())
    stack.drop("it")
    assert list(stack.lanes) == ["it"]


def test_a_stack_drops_any_lane_but_the_last():
    shelf, starts = shelf_of([(2,), (3,)], 3)
    stack = Stack(
        nn.Identity(), {name: Lane(shelf.places(lane)) for lane, name in enumerate("abc")}, RowCounts(3), shelf
    )
    for name, left in (("b", "ac"), ("a", "c"), ("c", "c")):
        stack.drop(name)
        assert "".join(stack.lanes) == left
        assert stack.rows.counts == (1,) * len(left)
        assert len(shelf.values) == len(left)
    [place] = [place for name, place in stack.lanes["c"].places.items() if name == "w0"]
    assert torch.equal(place.of(place.parameter.detach()), starts[2]["w0"])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 7))
def test_tokens_are_dealt_like_rows(counts, width):
    rows = RowCounts(len(counts))
    before = rows.counts
    with rows.are(counts):
        total = sum(counts) * width
        assert rows.tokens(total) == [count * width for count in counts]
        with rows.are([1] * len(counts)):
            assert rows.tokens(len(counts)) == [1] * len(counts)
        assert rows.counts == tuple(counts)
    assert rows.counts == before


def test_rows_are_as_before_after_an_error():
    rows = RowCounts(2)
    with pytest.raises(KeyError), rows.are([3, 4]):
        raise KeyError
    assert rows.counts == (1, 1)


def test_names_do_not_tell_the_adapter():
    assert lane_name("a.lora_A.3f.weight", "3f") == "a.lora_A.default.weight"
    assert lane_name("a.3f_proj.lora_A.3f.weight", "3f") == "a.3f_proj.lora_A.default.weight"
