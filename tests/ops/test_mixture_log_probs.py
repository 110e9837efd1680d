from __future__ import annotations

import pytest
import torch

from ensemw2s.ops import mixture_log_probs
from ensemw2s.ops.checks import COMBINES
from tests.ops.helpers import DTYPES, assert_as_good_as_torch, needs_cpp

# 1: one token; 3: below one vector; 64, 65: a plain tile and one token more; 257: past an AVX-512 tile;
# 8195: past one segment of the scan, odd.
SIZES = (1, 3, 64, 65, 257, 8195)
# 1: no mixing; 2: the smallest mixture; 5: more experts than accumulators.
EXPERTS = (1, 2, 5)
SCALE = 3.0  # typical spread of a language model's logits


def inputs(generator, experts, shape, dtype=torch.float32, scale=SCALE):
    logits = [(torch.randn(*shape, generator=generator) * scale).to(dtype) for _ in range(experts)]
    return logits, torch.rand(experts, generator=generator) + 0.1


@needs_cpp
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_is_as_good_as_plain_torch(generator, dtype, combine):
    for experts in EXPERTS:
        for size in SIZES:
            logits, weights = inputs(generator, experts, (3, size), dtype)
            exact = mixture_log_probs([x.double() for x in logits], weights.double(), combine)
            plain = mixture_log_probs([x.float() for x in logits], weights, combine, impl="reference")
            kernel = mixture_log_probs(logits, weights, combine, impl="cpp")
            assert kernel.dtype == torch.float32
            assert_as_good_as_torch(kernel, plain, exact, atol=1e-6)


def test_reference_is_the_definition(generator):
    logits, weights = inputs(generator, 3, (4, 11))
    probs = [x.double().softmax(-1) for x in logits]
    w = weights.double() / weights.double().sum()
    mean = sum(a * p for a, p in zip(w, probs, strict=True)).log()
    product = torch.stack([p**a for a, p in zip(w, probs, strict=True)]).prod(0)
    product = (product / product.sum(-1, keepdim=True)).log()
    votes = torch.zeros(4, 11, dtype=torch.double)
    for a, p in zip(w, probs, strict=True):
        votes[torch.arange(4), p.argmax(-1)] += a
    for combine, expected in zip(COMBINES, (mean, product, votes.log()), strict=True):
        got = mixture_log_probs([x.double() for x in logits], weights.double(), combine)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("combine", COMBINES)
class TestEveryBackend:
    def test_extreme_logits(self, combine, impl):
        logits = torch.tensor([[[1e4, -1e4, 0.0, 9999.0]], [[-1e4, 1e4, 5.0, 1e4]]])
        weights = torch.tensor([0.25, 0.75])
        exact = mixture_log_probs(logits.double(), weights.double(), combine)
        got = mixture_log_probs(logits, weights, combine, impl=impl)
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)

    def test_equal_logits_are_uniform(self, combine, impl):
        got = mixture_log_probs(torch.full((2, 1, 100), 7.0), [1.0, 1.0], combine, impl=impl)
        expected = torch.full((1, 100), -torch.inf) if combine == "vote" else torch.full((1, 100), 0.01).log()
        if combine == "vote":
            expected[0, 0] = 0.0
        torch.testing.assert_close(got, expected)

    def test_masked_tokens_are_impossible(self, combine, impl, generator):
        logits, weights = inputs(generator, 2, (2, 70))
        for expert in logits:
            expert[:, 5:50] = -torch.inf
        got = mixture_log_probs(logits, weights, combine, impl=impl)
        assert bool((got[:, 5:50] == -torch.inf).all())
        torch.testing.assert_close(got.exp().sum(-1), torch.ones(2))

    @pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
    def test_broken_rows_are_nan_and_alone(self, combine, impl, broken, generator):
        logits, weights = inputs(generator, 3, (3, 300))
        if broken == -float("inf"):
            logits[1][1] = broken
        else:
            logits[1][1, 299] = broken
        got = mixture_log_probs(logits, weights, combine, impl=impl)
        assert bool(got[1].isnan().all())
        torch.testing.assert_close(got[[0, 2]].exp().sum(-1), torch.ones(2))

    def test_expert_of_weight_zero_drops_out(self, combine, impl, generator):
        logits, _ = inputs(generator, 3, (3, 40))
        logits[1][0] = float("nan")
        logits[1][1] = -torch.inf
        got = mixture_log_probs(logits, [0.5, 0.0, 2.0], combine, impl=impl)
        expected = mixture_log_probs([logits[0], logits[2]], [0.2, 0.8], combine, impl="reference")
        torch.testing.assert_close(got, expected)

    def test_leading_shapes(self, combine, impl, generator):
        weights = torch.tensor([0.3, 0.7])
        stacked = torch.randn(2, 3, 4, 9, generator=generator)
        expected = mixture_log_probs(stacked, weights, combine, impl="reference")
        strided = torch.empty(4, 2, 3, 12)[..., :9].permute(1, 2, 0, 3).copy_(stacked)
        assert not strided.is_contiguous()
        torch.testing.assert_close(mixture_log_probs(strided, weights, combine, impl=impl), expected)
        columns = stacked.transpose(-1, -2).contiguous().transpose(-1, -2)  # last stride is not 1
        torch.testing.assert_close(mixture_log_probs(columns, weights, combine, impl=impl), expected)
        expanded = stacked[:, :1, :1].expand(2, 3, 4, 9)  # strides of 0
        torch.testing.assert_close(
            mixture_log_probs(expanded, weights, combine, impl=impl), expected[:1, :1].expand(3, 4, 9)
        )
        torch.testing.assert_close(mixture_log_probs(stacked[:, 0, 0], weights, combine, impl=impl), expected[0, 0])
        assert mixture_log_probs(stacked[:, :0], weights, combine, impl=impl).shape == (0, 4, 9)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("combine", COMBINES)
class TestWeightsOfRows:
    def test_a_row_is_what_its_weights_alone_make_it(self, combine, impl, generator):
        logits = [torch.randn(2, 3, 70, generator=generator) for _ in range(3)]
        weights = torch.rand(2, 3, 3, generator=generator)
        weights[0, 1] = torch.tensor([0.0, 2.0, 1.0])
        logits[0][0, 1] = float("nan")  # of an expert that has no say there
        got = mixture_log_probs(logits, weights, combine, impl=impl)
        for i, j in ((i, j) for i in range(2) for j in range(3)):
            alone = mixture_log_probs([x[i, j] for x in logits], weights[i, j], combine, impl=impl)
            torch.testing.assert_close(got[i, j], alone, rtol=0, atol=0 if impl == "cpp" else 1e-6)

    def test_a_row_without_weight_is_nan_and_alone(self, combine, impl, generator):
        logits, _ = inputs(generator, 2, (3, 70))
        got = mixture_log_probs(logits, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 0.5]]), combine, impl=impl)
        assert got.isnan().any(-1).tolist() == got.isnan().all(-1).tolist() == [False, True, False]

    def test_weights_that_float32_cannot_hold(self, combine, impl, generator):
        logits, _ = inputs(generator, 2, (2, 70))
        weights = torch.tensor([[1e200, 3e200], [1e-300, 3e-300]], dtype=torch.float64)
        got = mixture_log_probs(logits, weights, combine, impl=impl)
        torch.testing.assert_close(got, mixture_log_probs(logits, [1.0, 3.0], combine, impl=impl), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
    def test_bad_weights_are_named_with_their_row(self, combine, impl, value):
        weights = torch.ones(3, 2)
        weights[2, 1] = value
        with pytest.raises(ValueError, match=rf"weights must be finite and non-negative, got {value} in row 2"):
            mixture_log_probs(torch.zeros(2, 3, 5), weights, combine, impl=impl)
        with pytest.raises(ValueError, match=r"weights must have shape \(2,\).*or \(3, 2\), those of each row"):
            mixture_log_probs(torch.zeros(2, 3, 5), torch.ones(2, 2), combine, impl=impl)


@pytest.mark.parametrize("combine", ["prob", "logprob"])
def test_gradcheck_of_the_reference_with_weights_of_rows(generator, combine):
    logits = [torch.randn(2, 5, dtype=torch.double, generator=generator).requires_grad_() for _ in range(3)]
    weights = (torch.rand(2, 3, dtype=torch.double, generator=generator) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, *z: mixture_log_probs(z, w, combine), (weights, *logits))


@needs_cpp
@pytest.mark.parametrize("combine", ["prob", "logprob"])
def test_kernel_gradients_with_weights_of_rows_match_float64(generator, combine):
    logits, _ = inputs(generator, 3, (4, 2, 130))
    weights = torch.rand(4, 2, 3, generator=generator) + 0.1
    weights[0, 1, 2] = 0.0
    upstream = torch.randn(4, 2, 130, generator=generator)
    exact = gradients([x.double() for x in logits], weights.double(), combine, upstream)
    got = gradients(logits, weights, combine, upstream, impl="cpp")
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=3e-5 * float(theirs.abs().max()), rtol=2e-5)
    # An expert that has no say may hold NaN; the other experts' gradients do not see it.
    logits[2][0, 1] = float("nan")
    broken = gradients(logits, weights, combine, upstream, impl="cpp")
    assert bool(broken[0].isfinite().all())
    torch.testing.assert_close(broken[1], got[1])
    torch.testing.assert_close(broken[0][..., :2][weights[..., 2] > 0], got[0][..., :2][weights[..., 2] > 0])


@pytest.mark.parametrize("combine", ["prob", "logprob"])
def test_gradcheck_of_the_reference(generator, combine):
    logits = [torch.randn(2, 5, dtype=torch.double, generator=generator).requires_grad_() for _ in range(3)]
    weights = (torch.rand(3, dtype=torch.double, generator=generator) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, *z: mixture_log_probs(z, w, combine), (weights, *logits))


def gradients(logits, weights, combine, upstream, **settings):
    leaves = [x.detach().clone().requires_grad_() for x in (weights, *logits)]
    out = mixture_log_probs(leaves[1:], leaves[0], combine, **settings)
    out.backward(upstream.to(out.dtype))
    return [x.grad for x in leaves]


@needs_cpp
@pytest.mark.parametrize("combine", ["prob", "logprob"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_gradients_match_float64(generator, combine, dtype):
    logits, weights = inputs(generator, 3, (4, 130), dtype)
    weights[1] = 0.0  # the one-sided gradient of an idle expert's weight counts too
    for expert in logits:
        expert[:, 7] = -torch.inf
    upstream = torch.randn(4, 130, generator=generator)
    upstream[:, 7] = 0
    exact = gradients([x.double() for x in logits], weights.double(), combine, upstream)
    got, plain = (gradients(logits, weights, combine, upstream, impl=impl) for impl in ("cpp", "reference"))
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for ours, torchs, theirs in zip(got, plain, exact, strict=True):
        # An idle expert's weight has a sum of large terms of both signs, where plain torch is off as far.
        allowed = tolerance * float(theirs.abs().max()) + 2 * float((torchs.double() - theirs).abs().max())
        torch.testing.assert_close(ours.double(), theirs, atol=allowed, rtol=tolerance)


@needs_cpp
@pytest.mark.parametrize("combine", [0, 1])
def test_opcheck(generator, combine):
    logits, weights = inputs(generator, 2, (3, 20))
    for tensor in (weights, *logits):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.ensemw2s.mixture_log_probs, (logits, weights, combine))
    of_rows = torch.rand(3, 2, generator=generator).requires_grad_()
    torch.library.opcheck(torch.ops.ensemw2s.mixture_log_probs, (logits, of_rows, combine))


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_compiles_whole(generator, impl, fresh_compiler):
    logits, weights = inputs(generator, 2, (3, 33))
    compiled = torch.compile(mixture_log_probs, fullgraph=True, backend="aot_eager")
    for combine in COMBINES:
        torch.testing.assert_close(
            compiled(logits, weights, combine, impl=impl), mixture_log_probs(logits, weights, combine, impl="reference")
        )


def test_whole_numbers_are_weights():
    logits = torch.randn(2, 3, 5)
    assert torch.equal(
        mixture_log_probs(logits, torch.tensor([2, 1])), mixture_log_probs(logits, torch.tensor([2.0, 1.0]))
    )


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": []}, ValueError, "no expert"),
        ({"logits": torch.zeros(3)}, ValueError, r"\[T, \.\.\., V\]"),
        ({"logits": [torch.zeros(2, 3), torch.zeros(2, 4)]}, ValueError, r"logits\[1\] has shape \(2, 4\)"),
        ({"logits": [torch.zeros(2, 3), torch.zeros(2, 3).half()]}, TypeError, r"logits\[1\] is torch.float16"),
        ({"logits": [torch.zeros(2, 3)] * 2 + [torch.zeros(2, 3, device="meta")]}, ValueError, "on meta"),
        ({"logits": torch.zeros(2, 2, 3, dtype=torch.int64)}, TypeError, "int64"),
        ({"logits": torch.zeros(2, 2, 0)}, ValueError, "vocabulary axis"),
        ({"weights": torch.ones(3)}, ValueError, r"shape \(2,\)"),
        ({"weights": torch.ones(2, dtype=torch.bool)}, TypeError, "weights must be numbers, got torch.bool"),
        ({"weights": torch.tensor([1.0, -0.5])}, ValueError, "-0.5"),
        ({"weights": torch.zeros(2)}, ValueError, "not all zero"),
        ({"weights": torch.tensor([1.0, float("nan")])}, ValueError, "finite"),
        ({"combine": "mean"}, ValueError, "combine='mean'"),
        ({"impl": "fortran"}, ValueError, "impl='fortran'"),
        (
            {"impl": "triton"},
            ValueError,
            "impl='triton' cannot run mixture_log_probs on a cpu tensor: Triton's kernels run on CUDA",
        ),
    ],
)
def test_bad_input(impl, change, error, words):
    arguments = {"logits": torch.zeros(2, 2, 3), "weights": torch.ones(2), "impl": impl} | change
    with pytest.raises(error, match=words):
        mixture_log_probs(**arguments)


def test_vote_refuses_a_gradient():
    with pytest.raises(ValueError, match="no gradient"):
        mixture_log_probs(torch.zeros(2, 2, 3, requires_grad=True), [1.0, 1.0], "vote")


@needs_cpp
def test_kernels_refuse_float64():
    with pytest.raises(TypeError, match="float64; use impl='reference'"):
        mixture_log_probs(torch.zeros(2, 2, 3, dtype=torch.double), [1.0, 1.0], impl="cpp")
