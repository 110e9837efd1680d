from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ensemw2s.ops import available_backends, backend, backend_for, build_info, draw_seeds, mixture_log_probs
from ensemw2s.ops.randomness import gumbel_noise, philox
from tests.ops.helpers import needs_cpp


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(backend, "_WHY_MISSING", "it was left out of this test")
    monkeypatch.setattr(backend, "_is_registered", lambda op, device_type: False)


def forget_choices():
    backend._fast_backends.cache_clear()
    backend._warn_once.cache_clear()


@pytest.fixture(autouse=True)
def choices_made_anew():
    forget_choices()
    yield
    forget_choices()


def test_missing_library_is_an_error_when_asked_for(without_library):
    with pytest.raises(ValueError, match=r"impl='cpp' cannot run mixture_log_probs.*left out of this test"):
        mixture_log_probs(torch.zeros(2, 2, 3), [1.0, 1.0], impl="cpp")


def test_missing_library_falls_back_with_one_warning(without_library, recwarn):
    for _ in range(3):
        mixture_log_probs(torch.zeros(2, 2, 3), [1.0, 1.0])
    messages = [str(w.message) for w in recwarn if "runs in plain torch" in str(w.message)]
    assert messages == ["mixture_log_probs runs in plain torch: it was left out of this test"]


def test_without_kernels_for_the_gpu_one_warning_says_how_to_get_them(without_library, recwarn):
    for _ in range(2):
        assert backend_for("mixture_sample", "cuda") == "reference"
    (message,) = [str(w.message) for w in recwarn if "runs in plain torch" in str(w.message)]
    assert message.startswith("mixture_sample runs in plain torch: triton is not installed (pip install triton)")


def test_a_gpu_that_is_too_old_is_named(monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert backend_for("mixture_sample", "cuda") == "reference"
    assert available_backends("cuda")["token_scores"] == ("reference",)
    (message,) = [str(w.message) for w in recwarn if "runs in plain torch" in str(w.message)]
    assert message.endswith("the kernels need a GPU of compute capability 8.0, this one has 7.5")


def test_each_gpu_is_looked_at_by_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index == 1 else (7, 5))
    monkeypatch.setattr(backend, "_is_registered", lambda op, device_type: True)
    assert backend_for("mixture_sample", "cuda:1") == "cuda"
    with pytest.warns(RuntimeWarning, match=r"needs? a GPU of compute capability 8\.0"):
        assert backend_for("mixture_sample", "cuda:0") == "reference"


class OnGpu:
    """What the choice looks at of logits on a GPU."""

    device, dtype = torch.device("cuda:0"), torch.float32

    def __init__(self, vocabulary):
        self.shape = (2, vocabulary)


@pytest.mark.parametrize(("experts", "vocabulary"), [(65, 10), (2, 2**21 + 1)])
@pytest.mark.parametrize("with_triton", [True, False])
def test_what_is_too_much_for_the_cuda_kernels_runs_elsewhere_with_one_warning(
    monkeypatch, recwarn, experts, vocabulary, with_triton
):
    monkeypatch.setattr(backend, "_is_registered", lambda op, device_type: with_triton or not op.endswith("_triton"))
    assert backend.choose_for_mixture("mixture_sample", None, [OnGpu(2**21)] * 64) == "cuda"
    other = "triton" if with_triton else "reference"
    for _ in range(2):
        assert backend.choose_for_mixture("mixture_sample", None, [OnGpu(vocabulary)] * experts) == other
    (message,) = [str(w.message) for w in recwarn if "CUDA kernels" in str(w.message)]
    assert message == f"mixture_sample runs on {other}: the CUDA kernels take at most 64 experts and 2097152 tokens"
    # Who asks for them by name is told by them.
    assert backend.choose_for_mixture("mixture_sample", "cuda", [OnGpu(vocabulary)] * experts) == "cuda"


def test_environment_variable_sets_the_default(monkeypatch):
    monkeypatch.setenv("ENSEMW2S_IMPL", "reference")
    assert backend_for("mixture_sample") == "reference"
    monkeypatch.setenv("ENSEMW2S_IMPL", "")
    assert backend_for("mixture_sample") == backend_for("mixture_sample", impl="auto")
    monkeypatch.setenv("ENSEMW2S_IMPL", "fast")
    with pytest.raises(ValueError, match="ENSEMW2S_IMPL='fast'"):
        backend_for("mixture_sample")
    assert backend_for("mixture_sample", impl="reference") == "reference"


@needs_cpp
def test_choice_follows_device_and_dtype():
    assert set(available_backends("cpu")) == set(available_backends("cuda"))
    assert all(backends == ("cpp", "reference") for backends in available_backends("cpu").values())
    assert backend_for("mixture_sample", "cpu") == "cpp"
    assert backend_for("mixture_sample", "cpu", torch.float64) == "reference"
    assert backend_for("mixture_sample", "cuda", torch.float64) == "reference"
    assert build_info()["instruction_set"] in ("avx512", "avx2", "default")


def test_unknown_op_is_named():
    with pytest.raises(ValueError, match="op='mixture'"):
        backend_for("mixture")


@needs_cpp
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_aten_cpu_capability_lowers_the_instruction_set(capability):
    code = "from ensemw2s.ops import build_info; print(build_info()['instruction_set'])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"ATEN_CPU_CAPABILITY": capability, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() in ("default", capability)


def test_philox_known_answer():
    # Random123's own vectors (kat_vectors, philox4x32 with 10 rounds) for counters and keys that this
    # package's (seed, position, token) form can express. Tokens 0 to 3 are the four words of one block.
    zero = torch.zeros(4, dtype=torch.int64)
    assert philox(zero, zero, torch.arange(4)).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@needs_cpp
def test_philox_and_noise_agree_with_the_compiled_ones(generator):
    from ensemw2s import _host

    seeds = torch.randint(-(2**63), 2**63 - 1, (200,), generator=generator)
    positions = torch.randint(0, 2**32, (200,), generator=generator)
    tokens = torch.randint(0, 2**31, (200,), generator=generator)
    words = philox(seeds, positions, tokens).tolist()
    noise = gumbel_noise(seeds, positions, tokens).tolist()
    for index, (seed, position, token) in enumerate(zip(seeds, positions, tokens, strict=True)):
        word = _host.philox(int(seed) % 2**64, int(position), int(token))
        assert word == words[index]
        assert _host.gumbel(word) == pytest.approx(noise[index], rel=1e-12)


def test_noise_is_gumbel():
    zero = torch.zeros(1, dtype=torch.int64)
    noise = gumbel_noise(zero + 5, zero, torch.arange(200_000))
    # Mean 0.57722 and variance pi^2 / 6 of the standard Gumbel distribution; tolerances are 5 standard errors.
    assert abs(noise.mean() - 0.57722) < 5 * (1.645 / 200_000) ** 0.5
    assert abs(noise.var() - 1.644934) < 0.04


def test_draw_seeds_follows_torch():
    torch.manual_seed(3)
    first, second = draw_seeds(4), draw_seeds(4)
    torch.manual_seed(3)
    assert torch.equal(draw_seeds(4), first) and not torch.equal(first, second)
    own = torch.Generator().manual_seed(9)
    assert torch.equal(draw_seeds(2, generator=own), draw_seeds(2, generator=own.manual_seed(9)))
