"""What an engine is told of a saved ensemble, and what it is given of its adapters; vLLM is not needed for that."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from ensemw2s import TokenEnsemble
from ensemw2s.runtime.files import write_json
from ensemw2s.serving.adapters import SavedAdapters
from ensemw2s.serving.config import ServedEnsembleConfig
from tests import tiny
from tests.serving import ensembles


@pytest.fixture(autouse=True)
def _first_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.setattr(ServedEnsembleConfig, "experts_served", None)


@pytest.mark.parametrize("kind", ensembles.KINDS)
def test_a_configuration_knows_those_of_the_experts(kind: str, tmp_path: Path) -> None:
    folder = ensembles.saved(kind, tmp_path)
    config = ServedEnsembleConfig.from_pretrained(folder)
    ensemble = TokenEnsemble.from_pretrained(folder)
    assert config.folder == str(folder)
    assert len(config.expert_configs) == len(ensemble) == ServedEnsembleConfig.experts_served
    for index, own in enumerate(config.expert_configs):
        true = ensemble.experts.expert_config(index)
        assert (own.model_type, own.num_hidden_layers, own.hidden_size) == (
            true.model_type, true.num_hidden_layers, true.hidden_size,
        )  # fmt: skip
    assert config.get_text_config().max_position_embeddings == ensemble.config.max_position_embeddings
    assert config.expert_weights == ensemble.config.expert_weights
    # As it travels to other processes, and as it would be saved.
    monkey = ServedEnsembleConfig.experts_served
    ServedEnsembleConfig.experts_served = None
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert [own.hidden_size for own in again.expert_configs] == [own.hidden_size for own in config.expert_configs]
    assert monkey == ServedEnsembleConfig.experts_served
    assert not {"folder", "expert_configs"} & config.to_dict().keys()


@pytest.mark.parametrize("kind", ["adapters", "thinned"])
def test_base_and_products_are_the_experts(kind: str, tmp_path: Path) -> None:
    folder = ensembles.saved(kind, tmp_path)
    saved = SavedAdapters(ServedEnsembleConfig.from_pretrained(folder))
    weights, products = dict(saved.base_weights()), saved.products()
    ensemble = TokenEnsemble.from_pretrained(folder)
    ids = torch.randint(2, tiny.VOCAB, (3, 11))
    for index in range(len(ensemble)):
        merged = dict(weights)
        for path, experts in products.items():
            if index in experts:
                merged[f"{path}.weight"] = merged[f"{path}.weight"] + experts[index].second @ experts[index].first
        with ensemble.experts.expert(index) as expert, torch.no_grad():
            wanted = expert(ids).logits
            config = ensemble.experts.expert_config(index)
        model = tiny.llama(0, **{key: getattr(config, key) for key in (*ensembles.SHAPE, "num_hidden_layers",
                                                                      "tie_word_embeddings")})  # fmt: skip
        missing = model.load_state_dict(merged, strict=False)
        assert not missing.unexpected_keys
        assert set(missing.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    votes = tmp_path / "votes"
    TokenEnsemble.from_models([tiny.llama(0), tiny.llama(1)], [1, 1], combine="vote").save_pretrained(votes)
    with pytest.raises(ValueError, match='combine="vote" cannot be served'):
        ServedEnsembleConfig.from_pretrained(votes)
    folders = tiny.dora_adapters(tmp_path, 2)
    dora = tmp_path / "dora"
    TokenEnsemble.from_adapters(tiny.llama(0), folders, [1, 1]).save_pretrained(dora)
    with pytest.raises(ValueError, match="expert 1 is an adapter that does more than to add LoRA products"):
        SavedAdapters(ServedEnsembleConfig.from_pretrained(dora))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1: ensembles are run by vLLM's first model runner"):
        ServedEnsembleConfig.from_pretrained(dora)


def test_an_incomplete_folder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = ensembles.saved("models", tmp_path)
    (folder / "experts" / "2" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expert 2 of 3"):
        ServedEnsembleConfig.from_pretrained(folder)
    folder = ensembles.saved("adapters", tmp_path)
    (tmp_path / "adapters-base" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"the experts' base model: .* has no config\.json"):
        ServedEnsembleConfig.from_pretrained(folder)


def test_a_configuration_without_a_folder_is_an_ensembles(tmp_path: Path) -> None:
    config = ServedEnsembleConfig(expert_weights=[1.0, 2.0], vocab_size=5)
    assert config.folder is None
    assert config.get_text_config() is config
    write_json(tmp_path / "config.json", config.to_dict())
    assert ServedEnsembleConfig.from_dict(config.to_dict()).expert_weights == [1.0, 2.0]
