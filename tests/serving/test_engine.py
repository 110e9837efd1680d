"""What vLLM answers with a saved ensemble, against the ensemble in float64. Needs vLLM: `make serve-check`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemw2s import TokenEnsemble
from tests import tiny
from tests.serving import ensembles

pytestmark = pytest.mark.serve
ROOT = Path(__file__).parents[2]
COUNT, CLOSE = 100, 1e-5
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 32, "max_num_seqs": 8},
    "prefix": {"enable_prefix_caching": True, "max_num_seqs": 8},
    "compiled": {"enforce_eager": False},
    "parallel": {"tensor_parallel_size": 2},
}


@pytest.fixture(scope="module", params=ensembles.KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensembles.saved(request.param, tmp_path_factory.mktemp("served"))


def run(folder: Path, prompts: list[list[int]], sampling: list[dict[str, Any]], place: Path, **task: Any) -> Any:
    """Return what `engine.py` writes; fail with what it said if it ends otherwise."""
    task = {"model": str(folder), "engine": {}, "prompts": prompts, "sampling": sampling, **task}
    (place / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "-m", "tests.serving.engine", str(place / "task.json"), str(place / "told.json")]
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((place / "told.json").read_text())


def questions(count: int, seed: int, most: int = 40) -> list[list[int]]:
    """Prompts of random letters, the second half of which begin as the first do."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, most, (count,), generator=generator).tolist()
    prompts = [torch.randint(2, tiny.VOCAB, (length,), generator=generator).tolist() for length in lengths]
    half = count // 2
    return prompts[:half] + [prompts[i % half] + prompts[i][:5] for i in range(half, count)]


def reference(folder: Path) -> TokenEnsemble:
    ensemble: TokenEnsemble = TokenEnsemble.from_pretrained(folder, dtype=torch.float64)
    return ensemble


def distributions(ensemble: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [tokens, V] at the places of an answer."""
    with torch.no_grad():
        logits: torch.Tensor = ensemble(torch.tensor([prompt + tokens])).logits
    return logits[0, len(prompt) - 1 : -1]


def check(ensemble: Any, prompt: list[int], told: dict[str, Any], greedy: bool = True) -> None:
    """Compare one answer with the mixture: greedy tokens but where two tie, and log-probabilities."""
    given = torch.tensor(told["tokens"])
    wanted = distributions(ensemble, prompt, told["tokens"])
    if greedy:
        lead = wanted.topk(2).values
        settled = lead[:, 0] - lead[:, 1] > CLOSE
        assert torch.equal(given[settled], wanted.argmax(-1)[settled])
    of_given = wanted.gather(1, given[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(told["log_probs"]).double(), of_given.double(), rtol=0, atol=1e-4)


GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "logprobs": 1}


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_tokens_and_log_probabilities_are_the_mixtures(folder: Path, engine: str, tmp_path: Path) -> None:
    prompts = questions(COUNT, seed=1)
    told = run(folder, prompts, [GREEDY] * COUNT, tmp_path, engine=ENGINES[engine])
    ensemble = reference(folder)
    for prompt, output in zip(prompts, told["outputs"], strict=True):
        assert len(output["tokens"]) == GREEDY["max_tokens"]
        check(ensemble, prompt, output)


def test_sampling_prompts_and_penalties(folder: Path, tmp_path: Path) -> None:
    prompts = questions(60, seed=2)
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 3, "prompt_logprobs": 0},
        {"temperature": 1.3, "top_k": 4, "seed": 4},
        {"temperature": 0, "repetition_penalty": 1.5},
    ]
    sampling = [{"max_tokens": 12, "ignore_eos": True, "logprobs": 1, **kinds[i % 3]} for i in range(60)]
    told = run(folder, prompts, sampling, tmp_path)
    ensemble = reference(folder)
    single: TokenEnsemble = TokenEnsemble.from_pretrained(folder)
    for prompt, settings, output in zip(prompts, sampling, told["outputs"], strict=True):
        check(ensemble, prompt, output, greedy=False)
        wanted = distributions(ensemble, prompt, output["tokens"])
        if settings.get("top_k"):
            order = wanted.argsort(-1, descending=True).argsort(-1)
            assert order.gather(1, torch.tensor(output["tokens"])[:, None]).max() < settings["top_k"]
        elif settings.get("repetition_penalty"):
            penalised = single.generate(torch.tensor([prompt]), repetition_penalty=1.5, do_sample=False,
                                        max_new_tokens=12, min_new_tokens=12, eos_token_id=None)  # fmt: skip
            assert output["tokens"] == penalised[0, len(prompt) :].tolist()
        else:
            own = distributions(ensemble, prompt[:1], prompt[1:])
            read = own.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            said = torch.tensor(output["prompt_log_probs"][1:]).double()
            torch.testing.assert_close(said, read.double(), rtol=0, atol=1e-4)


def test_every_request_has_its_own_weights(folder: Path, tmp_path: Path) -> None:
    ensemble, prompts = reference(folder), questions(60, seed=5)
    generator = torch.Generator().manual_seed(6)
    count = len(ensemble)
    own: list[Any] = [None, *(torch.rand(count, generator=generator).tolist() for _ in range(58)), None]
    own[10:10 + count] = [[float(t == other) for other in range(count)] for t in range(count)]  # fmt: skip
    sampling = [
        {**GREEDY, "max_tokens": 3 + i % 19, "prompt_logprobs": 0 if i % 4 == 0 else None,
         "extra_args": None if weights is None else {"expert_weights": weights}}
        for i, weights in enumerate(own)
    ]  # fmt: skip
    server = [0.1] * (count - 1) + [3.0]
    engine = {"max_num_seqs": 7, "max_num_batched_tokens": 64}
    told = run(folder, prompts, sampling, tmp_path, engine=engine, calls=[["set_expert_weights", [server]]])
    for prompt, weights, output in zip(prompts, own, told["outputs"], strict=True):
        positive = [max(weight, 1e-30) for weight in (server if weights is None else weights)]
        check(ensemble.reweighted(positive), prompt, output)


def test_weights_that_cannot_be_are_refused_and_the_engine_lives_on(folder: Path, tmp_path: Path) -> None:
    count = len(reference(folder))
    bad: list[Any] = [[1.0], [0.0] * count, [-1.0] * count, ["1"] * count, "abc", 3, [True] * count]
    sampling = [{**GREEDY, "extra_args": {"expert_weights": weights}} for weights in bad] + [GREEDY]
    told = run(folder, questions(len(sampling), seed=7), sampling, tmp_path, one_by_one=True)
    *refused, last = told["outputs"]
    for output in refused:
        assert output["error"].startswith(f"expert_weights must be {count} finite numbers")
    assert len(last["tokens"]) == GREEDY["max_tokens"]
