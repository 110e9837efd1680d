"""One engine of vLLM, alone in its process, which it changes: reads a task as JSON, writes what came of it.

A task holds `model`, `engine` (arguments of `vllm.LLM`), `prompts` (token ids), `sampling` (arguments of
`SamplingParams`, one for each prompt), and `calls` (of `collective_rpc`, made before the prompts).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 27, "max_model_len": 96, "seed": 0,
}  # fmt: skip


def answered(llm: Any, prompt: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    try:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(**settings), use_tqdm=False)
    except VLLMValidationError as error:
        return {"error": str(error)}
    return told(output)


def told(output: Any) -> dict[str, Any]:
    (answer,) = output.outputs
    tokens = list(answer.token_ids)
    chosen = [place[token].logprob for place, token in zip(answer.logprobs or [], tokens, strict=False)]
    prompt = [None if place is None else place[token].logprob
              for place, token in zip(output.prompt_logprobs or [], output.prompt_token_ids, strict=False)]  # fmt: skip
    return {"tokens": tokens, "log_probs": chosen, "prompt_log_probs": prompt}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    parallel = task["engine"].get("tensor_parallel_size", 1)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1" if parallel == 2 else "nobind"
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if parallel == 1 else "1")
    from vllm import LLM, SamplingParams

    alone = {"distributed_executor_backend": "uni"} if parallel == 1 else {}
    llm = LLM(model=task["model"], **{**SETTINGS, **alone, **task["engine"]})
    calls = [llm.collective_rpc(name, args=tuple(args)) for name, args in task.get("calls", [])]
    if task.get("one_by_one"):
        each = zip(task["prompts"], task["sampling"], strict=True)
        outputs = [answered(llm, prompt, settings) for prompt, settings in each]
    else:
        prompts = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
        sampling = [SamplingParams(**settings) for settings in task["sampling"]]
        outputs = [told(output) for output in llm.generate(prompts, sampling, use_tqdm=False)]
    Path(sys.argv[2]).write_text(json.dumps({"outputs": outputs, "calls": calls}))


if __name__ == "__main__":
    main()
