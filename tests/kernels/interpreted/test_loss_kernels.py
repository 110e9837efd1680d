"""The row losses' Triton kernels against float64 autograd of the plain-torch reference, in Triton's interpreter."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from ensemw2s.kernels import rows as kernel_rows
from ensemw2s.kernels import topk_kl_rows as topk_kernel
from ensemw2s.ops import mixture_kl, row_losses, topk_kl, weighted_cross_entropy
from ensemw2s.ops.mixture_kl import reference as mixture_reference
from ensemw2s.ops.topk_kl import reference as topk_reference
from ensemw2s.ops.weighted_cross_entropy import reference as cross_entropy_reference
from tests.ops.helpers import DTYPES, assert_as_good_as_torch
from tests.ops.test_losses import NAMES, Case

# numpy warns where the interpreter computes with infinities, as the kernels mean to.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ops = torch.ops.ensemw2s
ROWS = 6
LEFT_OUT = 2
# One token, an incomplete block, a block and a token, whole blocks, several (a block has 256 or 512 tokens here).
SIZES = (1, 33, 257, 1024, 1031)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(kernel_rows, "MOST_WARPS", 1)


class RowCase:
    """A row op with inputs: `run` gives losses and gradient of the kernel, `reference` those of plain torch."""

    def __init__(self, name, generator, size, dtype=torch.float32, experts=3, k=5):
        def logits():
            return (3 * torch.randn(ROWS, size, generator=generator)).to(dtype)

        self.name = name
        self.logits = logits()
        self.weights = torch.randn(ROWS, generator=generator)
        self.weights[LEFT_OUT] = 0.0
        self.labels = torch.randint(0, size, (ROWS,), generator=generator)
        self.labels[LEFT_OUT] = -100
        self.experts = [logits() for _ in range(experts)]
        self.mix = torch.rand(experts, generator=generator) + 0.1
        k = min(k, size)
        self.ids = torch.rand(ROWS, size, generator=generator).argsort(-1)[:, :k].contiguous()
        self.log_probs = torch.randn(ROWS, size, generator=generator).log_softmax(-1).gather(-1, self.ids)

    def run(self, with_gradient=True):
        match self.name:
            case "weighted_cross_entropy":
                return ops.weighted_cross_entropy_triton(self.logits, self.labels, self.weights, with_gradient)
            case "mixture_kl":
                return ops.mixture_kl_triton(self.logits, self.experts, self.mix, self.weights, with_gradient)
            case _:
                inputs = (self.logits, self.ids, self.log_probs, self.weights)
                return ops.topk_kl_rows_triton(*inputs, with_gradient)

    def reference(self, dtype=torch.float64):
        logits = self.logits.detach().to(dtype, copy=True).requires_grad_()
        weights = self.weights.to(dtype)
        match self.name:
            case "weighted_cross_entropy":
                losses = cross_entropy_reference(logits, self.labels, weights)
            case "mixture_kl":
                experts = [x.to(dtype) for x in self.experts]
                losses = mixture_reference(logits, experts, self.mix.to(dtype), weights)
            case _:
                losses = topk_reference(logits, self.ids, self.log_probs.to(dtype), weights)
        return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]

    def check(self, atol=1e-6):
        for kernel, plain, exact in zip(self.run(), self.reference(torch.float32), self.reference(), strict=True):
            assert kernel.dtype == torch.float32
            assert_as_good_as_torch(kernel, plain, exact, atol * (1 + exact.nan_to_num(0, 0, 0).abs().max()))


ROW_OPS = ("weighted_cross_entropy", "mixture_kl", "topk_kl_rows")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROW_OPS)
def test_losses_and_gradients(generator, name, dtype):
    for size in SIZES:
        RowCase(name, generator, size, dtype).check()


@pytest.mark.parametrize("name", ROW_OPS)
def test_blocks_as_on_a_gpu(generator, name, monkeypatch):
    monkeypatch.undo()
    assert kernel_rows.MOST_WARPS > 1
    RowCase(name, generator, 10_007, torch.bfloat16).check()


@pytest.mark.parametrize("experts", [1, 2, 5, 17])
def test_any_number_of_experts(generator, experts):
    case = RowCase("mixture_kl", generator, 300, experts=experts)
    case.check()
    case.mix[0] = 0.0 if experts > 1 else 7.0
    case.experts[0] = case.experts[0] if experts == 1 else torch.full_like(case.experts[0], torch.nan)
    case.check()


def test_one_expert_that_is_the_student(generator):
    case = RowCase("mixture_kl", generator, 300, experts=1)
    case.experts = [case.logits]
    for result in case.run():
        assert result.abs().max() < 1e-6


@pytest.mark.parametrize("k", [1, 2, 9, 40])
def test_any_number_of_kept_tokens(generator, k, monkeypatch):
    monkeypatch.setattr(topk_kernel, "_MOST_KEPT_AT_ONCE", 4)
    for size in (40, 700):
        RowCase("topk_kl_rows", generator, size, k=k).check()


def test_a_tiny_rest_keeps_its_digits(generator):
    case = RowCase("topk_kl_rows", generator, 600)
    case.logits.scatter_(-1, case.ids, case.logits.gather(-1, case.ids) + 60.0)
    losses, gradient = case.run()
    exact, exact_gradient = case.reference()
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-7)
    case.logits.scatter_(-1, case.ids, case.logits.gather(-1, case.ids) + 200.0)  # exp(-260) is 0 in float32
    losses, gradient = case.run()
    exact, exact_gradient = case.reference()
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ROW_OPS)
class TestExtremes:
    def test_far_apart(self, name, generator):
        case = RowCase(name, generator, 600)
        case.logits *= 1e4
        case.experts = [x * 1e4 for x in case.experts]
        case.check()

    def test_equal_logits(self, name, generator):
        case = RowCase(name, generator, 600)
        for value in (0.0, 1e4, -1e4, -3e38):
            for tensor in (case.logits, *case.experts):
                tensor.fill_(value)
            case.check()

    def test_masked_tokens(self, name, generator):
        case = RowCase(name, generator, 600)
        for tensor in (case.logits, *case.experts):
            tensor[:, 40:] = -torch.inf
        case.labels %= 40
        case.ids = torch.rand(ROWS, 40, generator=generator).argsort(-1)[:, :5].contiguous()
        case.check()
        _, gradient = case.run()
        assert gradient.isfinite().all() and not gradient[:, 40:].any()

    def test_a_mass_on_what_the_student_excludes_is_infinite(self, name, generator):
        case = RowCase(name, generator, 600)
        case.logits[0, int(case.labels[0])] = -torch.inf
        case.logits[0, int(case.ids[0, 0])] = -torch.inf
        losses, gradient = case.run()
        assert losses[0] == torch.inf * case.weights[0].sign() and losses[1:].isfinite().all()
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_broken_rows_become_nan(self, name, generator, value):
        case = RowCase(name, generator, 600)
        whole, whole_gradient = case.run()
        columns = slice(None) if value == -torch.inf else slice(300, 301)
        case.logits[1, columns] = value
        case.experts[0][3, columns] = value
        losses, gradient = case.run()
        broken = torch.zeros(ROWS, dtype=torch.bool)
        broken[[1, 3] if name == "mixture_kl" else [1]] = True
        assert torch.equal(losses.isnan(), broken)
        assert torch.equal(gradient.isnan(), broken[:, None].expand_as(gradient))
        assert torch.equal(losses[~broken], whole[~broken])
        assert torch.equal(gradient[~broken], whole_gradient[~broken])

    def test_two_infinities_are_nan(self, name, generator):
        case = RowCase(name, generator, 600)
        case.logits[1, [3, 3 + 512]] = torch.inf
        losses, gradient = case.run()
        assert losses[1].isnan() and gradient[1].isnan().all()

    def test_rows_left_out_are_not_read(self, name, generator):
        case = RowCase(name, generator, 600)
        losses, gradient = case.run()
        for tensor in (case.logits, *case.experts, case.log_probs):
            tensor[LEFT_OUT] = torch.nan
        case.ids[LEFT_OUT] = 2**40
        again, again_gradient = case.run()
        assert torch.equal(losses, again) and torch.equal(gradient, again_gradient)
        assert losses[LEFT_OUT] == 0 and not gradient[LEFT_OUT].any()

    def test_a_weight_that_is_nan(self, name, generator):
        case = RowCase(name, generator, 33)
        case.weights[1] = torch.nan
        losses, gradient = case.run()
        assert losses.isnan().tolist() == [False, True] + [False] * 4
        assert gradient[1].isnan().all() and not gradient[0].isnan().any()


@pytest.mark.parametrize("wrong", [-1, 600, 2**40, -(2**40), -100])
@pytest.mark.parametrize("name", ["weighted_cross_entropy", "topk_kl_rows"])
def test_tokens_out_of_range_make_the_row_nan(generator, name, wrong):
    case = RowCase(name, generator, 600)
    case.labels[3] = case.ids[3, 1] = wrong
    losses, gradient = case.run()
    assert losses.isnan().tolist() == [row == 3 for row in range(ROWS)]
    assert gradient[3].isnan().sum() >= 600 - 5 and not gradient[[0, 1, 2, 4, 5]].isnan().any()


@pytest.mark.parametrize("mix", [[-0.1, 0.5, 0.6], [torch.nan, 0.5, 0.5], [0.0, 0.0, 0.0], [torch.inf, 0.5, 0.5]])
def test_bad_mixture_weights_make_every_row_nan(generator, mix):
    case = RowCase("mixture_kl", generator, 33)
    case.mix = torch.tensor(mix)
    losses, gradient = case.run()
    assert losses.isnan().tolist() == [row != LEFT_OUT for row in range(ROWS)]
    assert torch.equal(gradient.isnan(), losses.isnan()[:, None].expand_as(gradient))


@pytest.mark.parametrize("name", ROW_OPS)
def test_strides_and_leading_shapes(generator, name):
    case = RowCase(name, generator, 65)
    losses, gradient = case.run()
    flat = case.logits, case.experts

    def check(shape, change):
        case.logits, case.experts = change(flat[0]), [change(x) for x in flat[1]]
        labels, weights, ids, log_probs = case.labels, case.weights, case.ids, case.log_probs
        case.labels, case.weights = labels.reshape(shape), weights.reshape(shape)
        case.ids, case.log_probs = ids.reshape(*shape, -1), log_probs.reshape(*shape, -1)
        again, again_gradient = case.run()
        case.labels, case.weights, case.ids, case.log_probs = labels, weights, ids, log_probs
        assert again.shape == shape and again_gradient.shape == (*shape, 65)
        assert torch.equal(again.reshape(-1), losses) and torch.equal(again_gradient.reshape(-1, 65), gradient)

    def padded(x):
        return torch.nn.functional.pad(x, (0, 11), value=torch.nan)[..., :65]

    check((ROWS,), padded)
    check((2, 3), lambda x: padded(x).view(2, 3, 65))
    check((2, 3), lambda x: x.view(2, 3, 65).transpose(0, 1).contiguous().transpose(0, 1))
    check((3, 1, 2), lambda x: padded(x).view(3, 1, 2, 65))
    check((2, 1, 3, 1), lambda x: x.view(2, 1, 3, 1, 65).transpose(0, 2).contiguous().transpose(0, 2))
    case.logits = torch.stack([flat[0], flat[0]], dim=1)[:, 0]
    case.experts = [x.flip(0).flip(0) for x in flat[1]]  # other strides than the student's
    again, again_gradient = case.run()
    assert torch.equal(again, losses) and torch.equal(again_gradient, gradient)


@pytest.mark.parametrize("name", ROW_OPS)
def test_an_expanded_axis_and_one_row_without_axes(generator, name):
    case = RowCase(name, generator, 65)
    losses, _ = case.run()
    for attribute in ("logits", "labels", "weights", "ids", "log_probs"):
        tensor = getattr(case, attribute)
        setattr(case, attribute, tensor[None].expand(2, *tensor.shape))
    experts = case.experts
    case.experts = [x[None].expand(2, -1, -1) for x in experts]
    twice, _ = case.run()
    assert torch.equal(twice, torch.stack([losses, losses]))
    for attribute in ("logits", "labels", "weights", "ids", "log_probs"):
        setattr(case, attribute, getattr(case, attribute)[0, 1])
    case.experts = [x[1] for x in experts]
    one, gradient = case.run()
    assert one.shape == () and torch.equal(one, losses[1]) and gradient.shape == (65,)


@pytest.mark.parametrize("name", ROW_OPS)
def test_no_rows(generator, name):
    case = RowCase(name, generator, 65)
    for attribute in ("logits", "labels", "weights", "ids", "log_probs"):
        setattr(case, attribute, getattr(case, attribute)[:0])
    case.experts = [x[:0] for x in case.experts]
    losses, gradient = case.run()
    assert losses.shape == (0,) and gradient.shape == (0, 65)


@pytest.mark.parametrize("name", ROW_OPS)
def test_without_gradient(generator, name):
    case = RowCase(name, generator, 600)
    losses, gradient = case.run(with_gradient=False)
    assert gradient.shape == (0,)
    assert torch.equal(losses, case.run()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROW_OPS)
def test_a_gradient_in_16_bits_is_that_of_32_rounded(generator, name, dtype):
    for size in SIZES:
        case = RowCase(name, generator, size, dtype)
        kernel = getattr(import_module(f"ensemw2s.kernels.{name}"), name)
        inputs = {
            "weighted_cross_entropy": (case.labels,),
            "mixture_kl": (case.experts, case.mix),
            "topk_kl_rows": (case.ids, case.log_probs),
        }[name]
        arguments = (case.logits, *inputs, case.weights, True)
        losses, gradient = kernel(*arguments, gradient_dtype=dtype)
        exact_losses, exact = kernel(*arguments)
        assert gradient.dtype == dtype and exact.dtype == torch.float32
        assert torch.equal(losses, exact_losses)
        # The interpreter cuts off what bfloat16 has no room for, where a GPU rounds.
        unit = torch.finfo(dtype)
        torch.testing.assert_close(gradient.float(), exact, rtol=unit.eps, atol=unit.smallest_normal * unit.eps)


@pytest.mark.parametrize("name", ROW_OPS)
def test_opcheck(generator, name):
    case = RowCase(name, generator, 20)
    inputs = {
        "weighted_cross_entropy": (case.labels, case.weights),
        "mixture_kl": (case.experts, case.mix, case.weights),
        "topk_kl_rows": (case.ids, case.log_probs, case.weights),
    }
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    logits = case.logits.requires_grad_(name != "topk_kl_rows")
    torch.library.opcheck(getattr(ops, f"{name}_triton"), (logits, *inputs[name], True), test_utils=utilities)


class TestPublicOps:
    """The five losses with impl="triton": row ops with their gradients, linear ones in chunks over them."""

    @pytest.fixture(params=["rows that count", "slices"], autouse=True)
    def _chunks(self, request, monkeypatch):
        """Chunks of three rows, those that count as on a CPU or slices of all as on a GPU."""
        monkeypatch.setattr(row_losses, "CHUNK_ELEMENTS", 3 * 65)
        if request.param == "slices":
            monkeypatch.setattr(
                row_losses, "_row_groups", lambda row_weights, _: row_losses._slices(len(row_weights), 3)
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", NAMES)
    def test_gradients(self, name, generator, dtype):
        case = Case(name, generator, 65, dtype)
        exact, exact_gradients = case.with_gradients(case.define, [x.double() for x in case.leaves])
        plain, plain_gradients = case.with_gradients(case.call, case.leaves, impl="reference")
        loss, gradients = case.with_gradients(case.call, case.leaves, impl="triton")
        assert (loss - exact).abs() <= 2 * (plain - exact).abs() + 1e-5 * exact.abs() + 1e-6
        # In 16 bits a gradient is a rounded sum of rounded products. Each chunk's is rounded before it is added, which
        # rounds again: by half a unit each time, and with a handful of chunks hardly by more than two units in all.
        unit = torch.finfo(dtype).eps
        for ours, theirs, truth in zip(gradients, plain_gradients, exact_gradients, strict=True):
            allowed = 2 * (theirs.double() - truth).abs().max() + (2 * unit + 1e-6) * truth.abs().max()
            assert (ours.double() - truth).abs().max() <= allowed

    @pytest.mark.parametrize("name", NAMES)
    def test_rows_left_out_reach_nothing(self, name, generator):
        case = Case(name, generator, 65)
        loss, gradients = case.with_gradients(case.call, case.leaves, impl="triton")
        left_out = [2, 4] if "cross_entropy" in name else [2]
        for tensor in (case.leaves[0], *case.experts, *case.states):
            tensor[left_out] = torch.nan
        again, again_gradients = case.with_gradients(case.call, case.leaves, impl="triton")
        assert torch.equal(loss, again)
        for before, after in zip(gradients, again_gradients, strict=True):
            torch.testing.assert_close(before, after)

    @pytest.mark.parametrize("name", NAMES)
    def test_no_rows_and_no_gradient(self, name, generator):
        case = Case(name, generator, 65)
        with torch.no_grad():
            loss = case.call(*[x.requires_grad_() for x in case.leaves], impl="triton")
        assert not loss.requires_grad
        torch.testing.assert_close(loss, case.call(*case.leaves, impl="reference").detach())
        for attribute in ("experts", "states"):
            setattr(case, attribute, [x[:0] for x in getattr(case, attribute)])
        case.labels, case.ids, case.top = case.labels[:0], case.ids[:0], case.top[:0]
        first, *middle, weights = [x.detach() for x in case.leaves]
        assert case.call(first[:0], *middle, weights[:0], impl="triton") == 0

    @pytest.mark.parametrize("name", NAMES)
    def test_compiles_whole(self, name, generator, fresh_compiler):
        case = Case(name, generator, 33)
        expected, expected_gradients = case.with_gradients(case.call, case.leaves, impl="triton")
        compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
        loss, gradients = case.with_gradients(compiled, case.leaves, impl="triton")
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_values_that_a_cpu_would_refuse_give_nan():
    """As on a GPU, where a kernel cannot raise."""
    weights = torch.ones(2)
    labels = torch.tensor([0, 5])
    assert weighted_cross_entropy(torch.zeros(2, 5), labels, weights, impl="triton").isnan()
    assert mixture_kl(torch.zeros(2, 5), torch.zeros(1, 2, 5), -torch.ones(1), weights, impl="triton").isnan()
    tokens = torch.tensor([[0], [5]])
    assert topk_kl(torch.zeros(2, 3), torch.zeros(5, 3), tokens, torch.zeros(2, 1), weights, impl="triton").isnan()


class TestChunksOnAGpu:
    def test_slices_of_all_rows(self):
        weights = torch.zeros(7, device="meta")
        elements = row_losses._GPU_CHUNK_ELEMENTS
        assert row_losses._row_groups(weights, elements // 3) == [slice(0, 3), slice(3, 6), slice(6, 9)]
        assert row_losses._row_groups(weights, 2 * elements) == [slice(i, i + 1) for i in range(7)]

    def test_chunks_fill_whole_tiles(self):
        weights, elements = torch.zeros(1500, device="meta"), row_losses._GPU_CHUNK_ELEMENTS
        for size, step in ((elements // 700, 512), (elements // 256, 256), (elements // 255, 255)):
            assert row_losses._row_groups(weights, size)[0] == slice(0, step)

    def test_rows_that_count_are_asked_for_unless_a_graph_is_captured(self, monkeypatch):
        for captured in (False, True):
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda captured=captured: captured)
            assert row_losses._can_be_asked(torch.device("cuda")) == (not captured)
        assert row_losses._can_be_asked(torch.device("cpu"))

    def test_nothing_waits_for_the_device(self):
        """On the meta device anything that asks for a value raises."""
        hidden, head = torch.empty(7, 4, device="meta").bfloat16(), torch.empty(300, 4, device="meta").bfloat16()

        def row_op(logits, counted, rows, with_gradient):
            return row_losses.fake_row_losses(logits, with_gradient)

        total, losses, grad_hidden, grad_head = row_losses.in_chunks(
            hidden, head, torch.empty(7, device="meta"), True, True, row_op
        )
        assert {x.device.type for x in (total, losses, grad_hidden, grad_head)} == {"meta"}
        assert grad_hidden.dtype == torch.bfloat16 and grad_head.dtype == torch.float32

    def test_a_head_in_parts(self, generator, monkeypatch):
        def product(a, b, *, out_dtype):  # the CPU's torch.mm has no out_dtype
            sizes.append(a.shape[0])
            return a.to(out_dtype) @ b.to(out_dtype)

        sizes: list[int] = []
        monkeypatch.setattr(torch, "mm", product)
        monkeypatch.setattr(row_losses, "_GPU_HEAD_ELEMENTS", 130 * 4)
        gradient, inputs = (torch.randn(5, n, generator=generator).bfloat16() for n in (300, 4))
        total = torch.ones(300, 4)
        row_losses._add_product_in_parts(total, gradient, inputs)
        assert sizes == [128, 128, 44]
        torch.testing.assert_close(total, 1 + gradient.float().T @ inputs.float())

    @pytest.mark.parametrize("behaviour", ["adds", "forgets the sum", "refuses"])
    def test_whether_products_can_be_added_in_float32(self, generator, monkeypatch, behaviour):
        def add(total, a, b, *, out_dtype, out):  # neither has the CPU's torch.addmm
            if behaviour == "refuses":
                raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
            product = a.to(out_dtype) @ b.to(out_dtype)
            return out.copy_(product + total if behaviour == "adds" else product)

        monkeypatch.setattr(torch, "addmm", add)
        row_losses._adds_to_float32.cache_clear()
        assert row_losses._adds_to_float32(torch.device("cpu"), torch.bfloat16) == (behaviour == "adds")
        row_losses._adds_to_float32.cache_clear()
