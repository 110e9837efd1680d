"""What vLLM calls when it starts, in each of its processes."""

from __future__ import annotations

from transformers import AutoConfig

from ensemw2s.serving.config import ServedEnsembleConfig


def register() -> None:
    """Tell vLLM and transformers what a saved ensemble is: the entry point `ensemw2s` of `vllm.general_plugins`."""
    from vllm import ModelRegistry

    AutoConfig.register(ServedEnsembleConfig.model_type, ServedEnsembleConfig, exist_ok=True)
    # By name: vLLM looks at the class in a process of its own, before this one has begun to use a device.
    ModelRegistry.register_model("TokenEnsemble", "ensemw2s.serving.model:ServedEnsemble")
