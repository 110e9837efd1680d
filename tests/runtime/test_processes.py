"""Two processes on one machine (gloo): the same results as one, one writer, no hanging, kill and continue."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from datasets import Dataset
from safetensors.numpy import load_file
from transformers import TrainerCallback

from ensemw2s import BoostingConfig, TokenEnsemble
from ensemw2s.boosting import algorithm
from ensemw2s.cli import main
from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.experiments.config import build_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.inference.decoding import Sampling
from ensemw2s.inference.label_files import read_labels
from ensemw2s.inference.scoring import score_mixtures
from ensemw2s.runtime import processes
from ensemw2s.runtime.files import map_array, read_array, read_complete_lines, read_json
from ensemw2s.training.arguments import AnswerTrainingArguments
from ensemw2s.training.fine_tune import fine_tune
from ensemw2s.training.trainer import AnswerTrainer
from tests.experiments.test_experiment import settings
from tests.tiny import END, FORMAT, llama, questions, saved_adapters, tokenizer

# Longer than any of these takes on a busy machine, shorter than a group that hangs.
LIMIT = 150


ROOT = Path(__file__).parents[2]
TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2")
# Without `--multi_gpu` (which does not ask for a GPU), accelerate starts several processes on GPUs alone.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")


def launch(*words: object, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes, in the repository's root."""
    return subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, words)],
        capture_output=True, text=True, check=False, timeout=LIMIT, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


# What both processes run, and this one beside them: each function returns arrays that must not differ.

TRAIN_SIZES = (16, 18, 21, 3)
SAMPLING = Sampling(temperature=0.8, top_p=0.9)


def tokenized(count: int) -> Dataset:
    return tokenize_questions(questions(count), tokenizer(), FORMAT)


def ensemble(adapters: Path) -> TokenEnsemble:
    return TokenEnsemble.from_adapters(llama(0), sorted(adapters.iterdir()), [1.0, 0.7, 0.4])


def scores(adapters: Path, count: int = 45) -> dict[str, np.ndarray]:
    """Scores of two mixtures; 45 answers in batches of 4 leave one process a batch more, and the last one short."""
    mixtures = {"all": [1.0, 0.5, 0.2], "second": [0.0, 1.0, 0.0]}
    found = score_mixtures(ensemble(adapters), tokenized(count), mixtures, pad_token_id=END, batch_size=4)
    return {
        f"{name}.{field}": getattr(values, field)
        for name, values in found.items()
        for field in ("lengths", "token_wrong", "token_log_probs")
    }


def labels(adapters: Path, file: Path) -> list[dict[str, Any]]:
    options = {"max_new_tokens": 5, "batch_size": 4, "sampling": SAMPLING, "output_file": file, "description": None}
    return ensemble(adapters).label(questions(30), tokenizer(), question_format=FORMAT, **options).to_list()


class Gradients(TrainerCallback):
    """Keeps every step's gradient, as the optimiser gets it."""

    steps: ClassVar[list[np.ndarray]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.steps.append(np.concatenate([p.grad.flatten().numpy() for p in model.parameters()]))


class Losses(TrainerCallback):
    """Keeps every step's loss."""

    steps: ClassVar[list[float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.steps += [logs["loss"]] if "loss" in logs else []


class WatchedTrainer(AnswerTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(Gradients())
        self.add_callback(Losses())


def gradients(size: int, per_process: int, folder: Path, steps: int = 1) -> np.ndarray:
    """Return the gradient of each step of one epoch (float32 [steps, parameters]) over `size` weighted answers."""
    Gradients.steps.clear()
    examples = tokenized(size)
    generator = np.random.default_rng(size)
    weights = [
        generator.exponential(size=len(row["input_ids"]) - row["prompt_length"]).astype(np.float32) for row in examples
    ]
    args = AnswerTrainingArguments(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=per_process, learning_rate=0.0,
        gradient_accumulation_steps=steps, max_grad_norm=1e9, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    fine_tune(
        llama(0), examples, args, pad_token_id=END, seed=3, description="x", token_weights=weights,
        trainer_class=WatchedTrainer,
    )  # fmt: skip
    return np.stack(Gradients.steps)


def losses(per_process: int, folder: Path) -> np.ndarray:
    """Return the losses of 50 steps with Adam."""
    Losses.steps.clear()
    args = AnswerTrainingArguments(
        output_dir=str(folder), max_steps=50, per_device_train_batch_size=per_process, learning_rate=1e-3,
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    fine_tune(llama(0), tokenized(30), args, pad_token_id=END, seed=3, description="x", trainer_class=WatchedTrainer)
    return np.array(Losses.steps)


def refusal(function: Any) -> str:
    try:
        processes.on_main(function)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def worker(folder: Path) -> int:
    """What each of the two processes does; its findings go to a file of its own. Ends with a whole experiment."""
    processes.start()
    found: dict[str, Any] = scores(folder / "adapters")
    # More processes than batches: one has nothing to score.
    found |= {f"few.{name}": value for name, value in scores(folder / "adapters", 3).items()}
    for size in TRAIN_SIZES:
        found[f"gradients.{size}"] = gradients(size, 4, folder)
    found["gradients.accumulated"] = gradients(21, 2, folder, steps=2)
    found["losses"] = losses(4, folder)
    rows = labels(folder / "adapters", folder / "labels.jsonl")
    found["num_processes"] = processes.count()
    found["threads"] = processes.fair_threads()
    found["main"] = np.array(processes.gather(processes.is_main()))
    found["result"] = processes.on_main(os.getpid)
    found["refusal"] = refusal(lambda: BoostingConfig(output_dir="x", num_rounds=0))
    np.savez(folder / f"found-{processes.index()}.npz", **found)
    (folder / f"rows-{processes.index()}.json").write_text(json.dumps(rows))
    return main(["run", str(folder / "two.yaml")])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have run `worker`."""
    folder = tmp_path_factory.mktemp("pair")
    values = settings(folder, name="two", threads=1)
    for phase in ("boosting", "student"):
        # Half the batch of one process; fewer steps than the experiment's own tests take.
        values[phase] = values[phase] | {"num_train_epochs": 3, "per_device_train_batch_size": 4}
    (folder / "two.yaml").write_text(yaml.safe_dump(values))
    saved_adapters(folder / "adapters")
    # As if one of three processes had been killed with three answers in its file, one of them cut off.
    labels(folder / "adapters", folder / "whole.jsonl")
    lines = (folder / "whole.jsonl").read_text().splitlines(keepends=True)
    (folder / "labels.jsonl").write_text(lines[0])
    (folder / "labels.jsonl.process-2").write_text("".join(lines[5:8]) + lines[9][:17])
    run = launch("-m", "tests.runtime.test_processes", folder, launcher=ACCELERATE)
    assert run.returncode == 0, run.stderr
    (folder / "said.txt").write_text(run.stdout)
    return folder


def found(pair: Path, process: int) -> dict[str, np.ndarray]:
    return dict(np.load(pair / f"found-{process}.npz"))


@pytest.mark.parametrize("process", [0, 1])
def test_scores_have_the_bits_of_one_process(pair: Path, process: int) -> None:
    there = found(pair, process)
    here = scores(pair / "adapters") | {f"few.{k}": v for k, v in scores(pair / "adapters", 3).items()}
    assert here["all.token_wrong"].any() and not here["all.token_wrong"].all()
    for name, value in here.items():
        np.testing.assert_array_equal(there[name], value, err_msg=name)
        assert there[name].dtype == value.dtype


@pytest.mark.parametrize("size", TRAIN_SIZES)
def test_the_gradient_of_each_step_is_that_of_one_process(pair: Path, tmp_path: Path, size: int) -> None:
    # 18 and 21 rows leave a last step in which one process, or both, run out of rows; 3 rows are less than one step.
    here = gradients(size, 8, tmp_path)
    assert len(here) == -(-size // 8)
    for process in (0, 1):
        there = found(pair, process)[f"gradients.{size}"]
        np.testing.assert_allclose(there, here, atol=1e-5 * np.abs(here).max())


def test_the_gradient_of_an_accumulated_step_is_that_of_one_process(pair: Path, tmp_path: Path) -> None:
    here = gradients(21, 4, tmp_path, steps=2)
    np.testing.assert_allclose(found(pair, 1)["gradients.accumulated"], here, atol=1e-5 * np.abs(here).max())


def test_the_losses_of_fifty_steps_are_those_of_one_process(pair: Path, tmp_path: Path) -> None:
    here = losses(8, tmp_path)
    assert len(here) == 50 and here[-5:].mean() < 0.7 * here[:5].mean()
    for process in (0, 1):
        np.testing.assert_allclose(found(pair, process)["losses"], here, rtol=1e-4)


def test_labels_are_those_of_one_process_and_end_in_one_file(pair: Path) -> None:
    whole = [{**row, "answer_ids": row["answer_ids"].tolist()} for row in read_labels(pair / "whole.jsonl")]
    assert len({row["answer"] for row in whole}) > 10
    assert (pair / "labels.jsonl").read_bytes() == (pair / "whole.jsonl").read_bytes()
    for process in (0, 1):
        rows = json.loads((pair / f"rows-{process}.json").read_text())
        assert {row["id"]: row for row in rows} == {row["id"]: row for row in whole}
        assert [row["id"] for row in rows] == questions(30)["id"]
    assert not list(pair.glob("labels.jsonl.process-*"))


def test_the_main_process_acts_for_all(pair: Path) -> None:
    first, second = found(pair, 0), found(pair, 1)
    assert first["num_processes"] == second["num_processes"] == 2
    assert first["main"].tolist() == second["main"].tolist() == [True, False]
    assert first["result"] == second["result"]
    assert first["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    told = "ValueError: num_rounds must be from 1 to 10000, got 0"
    assert str(first["refusal"]) == told
    assert str(second["refusal"]) == f"MainProcessError: the main process failed: {told}"


def test_one_process_needs_nobody() -> None:
    assert processes.count() == 1 and processes.is_main()
    assert processes.gather(3) == [3] and processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.fair_threads() is None
    with pytest.raises(KeyError):
        processes.on_main({}.__getitem__, "missing")
    processes.end()


# Whole runs


@pytest.fixture(scope="module")
def runs(pair: Path) -> tuple[Path, Path]:
    """The run's folders of one experiment, by one process here and by the two with half the batch each."""
    values = yaml.safe_load((pair / "two.yaml").read_text()) | {"name": "one"}
    for phase in ("boosting", "student"):
        values[phase]["per_device_train_batch_size"] = 8
    Experiment(build_config(values)).run()
    return pair / "run/one", pair / "run/two"


def test_two_processes_say_everything_once(pair: Path) -> None:
    lines = (pair / "said.txt").read_text().splitlines()
    for words in ("questions: train 24", "ensemble: round 1/2:", "report: ", "results: "):
        assert sum(line.strip().startswith(words) for line in lines) == 1, (words, lines)


def test_two_processes_with_half_the_batch_each_end_like_one(runs: tuple[Path, Path]) -> None:
    one, two = runs
    assert read_json(two / "boosting/rounds/1/attempt-1/record.json")["num_processes"] == 2
    # The model before training is the same: its errors are the same, bit by bit.
    prior = "boosting/pretrained_scores/token_wrong.npy"
    np.testing.assert_array_equal(read_array(two / prior), read_array(one / prior))
    tokens = wrong = 0
    for number in (1, 2):
        name = f"boosting/rounds/{number}/attempt-1/training_scores/token_wrong.npy"
        tokens += read_array(one / name).size
        wrong += int((read_array(one / name) != read_array(two / name)).sum())
    assert wrong <= tokens / 1000
    for name in ("boosting/rounds/2/attempt-1/expert", "boosting/rounds/1/attempt-1/expert", "students/ceiling"):
        ours, theirs = (load_file(run / name / "adapter_model.safetensors") for run in (one, two))
        for key, value in ours.items():
            np.testing.assert_allclose(theirs[key], value, atol=1e-3 * np.abs(value).max(), err_msg=f"{name} {key}")
    names = {f"{teacher}.jsonl{end}" for teacher in ("single_expert", "ensemble") for end in ("", ".run.json")}
    assert {path.name for path in (two / "labels").iterdir() if path.suffix != ".lock"} == names
    rows = [{(r["kind"], r.get("arm"), r.get("split")) for r in read_complete_lines(run / "results.jsonl")}
            for run in (one, two)]  # fmt: skip
    assert rows[0] == rows[1]


def test_the_same_errors_give_the_same_weights(pair: Path) -> None:
    """Weights, expert weights and draws follow from the errors alone, whoever computed those."""
    folder = pair / "run/two/boosting"
    weights, units = read_array(folder / "rounds/1/weights.npy"), read_array(folder / "units.npy")
    for number in (1, 2):
        record = read_json(folder / f"rounds/{number}/attempt-1/record.json")
        log_probs = read_array(folder / f"rounds/{number}/attempt-1/training_scores/token_log_probs.npy")
        losses = algorithm.unit_losses(np.clip(-np.expm1(log_probs), 0.0, 1.0), units)
        error, _ = algorithm.clamp_error(algorithm.weighted_error(weights, losses), weights.size)
        assert record["error"] == error
        assert record["expert_weight"] == algorithm.expert_weight(error, record["prior_error"])
        step = algorithm.tempered_shrinkage(weights, losses, record["expert_weight"], 0.7)
        assert record["shrinkage"] == step
        weights = algorithm.update_weights(weights, losses, record["expert_weight"], step)
        np.testing.assert_array_equal(map_array(folder / f"rounds/{number + 1}/weights.npy"), weights)


# Killed

KILLED = """
import os, signal, sys
from ensemw2s.cli import main
from ensemw2s.boosting.trainer import BoostingTrainer

# The second process dies while the first is on its way to the weights of round 2.
losses = BoostingTrainer._losses

def mortal(self, *args):
    if self.args.num_rounds == 2 and (self.folder / "rounds/1/attempt-1/expert").exists() and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return losses(self, *args)

BoostingTrainer._losses = mortal
raise SystemExit(main(["boost", sys.argv[1]]))
"""


def test_a_killed_process_ends_the_run_and_another_number_goes_on(tmp_path: Path) -> None:
    values = settings(tmp_path, threads=1)
    values["boosting"] = values["boosting"] | {"num_train_epochs": 3, "per_device_train_batch_size": 4}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    (tmp_path / "killed.py").write_text(KILLED)
    start = time.monotonic()
    run = launch(tmp_path / "killed.py", config)
    assert run.returncode != 0
    assert time.monotonic() - start < LIMIT / 2
    assert "exitcode: -9" in run.stderr
    assert f"go on with the same command:\n  ensemw2s boost {config}" in run.stderr or "is kept: run the" in run.stderr
    folder = tmp_path / "run/small"
    expert = folder / "boosting/rounds/1/attempt-1/expert/adapter_model.safetensors"
    before = expert.stat().st_mtime_ns
    assert not (folder / "boosting/rounds/2").exists() and not (folder / "ensemble").exists()
    # One process takes half as many rows a step as the two did: the expert to come differs, what is finished stays.
    assert main(["boost", str(config)]) == 0
    assert TokenEnsemble.from_pretrained(folder / "ensemble").num_experts == 2
    assert expert.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:29500", True),
        ("Timed out waiting 1800000ms for recv operation to complete", True),
        ("weights must sum to 1", False),
    ],
)
def test_a_lost_process_is_told_from_other_errors(monkeypatch: pytest.MonkeyPatch, message: str, lost: bool) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert processes.is_lost_contact(RuntimeError(message)) == lost
    monkeypatch.setattr(processes, "count", lambda: 1)
    assert not processes.is_lost_contact(RuntimeError(message))


if __name__ == "__main__":
    # As in `tests.conftest`.
    gc.freeze()
    raise SystemExit(worker(Path(sys.argv[1])))
