"""Caches that grow in place, against transformers' own that copy."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config
from transformers.cache_utils import DynamicLayer

from ensemw2s.ensemble.cache import GrowingLayer, growing_cache
from tests.tiny import llama

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 70)),
        st.tuples(st.just("crop"), st.integers(1, 9)),
        st.tuples(st.just("reorder"), st.integers(0, 99)),
        st.tuples(st.just("select"), st.integers(0, 99)),
        st.tuples(st.just("repeat"), st.integers(2, 3)),
        st.tuples(st.just("reset"), st.none()),
        st.tuples(st.just("copy"), st.none()),
    ),
    max_size=12,
)


def states(rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randn(rows, 2, length, 4, generator=generator)
    return keys, torch.randn(rows, 2, length, 3, generator=generator)


@given(steps=STEPS, seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=80)
@torch.no_grad()
def test_whatever_happens_to_a_layer_it_holds_what_the_copying_one_holds(
    steps: list[tuple[str, int | None]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = GrowingLayer(), DynamicLayer()
    for what, number in [("append", 5), *steps, ("append", 1)]:
        rows = theirs.keys.shape[0] if theirs.get_seq_length() else 2
        if rows > 12 and what == "repeat":
            continue
        if what == "copy":
            ours = copy.deepcopy(ours)
        for layer in (ours, theirs):
            generator.manual_seed(seed)
            if what == "append":
                layer.update(*states(rows, number, generator))
            elif what == "crop":
                layer.crop(-min(number, layer.get_seq_length() - 1)) if layer.get_seq_length() > 1 else None
            elif what == "reorder":
                layer.reorder_cache(torch.randint(rows, (rows,), generator=generator))
            elif what == "select":
                layer.batch_select_indices(torch.randint(rows, (max(1, number % rows),), generator=generator))
            elif what == "repeat":
                layer.batch_repeat_interleave(number)
            elif what == "reset":
                layer.reset()
        seed += 1
        assert ours.get_seq_length() == theirs.get_seq_length()
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


@torch.no_grad()
def test_a_step_writes_behind_what_is_there() -> None:
    layer, generator = GrowingLayer(), torch.Generator()
    layer.update(*states(2, 10, generator))
    start = layer.keys.data_ptr(), layer.values.data_ptr()
    for _ in range(20):
        keys, _ = layer.update(*states(2, 1, generator))
        assert keys is layer.keys
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == start
    assert layer.keys.shape == (2, 2, 30, 4)


def test_gradients_go_through_the_cache() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, length, 4, requires_grad=True) for length in (3, 2)]
    layer = GrowingLayer()
    for state in inputs:
        keys, values = layer.update(state, 2 * state)
    (keys.square().sum() + values.sum()).backward()
    for state in inputs:
        torch.testing.assert_close(state.grad, 2 * state.detach() + 2)


def test_only_layers_that_keep_everything_are_replaced() -> None:
    assert [type(layer) for layer in growing_cache(llama(0).config).layers] == [GrowingLayer] * 2
    config = Gemma2Config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    kinds = [type(layer).__name__ for layer in growing_cache(config).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "GrowingLayer"]
