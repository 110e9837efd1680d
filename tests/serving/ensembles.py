"""Tiny saved ensembles of every kind that can be served; vLLM's attention wants heads of 32 numbers at least."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from ensemw2s import TokenEnsemble, load_model
from tests import tiny

# With larger weights, float32 itself is further than 1e-4 from float64.
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
    "initializer_range": 0.3,
}  # fmt: skip
KINDS = ("models", "mixed", "adapters", "thinned")


def qwen(seed: int) -> Qwen2ForCausalLM:
    """Another architecture, size and number of layers over the same vocabulary, and a shorter context."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=tiny.VOCAB, hidden_size=128, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.15, bos_token_id=None,
        eos_token_id=tiny.END, pad_token_id=tiny.PAD,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def adapters(base: Path, folder: Path) -> list[Path]:
    """Three adapters of different ranks, on different layers, of which one rank-stabilised."""
    targets = ("all-linear", ["q_proj", "v_proj", "down_proj"], ["k_proj", "gate_proj", "o_proj"])
    paths = [folder / f"adapter-{t}" for t in range(len(targets))]
    for t, (path, target) in enumerate(zip(paths, targets, strict=True)):
        config = LoraConfig(task_type="CAUSAL_LM", r=4 + 4 * (t == 1), target_modules=target, use_rslora=t == 2)
        model = get_peft_model(load_model(base), config)
        torch.manual_seed(40 + t)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.2)
        model.save_pretrained(path)
    return paths


def saved(kind: str, folder: Path) -> Path:
    """Write the ensemble of that kind, and return where it lies."""
    place = folder / kind
    if kind == "models":
        models = [tiny.llama(seed, **SHAPE) for seed in (0, 1, 0)]
        ensemble = TokenEnsemble.from_models(models, [1.0, 2.0, 0.5])
    elif kind == "mixed":
        ensemble = TokenEnsemble.from_models([tiny.llama(0, **SHAPE), qwen(1)], [1.0, 2.0], combine="logprob")
    else:
        layers = {"num_hidden_layers": 3, "tie_word_embeddings": kind == "adapters"}
        base = tiny.saved_model(folder / f"{kind}-base", 5, **SHAPE, **layers)
        reference = {"source": str(base)}
        model = load_model(base)
        if kind == "thinned":
            reference["keep_layers"] = "0,2"
            model = load_model(base, keep_layers="0,2")
            model.save_pretrained(folder / "thin-base")
            tiny.tokenizer().save_pretrained(folder / "thin-base")
        trained_on = base if kind == "adapters" else folder / "thin-base"
        folders = adapters(trained_on, folder / f"{kind}-adapters")
        ensemble = TokenEnsemble.from_adapters(model, folders, [1.0, 2.0, 1.5], base_reference=reference)
    ensemble.save_pretrained(place, processing_class=tiny.tokenizer())
    return place
