"""Prompts that are read in groups of similar lengths: the same logits and caches as read all at once."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from ensemw2s import TokenEnsemble
from ensemw2s.inference import reading
from ensemw2s.inference.reading import read_prompts, run_experts
from ensemw2s.models.mixture import OneModel
from tests.tiny import VOCAB, gpt2, llama, saved_adapters

LENGTHS = (3, 17, 1, 9, 17, 2, 30, 4)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    ids = torch.randint(2, VOCAB, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    return ids, (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()


def sliding() -> Any:
    torch.manual_seed(5)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=4,
        )
    ).eval()  # fmt: skip


@pytest.fixture(params=["adapters", "models", "one model", "gpt2", "sliding"])
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "adapters":
        return TokenEnsemble.from_adapters(llama(), saved_adapters(tmp_path), [0.5, 0.3, 0.2])
    if request.param == "models":
        return TokenEnsemble.from_models([llama(1), gpt2(2)], [1.0, 2.0])
    return OneModel({"one model": llama, "gpt2": gpt2, "sliding": sliding}[request.param]().eval())


def calls_of(mixture: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    run = mixture.expert_logits

    def noted(indices: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return run(indices, input_ids, *args, **kwargs)

    monkeypatch.setattr(mixture, "expert_logits", noted)
    return shapes


@torch.no_grad()
def test_logits_and_caches_are_those_of_the_padded_batch(mixture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_POSITIONS_OF_A_PASS", 3)
    ids, mask = prompts()
    whole, grouped = mixture.new_cache(), mixture.new_cache()
    expected = run_experts(mixture, ids, mask, whole)
    shapes = calls_of(mixture, monkeypatch)
    found = read_prompts(mixture, ids, mask, grouped)
    if any(layer.is_sliding for layer in whole.layers):
        # Such a cache forgets positions.
        assert shapes == [ids.shape]
    else:
        assert len(shapes) > 2
        assert sum(rows * length for rows, length in shapes) < 0.6 * ids.numel()
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)
    for mine, right in zip(grouped.layers, whole.layers, strict=True):
        real = mask.repeat(len(right.keys) // len(mask), 1)[:, None, -right.keys.shape[2] :, None] != 0
        for name in ("keys", "values"):
            of_mine, of_right = (torch.where(real, getattr(each, name), 0) for each in (mine, right))
            torch.testing.assert_close(of_mine, of_right, rtol=0, atol=1e-5)
    # The next tokens are read behind either.
    token, longer = ids[:, :1], torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    for mine, right in zip(
        run_experts(mixture, token, longer, grouped), run_experts(mixture, token, longer, whole), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mask", "why"),
    [
        ([[1, 1, 1, 0], [1, 1, 1, 1]], "padding on the right"),
        ([[1, 0, 0, 1], [1, 1, 1, 1]], "a hole"),
        ([[1, 1, 1, 1], [1, 1, 1, 1]], "no padding"),
    ],
)
def test_other_padding_is_read_at_once(mask: list[list[int]], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_POSITIONS_OF_A_PASS", 0)
    mixture = OneModel(llama().eval())
    shapes = calls_of(mixture, monkeypatch)
    ids, given = prompts((4, 4))[0], torch.tensor(mask)
    # Masks of either kind are in use.
    given = given.bool() if why == "padding on the right" else given
    expected = run_experts(mixture, ids, given, mixture.new_cache())
    found = read_prompts(mixture, ids, given, mixture.new_cache())
    assert torch.equal(found[0], expected[0]), why
    assert shapes[1:] == [(2, 4)]


@torch.no_grad()
def test_no_pass_has_more_positions_than_serve_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST_POSITIONS", 40)
    mixture = OneModel(llama().eval())
    shapes = calls_of(mixture, monkeypatch)
    ids, mask = prompts((10,) * 9)
    found = read_prompts(mixture, ids, mask, mixture.new_cache())
    assert sorted(shapes) == [(1, 10), (4, 10), (4, 10)]
    monkeypatch.undo()
    torch.testing.assert_close(found[0], run_experts(mixture, ids, mask, mixture.new_cache())[0], rtol=0, atol=1e-5)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 90), st.integers(0, 20))
def test_groups_cost_as_little_as_any(lengths: list[int], most: int, one_pass: int) -> None:
    lengths.sort()

    def cost(ends: list[int]) -> float:
        groups = list(itertools.pairwise([0, *ends]))
        if any(end - start > 1 and (end - start) * lengths[end - 1] > most for start, end in groups):
            return float("inf")
        return sum((end - start) * lengths[end - 1] + one_pass for start, end in groups)

    found = reading._ends_of_groups(lengths, most, one_pass)
    inner = range(1, len(lengths))
    every = ([*some, len(lengths)] for size in range(len(lengths)) for some in itertools.combinations(inner, size))
    assert cost(found) == min(map(cost, every))


def test_texts_of_a_batch_are_those_of_prompts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_POSITIONS_OF_A_PASS", 0)
    ensemble = TokenEnsemble.from_adapters(llama(), saved_adapters(tmp_path), [0.5, 0.3, 0.2])
    ids, mask = prompts()
    together = ensemble.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
    for row, length in enumerate(LENGTHS):
        alone = ensemble.generate(ids[row : row + 1, -length:], max_new_tokens=6, do_sample=False)[0, length:]
        assert together[row, : len(alone)].tolist() == alone.tolist()
