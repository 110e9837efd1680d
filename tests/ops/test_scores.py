from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ensemw2s.ops import mixture_log_probs, mixture_scores, token_scores
from ensemw2s.ops.checks import COMBINES
from tests.ops.helpers import DTYPES, assert_as_good_as_torch, needs_cpp

IMPLS = ["reference", pytest.param("cpp", marks=needs_cpp)]
# 1: one token; 3: below one vector; 64, 65: a plain tile and one more; 257: past an AVX-512 tile; 8195: past a segment.
SIZES = (1, 3, 64, 65, 257, 8195)


def labels_for(generator, logits, rows):
    """Half the labels are the argmax of some expert, so that `correct` is true and false; one is masked."""
    labels = torch.randint(0, logits.shape[-1], (rows,), generator=generator)
    labels[::2] = logits.float().argmax(-1)[::2]
    labels[1] = -100
    return labels


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_scores_are_as_good_as_plain_torch(generator, dtype):
    for size in SIZES:
        logits = (torch.randn(6, size, generator=generator) * 3).to(dtype)
        labels = labels_for(generator, logits, 6)
        exact = token_scores(logits.double(), labels)
        plain = token_scores(logits, labels, impl="reference")
        kernel = token_scores(logits, labels, impl="cpp")
        assert_as_good_as_torch(kernel.log_probs, plain.log_probs, exact.log_probs, atol=1e-6)
        assert_as_good_as_torch(kernel.entropy, plain.entropy, exact.entropy, atol=4e-6)
        assert torch.equal(kernel.correct, exact.correct)


@needs_cpp
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixture_scores_are_as_good_as_plain_torch(generator, dtype, combine):
    for size in SIZES:
        for experts in (1, 3):
            logits = [(torch.randn(6, size, generator=generator) * 3).to(dtype) for _ in range(experts)]
            weights = torch.rand(experts, generator=generator) + 0.1
            labels = labels_for(generator, logits[0], 6)
            double = [x.double() for x in logits]
            exact = mixture_scores(double, weights.double(), labels, combine)
            plain = mixture_scores(logits, weights, labels, combine, impl="reference")
            kernel = mixture_scores(logits, weights, labels, combine, impl="cpp")
            assert_as_good_as_torch(kernel.log_probs, plain.log_probs, exact.log_probs, atol=1e-6)
            assert_as_good_as_torch(kernel.entropy, plain.entropy, exact.entropy, atol=4e-6)
            ranked = mixture_log_probs(double, weights.double(), combine).sort(-1, descending=True).values
            clear = torch.ones(6, dtype=torch.bool) if size == 1 else ranked[:, 0] - ranked[:, 1] > 1e-5
            assert torch.equal(kernel.correct[clear], exact.correct[clear])


SMALL_TERMS = """
import torch
from ensemw2s.ops import mixture_scores, token_scores
logits = torch.full((1, 8000), -16.0)
logits[:, ::1000] = 0.0
label = torch.tensor([0])
for got, exact in (
    (token_scores(logits, label, impl="cpp"), token_scores(logits.double(), label)),
    (mixture_scores([logits], [1.0], label, impl="cpp"), mixture_scores([logits.double()], [1.0], label)),
):
    print(float(got.log_probs - exact.log_probs), float(got.entropy - exact.entropy))
"""


@needs_cpp
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_many_small_terms_are_not_lost_beside_a_large_sum(capability):
    """8 tokens have all but a thousandth of the mass; one by one the others would vanish beside them in float32."""
    if capability == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("torch itself crashes when it is told this where there is no AVX-512")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run(
        [sys.executable, "-c", SMALL_TERMS], env=environment, capture_output=True, text=True, check=True
    )
    errors = [float(x) for x in run.stdout.split()]
    assert len(errors) == 4 and max(map(abs, errors)) < 3e-6


@pytest.mark.parametrize("impl", IMPLS)
class TestEveryBackend:
    def test_known_values(self, impl):
        logits = torch.tensor([[0.0, 0.0], [3.0, -torch.inf], [0.0, 0.0]])
        got = token_scores(logits, torch.tensor([0, 0, 1]), impl=impl)
        torch.testing.assert_close(got.log_probs, torch.tensor([-0.693147, 0.0, -0.693147]))
        torch.testing.assert_close(got.entropy, torch.tensor([0.693147, 0.0, 0.693147]))
        assert got.correct.tolist() == [True, True, False]  # the lowest id wins a tie

    def test_mixture_of_one_is_the_expert(self, impl, generator):
        logits = torch.randn(5, 300, generator=generator)
        labels = labels_for(generator, logits, 5)
        for combine in ("prob", "logprob"):
            one = token_scores(logits, labels, impl=impl)
            mixed = mixture_scores(logits[None], [2.0], labels, combine, impl=impl)
            for ours, theirs in zip(mixed, one, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    def test_extremes(self, impl):
        logits = torch.full((3, 500), -1e4)
        logits[0, 499] = 1e4
        logits[1, :] = torch.linspace(-1e4, 1e4, 500)
        labels = torch.tensor([499, 0, 7])
        exact = token_scores(logits.double(), labels)
        got = token_scores(logits, labels, impl=impl)
        for ours, theirs in zip(got, exact, strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
    def test_broken_rows_are_nan_and_alone(self, impl, broken, generator):
        logits = torch.randn(2, 3, 70, generator=generator)
        logits[0, 1, slice(None) if broken == -float("inf") else 3] = broken
        labels = torch.tensor([4, 5, 6])
        for got in (
            token_scores(logits[0], labels, impl=impl),
            mixture_scores(logits, [0.5, 0.5], labels, impl=impl),
        ):
            assert got.log_probs.isnan().tolist() == got.entropy.isnan().tolist() == [False, True, False]
            assert not got.correct[1]

    def test_masked_rows_are_not_read(self, impl):
        logits = torch.full((2, 2, 9), float("nan"))
        masked = torch.full((2,), -100)
        for got in (token_scores(logits[0], masked, impl=impl), mixture_scores(logits, [1.0, 1.0], masked, impl=impl)):
            assert got.log_probs.tolist() == got.entropy.tolist() == [0.0, 0.0]
            assert got.correct.tolist() == [False, False]

    def test_leading_shapes(self, impl, generator):
        logits = torch.randn(2, 3, 4, 9, generator=generator)
        labels = torch.randint(0, 9, (3, 4), generator=generator)
        expected = mixture_scores(logits, [0.4, 0.6], labels, impl="reference")
        strided = torch.empty(4, 2, 3, 12)[..., :9].permute(1, 2, 0, 3).copy_(logits)
        strided_labels = labels.T.contiguous().T
        for ours, theirs in zip(mixture_scores(strided, [0.4, 0.6], strided_labels, impl=impl), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        one = token_scores(strided[0], strided_labels, impl=impl)
        torch.testing.assert_close(one.log_probs, token_scores(logits[0], labels, impl="reference").log_probs)
        assert token_scores(logits[0, :0], labels[:0], impl=impl).entropy.shape == (0, 4)

    @pytest.mark.parametrize("label", [9, -1, -99])
    def test_labels_out_of_range(self, impl, label):
        labels = torch.tensor([0, label])
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 9\) or -100, got .*{label}"):
            token_scores(torch.zeros(2, 9), labels, impl=impl)
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 9\) or -100, got .*{label}"):
            mixture_scores(torch.zeros(1, 2, 9), [1.0], labels, impl=impl)

    def test_bad_shapes_and_dtypes(self, impl):
        with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
            token_scores(torch.zeros(2, 9), torch.zeros(3, dtype=torch.int64), impl=impl)
        with pytest.raises(TypeError, match="labels must be an int64 tensor"):
            token_scores(torch.zeros(2, 9), torch.zeros(2), impl=impl)
        with pytest.raises(TypeError, match="logits must be float32"):
            token_scores(torch.zeros(2, 9, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), impl=impl)
        with pytest.raises(ValueError, match="not all zero"):
            mixture_scores(torch.zeros(2, 2, 9), [0.0, 0.0], torch.zeros(2, dtype=torch.int64), impl=impl)

    def test_compiles_whole(self, impl, generator, fresh_compiler):
        logits = torch.randn(2, 3, 33, generator=generator)
        labels = torch.tensor([1, -100, 7])
        for function, arguments in ((token_scores, (logits[0],)), (mixture_scores, (logits, [0.3, 0.7]))):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            for ours, theirs in zip(
                compiled(*arguments, labels, impl=impl), function(*arguments, labels, impl=impl), strict=True
            ):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("combine", COMBINES)
def test_weights_of_rows(impl, combine, generator):
    logits, labels = torch.randn(2, 4, 50, generator=generator), torch.tensor([1, -100, 7, 9])
    weights = torch.tensor([[0.3, 0.7], [0.5, 0.5], [0.0, 1.0], [0.0, 0.0]])
    logits[0, 2] = float("nan")
    got = mixture_scores(logits, weights, labels, combine, impl=impl)
    for row in range(3):
        alone = mixture_scores(logits[:, row : row + 1], weights[row], labels[row : row + 1], combine, impl=impl)
        for ours, theirs in zip(got, alone, strict=True):
            torch.testing.assert_close(ours[row : row + 1], theirs)
    assert bool(got.log_probs[3].isnan()) and bool(got.entropy[3].isnan()) and not got.correct[3]


@needs_cpp
def test_opcheck(generator):
    logits, labels = torch.randn(2, 3, 20, generator=generator), torch.tensor([1, -100, 7])
    torch.library.opcheck(torch.ops.ensemw2s.token_scores, (logits[0], labels))
    torch.library.opcheck(torch.ops.ensemw2s.mixture_scores, (list(logits), torch.tensor([0.3, 0.7]), labels, 0))
