"""Products by oneDNN or torch's own choice: values, gradients, the rule, the switch."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from ensemw2s import ops
from ensemw2s.ops import products
from ensemw2s.ops.products import faster_linear_layers, is_for_onednn, linear, product_library

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(products.VARIABLE, "onednn" if torch.backends.mkldnn.is_available() else "torch")
    yield


def large(*shape: int, seed: int = 0, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


def within_rounding(found: torch.Tensor, expected: torch.Tensor, terms: int) -> None:
    # Sums of so many products of standard normals, in any order.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4e-7 * terms)


SHAPES = [((33,), 300, 257), ((5, 7), 576, 192), ((2, 3, 65), 128, 97), ((1024,), 64, 64), ((9, 1), 1031, 517)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("leading", "inner", "outer"), SHAPES)
def test_values_and_gradients_are_those_of_float64(
    leading: tuple[int, ...], inner: int, outer: int, with_bias: bool
) -> None:
    inputs = [large(*leading, inner, requires_grad=True), large(outer, inner, seed=1, requires_grad=True)]
    inputs += [large(outer, seed=2, requires_grad=True)] if with_bias else []
    assert is_for_onednn(*inputs[:2]) == torch.backends.mkldnn.is_available()
    exact = [value.detach().double().requires_grad_() for value in inputs]
    product, expected = linear(*inputs), functional.linear(*exact)
    within_rounding(product, expected, inner)
    above = large(*product.shape, seed=3)
    rows = product.numel() // outer
    found = torch.autograd.grad(product, inputs, above)
    wanted = torch.autograd.grad(expected, exact, above.double())
    for mine, right, terms in zip(found, wanted, (outer, rows, rows), strict=False):
        within_rounding(mine, right, terms)


def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    frozen, x = large(400, 300, seed=1), large(40, 300, requires_grad=True)
    linear(x, frozen).sum().backward()
    within_rounding(x.grad, frozen.double().sum(0).expand(40, -1), 400)
    trained, y = large(400, 300, seed=1, requires_grad=True), large(40, 300)
    linear(y, trained).sum().backward()
    within_rounding(trained.grad, y.double().sum(0).expand(400, -1), 40)


def test_a_second_derivative() -> None:
    x, weight = large(64, 300, requires_grad=True), large(200, 300, seed=1, requires_grad=True)
    (first,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    a, b = (value.detach().double().requires_grad_() for value in (x, weight))
    (first,) = torch.autograd.grad(functional.linear(a, b).square().sum(), a, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), b)
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("change", ["every second row", "transposed weight", "some columns"])
def test_strides_are_followed(change: str) -> None:
    x, weight = large(90, 400), large(300, 400, seed=1)
    if change == "every second row":
        x, weight = large(180, 400)[::2], large(600, 400, seed=1)[::2]
    elif change == "transposed weight":
        weight = large(400, 300, seed=1).T
    else:
        x, weight = large(90, 500)[:, 100:], large(300, 500, seed=1)[:, 100:]
    within_rounding(linear(x, weight), x.double() @ weight.double().T, 400)


@needs_onednn
def test_what_onednn_does_not_serve_is_left_to_torch() -> None:
    x, weight = large(64, 512), large(256, 512, seed=1)
    assert is_for_onednn(x, weight)
    assert is_for_onednn(x, nn.Parameter(weight))
    for other, its_weight in (
        (x.double(), weight.double()),
        (x.bfloat16(), weight.bfloat16()),
        (x[:7], weight),
        (x[:, :16], weight[:64, :16]),
        (x[:0], weight),
        (x, weight[:0]),
        (x[0, 0], weight),
        (x, weight[:, :500]),
        (x.to("meta"), weight.to("meta")),
    ):
        assert not is_for_onednn(other, its_weight)
    with torch.autocast("cpu"):
        assert not is_for_onednn(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_for_onednn(x, weight)


def test_what_torch_refuses_is_refused_in_its_words() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        linear(large(64, 512), large(256, 500))


def test_functions_that_transform_functions_see_torchs_own_product() -> None:
    x, weight = large(6, 64, 512), large(256, 512, seed=1)
    torch.testing.assert_close(torch.func.vmap(linear, (0, None))(x, weight), functional.linear(x, weight))
    _, along = torch.func.jvp(lambda value: linear(value, weight), (x[0],), (x[1],))
    torch.testing.assert_close(along, functional.linear(x[1], weight))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], x[1])
        assert torch.autograd.forward_ad.unpack_dual(linear(dual, weight)).tangent is not None


def test_it_compiles_into_one_graph() -> None:
    x, weight = large(64, 512), large(256, 512, seed=1)
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), functional.linear(x, weight))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_beside_any_others(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = large(100, 576), large(192, 576, seed=1)
        assert torch.equal(linear(x, weight)[:40], linear(x[:40], weight))
        assert torch.equal(linear(x, weight), linear(x, weight))
    finally:
        torch.set_num_threads(before)


# The switch and the rule


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.VARIABLE, "")
    found = product_library()
    monkeypatch.delenv(products.VARIABLE)
    assert found == product_library()


def test_a_library_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.VARIABLE, "mkl")
    with pytest.raises(ValueError, match="ENSEMW2S_PRODUCTS='mkl' is not one of auto, torch, onednn"):
        product_library()


@pytest.mark.parametrize(
    ("vendor", "instructions", "expected"),
    [
        ("AuthenticAMD", "AVX512", "onednn"), ("AuthenticAMD", "AVX2", "torch"), ("GenuineIntel", "AVX512", "torch"),
        (None, "DEFAULT", "torch"),
    ],
)  # fmt: skip
@needs_onednn
def test_the_processor_decides(
    monkeypatch: pytest.MonkeyPatch, vendor: str | None, instructions: str, expected: str
) -> None:
    monkeypatch.delenv(products.VARIABLE)
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    products._is_onednn.cache_clear()
    assert product_library() == expected
    products._is_onednn.cache_clear()
    monkeypatch.setenv(products.VARIABLE, "torch")
    assert product_library() == "torch"
    assert not is_for_onednn(large(64, 512), large(256, 512))


def test_the_report_of_the_environment_names_it() -> None:
    assert ops.build_info()["products"] == product_library()
    command = [sys.executable, "-m", "ensemw2s", "env"]
    environment = {"PATH": "", products.VARIABLE: "torch"}
    assert "torch" in subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


# Whole models


def small_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


@needs_onednn
def test_a_models_layers_multiply_by_onednn_within_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_llama(), torch.arange(64).view(2, 32)
    calls: list[torch.Size] = []
    multiply = products._multiply
    monkeypatch.setattr(products, "_multiply", lambda x, w, b: calls.append(w.shape) or multiply(x, w, b))
    plain = model(ids, labels=ids)
    plain.loss.backward()
    before = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    assert not calls
    with faster_linear_layers(model, ids.numel()):
        faster = model(ids, labels=ids)
    forward = len(calls)
    # All of the seven products of each layer are large enough, and the head's is not.
    assert forward == 14
    faster.loss.backward()
    assert len(calls) == 3 * forward
    torch.testing.assert_close(faster.logits, plain.logits, rtol=0, atol=1e-5)
    for found, expected in zip((weight.grad for weight in model.parameters()), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@needs_onednn
def test_a_pass_over_few_tokens_is_let_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, frozen = small_llama(), products.FrozenWeights()
    assert type(faster_linear_layers(model, 31)).__name__ == "nullcontext"
    assert type(faster_linear_layers(model, 32)).__name__ != "nullcontext"
    assert type(faster_linear_layers(model, 1, frozen)).__name__ != "nullcontext"
    monkeypatch.setenv(products.VARIABLE, "torch")
    assert type(faster_linear_layers(model, 32, frozen)).__name__ == "nullcontext"


@needs_onednn
@torch.no_grad()
def test_a_frozen_models_layers_read_copies_for_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_llama(), torch.arange(6).view(2, 3)
    used, frozen = counted_copies(monkeypatch), products.FrozenWeights()
    expected = model.double()(ids).logits
    model.float()
    with faster_linear_layers(model, ids.numel(), frozen):
        found = model(ids).logits
    assert len(used) == 14
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


# Weights in oneDNN's order


def counted_copies(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the weights that `_multiply` gets in oneDNN's own layout."""
    shapes: list[torch.Size] = []
    multiply = products._multiply

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        shapes.extend([weight.shape] if weight.is_mkldnn else [])
        return multiply(x, weight, bias)

    monkeypatch.setattr(products, "_multiply", noted)
    return shapes


def by_copy(weights: products.FrozenWeights, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return weights.linear(x, layer.weight, layer.bias)


def layer_of(inner: int = 300, outer: int = 257, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(inner, outer, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 2, 7, 33, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_meet_a_copy_of_the_weight(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used, layer, x = counted_copies(monkeypatch), layer_of(bias=bias), large(rows, 300)
    found = by_copy(products.FrozenWeights(), layer, x)
    expected = functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    within_rounding(found, expected, 300)
    assert len(used) == int(torch.backends.mkldnn.is_available())


@needs_onednn
def test_where_a_copy_is_of_no_use_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    used, weights = counted_copies(monkeypatch), products.FrozenWeights()
    by_copy(weights, layer_of(), large(65, 300))
    by_copy(weights, layer_of(128, 128), large(4, 128))
    by_copy(weights, layer_of().requires_grad_(), large(4, 300))
    by_copy(weights, layer_of(), large(4, 300, requires_grad=True)).sum().backward()
    ready = layer_of()
    with torch.inference_mode():
        by_copy(weights, layer_of(), large(4, 300))
    monkeypatch.setenv(products.VARIABLE, "torch")
    by_copy(weights, ready, large(4, 300))
    assert not used
    monkeypatch.setenv(products.VARIABLE, "onednn")
    with torch.inference_mode():
        by_copy(weights, ready, large(4, 300))
    assert len(used) == 1


def rewritten(layer: nn.Linear, how: str) -> None:
    other = large(257, 300, seed=9)
    with torch.no_grad():
        if how == "in place":
            layer.weight.add_(other)
        elif how == "another parameter":
            layer.weight = nn.Parameter(other, requires_grad=False)
        elif how == "other data":
            layer.weight.data = other
        elif how == "merged as peft does":
            layer.weight.data += other
        else:
            layer.weight.data[:2] = layer.weight.data[:2].flip(0)


@pytest.mark.parametrize("how", ["in place", "another parameter", "other data", "merged as peft does", "rows swapped"])
def test_a_copy_is_never_that_of_another_weight(how: str) -> None:
    layer, x = layer_of(), large(4, 300)
    before = products.FrozenWeights()
    by_copy(before, layer, x)
    rewritten(layer, how)
    users = [products.FrozenWeights()]
    # What leaves a trace is seen by those who have looked already, too.
    users += [before] if how in ("in place", "another parameter", "other data") else []
    expected = functional.linear(*(v.double() for v in (x, layer.weight, layer.bias)))
    for user in users:
        within_rounding(by_copy(user, layer, x), expected, 300)


@needs_onednn
def test_copies_are_shared_limited_and_go_with_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    products._copies.clear()
    used, first, second, x = counted_copies(monkeypatch), layer_of(), layer_of(), large(4, 300)
    by_copy(products.FrozenWeights(), first, x)
    copy = products._copies[first.weight].weight
    by_copy(products.FrozenWeights(), first, x)
    assert products._copies[first.weight].weight is copy
    monkeypatch.setattr(products, "_MOST_PACKED_BYTES", int(1.5 * first.weight.nbytes))
    within_rounding(
        by_copy(products.FrozenWeights(), second, x),
        functional.linear(*(v.double() for v in (x, second.weight, second.bias))),
        300,
    )
    assert len(used) == 2
    assert len(products._copies) == 1
    assert first.weight in products._copies
    del first
    gc.collect()
    by_copy(products.FrozenWeights(), second, x)
    assert second.weight in products._copies
    assert len(products._copies) == 1


@needs_onednn
def test_threads_make_one_copy() -> None:
    layer, x = layer_of(1024, 1024), large(3, 1024)
    expected = functional.linear(*(v.double() for v in (x, layer.weight, layer.bias)))
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(lambda _: by_copy(products.FrozenWeights(), layer, x), range(30)):
            within_rounding(found, expected, 1024)
