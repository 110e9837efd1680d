"""Values at the edges of what floats hold, and arguments that are none: every backend gives the same, and says why."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemw2s.ops import (
    linear_mixture_kl,
    linear_weighted_cross_entropy,
    mixture_kl,
    mixture_log_probs,
    mixture_sample,
    mixture_scores,
    token_scores,
    topk_kl,
    weighted_cross_entropy,
)
from tests.faults.op_calls import Backend, Inputs, arguments_of, bad_values, is_refused
from tests.ops.helpers import needs_cpp

IMPLS = ["reference", pytest.param("cpp", marks=needs_cpp)]
COLD = (1e-12, 1e-30, 1e-38, 2e-39, 1e-45, 5e-324)
FILTERS = ({}, {"top_k": 3}, {"top_p": 0.9}, {"top_p": 1e-46}, {"min_p": 1.0}, {"top_k": 9, "top_p": 0.5, "min_p": 0.1})
EXTREME = torch.finfo(torch.float32)


def keys(rows):
    return {"seeds": torch.arange(rows), "positions": torch.full((rows,), 3)}


@pytest.mark.parametrize("impl", IMPLS)
class TestARaceAlwaysHasAWinner:
    @pytest.mark.parametrize("combine", ["prob", "logprob", "vote"])
    @pytest.mark.parametrize("temperature", COLD)
    def test_cold(self, impl, combine, temperature, generator):
        logits = [3 * torch.randn(40, 300, generator=generator) for _ in range(3)]
        # No two sides of a vote weigh the same: rounding would decide between them.
        weights = [0.2, 0.35, 0.45]
        exact = mixture_log_probs([x.double() for x in logits], weights, combine)
        likeliest = exact.argmax(-1)
        for setting in FILTERS:
            got = mixture_sample(
                logits, weights, temperature=temperature, combine=combine, impl=impl, **keys(40), **setting
            )
            assert bool(got.valid.all())
            assert torch.equal(got.tokens, likeliest), setting

    def test_the_lowest_of_equals_where_it_is_too_cold_for_noise(self, impl):
        logits = torch.zeros(1, 20, 50)
        logits[..., [40, 7, 30]] = 2.0
        got = mixture_sample(logits, [1.0], temperature=1e-38, impl=impl, **keys(20))
        assert set(got.tokens.tolist()) == {7}
        # Noise decides among equals at any temperature that float32 has room for.
        warm = mixture_sample(logits, [1.0], temperature=1e-25, impl=impl, **keys(20))
        exact = mixture_sample(logits.double(), [1.0], temperature=1e-25, **keys(20))
        assert set(warm.tokens.tolist()) == {7, 30, 40}
        assert torch.equal(warm.tokens, exact.tokens)

    @pytest.mark.parametrize("combine", ["prob", "logprob"])
    @pytest.mark.parametrize("scale", [1e20, 1e37])
    def test_huge_logits(self, impl, combine, scale, generator):
        logits = [scale * torch.randn(60, 300, generator=generator) for _ in range(3)]
        double = [x.double() for x in logits]
        weights = [
            0.2,
            0.25,
            0.55,
        ]  # No two of them are as likely as the third, which float32 would decide by rounding.
        for setting in ({"temperature": 0.0}, *FILTERS):
            got = mixture_sample(logits, weights, combine=combine, impl=impl, **keys(60), **setting)
            exact = mixture_sample(double, weights, combine=combine, **keys(60), **setting)
            assert torch.equal(got.tokens, exact.tokens), setting
            torch.testing.assert_close(got.log_probs.double(), exact.log_probs, atol=2e-6, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("offset", [300.0, -3000.0, 1e5])
    def test_min_p_beside_an_offset(self, impl, dtype, offset, generator):
        logits = [(3 * torch.randn(100, 257, generator=generator) + offset).to(dtype) for _ in range(2)]
        for min_p in (1.0, 1 - 1e-7, 0.999):
            got = mixture_sample(logits, [0.4, 0.6], min_p=min_p, combine="logprob", impl=impl, **keys(100))
            assert bool(got.valid.all()) and bool((got.tokens >= 0).all())
            log_probs = mixture_log_probs([x.double() for x in logits], [0.4, 0.6], "logprob")
            picked = log_probs.gather(-1, got.tokens[:, None])[:, 0]
            assert bool((picked >= log_probs.amax(-1) + np.log(min_p) - 1e-5).all())

    def test_experts_that_each_rule_out_the_other_s_token(self, impl):
        logits = torch.tensor([[[3e38, -3e38]], [[-3e38, 3e38]]])
        got = mixture_sample(logits, [0.4, 0.6], combine="logprob", temperature=0.0, impl=impl, **keys(1))
        assert got.valid.tolist() == [True] and got.tokens.tolist() == [1] and got.log_probs.tolist() == [0.0]

    def test_temperatures_without_an_inverse(self, impl, generator):
        logits = 3 * torch.randn(1, 400, 20, generator=generator)
        logits[..., 5:] = -torch.inf
        for setting in ({}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 1.0}):
            got = mixture_sample(logits, [1.0], temperature=1e300, impl=impl, **keys(400), **setting)
            likeliest = logits[0].argmax(-1)
            assert bool(got.valid.all())
            if "min_p" not in setting:
                assert set(got.tokens.tolist()) == set(range(5))
            else:
                assert torch.equal(got.tokens, likeliest)


@pytest.mark.parametrize("impl", IMPLS)
class TestLogProbs:
    @pytest.mark.parametrize("offsets", [(3e3, -3e3), (1e5, 1e5), (-1e6, 2e6)])
    def test_the_product_does_not_see_a_constant(self, impl, offsets, generator):
        # Multiples of 1/8, to which the offsets can be added without rounding.
        logits = [torch.randint(-60, 60, (5, 9000), generator=generator) / 8 for _ in offsets]
        moved = [x + offset for x, offset in zip(logits, offsets, strict=True)]
        exact = mixture_log_probs([x.double() for x in logits], [0.3, 0.7], "logprob")
        got = mixture_log_probs(moved, [0.3, 0.7], "logprob", impl=impl)
        torch.testing.assert_close(got.double(), exact, atol=6e-6, rtol=0)
        labels = torch.arange(5)
        scores = mixture_scores(moved, [0.3, 0.7], labels, "logprob", impl=impl)
        picked = exact[torch.arange(5), labels]
        torch.testing.assert_close(scores.log_probs.double(), picked, atol=6e-6, rtol=0)
        entropy = -(exact.exp() * exact).sum(-1)
        torch.testing.assert_close(scores.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
        drawn = mixture_sample(moved, [0.3, 0.7], combine="logprob", impl=impl, **keys(5))
        picked = exact.gather(-1, drawn.tokens[:, None])[:, 0]
        torch.testing.assert_close(drawn.log_probs.double(), picked, atol=6e-6, rtol=0)

    @pytest.mark.parametrize("combine", ["prob", "logprob", "vote"])
    @pytest.mark.parametrize(
        "values", [[3e38, 3e38, 1e38], [1e-45, 1e-45, 3e-45], [1e38, 1e-45, 1e38], [2e-38, 1e-38, 0]]
    )
    def test_weights_whose_sum_is_no_float(self, impl, combine, values, generator):
        logits = [torch.randn(4, 60, generator=generator) for _ in values]
        weights = torch.tensor(values)
        shares = weights.double() / weights.double().sum()
        shares[shares < 1e-45] = 0
        exact = mixture_log_probs([x.double() for x in logits], shares, combine)
        got = mixture_log_probs(logits, weights, combine, impl=impl)
        torch.testing.assert_close(got.double(), exact, atol=3e-6, rtol=1e-6)

    @pytest.mark.parametrize("combine", ["prob", "logprob"])
    @pytest.mark.parametrize("values", [[3e38, 2e38], [1e-30, 3e-30], [1e20, 1e-15]])
    def test_gradients_of_such_weights(self, impl, combine, values, generator):
        weights = torch.tensor(values)
        upstream = torch.randn(4, 60, generator=generator)
        found = []
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, impl)):
            leaves = [
                x.to(dtype).clone().requires_grad_() for x in (weights, torch.randn(2, 4, 60, generator=generator))
            ]
            if found:
                leaves[1].data.copy_(found[0][1])
            out = mixture_log_probs(leaves[1], leaves[0], combine, impl=backend)
            (out * upstream.to(dtype)).sum().backward()
            found.append((leaves[0].grad, leaves[1].detach().clone(), leaves[1].grad))
        for exact, got in ((found[0][0], found[1][0]), (found[0][2], found[1][2])):
            largest = float(exact.abs().max())
            torch.testing.assert_close(got.double() / largest, exact / largest, atol=2e-4, rtol=1e-3)

    def test_weights_of_float64_that_float32_does_not_hold(self, impl, generator):
        logits = torch.randn(2, 3, 9, generator=generator)
        expected = mixture_log_probs(logits, [1.0, 3.0], impl=impl)
        for weights in ([1e200, 3e200], torch.tensor([1e-320, 3e-320], dtype=torch.float64), (1e-60, 3e-60)):
            torch.testing.assert_close(mixture_log_probs(logits, weights, impl=impl), expected, atol=1e-3, rtol=0)

    def test_the_sum_of_probabilities_below_any_float(self, impl):
        logits = torch.tensor([[[0.0, -60000.0, -60001.0]], [[0.0, -60001.0, -60000.0]]], dtype=torch.float16)
        labels = torch.tensor([1])
        exact = mixture_log_probs(logits.double(), [0.5, 0.5])[0, 1]
        got = mixture_scores(logits, [0.5, 0.5], labels, impl=impl).log_probs[0]
        assert abs(float(got - exact)) < 0.01


@pytest.mark.parametrize("impl", IMPLS)
class TestScores:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_masks_of_the_least_number(self, impl, dtype, generator):
        logits = (3 * torch.randn(3, 1024, generator=generator)).to(dtype)
        logits[:, :256] = torch.finfo(dtype).min
        labels = torch.tensor([1000, 3, 500])
        for got, exact in (
            (token_scores(logits, labels, impl=impl), token_scores(logits.double(), labels)),
            (
                mixture_scores(logits[None].expand(2, -1, -1), [0.5, 0.5], labels, impl=impl),
                mixture_scores(logits[None].double(), [1.0], labels),
            ),
        ):
            torch.testing.assert_close(got.entropy.double(), exact.entropy, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(got.log_probs.double(), exact.log_probs, atol=1e-5, rtol=1e-5)
            assert torch.equal(got.correct, exact.correct)

    def test_logits_that_only_their_own_digits_tell_apart(self, impl):
        logits = torch.tensor([[1e-40, 2e-40, 0.0]])
        assert token_scores(logits, torch.tensor([1]), impl=impl).correct.tolist() == [True]


@pytest.mark.parametrize("impl", IMPLS)
class TestLosses:
    def test_kl_of_float16_at_a_low_temperature(self, impl):
        student = torch.tensor([[40000.0, -40000.0, 39990.0]], dtype=torch.float16, requires_grad=True)
        teacher = torch.tensor([[39990.0, -40000.0, 39980.0]], dtype=torch.float16)
        loss = mixture_kl(student, [teacher], [1.0], torch.ones(1), 0.5, impl=impl)
        exact_student = student.detach().double().requires_grad_()
        exact = mixture_kl(exact_student, [teacher.double()], [1.0], torch.ones(1), 0.5)
        torch.testing.assert_close(loss.double(), exact, atol=1e-6, rtol=1e-5)
        for x in (loss, exact):
            x.backward()
        torch.testing.assert_close(student.grad.double(), exact_student.grad, atol=1e-6, rtol=1e-2)

    @pytest.mark.parametrize("name", ["linear_mixture_kl", "topk_kl"])
    def test_hidden_states_of_float16_at_a_low_temperature(self, impl, name):
        hidden = torch.tensor([[200.0]], dtype=torch.float16)
        head = torch.tensor([[200.0], [-200.0], [199.9]], dtype=torch.float16)
        if name == "topk_kl":
            arguments = (torch.tensor([[2]]), torch.tensor([[0.25]]).log(), torch.ones(1), 0.5)
            loss, exact = topk_kl(hidden, head, *arguments, impl=impl), None
        else:
            loss = linear_mixture_kl(hidden, head, [hidden], [head], [1.0], torch.ones(1), 0.5, impl=impl)
            exact = 0.0
        assert loss.isfinite() and (exact is None or abs(float(loss)) < 1e-5)

    @pytest.mark.parametrize("temperature", [1e-40, 1e-320, 1e300])
    def test_temperatures_that_float32_does_not_hold(self, impl, temperature, generator):
        student = torch.randn(3, 40, generator=generator)
        teacher = torch.randn(3, 40, generator=generator)
        student[:, 7] = teacher[:, 7] = -torch.inf
        loss = mixture_kl(student, [teacher], [1.0], torch.ones(3), temperature, impl=impl)
        exact = mixture_kl(student.double(), [teacher.double()], [1.0], torch.ones(3), temperature)
        torch.testing.assert_close(loss, exact.float(), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [1e37, 3e37, 1e36], [1e-45, 1e-44, 3e-40]])
    def test_gradients_of_token_weights(self, impl, values, generator):
        logits, labels = torch.randn(3, 50, generator=generator), torch.tensor([3, 4, 5])
        teacher, hidden = torch.randn(3, 50, generator=generator), torch.randn(3, 4, generator=generator)
        head = torch.randn(50, 4, generator=generator)
        ids, kept = labels[:, None], torch.full((3, 1), -1.0)

        def losses(kind, weights, impl):
            z, t, h, v = (x.to(kind).requires_grad_() for x in (logits, teacher, hidden, head))
            yield (z,), weighted_cross_entropy(z, labels, weights, impl=impl)
            yield (z,), mixture_kl(z, [t.detach()], [1.0], weights, impl=impl)
            yield (h, v), linear_weighted_cross_entropy(h, v, labels, weights, impl=impl)
            yield (h, v), linear_mixture_kl(h, v, [h.detach()[:, :2]], [v.detach()[:, :2]], [1.0], weights, impl=impl)
            yield (h, v), topk_kl(h, v, ids, kept, weights, impl=impl)

        exact_weights = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        weights = torch.tensor(values, requires_grad=True)
        pairs = zip(
            losses(torch.float32, weights, impl), losses(torch.float64, exact_weights, "reference"), strict=True
        )
        for (leaves, loss), (exact_leaves, exact) in pairs:
            got = torch.autograd.grad(loss, (weights, *leaves))
            expected = torch.autograd.grad(exact, (exact_weights, *exact_leaves))
            assert bool((got[0][weights == 0] == 0).all())
            torch.testing.assert_close(got[0].double(), expected[0], atol=1e-5, rtol=1e-5)
            for ours, theirs in zip(got[1:], expected[1:], strict=True):
                largest = float(theirs.abs().max())
                torch.testing.assert_close(ours.double(), theirs, atol=1e-5 * largest + 1e-43, rtol=1e-4)

    def test_float16_and_weights_beyond_it(self, impl, generator):
        hidden = (3 * torch.randn(4, 6, generator=generator)).half().requires_grad_()
        head = torch.randn(30, 6, generator=generator).half().requires_grad_()
        labels, weights = torch.arange(4), torch.full((4,), 3e4)
        exact_head = head.detach().double().requires_grad_()
        linear_weighted_cross_entropy(hidden, head, labels, weights * 1e-6, impl=impl).backward()
        linear_weighted_cross_entropy(hidden.detach().double(), exact_head, labels, weights * 1e-6).backward()
        torch.testing.assert_close(
            head.grad.double(), exact_head.grad, atol=0.01 * float(exact_head.grad.abs().max()), rtol=0
        )
        head.grad = None
        one = head.detach()[:1].requires_grad_()  # one token: the gradient is 0, whatever the weight
        linear_weighted_cross_entropy(hidden, one, labels * 0, weights, impl=impl).backward()
        assert bool((one.grad == 0).all())

    def test_a_teacher_s_nan_is_no_loss_of_zero(self, impl):
        kept = torch.tensor([[float("nan"), -1.0]])
        assert topk_kl(
            torch.ones(1, 2), torch.eye(4, 2), torch.tensor([[0, 1]]), kept, torch.ones(1), impl=impl
        ).isnan()

    def test_a_teacher_s_mass_that_is_not_one(self, impl, generator):
        # All tokens kept: by the definition the gradient is q sum(p) - p.
        hidden = torch.randn(1, 3, generator=generator).requires_grad_()
        head = torch.randn(4, 3, generator=generator)
        kept = torch.tensor([[0.1, 0.2, 0.3, 0.1]]).log()
        (gradient,) = torch.autograd.grad(
            topk_kl(hidden, head, torch.arange(4)[None], kept, torch.ones(1), impl=impl), hidden
        )
        q = (hidden @ head.T).softmax(-1)
        torch.testing.assert_close(gradient, (q * 0.7 - kept.exp()) @ head, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
class TestLayouts:
    def test_keys_of_any_stride(self, impl, generator):
        logits = torch.randn(2, 3, 40, generator=generator)
        wide = torch.tensor([[5, 1], [6, 1], [7, 1]])
        for seeds, positions in (
            (torch.tensor([5]).expand(3), torch.tensor([2]).expand(3)),
            (wide[:, 0], wide[:, 1]),
            (torch.tensor([5, 6, 7]).flip(0), torch.zeros(6, dtype=torch.int64)[::2]),
        ):
            got = mixture_sample(logits, [1.0, 1.0], seeds=seeds, positions=positions, impl=impl)
            dense = {"seeds": seeds.contiguous(), "positions": positions.contiguous()}
            assert torch.equal(got.tokens, mixture_sample(logits, [1.0, 1.0], impl=impl, **dense).tokens)

    def test_raw_ops_take_any_stride_too(self, impl):
        if impl == "reference":
            return
        raw = torch.ops.ensemw2s
        logits, one = [torch.randn(3, 20)], torch.ones(2)[::2]
        keys_of_any_stride = torch.tensor([5]).expand(3)
        of_rows = (torch.tensor([0.5]).expand(3), torch.arange(6)[::2], torch.ones(3, 2)[:, 0].double(), None)
        settings = (1.0, 0, 1.0, 0.0, *of_rows, keys_of_any_stride, keys_of_any_stride, 0, 0)
        changes = (
            torch.tensor([[4], [9]]).int().T.expand(3, 2),
            torch.ones(2, 3, 3).T,
            torch.tensor([528]).expand(3, 1).int(),
        )
        offer = (*changes, torch.full((3, 2), -1, dtype=torch.int32)[:, ::2])
        assert bool(raw.mixture_sample(logits, one, *settings, *offer)[3].all())
        labels, weights = torch.tensor([4]).expand(3), torch.tensor([1.0]).expand(3)
        losses = raw.weighted_cross_entropy(logits[0], labels, weights, False)[0]
        torch.testing.assert_close(losses, -logits[0].log_softmax(-1)[:, 4])

    def test_empty_batches_of_any_stride(self, impl):
        logits = torch.zeros(7, 0).T
        assert token_scores(logits, torch.zeros(0, dtype=torch.int64), impl=impl).entropy.shape == (0,)
        assert mixture_log_probs([logits], [1.0], impl=impl).shape == (0, 7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in Backend.names for argument in arguments_of(name)]
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_bad_arguments_are_refused_by_name(impl, name, argument):
    for value in bad_values(name, argument, arguments_of(name)[argument]):
        is_refused(name, argument, value, Backend(impl))


def test_inputs_of_a_seed_are_the_same():
    first, second = (str(Inputs(np.random.default_rng([1, 2]))) for _ in range(2))
    assert first == second
