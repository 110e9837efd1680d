"""`ensemw2s init`: a configuration for one's own questions and models, which runs."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from ensemw2s.cli import main
from ensemw2s.experiments.config import load_config
from ensemw2s.experiments.experiment import Experiment
from tests.tiny import questions, saved_model


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """What `init` needs, on the command line."""
    questions(60).to_json(tmp_path / "easy.jsonl")
    questions(60, seed=8, start=60).to_json(tmp_path / "hard.jsonl")
    for seed, name in enumerate(("weak", "strong")):
        saved_model(tmp_path / name, seed=seed)
    models = [f"--weak={tmp_path / 'weak'}", f"--strong={tmp_path / 'strong'}"]
    return ["init", str(tmp_path / "mine.yaml"), f"--questions={tmp_path / 'easy.jsonl'}", *models]


def exit_status(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)


def test_what_it_writes_runs(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, f"--hard={tmp_path / 'hard.jsonl'}"]) == 0
    assert f"ensemw2s run {tmp_path / 'mine.yaml'}" in capsys.readouterr().out
    fast = ["boosting.num_rounds=1", "boosting.num_train_epochs=1", "student.num_train_epochs=1"]
    fast.append("student.keep_unfinished=true")
    assert main(["run", words[1], f"output_dir={tmp_path / 'run'}", "lora.r=2", *fast]) == 0
    assert (tmp_path / "run" / "mine" / "report.html").exists()
    # Two letters, the space in front of them and the end, one token each, and room for a longer answer.
    assert load_config(words[1]).labelling.max_new_tokens == 5
    quick = load_config(words[1], quick=True)
    assert quick.name == "mine_quick" and quick.boosting["max_steps"] == quick.student["max_steps"] == 20


def test_one_file_is_split_by_difficulty_and_rated_where_it_says_nothing_of_it(
    tmp_path: Path, words: list[str]
) -> None:
    assert main(words) == 0
    assert load_config(words[1]).data.difficulty.folds == 5
    known = questions(60)
    known.add_column("difficulty", [float(i) for i in range(60)]).to_json(tmp_path / "easy.jsonl")
    words[1] = str(tmp_path / "other.yaml")
    assert main(words) == 0
    config = load_config(words[1])
    assert config.data.difficulty.folds is None
    assert sum(config.data.sizes.values()) <= 60


@pytest.mark.parametrize(
    ("grades", "shares"),
    [
        # A third each: no cut is within a tenth of a half.
        ([1, 2, 3] * 40, (0.33, 0.67)),
        ([1] * 75 + [2] * 25, (0.75, 0.25)),
        ([1] * 30 + [2] * 90 + [3] * 3 + [4] * 37, (0.75, 0.25)),
        (["1", "2", "4", "5"] * 30, (0.5, 0.5)),
        ([x / 50 for x in range(100)], (0.5, 0.5)),
        # Ties on both sides of a few values that lie close together.
        ([0.0] * 900 + [x + 1.0 for x in range(9)] + [50.0] * 91, (0.9, 0.1)),
    ],
)
def test_a_scale_of_few_values_is_cut_where_it_can_be(
    tmp_path: Path, words: list[str], grades: list[Any], shares: tuple[float, float]
) -> None:
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1), "difficulty": grade} for i, grade in enumerate(grades)]
    Dataset.from_list(rows).to_json(tmp_path / "easy.jsonl")
    assert main(words) == 0
    config = load_config(words[1])
    assert (config.data.difficulty.easy, config.data.difficulty.hard) == shares
    experiment = Experiment(dataclasses.replace(config, output_dir=str(tmp_path / "run")))
    sizes = {record["split"]: record["n"] for record in experiment.run(("data",)) if record["kind"] == "questions"}
    assert sizes == config.data.sizes
    # Nearly all of them are used.
    assert sum(sizes.values()) >= len(grades) - 5


def test_it_asks_for_what_is_missing(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(f"{tmp_path / 'weak'}\nscratch:char-strong\n"))
    assert main(words[:3]) == 0
    config = load_config(words[1])
    assert (config.weak.source, config.strong.source) == (str(tmp_path / "weak"), "scratch:char-strong")


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (["scratch:char-weak", "scratch:char-strong"], ("{prompt}=", "", 4)),
        ([None, "scratch:char-strong"], ("{prompt}=", "", 4)),
        ([None, None], ("{prompt}\nAnswer:", " ", 5)),
    ],
)
def test_models_of_characters_are_asked_as_they_were_made(
    words: list[str], models: list[str | None], expected: tuple[str, str, int]
) -> None:
    for place, (option, model) in enumerate(zip(("--weak", "--strong"), models, strict=True), start=3):
        words[place] = words[place] if model is None else f"{option}={model}"
    assert main(words) == 0
    config = load_config(words[1])
    asked = config.data.format
    assert (asked.prompt_template, asked.answer_prefix, config.labelling.max_new_tokens) == expected


def test_a_name_is_text_whatever_is_in_it(tmp_path: Path, words: list[str]) -> None:
    odd = tmp_path / 'it\'s: "odd" #1 ü.jsonl'
    questions(60).to_json(odd)
    words[2] = f"--questions={odd}"
    assert main(words) == 0
    config = load_config(words[1])
    assert config.data.questions == {"file": str(odd)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({3: ""}, "init needs the experts' model"),
        ({2: "--questions=gone.jsonl"}, "gone.jsonl does not exist: name a file of questions"),
        ({2: "--questions={folder}/few.jsonl"}, "few.jsonl leaves 4 easy questions, expected at least 20"),
        (
            {2: "--questions={folder}/alike.jsonl"},
            "Without a column `difficulty` the questions are rated by weak models",
        ),
        ({2: "--questions={folder}/rare.jsonl"}, "rare.jsonl leaves 3 hard questions, expected at least 20"),
        ({5: "--hard={folder}/few.jsonl"}, "few.jsonl leaves 10 hard questions, expected at least 20"),
        ({1: "{folder}/easy.jsonl"}, "easy.jsonl is there already and stays as it is"),
        ({3: "--weak=./wek"}, "./wek does not exist: give a model folder"),
        ({4: "--strong=wek"}, "wek is neither a folder nor a model that can be found on the hub"),
        ({5: "--columns=question"}, "'question' is not of the form prompt=question,answer=solution"),
        (
            {5: "--columns=question=prompt"},
            'our names come first, {"prompt": "question"} (prompt=question in --columns)',
        ),
        ({5: "--columns=prompt=question,answer=text"}, "easy.jsonl has no column 'question' (for prompt)"),
    ],
)
def test_what_it_cannot_work_with_is_named(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str], change: dict[int, str], said: str
) -> None:
    Dataset.from_list(questions(10, seed=9, start=900).to_list()).to_json(tmp_path / "few.jsonl")
    for name, grades in {"alike": [1] * 80, "rare": [1] * 77 + [2] * 3}.items():
        questions(80).add_column("difficulty", grades).to_json(tmp_path / f"{name}.jsonl")
    given = dict(enumerate(words)) | {place: word.format(folder=tmp_path) for place, word in change.items()}
    assert exit_status([word for word in given.values() if word]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "mine.yaml").exists()


def test_columns_of_other_names(tmp_path: Path, words: list[str]) -> None:
    for name, start in (("easy", 0), ("hard", 60)):
        asked = questions(60, seed=start, start=start).rename_columns({"prompt": "question", "answer": "the: answer"})
        asked.to_json(tmp_path / f"{name}.jsonl")
    assert main([*words, f"--hard={tmp_path / 'hard.jsonl'}", "--columns=prompt=question,answer=the: answer"]) == 0
    data = load_config(words[1]).data
    columns = {"prompt": "question", "answer": "the: answer"}
    assert [data.easy, data.hard] == [
        {"file": str(tmp_path / f"{name}.jsonl"), "columns": columns} for name in ("easy", "hard")
    ]


def test_run_without_a_configuration_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 2
    assert "`ensemw2s init` writes one" in capsys.readouterr().err
