"""An ensemble in EleutherAI's lm-evaluation-harness, on local tasks: its figures against the float64 mixture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ensemw2s import TokenEnsemble
from tests.reference import slow_mixture, slow_mixtures
from tests.tiny import END, random_word, tokenizer

COUNT = 12
CHOICE_TASK = """
task: letters_choice
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{prompt}}:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TEXT_TASK = """
task: letters_text
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}:"
doc_to_target: "{{prompt}}"
generation_kwargs: {until: [e, "7"], max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING_TASK = """
task: letters_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


def documents() -> list[dict[str, Any]]:
    """Random words with four continuations of one to four letters."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 9, (COUNT,), generator=generator).tolist()
    return [
        {
            "prompt": random_word(generator, length),
            "choices": [random_word(generator, 1 + (row + place) % 4) for place in range(4)],
            "label": row % 4,
        }
        for row, length in enumerate(lengths)
    ]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three tasks and their questions."""
    # The JSON reader keeps what it read under the user's home otherwise.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in documents()))
    for name, task in (("choice", CHOICE_TASK), ("text", TEXT_TASK), ("rolling", ROLLING_TASK)):
        (folder / f"{name}.yaml").write_text(task.replace("QUESTIONS", str(questions)))
    return folder


def evaluate(ensemble: TokenEnsemble, tasks: Path, name: str) -> dict[str, Any]:
    model = HFLM(pretrained=ensemble, tokenizer=tokenizer(), batch_size=5, max_length=64)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=[name], task_manager=manager, bootstrap_iters=0)


def encode(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def log_likelihood(ensemble: TokenEnsemble, prompt: list[int], answer: list[int]) -> float:
    log_probs = slow_mixtures(ensemble, prompt + answer)[len(prompt) - 1 : -1]
    return float(log_probs.gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("combine", ["prob", "logprob"])
def test_multiple_choice_equals_our_own_scores(ensemble: TokenEnsemble, tasks: Path, combine: str) -> None:
    ensemble.config.combine = combine
    result = evaluate(ensemble, tasks, "letters_choice")
    right, right_per_letter = 0, 0
    samples = sorted(result["samples"]["letters_choice"], key=lambda sample: sample["doc_id"])
    for row, sample in zip(documents(), samples, strict=True):
        expected = [log_likelihood(ensemble, encode(f"{row['prompt']}:"), encode(f" {c}")) for c in row["choices"]]
        measured = [answer[0] for answer in sample["filtered_resps"]]
        assert measured == pytest.approx(expected, abs=1e-4)
        right += max(range(4), key=expected.__getitem__) == row["label"]
        per_letter = [value / len(choice) for value, choice in zip(expected, row["choices"], strict=True)]
        right_per_letter += max(range(4), key=per_letter.__getitem__) == row["label"]
    assert result["results"]["letters_choice"]["acc,none"] == pytest.approx(right / COUNT)
    assert result["results"]["letters_choice"]["acc_norm,none"] == pytest.approx(right_per_letter / COUNT)


def greedy_text(ensemble: TokenEnsemble, prompt: list[int]) -> str:
    """Twelve greedy tokens or fewer, cut where the task's stop strings or the end token say."""
    ids = list(prompt)
    while len(ids) < len(prompt) + 12 and ids[-1] != END:
        ids.append(int(slow_mixture(ensemble, ids).argmax()))
    text = tokenizer().decode(ids[len(prompt) :], skip_special_tokens=True)
    return text.split("e")[0].split("7")[0]


def test_generated_text_is_the_greedy_text_up_to_a_stop_string(ensemble: TokenEnsemble, tasks: Path) -> None:
    result = evaluate(ensemble, tasks, "letters_text")
    texts = [sample["filtered_resps"][0] for sample in result["samples"]["letters_text"]]
    prompts = [sample["arguments"][0][0] for sample in result["samples"]["letters_text"]]
    assert texts == [greedy_text(ensemble, encode(prompt)) for prompt in prompts]
    # Some run to the end and some are cut.
    assert len({len(text) for text in texts}) > 2


def test_rolling_log_likelihood_is_the_sum_over_all_tokens(ensemble: TokenEnsemble, tasks: Path) -> None:
    result = evaluate(ensemble, tasks, "letters_rolling")
    for sample in result["samples"]["letters_rolling"]:
        expected = log_likelihood(ensemble, [END], encode(sample["doc"]["prompt"]))
        assert sample["filtered_resps"][0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_the_command_line_loads_a_saved_ensemble(of_adapters: TokenEnsemble, tasks: Path, tmp_path: Path) -> None:
    of_adapters.save_pretrained(tmp_path / "saved", processing_class=tokenizer())
    script = "import ensemw2s.ensemble, lm_eval.__main__ as m; m.cli_evaluate()"
    command = [
        sys.executable, "-c", script, "run", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'saved'}",
        "--device", "cpu", "--batch_size", "4", "--include_path", str(tasks), "--tasks", "letters_choice",
        "--output_path", str(tmp_path / "out.json"),
    ]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("out*.json")
    measured = json.loads(file.read_text())["results"]["letters_choice"]
    expected = evaluate(of_adapters, tasks, "letters_choice")["results"]["letters_choice"]
    assert {name: measured[name] for name in ("acc,none", "acc_norm,none")} == {
        name: expected[name] for name in ("acc,none", "acc_norm,none")
    }
