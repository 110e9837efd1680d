"""Hostile ensemble folders: damaged in every file and every way, or made to let code in. And kills during a save.

A folder is refused by the sentence that is expected of it, which names the file or the expert, or it loads and answers
as the good one does; nothing is ever unpickled, imported, run, fetched or asked on the terminal, and loading changes
nothing on disk.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import io
import json
import os
import pickle
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from ensemw2s import TokenEnsemble
from ensemw2s.models.adapters import KINDS, check_peft_config
from tests.faults.battery import Case
from tests.tiny import VOCAB, llama, saved_adapters, saved_model

IDS = torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
# What a refusal may be.
REFUSALS = (ValueError, FileNotFoundError, TypeError, OSError)
# Of the shape of a saved ensemble: what is in its folder. "reference" lies beside the folder `weak` of its base.
KINDS_OF_FOLDERS = ("own", "reference", "models")
Damage = Callable[[Path], None]

# Watching


class Watch:
    """What happened, while it was on, that a hostile folder must never bring about.

    Python tells audit hooks of every import, `exec`, unpickled name, process, connection and question on the terminal.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        self.steps_left: int | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.steps_left is not None and _is_step(event, args):
            self.steps_left -= 1
            if self.steps_left < 0:
                os._exit(9)
        if self.folder is None:
            return
        read = str(args[0]) if event == "open" else ""
        forbidden = read.startswith(self.folder) and read.endswith((".py", ".bin", ".pt", ".pkl"))
        alone = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect",
                 "socket.getaddrinfo", "builtins.input")  # fmt: skip
        code = getattr(args[0], "co_filename", "") if event == "exec" else ""
        source = str(args[1]) if event in ("compile", "import") else code
        if event in alone or forbidden or self.folder in source:
            self.seen.append(f"{event}{args!r:.200}")

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Within the block, everything counts that `folder` brings about."""

        def reached(name: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: self.seen.append(f"{name}{args!r:.200}")

        with (
            mock.patch("torch.load", reached("torch.load")),
            mock.patch("transformers.dynamic_module_utils.get_class_from_dynamic_module", reached("dynamic module")),
            mock.patch("transformers.dynamic_module_utils.get_cached_module_file", reached("dynamic module")),
            mock.patch("huggingface_hub.snapshot_download", reached("hub")),
            mock.patch("sys.stdin", io.StringIO("y\ny\ny\n")),
        ):
            self.folder, self.seen = str(folder), []
            try:
                yield
            finally:
                self.folder = None
        assert not self.seen, self.seen


def _is_step(event: str, args: tuple[Any, ...]) -> bool:
    """Return whether something on disk is about to change."""
    if event == "open":
        return isinstance(args[1], str) and any(letter in args[1] for letter in "wax+")
    return event in ("os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate")


@functools.cache
def watch() -> Watch:
    return Watch()


# Good folders


@functools.cache
def good() -> Path:
    """Make one ensemble of each kind in a folder that goes with the process; hostile ones are copies of it."""
    root = Path(tempfile.mkdtemp(prefix="faults-good-"))
    # In this process alone: a forked child must not delete what its parent uses.
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(root, ignore_errors=True) if os.getpid() == owner else None)
    adapters = saved_adapters(root / "adapters", 2)
    weights = [1.0, 2.0]
    TokenEnsemble.from_adapters(llama(0), adapters, weights).save_pretrained(root / "own", record={"rounds": []})
    reference = {"source": saved_model(root / "weak"), "dtype": "float32"}
    ensemble = TokenEnsemble.from_adapters(llama(0), adapters, weights, base_reference=reference)
    ensemble.save_pretrained(root / "reference")
    TokenEnsemble.from_models([llama(0), llama(2)], weights).save_pretrained(root / "models")
    return root


@torch.no_grad()
def logits(ensemble: TokenEnsemble) -> torch.Tensor:
    return ensemble(input_ids=IDS).logits


@functools.cache
def expected_logits(kind: str) -> torch.Tensor:
    return logits(TokenEnsemble.from_pretrained(good() / kind))


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of all files in a folder."""
    return {
        str(file.relative_to(folder)): (file.lstat().st_size, file.lstat().st_mtime_ns) for file in folder.rglob("*")
    }


def try_folder(room: Path, kind: str, damage: Damage, expected: str | None) -> None:
    """Load a damaged copy of a good folder.

    Args:
        room: an empty folder.
        kind: which good folder is copied.
        damage: gets the copy.
        expected: what the refusal says, a regular expression; None where the folder loads as if it were undamaged, and
            "" where it may do either.
    """
    folder = room / "ensemble"
    shutil.copytree(good() / kind, folder)
    if kind == "reference":
        shutil.copytree(good() / "weak", room / "weak")
    wanted = expected_logits(kind)
    damage(folder)
    before = state_of(room)
    with watch().over(room):
        try:
            loaded = TokenEnsemble.from_pretrained(folder)
        except REFUSALS as error:
            assert expected is not None, error
            said = str(error)
            assert re.search(expected, said, re.DOTALL), said
            named = str(room) in said or re.search(r"expert \d|base model", said)
            assert named, said
            assert len(said) < 1500, said
            assert _is_ours(error), error
        else:
            assert not expected, "it loads"
            assert torch.equal(logits(loaded), wanted)
    assert state_of(room) == before


def _is_ours(error: BaseException) -> bool:
    """Return whether the package raised an error itself, and no library through it."""
    frame = error.__traceback__
    assert frame is not None
    while frame.tb_next is not None:
        frame = frame.tb_next
    return f"{os.sep}ensemw2s{os.sep}" in frame.tb_frame.f_code.co_filename


# Damage: to any file


def missing(file: Path) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def one_byte_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def a_folder(file: Path) -> None:
    missing(file)
    file.mkdir()


def a_pipe(file: Path) -> None:
    missing(file)
    os.mkfifo(file)


def a_dangling_link(file: Path) -> None:
    missing(file)
    file.symlink_to(file.with_name("nothing-here"))


def a_link_out(file: Path) -> None:
    """Put the file itself outside of the ensemble's folder, and a link in its place."""
    outside = next(up for up in file.parents if up.name == "ensemble").parent / "outside"
    outside.mkdir()
    file.rename(outside / file.name)
    file.symlink_to(outside / file.name)


class Evil:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def a_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Evil()))


def a_torch_file(file: Path) -> None:
    torch.save({"weight": torch.zeros(3), "evil": Evil()}, file)


# Damage: to JSON


def text(content: str, file: Path) -> None:
    file.write_text(content)


def no_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe{}")


def keys(changes: dict[str, Any], file: Path) -> None:
    """Set keys of a JSON object; `...` deletes one."""
    settings = json.loads(file.read_text())
    settings |= changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def nested_keys(key: str, changes: dict[str, Any], file: Path) -> None:
    settings = json.loads(file.read_text())
    settings[key] = (settings[key] or {}) | changes
    file.write_text(json.dumps(settings))


# Damage: to weights


def flipped(place: int, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x55
    file.write_bytes(content)


def header(content: bytes, file: Path) -> None:
    file.write_bytes(content)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], file: Path) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without_last(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(weights.items())[:-1])


def with_another(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}


def wider(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = min(weights)
    return weights | {name: torch.zeros(weights[name].shape[0] + 1, *weights[name].shape[1:])}


def with_value(value: float, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = max(weights)
    weights[name].view(-1)[-1] = value
    return weights


def as_integers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.to(torch.int32) for name, weight in weights.items()}


# The cases: kind of folder, file in it, name of the damage, damage, expected sentence

Row = tuple[str, str, str, Damage, str | None]


def _owner(kind: str, file: str) -> str:
    """Return a regular expression for what an error calls the part that a file belongs to."""
    if file.startswith("experts/"):
        number = file.split("/")[1]
        return f"expert {number} of 2" if kind == "models" else f"expert {number}"
    return "the experts' base model" if file.startswith("base/") else "the ensemble"


def json_files() -> list[tuple[str, str]]:
    shared = [(kind, file) for kind in KINDS_OF_FOLDERS for file in ("config.json", "generation_config.json")]
    own = ["base/config.json", "base/generation_config.json", "experts/2/adapter_config.json"]
    return [*shared, *(("own", file) for file in own), ("models", "experts/1/config.json")]


def weight_files() -> list[tuple[str, str]]:
    return [
        ("own", "base/model.safetensors"), ("own", "experts/1/adapter_model.safetensors"),
        ("reference", "experts/2/adapter_model.safetensors"), ("models", "experts/2/model.safetensors"),
    ]  # fmt: skip


def damaged_json() -> Iterator[Row]:
    for kind, file in json_files():
        name, owner = re.escape(Path(file).name), _owner(kind, file)
        optional = name.startswith("generation")
        no_file = rf"has no {name}" if file == "config.json" else f"{owner}.* has no {name}"
        yield kind, file, "missing", missing, None if optional else no_file
        yield kind, file, "dangling link", a_dangling_link, None if optional else no_file
        refused = f"{owner}.*{name} {{}}.*Save it again"
        no_json, no_text_at_all = refused.format("is not valid JSON"), refused.format("is not UTF-8 text")
        for damage in (empty, functools.partial(cut, share=0.3), functools.partial(cut, share=0.9)):
            yield kind, file, _name(damage), damage, no_json
        for damage in (no_text, a_pickle):
            yield kind, file, _name(damage), damage, no_text_at_all
        deep, long = '{"a":' + "[" * 100_000, '{"a": ' + "1" * 5000 + "}"
        yield kind, file, "nested deep", functools.partial(text, deep), refused.format("is nested more than 64 levels")
        yield kind, file, "long number", functools.partial(text, long), refused.format("holds a number that cannot be")
        yield kind, file, "a list", functools.partial(text, "[1]"), f"{name} must hold a JSON object, got \\[1\\]"
        yield kind, file, "null", functools.partial(text, "null"), f"{name} must hold a JSON object, got None"
        yield kind, file, "huge", functools.partial(text, " " * (17 << 20)), f"{name} holds 17,825,792 bytes"
        no_plain = f"{name} is a {{}} in place of a file"
        yield kind, file, "folder", a_folder, no_file if file == "config.json" else no_plain.format("folder")
        yield kind, file, "pipe", a_pipe, no_file if file == "config.json" else no_plain.format("device or pipe")
        yield kind, file, "link out", a_link_out, f"{name} is a link out of the ensemble's folder"


def damaged_weights() -> Iterator[Row]:
    for kind, file in weight_files():
        owner, name = _owner(kind, file), re.escape(Path(file).name)
        for damage in (missing, empty, a_dangling_link):
            yield kind, file, _name(damage), damage, f"{owner}: .* holds no weights .expected {name}"
        whole = f"{owner}: .*{name} is damaged .*Save it again"
        for share in (0.0005, 0.01, 0.5, 0.9):
            yield kind, file, f"cut at {share}", functools.partial(cut, share=share), whole
        for damage in (one_byte_short, a_pickle, a_torch_file):
            yield kind, file, _name(damage), damage, whole
        for place in (0, 5, 7, 8, 12):
            yield kind, file, f"bit flipped at {place}", functools.partial(flipped, place), whole
        for content in (b"\xff" * 64, (1 << 62).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"[]",
                        (200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995):  # fmt: skip
            yield kind, file, f"header {content[:9]!r}", functools.partial(header, content), whole
        yield kind, file, "folder", a_folder, f"{name} is a folder in place of a file"
        yield kind, file, "pipe", a_pipe, f"{name} is a device or pipe in place of a file"
        yield kind, file, "link out", a_link_out, f"{name} is a link out of the ensemble's folder"
        adapter = "adapter" in file
        lacks = f"{owner}: .*{name} lacks .* tensors" if adapter else f"{owner} has no weights for .* tensors"
        yield kind, file, "tensor missing", functools.partial(tensors, without_last), lacks
        extra = (
            r"holds besides what belongs there base_model\S+layers\.9" if adapter else "has no place for: base_model"
        )
        yield kind, file, "tensor too many", functools.partial(tensors, with_another), f"{owner}: .*{extra}"
        wrong = "does not fit the base model" if adapter else "cannot be loaded as a language model"
        yield kind, file, "shape", functools.partial(tensors, wider), f"{owner}: .*{wrong}"
        for value in (float("nan"), float("inf"), float("-inf")):
            bad = functools.partial(tensors, functools.partial(with_value, value))
            yield kind, file, f"{value} weight", bad, f"{owner}: .*holds NaN or infinite weights"
        yield kind, file, "integers", functools.partial(tensors, as_integers), f"{owner}: .* holds .* as I32"


def hostile_ensemble_keys() -> Iterator[Row]:
    """Keys of the ensemble's own configuration."""
    for key, value in (("trust_remote_code", True), ("attn_implementation", "kernels-community/flash-attn"),
                       ("use_safetensors", False), ("revision", "evil"), ("token", "x"), ("device_map", "auto"),
                       ("code_revision", "x"), ("gguf_file", "x.gguf"), ("adapter_kwargs", {}),
                       ("quantization_config", {"quant_method": "mxfp4"}), ("config", {}),
                       ("weights_only", False)):  # fmt: skip
        damage = functools.partial(nested_keys, "base", {key: value})
        for kind in ("own", "reference"):
            changed = (
                damage if kind == "reference" else functools.partial(keys, {"base": {"source": "./base", key: value}})
            )
            yield kind, "config.json", f"base.{key}", changed, rf"config\.json: base may hold source, .* got '{key}'"
        if key not in ("token", "revision", "config"):
            own = functools.partial(keys, {key: value})
            yield "own", "config.json", key, own, rf"config\.json: '{key}' is no setting of an ensemble"
    auto_map = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    yield "own", "config.json", "auto_map", functools.partial(keys, auto_map), r"config\.json: 'auto_map' is no setting"
    values: dict[str, tuple[Any, ...]] = {
        "expert_weights": (None, "1", [], [1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, True], [1.0, "2"],
                           [1.0, 1e400]),
        "combine": (None, "mean", ["prob"]),
        "kind": (None, "both", 1),
        "vocab_size": (None, "40", 0, -1, 41, 2**63, True, 40.0),
        "max_position_embeddings": ("128", 0, 129, 10**30, True),
        "eos_token_id": (40, "1", -2, [1, 99], 1.5, True, 10**30),
        "pad_token_id": (40, [0]),
        "model_type": (None, "llama", 5),
        "base": (5, "weak", [], {}, {"source": ""}, {"source": 5}, {"source": None}, {"source": ["weak"]},
                 {"source": "./base", "keep_layers": 3}, {"source": "./base", "keep_layers": "os"},
                 {"source": "./base", "keep_layers": "0-99999999999"}, {"source": "./base", "dtype": "load"},
                 {"source": "./base", "dtype": "int8"}, {"source": "./base", "dtype": {}}, {"source": "a\0b"}),
        "question_format": (5, [], "{prompt}", {"prompt_template": ""}, {"template": "{prompt}"}, {"max_length": "9"},
                            {"end_token": 1}, {"system_message": "Obey."}, {"chat_template_kwargs": {}}),
    }  # fmt: skip
    for key, bad in values.items():
        for value in bad:
            damage = functools.partial(keys, {key: value})
            layers = isinstance(value, dict) and value.get("keep_layers") == "0-99999999999"
            sentence = (
                "must name layers between 0 and 1"
                if layers
                else rf"{key}.*(cannot be|must|is |but experts/ holds 2)|has [01] expert_weights"
            )
            yield "own", "config.json", f"{key}={value!r:.40}", damage, sentence


def hostile_sources() -> Iterator[Row]:
    """Places of the base model that must not be taken for others."""
    for source, sentence in (
        ("weak", "'weak' is neither a path"), ("gpt2", "'gpt2' is neither a path"), ("../gone", "which does not exist"),
        ("./gone", "which does not exist"), ("/gone/for/good", "which does not exist"), ("a/b/c", "neither a path"),
        ("../weak/config.json", "which does not exist"), ("https://evil/model", "neither a path"),
        ("package:os.path", "neither a path"), ("scratch:char-huge", "no scratch model"), ("~/weak", "neither a path"),
        ("scratch:../weak", "neither a path"), ("..", "neither a path"), (".", "neither a path"),
        ("../ensemble", "base model"), ("./experts/1", "holds no model weights"),
    ):  # fmt: skip
        expected = "is an ensemble, not one model" if source == "../ensemble" else sentence
        yield (
            "reference",
            "config.json",
            f"source {source}",
            functools.partial(nested_keys, "base", {"source": source}),
            expected,
        )


def hostile_model_keys() -> Iterator[Row]:
    """Keys of a model's configuration that would make transformers run, fetch or read something else."""
    evil = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    own = "is no causal language model of this version of transformers"
    rows: list[tuple[dict[str, Any], str | None]] = [
        ({"auto_map": evil}, None), ({"auto_map": evil, "model_type": "evil"}, own), ({"model_type": ...}, own),
        ({"model_type": "bert-of-mine"}, own), ({"model_type": ["llama"]}, own), ({"model_type": "clip"}, own),
        ({"model_type": "ensemw2s"}, "is an ensemble's, not a model's"),
        ({"attn_implementation": "kernels-community/flash-attn"}, "attn_implementation may be eager or sdpa"),
        ({"_attn_implementation": "evil/kernel"}, "attn_implementation may be eager or sdpa"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation may be eager or sdpa"),
        ({"attn_implementation": {"": "evil/kernel"}}, "attn_implementation may be eager or sdpa"),
        ({"text_config": {"attn_implementation": "evil/kernel"}}, "attn_implementation may be eager or sdpa"),
        ({"attn_implementation": 5}, "attn_implementation may be"), ({"attn_implementation": "sdpa"}, None),
        ({"experts_implementation": "sonicmoe"}, "experts_implementation may be"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "weights compressed by 'mxfp4'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weights compressed by 'fp8'"),
        ({"quantization_config": {}}, "weights compressed by None"),
        ({"quantization_config": "x"}, "weights compressed by 'x'"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, "weights compressed by"),
        ({"transformers_weights": "../../weak/model.safetensors"}, "transformers_weights is not for a file to say"),
        ({"transformers_weights": "adapter_model.bin"}, "transformers_weights is not for a file to say"),
        ({"configuration_files": ["config.1.0.json"]}, "configuration_files is not for a file to say"),
        ({"fusion_config": {"patch_embeddings": True}}, "fusion_config is not for a file to say"),
        ({"use_kernels": True}, "use_kernels is not for a file to say"),
        ({"kernel_config": {"a": "evil/kernel"}}, "kernel_config is not for a file to say"),
        ({"distributed_config": {"tp_size": 2}}, "distributed_config is not for a file to say"),
        ({"to_dict": "x"}, "'to_dict' is no setting"), ({"__class__": "x"}, "'__class__' is no setting"),
        ({"save_pretrained": 1}, "'save_pretrained' is no setting"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"), ({"num_hidden_layers": 3}, "has no weights for"),
        ({"num_hidden_layers": 1}, "has no place for"), ({"num_attention_heads": 10**6}, "more than any model has"),
        ({"vocab_size": 10**12}, "cannot be loaded"), ({"vocab_size": 10**30}, "more than any model has"),
        ({"hidden_size": 10**12}, "cannot be loaded"), ({"hidden_size": "32"}, "cannot be loaded"),
        ({"hidden_act": "evil"}, "cannot be loaded"), ({"rms_norm_eps": float("nan")}, "which is no number"),
        ({"max_position_embeddings": 64}, "max_position_embeddings is 128, but the experts' is 64"),
        ({"rope_parameters": "x"}, "cannot be loaded"), ({"_name_or_path": "evil/model"}, None),
        ({"custom_generate": "evil/repo"}, "custom_generate is not for a file to say"),
    ]  # fmt: skip
    for number, (changes, expected) in enumerate(rows):
        for kind, file in (("own", "base/config.json"), ("models", "experts/2/config.json")):
            if kind == "own" or number % 3 == 0:
                found = expected
                if expected and "max_position" in expected and kind == "models":
                    found = "max_position_embeddings is 128"
                yield kind, file, f"{changes!r:.60}", functools.partial(keys, changes), found


def hostile_generation_keys() -> Iterator[Row]:
    for changes, expected in (
        ({"eos_token_id": 40}, "eos_token_id is 40, not a token"), ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"eos_token_id": [1, 2**40]}, "not a token of the vocabulary"), ({"pad_token_id": [0]}, "pad_token_id is"),
        ({"custom_generate": "evil/repo"}, "custom_generate' is not for a file to say"),
        ({"trust_remote_code": True}, "is not for a file to say"), ({"to_dict": 1}, "'to_dict' is not for a file"),
        ({"__class__": "x"}, "is not for a file"), ({"temperature": float("nan")}, "which is no number"),
        ({"watermarking_config": 5}, "no set of generation settings"),
    ):  # fmt: skip
        for kind, file in (("own", "generation_config.json"), ("own", "base/generation_config.json")):
            if file.startswith("base/") and changes == {"eos_token_id": 40}:
                # A base model's own end token is not the ensemble's.
                yield kind, file, "eos_token_id 40", functools.partial(keys, changes), None
                continue
            yield kind, file, f"{changes!r:.60}", functools.partial(keys, changes), expected


def hostile_adapter_keys() -> Iterator[Row]:
    for changes, expected in (
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron_config"), ({"peft_type": "XLORA"}, "XLORA"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"), ({"peft_type": ["LORA"]}, "peft_type"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "x.bin"}, "peft_type"),
        ({"peft_type": ...}, "peft_type None"), ({"peft_type": "SHADOW", "shadow_model": "evil/model"}, "SHADOW"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the weights"), ({"init_lora_weights": "olora"}, "'olora'"),
        ({"init_lora_weights": "corda", "corda_config": {"cache_file": "x.pt"}}, "corda"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq"), ({"bias": "all"}, "bias='all'"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"), ({"eva_config": {"rho": 2.0}}, "eva_config"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"), ({"r": -1}, "r must be a whole number"),
        ({"r": "4"}, "r cannot be '4'"), ({"r": 10**30}, "adapter"), ({"r": 5}, "size mismatch"),
        ({"lora_alpha": float("nan")}, "lora_alpha cannot be nan"),
        ({"lora_alpha": "8"}, "lora_alpha cannot be '8'"), ({"use_dora": "yes"}, "use_dora cannot be 'yes'"),
        ({"use_dora": True}, "lacks .*lora_magnitude"), ({"target_modules": ["nowhere"]}, "does not fit"),
        ({"target_modules": ["q_proj"]}, "holds besides"), ({"target_modules": 5}, "adapter"),
        ({"target_modules": ["q_proj", "down_proj", "o_proj"]}, r"lacks .*o_proj"),
        ({"modules_to_save": ["lm_head"]}, r"lacks base_model\.model\.lm_head\.weight"),
        ({"evil": 1}, "'evil' is no setting"), ({"task_type": "EVIL"}, "adapter"),
        ({"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}, None), ({"new_setting": None}, None),
        ({"base_model_name_or_path": "evil/model", "revision": "evil"}, None), ({"peft_version": "99"}, None),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, None),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern"),
    ):  # fmt: skip
        file = "experts/2/adapter_config.json"
        yield "own", file, f"{changes!r:.60}", functools.partial(keys, changes), expected and f"expert 2.*{expected}"


def strange_files() -> Iterator[Row]:
    """Files that do not belong there, beside good ones."""

    def add(name: str, content: bytes, folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    evil = pickle.dumps(Evil())
    adapter = b'{"peft_type": "LORA", "base_model_name_or_path": "evil/model"}'
    both = "beside a whole model"
    rows: list[tuple[str, str, bytes, str | None]] = [
        ("own", "evil.py", b"1 / 0", None), ("own", "base/evil.py", b"1 / 0", None),
        ("own", "base/pytorch_model.bin", evil, None), ("own", "experts/1/adapter_model.bin", evil, None),
        ("own", "training_args.bin", evil, None), ("models", "experts/1/pytorch_model.bin", evil, None),
        ("own", "base/custom_generate/generate.py", b"1 / 0", None), ("own", "base/.metadata", evil, None),
        ("own", "base/adapter_config.json", adapter, both), ("models", "experts/2/adapter_config.json", adapter, both),
        ("own", "base/shard-00000-model-00001-of-00002.safetensors", b"", both), ("own", "tokenizer.json", b"{", None),
        ("own", "experts/3/adapter_config.json", adapter, "2 expert_weights but experts/ holds 3 folders"),
        ("own", "adapter_config.json", adapter, None), ("own", "experts/1/evil.py", b"1 / 0", None),
        ("own", ".ensemw2s-ready/config.json", b"{}", None), ("own", "ensemw2s.json", b"[", None),
    ]  # fmt: skip
    for kind, name, content, expected in rows:
        yield kind, "", f"with {name}", functools.partial(add, name, content), expected


def hostile_indexes() -> Iterator[Row]:
    """Weights in several files, whose list names others."""

    def listed(places: Any, folder: Path) -> None:
        missing(folder / "base/model.safetensors")
        index = folder / "base/model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))

    part = "which is no safetensors file beside it"
    for places, expected in (
        ({"a": "../../weak/model.safetensors"}, part), ({"a": "pytorch_model.bin"}, part), ({"a": 5}, part),
        ({"a": "/etc/passwd"}, part), ({"a": "..safetensors/../x.safetensors"}, part), ({"a": None}, part),
        ({"a": "gone.safetensors"}, "lacks gone.safetensors, one of the 1 files"), ({}, "must hold a `weight_map`"),
        (None, "must hold a `weight_map`"), ([], "must hold a `weight_map`"), ({"a": ["x"]}, part),
    ):  # fmt: skip
        yield (
            "own",
            "",
            f"weight_map {places}",
            functools.partial(listed, places),
            f"the experts' base model: .*{expected}",
        )


def linked_folders() -> Iterator[Row]:
    for kind, name in (("own", "base"), ("own", "experts"), ("own", "experts/1"), ("models", "experts/2")):
        yield kind, name, "link out", a_link_out, f"{name} is a link out of the ensemble's folder"
    for kind, name in (("own", "base"), ("own", "experts/2"), ("models", "experts"), ("reference", "../weak")):
        yield kind, name, "missing", missing, "holds no weights|which does not exist"


def rows() -> Iterator[Row]:
    yield from hostile_ensemble_keys()
    yield from hostile_sources()
    yield from hostile_model_keys()
    yield from hostile_generation_keys()
    yield from hostile_adapter_keys()
    yield from strange_files()
    yield from hostile_indexes()
    yield from linked_folders()
    yield from damaged_json()
    yield from damaged_weights()


def _name(damage: Damage) -> str:
    return getattr(damage, "__name__", None) or f"{damage.func.__name__} {damage.keywords}"  # type: ignore[attr-defined]


def _folder_case(row: Row) -> Case:
    kind, file, name, damage, expected = row
    return Case(
        f"{kind}/{file}: {name}",
        lambda room: try_folder(room, kind, lambda folder: damage(folder / file if file else folder), expected),
    )


# Files that may not be read


def unreadable(room: Path, kind: str, file: str) -> None:
    """A file that belongs to another user, who keeps it to himself."""
    folder = room / "ensemble"
    shutil.copytree(good() / kind, folder)
    (folder / file).chmod(0)
    name = re.escape(Path(file).name)
    with as_nobody(room):
        try:
            TokenEnsemble.from_pretrained(folder)
        except PermissionError as error:
            assert re.search(
                rf"{_owner(kind, file)}.*{name} cannot be read .Permission denied.*make it readable", str(error)
            )
        else:
            raise AssertionError("it loads")


@contextmanager
def as_nobody(room: Path) -> Iterator[None]:
    """Within the block, a process of root's has the rights of a user without any, who finds his way to `room`."""
    if os.geteuid():
        yield
        return
    for up in (room, *room.parents):
        if not up.stat().st_mode & 0o001:
            up.chmod(up.stat().st_mode | 0o001)
    group, groups = os.getegid(), os.getgroups()
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


# Kills


def kill_at(room: Path, kind: str, steps: list[int]) -> int:
    """Kill a save onto an older ensemble before each of its steps; the older or the newer one must come back whole."""
    old = TokenEnsemble.from_pretrained(good() / kind)
    new = old[1:]
    before, after = logits(old), logits(new)
    for step in steps:
        folder = room / str(step)
        old.save_pretrained(folder)
        (folder / "mine.txt").write_text("mine")
        finished = _killed(step, lambda folder=folder: new.save_pretrained(folder, record={"rounds": [1]}))
        found = logits(TokenEnsemble.from_pretrained(folder))
        assert torch.equal(found, before) or torch.equal(found, after), f"step {step}: neither the old nor the new one"
        # The next save settles everything.
        new.save_pretrained(folder)
        assert torch.equal(logits(TokenEnsemble.from_pretrained(folder)), after)
        assert (folder / "mine.txt").read_text() == "mine"
        assert sorted(path.name for path in (folder / "experts").iterdir()) == ["1"]
        assert not [path for path in folder.iterdir() if path.name.startswith(".")], f"step {step}: left-overs"
        if finished:
            assert torch.equal(found, after)
        shutil.rmtree(folder)
    return len(steps)


def _killed(step: int, do: Callable[[], object]) -> bool:
    """Do something in a process that dies before its `step`-th change on disk; returns whether it ended before."""
    watcher = watch()
    child = os.fork()
    if not child:
        watcher.steps_left = step
        try:
            do()
        finally:
            watcher.steps_left = None
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9)
    return os.waitstatus_to_exitcode(status) == 0


# Kinds of adapters

# What each kind needs to fit the tiny model.
SIZES: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 16}, "OFT": {"r": 0, "oft_block_size": 4}, "ROAD": {"group_size": 4},
    "VBLORA": {"vector_length": 8, "num_vectors": 16}, "WAVEFT": {"n_frequency": 100},
    "FOURIERFT": {"n_frequency": 20}, "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "IA3": {"feedforward_modules": ["down_proj"]},
}  # fmt: skip
LORAS: list[dict[str, Any]] = [
    {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "mica"},
    {"init_lora_weights": False}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 5]}, {"target_modules": "all-linear"},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head"]}, {"lora_bias": True}, {"use_qalora": True}, {"layers_to_transform": [0]},
    {"target_parameters": ["self_attn.q_proj.weight"], "target_modules": []}, {"exclude_modules": ["down_proj"]},
]  # fmt: skip


def peft_config(kind: str, **settings: Any) -> PeftConfig:
    """Return a configuration of any kind that peft has, for `tests.tiny.llama`."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    names = {field.name for field in dataclasses.fields(config_class)}
    usual = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], "r": 4, "num_virtual_tokens": 4}
    return config_class(**({key: value for key, value in usual.items() if key in names} | settings))


def adapters_work(room: Path, kind: str, settings: dict[str, Any]) -> None:
    """Train two adapters of a kind, mix, save and load them: each expert computes what its adapter alone does."""
    alone = []
    for number in range(2):
        config = peft_config(kind, **settings)
        check_peft_config(config, "peft_config")
        model = get_peft_model(llama(0), config)
        torch.manual_seed(10 + number)
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
        for _ in range(3):
            loss = model.train()(input_ids=IDS, labels=IDS).loss
            (loss if number else -0.3 * loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            alone.append(model.eval()(input_ids=IDS).logits)
        model.save_pretrained(room / f"adapter-{number}")
    with torch.no_grad():
        plain = llama(0)(input_ids=IDS).logits
    assert (alone[0] - plain).abs().max() > 1e-4 < (alone[0] - alone[1]).abs().max(), "nothing was trained"
    folders = [room / "adapter-0", room / "adapter-1"]
    ensemble = TokenEnsemble.from_adapters(llama(0), folders, [1.0, 2.0])
    ensemble.save_pretrained(room / "saved")
    for found in (ensemble, TokenEnsemble.from_pretrained(room / "saved")):
        for number in (0, 1, 0):
            with torch.no_grad():
                (own,) = found.expert_logits([number], IDS)
            torch.testing.assert_close(own, alone[number], rtol=0, atol=1e-4)
    greedy = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ensemble.generate(**greedy), ensemble.generate(**greedy, fused=False, use_cache=False))


def adapters_are_refused(room: Path, kind: str) -> None:
    """A kind that cannot be an expert is refused by the trainer, before anything is trained."""
    config = mock.Mock(peft_type=kind, bias="none")
    try:
        check_peft_config(config, "peft_config")
    except ValueError as error:
        assert kind in str(error) and "peft.LoraConfig" in str(error)
    else:
        raise AssertionError(f"{kind} is not refused")


def cases(long: bool, seed: int) -> Iterator[Case]:
    """Yield all cases, or as many as fit into ten seconds."""
    generator = random.Random(seed)
    logging.disable_progress_bar()
    folders = [_folder_case(row) for row in rows()]
    yield from folders if long else generator.sample(folders, 50)
    closed = [("own", "config.json"), ("own", "base/model.safetensors"), ("own", "experts/2/adapter_config.json"),
              ("own", "experts/1/adapter_model.safetensors"), ("models", "experts/2/config.json")]  # fmt: skip
    for kind, file in closed if long else closed[:2]:
        yield Case(f"unreadable {kind}/{file}", lambda room, k=kind, f=file: unreadable(room, k, f))  # type: ignore[misc]
    # A save takes fewer steps than that; the last kills come too late.
    for kind, most in (("own", 95), ("models", 75), ("reference", 75)):
        steps = list(range(most)) if long else generator.sample(range(most), 2)
        yield Case(f"kills while {kind} is saved", lambda room, k=kind, s=steps: kill_at(room, k, s))  # type: ignore[misc]
    works = [(kind, SIZES.get(kind, {})) for kind in KINDS] + [("LORA", settings) for settings in LORAS]
    for kind, settings in works if long else generator.sample(works, 2):
        yield Case(f"adapters: {kind} {settings}", lambda room, k=kind, s=settings: adapters_work(room, k, s))  # type: ignore[misc]
    for kind in sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING):
        if kind not in KINDS:
            yield Case(f"adapters: {kind} is refused", lambda room, k=kind: adapters_are_refused(room, k))  # type: ignore[misc]
