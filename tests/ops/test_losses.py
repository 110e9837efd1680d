"""The five losses: each backend against float64 autograd of the definition, through every differentiable input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from ensemw2s.ops import (
    linear_mixture_kl,
    linear_weighted_cross_entropy,
    mixture_kl,
    row_losses,
    topk_kl,
    weighted_cross_entropy,
)
from tests.ops.helpers import DTYPES, needs_cpp

IMPLS = ["reference", pytest.param("cpp", marks=needs_cpp)]
ROWS, WIDTH = 7, 6
# 3: below one vector; 65: a plain tile and one more; 257: past an AVX-512 tile, odd.
SIZES = (3, 65, 257)


class Case:
    """One loss with inputs: `leaves` get gradients, `call` runs the op on them, `define` is the plain definition."""

    def __init__(self, name, generator, size, dtype=torch.float32):
        def random(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        self.name = name
        weights = torch.rand(ROWS, generator=generator) + 0.2
        weights[2] = 0.0
        self.labels = torch.randint(0, size, (ROWS,), generator=generator)
        self.labels[4] = -100
        self.mix = torch.tensor([0.2, 0.5, 0.3])
        self.experts = [2 * random(ROWS, size) for _ in range(3)]
        self.states = [random(ROWS, WIDTH + t) for t in range(3)]
        self.heads = [random(size, WIDTH + t) for t in range(3)]
        k = min(4, size)
        self.ids = torch.rand(ROWS, size, generator=generator).argsort(-1)[:, :k].contiguous()
        self.top = (random(ROWS, size).float().log_softmax(-1)).gather(-1, self.ids)
        if "linear" in name or name == "topk_kl":
            self.leaves = [random(ROWS, WIDTH), random(size, WIDTH), weights]
        else:
            self.leaves = [2 * random(ROWS, size), weights]

    def on(self, device):
        """The same case with everything on a device."""
        moved = copy.copy(self)
        for name in ("labels", "mix", "ids", "top"):
            setattr(moved, name, getattr(self, name).to(device))
        for name in ("experts", "states", "heads", "leaves"):
            setattr(moved, name, [x.to(device) for x in getattr(self, name)])
        return moved

    def call(self, *leaves, **settings):
        *tensors, weights = leaves
        kind = tensors[0].dtype
        experts, states, heads = ([x.to(kind) for x in xs] for xs in (self.experts, self.states, self.heads))
        match self.name:
            case "weighted_cross_entropy":
                return weighted_cross_entropy(*tensors, self.labels, weights, **settings)
            case "linear_weighted_cross_entropy":
                return linear_weighted_cross_entropy(*tensors, self.labels, weights, **settings)
            case "mixture_kl":
                return mixture_kl(*tensors, experts, self.mix, weights, 1.7, **settings)
            case "linear_mixture_kl":
                return linear_mixture_kl(*tensors, states, heads, self.mix, weights, 1.7, **settings)
            case _:
                return topk_kl(*tensors, self.ids, self.top, weights, 1.7, **settings)

    def define(self, *leaves):
        """The loss written out in plain torch, with no function of the package."""
        *tensors, weights = leaves
        logits = tensors[0] if len(tensors) == 1 else tensors[0] @ tensors[1].T
        if "cross_entropy" in self.name:
            return (weights * functional.cross_entropy(logits, self.labels, reduction="none")).sum()
        log_q = (logits / 1.7).log_softmax(-1)
        if self.name == "topk_kl":
            p, q = self.top.to(log_q).exp(), log_q.exp().gather(-1, self.ids)
            loss = (p * (p / q).log()).sum(-1)
            if self.ids.shape[-1] < log_q.shape[-1]:
                rest = 1 - p.sum(-1)
                loss = loss + rest * (rest / (1 - q.sum(-1))).log()
            return (weights * loss).sum()
        kind = logits.dtype
        if self.name == "mixture_kl":
            experts = [x.to(kind) for x in self.experts]
        else:
            experts = [x.to(kind) @ y.to(kind).T for x, y in zip(self.states, self.heads, strict=True)]
        mix = self.mix.to(kind) / self.mix.to(kind).sum()
        p = sum(w * (x / 1.7).softmax(-1) for w, x in zip(mix, experts, strict=True))
        return (weights * (p * (p.log() - log_q)).sum(-1)).sum()

    def with_gradients(self, function, leaves, **settings):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        loss = function(*leaves, **settings)
        (loss * 0.7).backward()
        gradients = [x.grad for x in leaves]
        # A weight of 0 leaves its row out: by definition of the op it gets no gradient.
        gradients[-1] = gradients[-1].masked_fill(leaves[-1] == 0, 0.0)
        return loss.detach(), gradients


NAMES = ("weighted_cross_entropy", "linear_weighted_cross_entropy", "mixture_kl", "linear_mixture_kl", "topk_kl")


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_the_definition(generator, name):
    for size in SIZES:
        case = Case(name, generator, size, torch.float64)
        leaves = [x.double() for x in case.leaves]
        loss, gradients = case.with_gradients(case.call, leaves)
        expected, expected_gradients = case.with_gradients(case.define, leaves)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_the_reference(generator, name):
    case = Case(name, generator, 5, torch.float64)
    keep = case.leaves[-1].double()
    tensors = [x.double().requires_grad_() for x in case.leaves[:-1]]
    assert torch.autograd.gradcheck(lambda *x: case.call(*x, keep), tensors)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_is_as_good_as_plain_torch(generator, name, dtype):
    for size in SIZES:
        case = Case(name, generator, size, dtype)
        exact, exact_gradients = case.with_gradients(case.define, [x.double() for x in case.leaves])
        plain, plain_gradients = case.with_gradients(case.call, case.leaves, impl="reference")
        kernel, gradients = case.with_gradients(case.call, case.leaves, impl="cpp")
        assert kernel.dtype == torch.float32
        assert (kernel - exact).abs() <= 2 * (plain - exact).abs() + 1e-5 * exact.abs() + 1e-6
        # In 16 bits a gradient is a rounded sum of rounded products, whose terms may cancel: two units of its largest
        # entry are allowed (the most in 18,000 random cases was 1.5).
        unit = 2 * torch.finfo(dtype).eps
        for ours, theirs, truth in zip(gradients, plain_gradients, exact_gradients, strict=True):
            allowed = 2 * (theirs.double() - truth).abs().max() + (unit + 1e-6) * truth.abs().max()
            assert (ours.double() - truth).abs().max() <= allowed


@needs_cpp
def test_many_chunks_add_up(generator, monkeypatch):
    monkeypatch.setattr(row_losses, "CHUNK_ELEMENTS", 2 * 65)  # chunks of two rows
    for name in NAMES:
        case = Case(name, generator, 65)
        exact, exact_gradients = case.with_gradients(case.define, [x.double() for x in case.leaves])
        loss, gradients = case.with_gradients(case.call, case.leaves, impl="cpp")
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
        for ours, truth in zip(gradients, exact_gradients, strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMES)
class TestEveryBackend:
    def test_rows_left_out_are_not_read(self, name, impl, generator):
        case = Case(name, generator, 65)
        loss, gradients = case.with_gradients(case.call, case.leaves, impl=impl)
        rows = [2, 4] if "cross_entropy" in name else [2]
        for tensor in (case.leaves[0], *case.experts, *case.states):
            tensor[rows] = float("nan")
        again, again_gradients = case.with_gradients(case.call, case.leaves, impl=impl)
        assert torch.equal(loss, again)
        for before, after in zip(gradients, again_gradients, strict=True):
            assert not bool(after[rows].any()) or after.shape[0] != ROWS
            torch.testing.assert_close(before, after)

    def test_broken_rows_make_the_loss_nan(self, name, impl, generator):
        case = Case(name, generator, 65)
        case.leaves[0][0] = float("nan")
        assert case.call(*case.leaves, impl=impl).isnan()

    def test_masked_tokens(self, name, impl, generator):
        """-inf in the student where the teachers have -inf too, or where no label is: nothing becomes NaN."""
        if len((case := Case(name, generator, 65)).leaves) == 3:
            return  # logits of a product are finite
        for tensor in (case.leaves[0], *case.experts):
            tensor[:, 60:] = -torch.inf
        case.labels.clamp_(max=59)
        loss, gradients = case.with_gradients(case.call, case.leaves, impl=impl)
        assert loss.isfinite() and not bool(gradients[0][:, 60:].any())
        assert bool(gradients[0].isfinite().all())

    def test_leading_shapes_and_no_rows(self, name, impl, generator):
        case = Case(name, generator, 9)
        expected = case.call(*case.leaves, impl="reference")
        for group in (case.experts, case.states):
            group[:] = [x[None].expand(2, -1, -1) for x in group]
        case.labels, case.ids, case.top = (x[None].expand(2, *x.shape) for x in (case.labels, case.ids, case.top))
        first, *middle, weights = case.leaves
        leaves = [first[None].expand(2, -1, -1), *middle, weights[None].expand(2, -1)]
        torch.testing.assert_close(case.call(*leaves, impl=impl), 2 * expected)
        for group in (case.experts, case.states):
            group[:] = [x[:0] for x in group]
        case.labels, case.ids, case.top = case.labels[:0], case.ids[:0], case.top[:0]
        assert case.call(leaves[0][:0], *middle, leaves[-1][:0], impl=impl) == 0

    def test_a_second_derivative_is_right_or_refused(self, name, impl, generator):
        case = Case(name, generator, 9)
        leaves = [x.double() if impl == "reference" else x for x in case.leaves]
        *tensors, weights = [x.clone().requires_grad_() for x in leaves]
        gradient, *_ = torch.autograd.grad(case.call(*tensors, weights, impl=impl), tensors, create_graph=True)
        penalty = gradient.square().sum()
        if impl == "reference":
            found = torch.autograd.grad(penalty, tensors)
            *others, weight = [x.clone().requires_grad_() for x in leaves]
            expected, *_ = torch.autograd.grad(case.define(*others, weight), others, create_graph=True)
            for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), others), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        else:
            for wanted in tensors:
                with pytest.raises(RuntimeError, match=r'differentiated once only.* impl="reference"'):
                    torch.autograd.grad(penalty, wanted, retain_graph=True)

    def test_without_gradient(self, name, impl, generator):
        case = Case(name, generator, 65)
        with torch.no_grad():
            loss = case.call(*[x.requires_grad_() for x in case.leaves], impl=impl)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, case.call(*case.leaves, impl="reference").detach())

    def test_frozen_head(self, name, impl, generator):
        case = Case(name, generator, 65)
        leaves = [x.clone() for x in case.leaves]
        leaves[0].requires_grad_()
        case.call(*leaves, impl=impl).backward()
        _, gradients = case.with_gradients(case.call, case.leaves, impl=impl)
        torch.testing.assert_close(leaves[0].grad * 0.7, gradients[0])

    def test_compiles_whole(self, name, impl, generator, fresh_compiler):
        case = Case(name, generator, 33)
        expected, expected_gradients = case.with_gradients(case.call, case.leaves, impl=impl)
        compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
        loss, gradients = case.with_gradients(compiled, case.leaves, impl=impl)
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_bad_token_weights(self, name, impl, generator):
        case = Case(name, generator, 9)
        *tensors, weights = case.leaves
        with pytest.raises(ValueError, match=r"token_weights must have shape \(7,\)"):
            case.call(*tensors, weights[:3], impl=impl)
        with pytest.raises(TypeError, match="token_weights must be a floating point tensor"):
            case.call(*tensors, weights.long(), impl=impl)


@needs_cpp
def test_opcheck(generator):
    case = Case("linear_mixture_kl", generator, 20)
    hidden, head, weights = case.leaves
    for tensor in (hidden, head):
        tensor.requires_grad_()
    logits = (hidden @ head.T).detach().requires_grad_()
    ops = torch.ops.ensemw2s
    weights = weights.masked_fill(case.labels == -100, 0.0)
    checks = (
        (ops.weighted_cross_entropy, (logits, case.labels, weights, True)),
        (ops.linear_weighted_cross_entropy, (hidden, head, case.labels, weights, True, True)),
        (ops.mixture_kl, (logits, case.experts, case.mix, weights, True)),
        (ops.linear_mixture_kl, (hidden, head, case.states, case.heads, case.mix, weights, True, True)),
        (ops.topk_kl, (hidden, head, case.ids, case.top, weights, True, True)),
        (ops.topk_kl_rows, (logits.detach(), case.ids, case.top, weights, True)),
    )
    # The gradients that an op returns beside its loss are constants: no second derivative is offered, so the check of
    # derivatives through every output is left to the tests above.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in checks:
        torch.library.opcheck(op, arguments, test_utils=utilities)


@pytest.mark.parametrize("impl", IMPLS)
class TestBadInput:
    def test_labels(self, impl):
        labels = torch.tensor([0, 5])
        with pytest.raises(ValueError, match=r"labels must be in \[0, 5\) or -100, got .*5"):
            weighted_cross_entropy(torch.zeros(2, 5), labels, torch.ones(2), impl=impl)
        with pytest.raises(ValueError, match=r"labels must be in \[0, 5\) or -100, got .*5"):
            linear_weighted_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), labels, torch.ones(2), impl=impl)

    def test_token_ids(self, impl):
        states, head, weights = torch.zeros(2, 3), torch.zeros(5, 3), torch.ones(2)
        with pytest.raises(ValueError, match=r"token_ids must be in \[0, 5\), got 5"):
            topk_kl(states, head, torch.tensor([[0], [5]]), torch.zeros(2, 1), weights, impl=impl)
        repeated = torch.tensor([[0, 1], [3, 3]])
        with pytest.raises(ValueError, match="token_ids must be distinct within a row, got one twice in row 1"):
            topk_kl(states, head, repeated, torch.full((2, 2), -2.0), weights, impl=impl)
        heavy = torch.tensor([[-1.0, -1.0], [-0.1, -0.2]])
        distinct = torch.tensor([[0, 1], [3, 4]])
        with pytest.raises(ValueError, match=r"weigh at most 1 together, got 1\.724 in row 1"):
            topk_kl(states, head, distinct, heavy, weights, impl=impl)
        # What does not count may hold anything.
        topk_kl(states, head, repeated, heavy, torch.tensor([1.0, 0.0]), impl=impl)
        with pytest.raises(ValueError, match=r"1 <= k <= 5"):
            topk_kl(states, head, torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6), weights, impl=impl)

    def test_heads_and_teachers(self, impl):
        states, head, weights = torch.zeros(2, 3), torch.zeros(5, 3), torch.ones(2)
        labels = torch.zeros(2, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"head must be \[V, d\]"):
            linear_weighted_cross_entropy(states, torch.zeros(5, 4), labels, weights, impl=impl)
        with pytest.raises(TypeError, match=r"head is torch.float16"):
            linear_weighted_cross_entropy(states, head.half(), labels, weights, impl=impl)
        with pytest.raises(ValueError, match="vocabulary of 6, head of 5"):
            linear_mixture_kl(states, head, [states], [torch.zeros(6, 3)], [1.0], weights, impl=impl)
        with pytest.raises(ValueError, match="must be as many"):
            linear_mixture_kl(states, head, [states], [], [1.0], weights, impl=impl)
        with pytest.raises(ValueError, match="same tokens and vocabulary"):
            mixture_kl(torch.zeros(2, 5), torch.zeros(1, 2, 6), [1.0], weights, impl=impl)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
    def test_temperature(self, impl, temperature):
        with pytest.raises(ValueError, match=f"temperature={temperature}"):
            mixture_kl(torch.zeros(2, 5), torch.zeros(1, 2, 5), [1.0], torch.ones(2), temperature, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_rest_too_small_for_a_number_has_a_gradient(impl):
    # The student gives the teacher's one token everything: R = exp(-2000), and q_v / R is a share of the rest.
    hidden = torch.tensor([[2000.0, 1.0]], requires_grad=True)
    head = torch.zeros(5, 2)
    head[2, 0] = 1.0
    head[:, 1] = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5])
    ids, log_probs = torch.tensor([[2]]), torch.tensor([[0.75]]).log()
    loss = topk_kl(hidden, head, ids, log_probs, torch.ones(1), impl=impl)
    (gradient,) = torch.autograd.grad(loss, hidden)
    share = torch.softmax(head[[0, 1, 3, 4], 1].double(), 0)
    # d/dh of sum_v (q_v - p_v) z_v: token 2 gets 1 - 3/4, the others minus 1/4 in their shares.
    torch.testing.assert_close(gradient[0, 0].double(), torch.tensor(0.25, dtype=torch.float64), rtol=1e-4, atol=0)
    expected = -0.25 * (share * head[[0, 1, 3, 4], 1]).sum()
    torch.testing.assert_close(gradient[0, 1].double(), expected, rtol=1e-4, atol=0)


@needs_cpp
def test_impossible_other_tokens_get_no_gradient():
    logits = torch.full((2, 40), -torch.inf)
    logits[:, 3] = 1.0
    ids, log_probs = torch.full((2, 1), 3), torch.full((2, 1), -0.5)
    # Memory that was used before, so that what is left unwritten shows.
    for _ in range(3):
        torch.full((2, 40), torch.nan)
        losses, gradient = torch.ops.ensemw2s.topk_kl_rows(logits, ids, log_probs, torch.ones(2), True)
        assert torch.equal(gradient[:, :3], torch.zeros(2, 3)) and torch.equal(gradient[:, 4:], torch.zeros(2, 36))
        assert bool(losses.isfinite().all())


# A student under autocast and teachers that are not


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16, torch.float16])
def test_teachers_may_have_another_dtype(impl, student, teacher, generator):
    logits = (2 * torch.randn(ROWS, 65, generator=generator)).to(student).requires_grad_()
    experts = [(2 * torch.randn(ROWS, 65, generator=generator)).to(teacher) for _ in range(2)]
    weights, mix = torch.rand(ROWS, generator=generator), torch.tensor([0.25, 0.75])
    loss = mixture_kl(logits, experts, mix, weights, impl=impl)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    p = sum(w * z.double().softmax(-1) for w, z in zip(mix.double(), experts, strict=True))
    expected = (weights.double() * (p * (p.log() - exact.log_softmax(-1))).sum(-1)).sum()
    expected.backward()
    assert logits.grad.dtype == student
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[student]
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2 * rounding, atol=1e-6)


def test_a_student_in_autocast_learns_from_float32_teachers(generator):
    hidden, head = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(65, WIDTH, generator=generator)
    experts = torch.randn(2, ROWS, 65, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        logits = hidden @ head.requires_grad_().T
        assert logits.dtype == torch.bfloat16
        mixture_kl(logits, experts, torch.ones(2), torch.ones(ROWS)).backward()
    assert bool(head.grad.isfinite().all())
    assert bool(head.grad.any())
