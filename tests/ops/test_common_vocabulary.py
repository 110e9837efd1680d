"""Experts that number their tokens each in its own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ensemw2s import ops
from ensemw2s.ops import common_vocabulary


def noise(*shape: int, seed: int = 0, **options: Any) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**options)


def drawn(experts: Any, weights: list[float], impl: str = "auto") -> ops.MixtureSample:
    seeds = torch.arange(len(experts[0]))
    return ops.mixture_sample(experts, weights, temperature=0.9, top_p=0.8, seeds=seeds, positions=seeds, impl=impl)


def test_vocabularies_that_are_padded_to_several_sizes_mix_without_a_copy() -> None:
    wide, narrow = noise(5, 1040, dtype=torch.float32), noise(5, 1000, seed=1, dtype=torch.float32)
    both = common_vocabulary([wide, narrow])
    assert [each.shape for each in both] == [(5, 1000)] * 2
    assert [each.data_ptr() for each in both] == [wide.data_ptr(), narrow.data_ptr()]
    expected = drawn([wide[:, :1000].contiguous(), narrow], [1.0, 2.0])
    assert torch.equal(drawn(both, [1.0, 2.0]).tokens, expected.tokens)


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.data())
def test_each_distribution_is_the_experts_own_over_the_tokens_that_it_shares(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    experts, maps = [], []
    for t in range(data.draw(st.integers(1, 3))):
        own = data.draw(st.integers(1, 15))
        ids = data.draw(st.lists(st.integers(-1, own - 1), min_size=size, max_size=size))
        experts.append(noise(2, 3, own, seed=t, dtype=torch.float64))
        maps.append(torch.tensor(ids, dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))))
    for expert, ids, found in zip(experts, maps, common_vocabulary(experts, maps), strict=True):
        assert found.shape == (2, 3, size)
        for v, own in enumerate(ids.tolist()):
            expected = torch.full((2, 3), -torch.inf, dtype=torch.float64) if own < 0 else expert[..., own]
            assert torch.equal(found[..., v], expected)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_renumbered_expert_leaves_every_draw_as_it_was(dtype: torch.dtype, impl: str) -> None:
    first, second = noise(9, 777, dtype=dtype), noise(9, 777, seed=1, dtype=dtype)
    # Of the second expert, common token v is its token order[v]; beside these it has 50 others.
    order = torch.randperm(827, generator=torch.Generator().manual_seed(2))[:777]
    renumbered = noise(9, 827, seed=3, dtype=dtype).index_copy(1, order, second)
    mapped = common_vocabulary([first, renumbered], [None, order.int()])
    found, expected = drawn(mapped, [0.5, 0.5], impl), drawn([first, second], [0.5, 0.5], impl)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.log_probs, expected.log_probs)


def test_tokens_that_one_expert_lacks_come_from_the_other() -> None:
    logits = [torch.zeros(1, 2), torch.zeros(1, 2)]
    # A union of three tokens, of which the middle one is shared.
    union = common_vocabulary(logits, [torch.tensor([0, 1, -1]), torch.tensor([-1, 0, 1])])
    probabilities = ops.mixture_log_probs(union, [1.0, 3.0]).exp()
    torch.testing.assert_close(probabilities, torch.tensor([[0.125, 0.5, 0.375]]))


def test_an_expert_without_any_common_token_makes_its_rows_invalid() -> None:
    both = common_vocabulary(
        [torch.zeros(2, 4), torch.zeros(2, 3)], [torch.full((4,), -1), torch.tensor([0, 1, 2, -1])]
    )
    assert not drawn(both, [1.0, 1.0]).valid.any()
    assert drawn(both, [0.0, 1.0]).valid.all()


def test_gradients_reach_the_experts_own_logits() -> None:
    experts = [noise(2, 6).requires_grad_(), noise(2, 5, seed=1).requires_grad_()]
    maps = [torch.tensor([5, 0, -1, 2]), torch.tensor([1, 1, 3, -1])]

    def log_probs(*logits: torch.Tensor) -> torch.Tensor:
        return ops.mixture_log_probs(common_vocabulary(logits, maps), [0.4, 0.6])

    assert torch.autograd.gradcheck(log_probs, experts)


def test_it_compiles_into_one_graph() -> None:
    experts, maps = [noise(2, 6), noise(2, 5, seed=1)], [torch.tensor([5, 0, -1, 2]), torch.tensor([1, 1, 3, -1])]
    compiled = torch.compile(common_vocabulary, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(experts, maps), common_vocabulary(experts, maps), strict=True):
        assert torch.equal(found, expected)


X, Y = torch.zeros(2, 4), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("logits", "maps", "error", "message"),
    [
        ([X, Y], [None], ValueError, "maps must have one entry for each of 2 experts, at least one; got 1"),
        ([], [], ValueError, "at least one; got 0"),
        ([X, Y], [torch.tensor([0, 1]), torch.tensor([0])], ValueError, r"got lengths \[1, 2\]"),
        (
            [X, Y],
            [torch.tensor([0, 1, 2, 3]), None],
            ValueError,
            r"maps\[1\] is None, but logits\[1\] has 3 tokens and",
        ),
        ([X, Y], [torch.tensor([0, 4]), None], ValueError, r"maps\[0\] holds 4, expected -1 or an id below 4"),
        ([X, Y], [torch.tensor([0, -2]), None], ValueError, r"maps\[0\] holds -2, expected -1"),
        ([X, Y], [torch.zeros(2), None], TypeError, r"maps\[0\] must be int32 or int64, got torch.float32"),
        ([X, Y], [[0, 1], None], TypeError, r"maps\[0\] must be a tensor, got list"),
        (
            [X, Y],
            [torch.zeros(1, 2, dtype=torch.int32), None],
            ValueError,
            r"maps\[0\] must be \[V\] with at least one",
        ),
        ([X, Y], [torch.zeros(0, dtype=torch.int32), None], ValueError, r"maps\[0\] must be \[V\] with at least one"),
        ([X, "y"], None, TypeError, r"logits\[1\] must be a tensor, got str"),
    ],
)
def test_what_is_wrong_is_named(logits: Any, maps: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        common_vocabulary(logits, maps)
