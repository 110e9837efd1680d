"""An ensemble in many threads, its slices, and the base that they share."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ensemw2s import TokenEnsemble
from ensemw2s.ensemble.experts import AdapterExperts, ModelExperts
from ensemw2s.models.sharing import NotShareable, turn_of, view
from ensemw2s.student.teacher import LiveTeacher
from tests.calls import IDS, KINDS, alike, between, build, calls, mixed
from tests.tiny import FORMAT, gpt2, llama, questions, saved_adapters, tokenizer

# One call -> what another thread does in the middle of it. Every call is once the one and once the other.
MEETINGS = {
    "forward": "steps",
    "steps": "first view",
    "generate": "the base's owner",
    "general loop": "generate",
    "beams": "add_expert",
    "first view": "last view",
    "last view": "forward",
    "label": "general loop",
    "label choices": "score_examples",
    "score_examples": "beams",
    "score_choices": "label",
    "add_expert": "label choices",
    "the base's owner": "score_choices",
}


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=IDS, **kwargs).logits


def of_adapters(folder: Path, base: Any = None, count: int = 2) -> TokenEnsemble:
    return TokenEnsemble.from_adapters(base or llama(0), saved_adapters(folder, count), [1.0, 2.0, 1.5][:count])


def in_a_thread(call: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


# Calls that meet


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_in_the_middle_of_another_changes_neither(kind: str, tmp_path: Path) -> None:
    ensemble, fourth = build(kind, tmp_path)
    named = calls(ensemble, fourth)
    expected = {name: call() for name, call in named.items()}
    for outer, inner in MEETINGS.items():
        if outer in named and inner in named:
            found, results = between(ensemble.experts.carrier(1), named[outer], named[inner])
            alike(found, expected[outer])
            for result in results:
                alike(result, expected[inner])


def test_calls_from_many_threads_give_what_they_give_alone(tmp_path: Path) -> None:
    ensemble, fourth = build("stacked", tmp_path)
    assert mixed(calls(ensemble, fourth), threads=4, each=6, seed=1) == 24


def test_no_call_takes_standard_output_from_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that take it at once may never give it back."""
    named = calls(*build("stacked", tmp_path))

    def taken(*_: Any) -> None:
        raise AssertionError("sys.stdout was taken")

    # What datasets' fingerprints do, by way of dill.
    monkeypatch.setattr("dill.temp.capture", taken)
    monkeypatch.setattr(contextlib.redirect_stdout, "__enter__", taken)
    for call in named.values():
        call()


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_teacher_is_asked_while_others_use_the_ensemble(kind: str, tmp_path: Path) -> None:
    ensemble, _ = build(kind, tmp_path)
    mask = torch.ones_like(IDS)

    def ask() -> torch.Tensor:
        return torch.cat(LiveTeacher(ensemble).logits(IDS, mask, mask.bool()))

    expected = ask(), logits(ensemble)
    found, results = between(ensemble.experts.carrier(1), ask, lambda: logits(ensemble))
    alike(found, expected[0])
    for result in results:
        alike(result, expected[1])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_that_is_added_meanwhile_is_in_the_next_call(kind: str, fused: bool, tmp_path: Path) -> None:
    ensemble, fourth = build(kind, tmp_path)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "fused": fused, "eos_token_id": -1}
    expected = ensemble.generate(IDS, **options)

    class Adding:
        """A streamer in whose second step an expert is added."""

        steps = 0

        def put(self, tokens: torch.Tensor) -> None:
            self.steps += 1
            if self.steps == 2:
                in_a_thread(lambda: ensemble.add_expert(fourth, 9.0))

        def end(self) -> None:
            pass

    assert torch.equal(ensemble.generate(IDS[:1], streamer=Adding(), **options), expected[:1])
    assert ensemble.num_experts == len(ensemble.config.expert_weights) == 4
    assert not torch.equal(ensemble.generate(IDS, **options), expected)


def test_labels_keep_to_the_experts_that_they_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble, fourth = build("stacked", tmp_path)
    options: dict[str, Any] = {"question_format": FORMAT, "description": None, "batch_size": 2, "max_new_tokens": 4}
    expected = ensemble.label(questions(4), tokenizer(), **options)
    layer = ensemble.experts.carrier(0).get_base_model().model.layers[0]  # type: ignore[operator]
    passes = []

    def add(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 2:
            handle.remove()
            in_a_thread(lambda: ensemble.add_expert(fourth, 9.0))

    handle = layer.register_forward_hook(add)
    assert ensemble.label(questions(4), tokenizer(), **options).to_list() == expected.to_list()
    assert ensemble.num_experts == 4


def test_experts_added_by_several_threads_are_all_there(tmp_path: Path) -> None:
    ensemble = of_adapters(tmp_path, count=1)
    folder = tmp_path / "adapter-0"
    begin = threading.Barrier(4)

    def add() -> None:
        begin.wait()
        ensemble.add_expert(folder, 1.0)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ensemble.num_experts == len(ensemble.config.expert_weights) == len(set(ensemble.experts.members())) == 5


def test_compiled_it_gives_the_same_with_a_cache_too(tmp_path: Path) -> None:
    ensemble = of_adapters(tmp_path)
    compiled = torch.compile(ensemble, backend="eager")
    alike(logits(compiled), logits(ensemble))
    alike(logits(compiled, use_cache=True), logits(ensemble, use_cache=True))
    torch.compiler.reset()


# What the owner of the base sees


def own_adapter(folder: Path) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(llama(0), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)).eval()


@pytest.mark.parametrize("kind", ["stacked", "one-after-the-other"])
def test_running_an_ensemble_leaves_no_trace_on_its_base(kind: str, tmp_path: Path) -> None:
    ensemble, fourth = build(kind, tmp_path)
    base: Any = ensemble.experts.carrier(0)

    def state() -> Any:
        layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
        attributes = [{name: id(value) for name, value in vars(module).items()} for module in base.modules()]
        return attributes, [list(layer.active_adapters) for layer in layers], base.active_adapter

    before = state()
    for name, call in calls(ensemble, fourth).items():
        if name != "add_expert":
            call()
    assert state() == before
    assert base.active_adapter == "default"


def test_training_of_an_adapter_on_the_base_goes_on_beside_an_ensemble(tmp_path: Path) -> None:
    base = own_adapter(tmp_path)
    ensemble = of_adapters(tmp_path, base)
    base.set_adapter("default")
    trained = [weight for weight in base.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    before, plain = logits(ensemble), [weight.clone() for weight in trained]
    base(input_ids=IDS, labels=IDS).loss.backward()
    ensemble.generate(IDS, max_new_tokens=2)
    ensemble.add_expert(tmp_path / "adapter-0", 1.0)
    ensemble.generate(IDS, max_new_tokens=2)
    optimizer.step()
    assert [weight.requires_grad for weight in trained] == [True] * len(trained)
    assert all(not torch.equal(weight, old) for weight, old in zip(trained, plain, strict=True))
    now = [weight for name, weight in base.named_parameters() if ".default." in name]
    assert {id(weight) for weight in now} == {id(weight) for weight in trained}
    alike(logits(ensemble[:2]), before)


def test_an_expert_in_training_is_seen_as_it_is(tmp_path: Path) -> None:
    ensemble = of_adapters(tmp_path)
    base: Any = ensemble.experts.carrier(0)
    base.set_adapter("expert_1")
    weights = [weight for weight in base.parameters() if weight.requires_grad]
    before = logits(ensemble, use_cache=True)
    with torch.no_grad():
        for weight in weights:
            weight.mul_(0.5)
    after = logits(ensemble, use_cache=True)
    assert not torch.allclose(before, after, atol=1e-2)
    alike(after, logits(ensemble))
    assert {id(weight) for weight in base.parameters()} >= {id(weight) for weight in weights}


def test_weights_that_become_rows_of_one_tensor_stay_whole_for_who_is_reading_them(tmp_path: Path) -> None:
    experts = AdapterExperts(llama(0), saved_adapters(tmp_path, 2))
    layer = experts.base.get_base_model().model.layers[0].self_attn.q_proj.lora_A["expert_1"]
    read = layer.weight
    where, values = read.data_ptr(), read.clone()
    experts.passes()
    assert read.data_ptr() == where and torch.equal(read, values)
    assert layer.weight.data_ptr() != where and torch.equal(layer.weight, values)


def test_weights_that_somebody_merged_into_the_base_are_refused(tmp_path: Path) -> None:
    ensemble = of_adapters(tmp_path)
    base: Any = ensemble.experts.carrier(0)
    before = logits(ensemble)
    base.merge_adapter()
    for call in (lambda: logits(ensemble), lambda: ensemble.generate(IDS, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"adapter 'expert_1' merged into them.*unmerge_adapter\(\)"):
            call()
    base.unmerge_adapter()
    torch.testing.assert_close(logits(ensemble), before, rtol=1e-3, atol=1e-3)


def test_two_ensembles_built_on_one_plain_base_keep_to_their_own_experts(tmp_path: Path) -> None:
    folders, base = saved_adapters(tmp_path, 4), llama(0)
    first = TokenEnsemble.from_adapters(base, folders[:2], [1.0, 2.0])
    expected = logits(first)
    second = TokenEnsemble.from_adapters(base, folders[2:], [1.0, 2.0])
    alike(logits(first), expected)
    alike(logits(second), logits(TokenEnsemble.from_adapters(llama(0), folders[2:], [1.0, 2.0])))
    assert len({*first.experts.members(), *second.experts.members()}) == 4


# Adapters that nobody uses


def test_an_adapter_goes_with_the_last_ensemble_that_uses_it(tmp_path: Path) -> None:
    base = own_adapter(tmp_path)
    mine = logits(base)
    ensemble = of_adapters(tmp_path, base)
    expected = logits(ensemble)
    for number in range(10):
        grown = ensemble[number % 2 :]
        grown.add_expert(tmp_path / "adapter-1", 1.0)
        grown.generate(IDS, max_new_tokens=1)
    kept = grown.new_cache()
    view_of_it = grown[-1:]
    assert len(base.peft_config) == 4
    del grown, kept
    # The slice of the slice still has it.
    assert len(base.peft_config) == 4
    alike(logits(view_of_it), logits(ensemble[1:]))
    del view_of_it
    assert sorted(base.peft_config) == ["default", "expert_1", "expert_2"]
    assert not [name for name, _ in base.named_parameters() if "expert_3" in name]
    alike(logits(ensemble), expected)
    del ensemble
    assert list(base.peft_config) == ["default"]
    assert torch.equal(logits(base), mine)


@pytest.mark.filterwarnings("error:Adapter:UserWarning")
def test_with_its_last_adapter_gone_the_base_is_plain_again(tmp_path: Path) -> None:
    base = llama(0)
    names, untouched = list(base.state_dict()), logits(base)
    ensemble = of_adapters(tmp_path, base)
    one = ensemble[1:]
    expected = logits(one)
    del ensemble
    alike(logits(one), expected)
    assert not any(weight.requires_grad for weight in base.parameters())
    del one
    assert list(base.state_dict()) == names and torch.equal(logits(base), untouched)
    # It serves as before.
    alike(logits(of_adapters(tmp_path, base)[1:]), expected)


def test_a_cache_keeps_its_adapters(tmp_path: Path) -> None:
    ensemble = of_adapters(tmp_path)
    base: Any = ensemble.experts.carrier(0)
    cache = ensemble[1:].new_cache()
    kept = ensemble[:1]
    del ensemble
    assert len(base.peft_config) == 2
    del cache
    assert len(base.peft_config) == kept.num_experts == 1


def test_an_adapter_that_is_dropped_within_a_turn_waits_for_its_end(tmp_path: Path) -> None:
    ensemble = of_adapters(tmp_path)
    base: Any = ensemble.experts.carrier(0)
    with turn_of(base.get_base_model()):
        del ensemble
        assert len(base.peft_config) == 2
    assert not base.peft_config


def test_an_adapter_that_cannot_be_loaded_leaves_nothing_behind(tmp_path: Path) -> None:
    ensemble = of_adapters(tmp_path)
    wider = tmp_path / "wider"
    get_peft_model(llama(0, hidden_size=64), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(wider)
    experts = AdapterExperts(ensemble.experts.carrier(0))  # type: ignore[arg-type]
    before = logits(ensemble)
    with pytest.raises(ValueError, match=r"does not fit the base model .*size mismatch"):
        experts.add(wider)
    assert len(experts.base.peft_config) == 2
    alike(logits(ensemble), before)


def test_a_copy_of_an_ensemble_has_adapters_of_its_own(tmp_path: Path) -> None:
    ensemble = of_adapters(tmp_path)
    other = copy.deepcopy(ensemble)
    expected = logits(ensemble, use_cache=True)
    base: Any = other.experts.carrier(0)
    assert base is not ensemble.experts.carrier(0)
    del ensemble
    alike(logits(other, use_cache=True), expected)
    other = other[:1]
    assert len(base.peft_config) == 1


# Whole models


def test_threads_that_start_later_compute_with_as_many_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with torch.no_grad():
            ModelExperts([llama(0), llama(1), llama(2)]).map(lambda model, index: index, [0, 1, 2])
        assert torch.get_num_threads() == 4
        assert in_a_thread(torch.get_num_threads) == 4
    finally:
        torch.set_num_threads(before)


# Views of a model


def test_a_view_shares_weights_and_differs_where_it_is_told_to() -> None:
    model = llama(0)
    head = model.lm_head
    other = view(model, {head: {"forward": lambda hidden: hidden[..., :3]}})
    assert logits(other).shape[-1] == 3 and logits(model).shape[-1] == model.config.vocab_size
    assert other.model is model.model
    seen: list[int] = []
    copied = view(model, {head: {}})
    copied.get_output_embeddings().register_forward_hook(lambda *_: seen.append(1))  # type: ignore[operator]
    assert torch.equal(logits(copied), logits(model)) and seen == [1]
    model.double()
    assert logits(copied).dtype == torch.float64
    assert view(model, {}) is model


def test_a_forward_pass_that_leads_back_to_the_models_own_modules_is_not_shared() -> None:
    model = gpt2(0)
    inner = model.transformer.forward
    model.transformer.forward = inner
    # A bound method is bound anew ...
    other = view(model, {model.transformer.wte: {"forward": lambda ids: torch.zeros(*ids.shape, 32)}})
    assert not torch.allclose(logits(other), logits(model))
    # ... which a function cannot be.
    model.transformer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(NotShareable, match="GPT2Model was replaced by function"):
        view(model, {model.transformer.wte: {}})


def test_a_base_that_only_its_own_modules_can_run_is_run_by_one_thread_at_a_time(tmp_path: Path) -> None:
    ensemble = of_adapters(tmp_path)
    expected = logits(ensemble), logits(ensemble[1:])
    inner: Any = ensemble.experts.carrier(0).get_base_model().model  # type: ignore[operator]
    own = inner.forward
    inner.forward = lambda *args, **kwargs: own(*args, **kwargs)
    assert all(each.stacked is None for each in ensemble.experts.passes())
    found, results = between(
        ensemble.experts.carrier(0), lambda: logits(ensemble), lambda: logits(ensemble[1:], use_cache=True)
    )
    alike(found, expected[0])
    for result in results:
        alike(result, expected[1])


def test_a_compiled_module_is_run_eagerly_in_a_view() -> None:
    model = llama(0)
    model.compile(backend="eager")
    other = view(model, {model.lm_head: {"forward": lambda hidden: hidden[..., :2]}})
    assert logits(other).shape[-1] == 2


def test_what_waits_is_done_once_and_by_whoever_ends_the_turn() -> None:
    turn, done = turn_of(nn.Linear(1, 1)), []
    with turn, turn:
        turn.when_free(lambda: done.append("first"))
        in_a_thread(lambda: turn.when_free(lambda: done.append("second")))
        assert done == []
    assert done == ["first", "second"]
    turn.when_free(lambda: done.append("third"))
    assert done[-1] == "third"
