"""Calls that an application makes of one ensemble from many threads, and two ways to let them meet.

`calls(...)` names them; each returns something that equals what it returns alone. `between` puts one call into the
middle of another, so that what one changes on modules that both run is seen by the other with certainty; `mixed` lets
threads make calls at random with as many switches between them as Python allows.
"""

from __future__ import annotations

import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from ensemw2s import TokenEnsemble
from ensemw2s.inference.choices import ChoiceSettings, score_choices
from ensemw2s.inference.decoding import Sampling
from ensemw2s.inference.scoring import score_examples
from tests.tiny import FORMAT, PAD, VOCAB, dora_adapters, gpt2, llama, questions, saved_adapters, tokenizer

Calls = dict[str, Callable[[], Any]]
KINDS = ("stacked", "one-after-the-other", "mixed", "models")
IDS = torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(5))
# How long a call in the middle of another is waited for: it may need what the other one holds.
_PATIENCE = 0.2


def build(kind: str, folder: Path) -> tuple[TokenEnsemble, Any]:
    """Return an ensemble of three experts, and what its `add_expert` takes for a fourth.

    The base of adapters belongs to somebody who has an adapter of their own on it, the active one.
    """
    weights = [1.0, 2.0, 1.5]
    if kind == "models":
        return TokenEnsemble.from_models([llama(0), gpt2(1), llama(2)], weights), llama(3)
    folders = saved_adapters(folder, 4) if kind != "one-after-the-other" else dora_adapters(folder, 4)
    if kind == "mixed":
        folders[1:2] = dora_adapters(folder, 1)
    torch.manual_seed(9)
    base = get_peft_model(llama(0), LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    return TokenEnsemble.from_adapters(base, folders[:3], weights), folders[3]


def calls(ensemble: TokenEnsemble, fourth: Any) -> Calls:
    """Return calls of an ensemble of three experts by name."""
    first, last = ensemble[:2], ensemble[1:]
    asked, given = questions(3), tokenizer()
    choices = Dataset.from_list([{"id": "c", "prompt": "abc", "choices": ["ab", "cd"]}])
    texts = Dataset.from_list([{"input_ids": row.tolist(), "prompt_length": 3} for row in IDS])
    generate: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    options: dict[str, Any] = {"question_format": FORMAT, "description": None}

    def step() -> torch.Tensor:
        cache = ensemble.new_cache()
        ensemble(IDS[:, :5], use_cache=True, cache=cache)
        return ensemble(IDS[:, 5:], torch.ones_like(IDS), use_cache=True, cache=cache).logits

    def grown() -> torch.Tensor:
        larger = last[:]
        larger.add_expert(fourth, 0.5)
        return torch.cat([larger(IDS).logits, larger(IDS, use_cache=True).logits])

    found: Calls = {
        "forward": lambda: ensemble(IDS).logits,
        "steps": step,
        "generate": lambda: ensemble.generate(IDS, **generate),
        "general loop": lambda: last.generate(IDS, fused=False, **generate),
        "beams": lambda: ensemble.generate(IDS, num_beams=2, **generate),
        "first view": lambda: first(IDS).logits,
        "last view": lambda: last.generate(IDS, **generate),
        "label": lambda: _numbers(ensemble.label(asked, given, max_new_tokens=4, **options)),
        "sampled label": lambda: _numbers(
            ensemble.label(
                asked, given, max_new_tokens=4, sampling=Sampling(temperature=1.0, top_p=0.9, seed=3), **options
            )
        ),
        "label choices": lambda: _numbers(ensemble.label(choices, given, **options)),
        "score_examples": lambda: _scores(score_examples(ensemble, texts, pad_token_id=PAD)),
        "score_choices": lambda: torch.tensor(
            score_choices(first, choices, given, ChoiceSettings(FORMAT)).log_probs[0]
        ),
        "add_expert": grown,
    }
    if isinstance(ensemble.experts.carrier(0), PeftModel):
        base: Any = ensemble.experts.carrier(0)
        found["the base's owner"] = lambda: base(input_ids=IDS).logits
    return {name: torch.no_grad()(call) for name, call in found.items()}


def _numbers(labels: Dataset) -> torch.Tensor:
    return torch.tensor(
        [value for row in labels for value in (*row["answer_ids"], row["confidence"], row["agreement"])]
    )


def _scores(scores: Any) -> torch.Tensor:
    return torch.from_numpy(scores.token_log_probs)


def alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that numbers are the same but for the order of sums; whole ones, as tokens, exactly."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def between(carrier: Any, outer: Callable[[], Any], inner: Callable[[], Any]) -> tuple[Any, Any]:
    """Make a call in the middle of another one's forward pass, from another thread; return what both return.

    Args:
        carrier: a model that `outer` runs.
        outer: interrupted at the first layer of its first pass, and again at the last layer of each.
        inner: begins there. It is over before `outer` goes on, or waits for what `outer` holds.
    """
    layers = _layers(carrier)
    results: list[Any] = []
    threads: list[threading.Thread] = []

    def interrupt(*_: Any) -> None:
        if len(threads) >= 2 or threading.current_thread() in threads:
            return
        threads.append(threading.Thread(target=lambda: results.append(_outcome(inner))))
        threads[-1].start()
        threads[-1].join(_PATIENCE)

    handles = [layers[0].register_forward_pre_hook(interrupt), layers[-1].register_forward_hook(interrupt)]
    try:
        found = _outcome(outer)
    finally:
        for handle in handles:
            handle.remove()
        for thread in threads:
            thread.join()
    assert results, "the outer call never came by the layers of this model"
    for result in (found, *results):
        if isinstance(result, BaseException):
            raise result
    return found, results


def _layers(carrier: Any) -> Any:
    plain = carrier.get_base_model() if isinstance(carrier, PeftModel) else carrier
    return plain.transformer.h if hasattr(plain, "transformer") else plain.model.layers


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return error


@contextmanager
def many_switches() -> Iterator[None]:
    """Let Python go from thread to thread all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def mixed(calls: Mapping[str, Callable[[], Any]], *, threads: int, each: int, seed: int) -> int:
    """Let threads begin together and make `each` calls at random; check all results and return their number."""
    expected = {name: call() for name, call in calls.items()}
    begin, wrong = threading.Barrier(threads), []

    def work(own_seed: int) -> None:
        draw = random.Random(own_seed)
        begin.wait()
        for _ in range(each):
            name = draw.choice(sorted(calls))
            try:
                alike(calls[name](), expected[name])
            except Exception:
                wrong.append(f"{name}: {traceback.format_exc()}")

    output = sys.stdout
    workers = [threading.Thread(target=work, args=(seed * 1000 + i,)) for i in range(threads)]
    with many_switches():
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert sys.stdout is output, "a call took sys.stdout and did not give it back"
    if wrong:
        raise AssertionError(f"{len(wrong)} of {threads * each} calls from {threads} threads went wrong; {wrong[0]}")
    return threads * each
