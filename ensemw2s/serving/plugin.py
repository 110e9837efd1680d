"""What vLLM calls when it starts, in each of its processes."""

from __future__ import annotations

from transformers import AutoConfig

from ensemw2s.serving.config import ServedEnsembleConfig


def register() -> None:
    """Tell vLLM and transformers what a saved ensemble is: the entry point `ensemw2s` of `vllm.general_plugins`."""
    from vllm import ModelRegistry
    from vllm.v1.worker.worker_base import WorkerBase

    from ensemw2s.serving import weights

    AutoConfig.register(ServedEnsembleConfig.model_type, ServedEnsembleConfig, exist_ok=True)
    # By name: vLLM looks at the class in a process of its own, before this one has begun to use a device.
    ModelRegistry.register_model("TokenEnsemble", "ensemw2s.serving.model:ServedEnsemble")
    # What `collective_rpc` calls by name.
    WorkerBase.set_expert_weights = weights.set_expert_weights
    WorkerBase.get_expert_weights = weights.get_expert_weights
