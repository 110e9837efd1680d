"""Folders that strangers wrote: what they hold is never run, and what they ask for is an allow-list."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ensemw2s import TokenEnsemble
from ensemw2s.models.loading import load_model, load_saved_model, load_tokenizer
from ensemw2s.student.trainer import load_trained
from tests.faults.folders import as_nobody, watch
from tests.reference import ragged_prompts
from tests.tiny import llama, saved_model, tokenizer


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def plant(folder: Path) -> dict[str, Any]:
    """Put code into a folder that leaves a trace when it is run, and return the setting that asks for it."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    return {
        "auto_map": {
            "AutoConfig": "evil.Evil",
            "AutoModelForCausalLM": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", None],
        }
    }


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=ragged_prompts(2)[0].clamp_min(2)).logits


@pytest.mark.parametrize("load", [TokenEnsemble.from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("where", ["base", "key"])
def test_code_in_the_base_of_a_saved_ensemble_never_runs(
    load: Any, where: str, of_adapters: TokenEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    of_adapters.save_pretrained(folder)
    change(folder / "base" / "config.json", model_type="evil", **plant(folder / "base"))
    expected = r"model_type 'evil' is no causal language model"
    if where == "key":
        change(folder / "config.json", base={"source": "./base", "trust_remote_code": True})
        expected = r"config\.json: base may hold source, keep_layers, dtype alone, got 'trust_remote_code'"
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with watch().over(folder), pytest.raises(ValueError, match=expected):
        load(folder)
    assert not (folder / "base" / "ran").exists()


def test_code_beside_a_model_of_transformers_own_is_let_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_model(tmp_path / "model")
    asks = plant(folder)
    change(folder / "config.json", **asks)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with watch().over(folder):
        assert torch.equal(logits(load_model(folder)), logits(llama(0)))
        assert load_tokenizer(folder)("abc")["input_ids"] == tokenizer()("abc")["input_ids"]
    assert not (folder / "ran").exists()


def test_a_tokenizer_that_needs_code_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_model(tmp_path / "model")
    plant(folder)
    change(folder / "config.json", model_type="evil")
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with (
        watch().over(folder),
        pytest.raises(ValueError, match=r"model has no tokenizer that can be loaded .*custom code"),
    ):
        load_tokenizer(folder)
    assert not (folder / "ran").exists()


def test_the_caller_may_trust_a_models_code(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    change(
        folder / "config.json", model_type="mine",
        auto_map={"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"},
    )  # fmt: skip
    with pytest.raises(ValueError, match="pass trust_remote_code=True"):
        load_model(folder)
    model = load_model(folder, trust_remote_code=True)
    assert type(model).__name__ == "MyModel"
    assert torch.equal(logits(model), logits(llama(0)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"attn_implementation": "kernels-community/flash-attn"}, "attn_implementation may be eager or sdpa in a file"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation may be"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "weights compressed by 'mxfp4' may bring code"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights is not for a file to say"),
        ({"use_kernels": True}, "use_kernels is not for a file to say"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
    ],
)
def test_a_models_settings_fetch_and_replace_nothing(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    change(folder / "config.json", **settings)
    with watch().over(folder), pytest.raises(ValueError, match=rf"the model .*config\.json: {expected}"):
        load_model(folder)


def test_what_a_file_may_not_say_the_caller_may(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    assert load_model(folder, attn_implementation="eager").config._attn_implementation == "eager"
    change(folder / "config.json", attn_implementation="eager")
    assert load_model(folder).config._attn_implementation == "eager"


def test_an_adapter_beside_a_model_is_not_loaded_along(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))
    with watch().over(folder), pytest.raises(ValueError, match=r"holds adapter_config\.json beside a whole model"):
        load_model(folder)


def test_a_hub_model_is_looked_through_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_model(tmp_path / "snapshots" / "abc123")
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = load_model("someone/weak", revision="v2", token="secret")
    assert torch.equal(logits(model), logits(llama(0)))
    assert model.config._name_or_path == "someone/weak"
    settings = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    assert asked == [
        {"name": "someone/weak", "allow_patterns": settings, "revision": "v2", "token": "secret"},
        {"name": "someone/weak", "allow_patterns": ["model.safetensors"], "revision": "abc123", "token": "secret"},
    ]
    model.save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert torch.equal(logits(load_model("someone/weak")), logits(llama(0)))
    assert len(asked[-1]["allow_patterns"]) > 1
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["lm_head.weight"] = "pytorch_model.bin"
    index.write_text(json.dumps(places))
    with pytest.raises(ValueError, match=r"weights are in 'pytorch_model\.bin', which is no safetensors file"):
        load_model("someone/weak")
    change(folder / "config.json", attn_implementation="evil/kernel")
    index.unlink()
    llama(0).save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"the model someone/weak: .*attn_implementation may be"):
        load_model("someone/weak")


def test_a_model_that_the_hub_does_not_have_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="someone/nothing is neither a folder here nor a model that the hub"):
        load_model("someone/nothing")
    with pytest.raises(ValueError, match=r"someone/nothing has no tokenizer .*: check the name, and the connection"):
        load_tokenizer("someone/nothing")
    with pytest.raises(FileNotFoundError, match="someone/nothing is neither the folder of a saved ensemble nor one"):
        TokenEnsemble.from_pretrained("someone/nothing")


# Damaged weights, wherever they are loaded


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def less_a_tensor(file: Path) -> None:
    save_file({k: v for k, v in load_file(file).items() if "norm" not in k}, file, metadata={"format": "pt"})


def more_a_tensor(file: Path) -> None:
    save_file(load_file(file) | {"stray.weight": torch.zeros(2)}, file, metadata={"format": "pt"})


def reshaped(file: Path) -> None:
    save_file({k: v.T.contiguous() if v.ndim > 1 else v for k, v in load_file(file).items()}, file, {"format": "pt"})


def with_nan(file: Path) -> None:
    weights = load_file(file)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


def pickled(file: Path) -> None:
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    torch.save(weights, file)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncated, r"model\.safetensors is damaged .*Save it again"),
        (pickled, r"model\.safetensors is damaged"),
        (less_a_tensor, r"has no weights for model\.layers\.0.*norm.* .5 tensors.: save it whole"),
        (more_a_tensor, r"has no place for: stray\.weight"),
        (reshaped, "cannot be loaded as a language model .*Save it again"),
        (with_nan, r"model\.norm\.weight holds NaN or infinite weights"),
        (lambda file: (file.parent / "config.json").write_text("{"), r"config\.json is not valid JSON"),
        (lambda file: (file.parent / "config.json").unlink(), r"has no config\.json"),
        (
            lambda file: (file.parent / "generation_config.json").write_text('{"eos_token_id": "x"}'),
            "eos_token_id is 'x'",
        ),
    ],
)
def test_damage_is_named_by_everything_that_loads(damage: Any, expected: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    damage(folder / "model.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=rf"the student.*{expected}"):
        load_trained(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"expert 1.*{expected}"):
        load_saved_model(folder, "expert 1")
    # A model that others made may have tensors that are for something else.
    if damage is more_a_tensor:
        assert torch.equal(logits(load_model(folder)), logits(llama(0)))
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=rf"the model {folder}.*{expected}"):
            load_model(folder)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    (folder / "model.safetensors").chmod(0o600 if os.geteuid() == 0 else 0)
    with (
        as_nobody(folder),
        pytest.raises(PermissionError, match=r"model\.safetensors cannot be read \(Permission denied\)"),
    ):
        load_model(folder)


def test_layers_without_end_cost_nothing(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    with pytest.raises(ValueError, match="must name layers between 0 and 1"):
        load_model(folder, keep_layers="0-99999999999")
