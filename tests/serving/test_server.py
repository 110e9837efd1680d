"""vLLM's OpenAI server with an ensemble: streams, weights while it runs, the key. Needs vLLM: `make serve-check`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.serving import ensembles
from tests.serving.test_engine import check, questions, reference

pytestmark = pytest.mark.serve
KEY = "a-key"


class Server:
    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.address = folder, f"http://127.0.0.1:{port}"

    def ask(self, path: str, body: Any = None, method: str | None = None, key: str | None = KEY) -> tuple[int, Any]:
        """Return the status and the JSON that came, or the text where it is a stream."""
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def complete(self, prompt: list[int], **settings: Any) -> dict[str, Any]:
        body = {"model": str(self.folder), "prompt": prompt, "temperature": 0, "max_tokens": 12, "ignore_eos": True,
                "logprobs": 1, "return_token_ids": True, **settings}  # fmt: skip
        status, answer = self.ask("/v1/completions", body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        return {"tokens": choice["token_ids"], "log_probs": choice["logprobs"]["token_logprobs"]}


def started(folder: Path, place: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "96",
        "--kv-cache-memory-bytes", str(1 << 27), "--max-num-seqs", "8", *options,
    ]  # fmt: skip
    environment = {
        **os.environ, "VLLM_PLUGINS": "ensemw2s", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(place / "cache"),
    }  # fmt: skip
    said = place / "server.log"
    with said.open("w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
        try:
            server = Server(folder, port)
            for _ in range(240):
                assert process.poll() is None, said.read_text()[-6000:]
                try:
                    if server.ask("/health")[0] == 200:
                        break
                except OSError:
                    time.sleep(1)
            yield server
            assert process.poll() is None, said.read_text()[-6000:]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("server")
    yield from started(ensembles.saved("adapters", place), place, "--api-key", KEY)


def test_completions_and_streams(server: Server) -> None:
    ensemble = reference(server.folder)
    for prompt in questions(6, seed=1):
        check(ensemble, prompt, server.complete(prompt))
    prompt = tiny.tokenizer()("abc", add_special_tokens=False)["input_ids"]
    whole = server.complete(prompt)
    body = {"model": str(server.folder), "prompt": prompt, "temperature": 0, "max_tokens": 12, "ignore_eos": True,
            "stream": True}  # fmt: skip
    status, text = server.ask("/v1/completions", body)
    assert status == 200
    pieces = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert len(pieces) >= 6
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == tiny.tokenizer().decode(whole["tokens"])


def test_requests_and_the_server_have_weights(server: Server) -> None:
    ensemble = reference(server.folder)
    (prompt,) = questions(2, seed=2)[:1]
    own = server.complete(prompt, vllm_xargs={"expert_weights": [0.0, 1.0, 0.5]})
    check(ensemble.reweighted([1e-30, 1.0, 0.5]), prompt, own)
    route = "/v1/ensemble/expert_weights"
    assert server.ask(route) == (200, {"expert_weights": [1.0, 2.0, 1.5]})
    status, told = server.ask(route, {"expert_weights": [3.0, 0.25, 1.0]}, "PUT")
    assert (status, told) == (200, {"expert_weights": [3.0, 0.25, 1.0]})
    check(ensemble.reweighted([3.0, 0.25, 1.0]), prompt, server.complete(prompt))
    assert server.ask(route, {"expert_weights": [1.0, 2.0, 1.5]}, "PUT")[0] == 200


def test_bad_weights_and_strangers_are_refused(server: Server) -> None:
    route = "/v1/ensemble/expert_weights"
    for body in ({"expert_weights": [1.0]}, {"expert_weights": [0, 0, 0]}, {"weights": [1, 1, 1]}, [1, 1, 1], 3):
        status, said = server.ask(route, body, "PUT")
        assert (status, "expert_weights" in str(said)) == (400, True), said
    body = {"model": str(server.folder), "prompt": [3, 4], "vllm_xargs": {"expert_weights": [1.0, -1.0, 1.0]}}
    status, said = server.ask("/v1/completions", body)
    assert status == 400 and "expert_weights must be 3 finite numbers" in str(said)
    for key in (None, "another"):
        assert server.ask(route, key=key)[0] == 401
        assert server.ask(route, {"expert_weights": [1, 1, 1]}, "PUT", key=key)[0] == 401
    assert server.ask(route) == (200, {"expert_weights": [1.0, 2.0, 1.5]})


def test_without_a_key_nobody_may_set_weights(tmp_path: Path) -> None:
    for server in started(ensembles.saved("models", tmp_path), tmp_path):
        status, said = server.ask("/v1/ensemble/expert_weights", {"expert_weights": [1, 1, 1]}, "PUT", key=None)
        assert status == 403 and "without --api-key" in str(said)


def test_many_clients_while_weights_change(server: Server) -> None:
    """No answer is lost or mixed up: each request has weights of its own, whatever those of the server are."""
    ensemble, prompts = reference(server.folder), questions(64, seed=9, most=20)
    generator = torch.Generator().manual_seed(10)
    own = [torch.rand(3, generator=generator).add(0.01).tolist() for _ in prompts]
    minutes = float(os.environ.get("SOAK_MINUTES", "0.25"))
    end, rounds = time.monotonic() + 60 * minutes, 0

    def one(number: int) -> dict[str, Any]:
        return server.complete(prompts[number], vllm_xargs={"expert_weights": own[number]}, max_tokens=4 + number % 9)

    with ThreadPoolExecutor(32) as clients:
        expected = list(clients.map(one, range(len(prompts))))
        while rounds == 0 or time.monotonic() < end:
            asked = [clients.submit(one, number) for number in range(len(prompts))]
            weights = torch.rand(3, generator=generator).add(0.01).tolist()
            status, _ = server.ask("/v1/ensemble/expert_weights", {"expert_weights": weights}, "PUT")
            assert status == 200
            again = [future.result() for future in asked]
            assert [output["tokens"] for output in again] == [output["tokens"] for output in expected]
            rounds += 1
    for prompt, weights, output in zip(prompts, own, expected, strict=True):
        check(ensemble.reweighted(weights), prompt, output)
    print(f"{rounds * len(prompts)} requests in {minutes} minutes")
