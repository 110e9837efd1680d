"""The configuration file: overrides, the quick section, and every misspelling named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemw2s.experiments.config import STUDENTS, build_config, load_config
from ensemw2s.experiments.study import load_study
from ensemw2s.models.loading import load_model
from tests.experiments.test_experiment import settings


def write(folder: Path, values: Any, name: str = "config.yaml") -> Path:
    (folder / name).write_text(yaml.safe_dump(values) if name.endswith("yaml") else json.dumps(values))
    return folder / name


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_yaml_and_json_say_the_same(tmp_path: Path, name: str) -> None:
    config = load_config(write(tmp_path, settings(tmp_path), name))
    assert config == build_config(settings(tmp_path))
    assert config.folder == tmp_path / "run" / "small"


def test_any_key_can_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path))
    config = load_config(path, ["boosting.learning_rate=1e-3", "seed=7", "data.format.answer_prefix=''", "lora=null"])
    assert config.boosting["learning_rate"] == 1e-3
    assert config.boosting["num_rounds"] == 2
    assert config.ensemble_config("ensemble", tmp_path).seed == 7
    assert config.data.format.answer_prefix == ""
    assert config.peft_config() is None


def test_one_key_turns_to_the_recipe_as_published(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path))
    ours = load_config(path).ensemble_config("ensemble", tmp_path)
    paper = load_config(path, ["boosting.recipe=paper"]).ensemble_config("ensemble", tmp_path)
    assert (ours.sampling, ours.errors, ours.effective_sample_size_floor) == ("reweight", "soft", 0.7)
    assert (paper.sampling, paper.shrinkage, paper.uniform_mix) == ("draw", 1.0, 0.0)


def test_keys_that_a_file_lacks_are_its_bases_whole(tmp_path: Path) -> None:
    values = settings(tmp_path)
    (tmp_path / "deeper").mkdir()
    write(tmp_path, values | {"seed": 4}, "first.yaml")
    write(tmp_path, {"base": "first.yaml", "seed": 5}, "second.yaml")
    third = {"base": "../second.yaml", "name": "third", "boosting": {"num_rounds": 1}, "students": {}}
    config = load_config(write(tmp_path / "deeper", third, "third.json"), ["labelling.batch_size=3"])
    expected = values | {"name": "third", "seed": 5, "boosting": {"num_rounds": 1}, "students": {}}
    assert config == build_config(expected | {"labelling": values.get("labelling", {}) | {"batch_size": 3}})


def test_a_base_that_is_missing_or_goes_in_circles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.yaml: base: .*gone\.yaml does not exist: name a YAML"):
        load_config(write(tmp_path, {"base": "gone.yaml"}))
    write(tmp_path, {"base": "config.yaml"}, "other.yaml")
    with pytest.raises(ValueError, match=r"other\.yaml: base: config\.yaml has this file as its own base"):
        load_config(write(tmp_path, {"base": "other.yaml"}))


def test_the_quick_section_overrides_and_replaces_sources_whole(tmp_path: Path) -> None:
    values = settings(tmp_path)
    quick = {
        "boosting": {"num_rounds": 1},
        "data": {"easy": {"characters": "reverse", "size": 9, "min_length": 2, "max_length": 3}},
    }
    path = write(tmp_path, values | {"quick": quick})
    assert load_config(path).data.easy == values["data"]["easy"]
    small = load_config(path, quick=True)
    assert small.data.easy == quick["data"]["easy"]
    assert small.boosting["num_rounds"] == 1
    assert small.boosting["learning_rate"] == values["boosting"]["learning_rate"]
    for nothing in (values, values | {"quick": ["boosting"]}):
        with pytest.raises(ValueError, match="has no section `quick`"):
            load_config(write(tmp_path, nothing), quick=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("boosting.num_ronds=2", r"unknown key boosting\.num_ronds: did you mean boosting\.num_rounds\?"),
        ("boosting.lr=1", r"unknown key boosting\.lr: did you mean boosting\.learning_rate or "),
        ("boosting.epochs=1", r"unknown key boosting\.epochs: did you mean .*boosting\.num_train_epochs"),
        ("boosting.batch_size=1", r"did you mean .*boosting\.per_device_train_batch_size"),
        ("weak.keep_layer=0-1", r"unknown key weak\.keep_layer: did you mean weak\.keep_layers\?"),
        ("data.format.max_len=9", r"unknown key data\.format\.max_len: did you mean data\.format\.max_length\?"),
        (
            "data.sizes.test=9",
            r"key data\.sizes\.test: did you mean data\.sizes\.test_id or data\.sizes\.test_ood\?",
        ),
        ("lora.rank=4", r"unknown key lora\.rank"),
        ("student.output_dir=x", r"unknown key student\.output_dir"),
        ("zzz=1", "unknown key zzz: valid keys are .*boosting"),
        ("boosting.num_rounds=0", r"boosting\.num_rounds must be from 1 to 10000, got 0"),
        ("boosting.prior=1.5", r"prior must be .* number in \(0, 1\), got 1\.5"),
        ("data.sizes.train=1", r"data\.sizes\.train must be a whole number of questions, at least 2; got 1"),
        ("student.min_confidence=0.5", "at most 0, got 0.5"),
        ("student.variant=softly", "variant must be one of sft, soft, confidence, got 'softly'"),
        ("student.top_logprobs=many", r"student\.top_logprobs must be int \| None, got 'many'"),
        ("threads=0", "threads must be from 1 to 1024, got 0"),
        ("weak=5", "weak must be a mapping"),
        ("boosting.num_rounds=two", r"boosting\.num_rounds must be int, got 'two'"),
        ("boosting.num_rounds=", r"boosting\.num_rounds must be int, got None"),
        ("boosting.num_rounds=true", r"boosting\.num_rounds must be int, got True"),
        ("boosting.learning_rate=fast", r"boosting\.learning_rate must be float \| None, got 'fast'"),
        ("boosting.prior=0", r"prior must be .* number in \(0, 1\), got 0"),
        ("boosting=null", r"boosting must be dict.*, got None"),
        ("student.num_train_epochs=[1]", r"student\.num_train_epochs must be float, got \[1\]"),
        ("lora=8", r"lora must be dict.* got 8"),
        ("lora.r=abc", r"lora\.r must be int, got 'abc'"),
        ("seed=1.5", r"seed must be int, got 1\.5"),
        ("name.first=x", "name must be str, got {'first': 'x'}"),
        ("name=''", "name must not be empty"),
        ("data.sizes=9", r"data\.sizes must be dict.* got 9"),
        ("data.format.use_chat_template=maybe", r"data\.format\.use_chat_template must be bool, got 'maybe'"),
        ("labelling.batch_size=0", r"labelling\.batch_size must be at least 1, got 0"),
        ("labelling.max_new_tokens=0", r"labelling\.max_new_tokens must be at least 1, got 0"),
        # The number 0 would read as "keep all".
        ("weak.keep_layers=0", r"weak\.keep_layers must be str \| None, got 0"),
        ("strong.dtype=flot32", "dtype must be .* got 'flot32'"),
        ("task=''", "task must not be empty: name what the runs of several seeds share"),
        ("seed=[", r"cannot read the override 'seed=\[': its value cannot be read as YAML, line 1, column 2"),
        ("seed", "cannot read the override 'seed': expected key=value"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, settings(tmp_path)), [override])


def test_whole_numbers_do_where_any_number_does_and_null_where_it_may(tmp_path: Path) -> None:
    overrides = ["boosting.learning_rate=1", "student.max_grad_norm=2", "data.format.max_length=null", "threads=null"]
    config = load_config(write(tmp_path, settings(tmp_path)), overrides)
    assert config.ensemble_config("ensemble", tmp_path).learning_rate == 1
    assert config.data.format.max_length is None


def test_layers_and_dtype_reach_the_model(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path))
    config = load_config(path, ["weak.keep_layers='0'", "weak.dtype=bfloat16"])
    assert config.weak.init_kwargs == {"dtype": "bfloat16", "keep_layers": "0"}
    assert load_model(config.weak.source, **config.weak.init_kwargs).config.num_hidden_layers == 1
    assert config.strong.init_kwargs == {"dtype": "float32"}


def test_soft_students_get_the_cache_that_they_read(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path))
    assert load_config(path).cache_settings("ensemble") == {}
    assert load_config(path, ["student.variant=soft"]).cache_settings("ensemble") == {}
    soft = ["student.variant=soft", "student.top_logprobs=8", "student.temperature=2"]
    assert load_config(path, soft).cache_settings("ensemble") == {"top_logprobs": 8, "top_temperature": 2}
    with pytest.raises(ValueError, match=r"variant=soft needs a teacher with a distribution.*combine=vote"):
        load_config(path, ["student.variant=soft", "boosting.combine=vote"])


def test_missing_keys_and_broken_files_are_named(tmp_path: Path) -> None:
    values = settings(tmp_path)
    del values["data"]["sizes"]
    with pytest.raises(ValueError, match=r"missing key data\.sizes"):
        build_config(values)
    with pytest.raises(ValueError, match=r"data\.sizes\.train must be .* got None"):
        build_config(settings(tmp_path) | {"data": settings(tmp_path)["data"] | {"sizes": {}}})
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"broken\.yaml cannot be read as YAML, line 1, column 5"):
        load_config(tmp_path / "broken.yaml")
    with pytest.raises(ValueError, match="must hold a mapping of keys to values, got list"):
        load_config(write(tmp_path, [1]))
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml does not exist"):
        load_config(tmp_path / "gone.yaml")


ONE = "data.questions={characters: reverse, size: 200, min_length: 2, max_length: 5}"
NONE_OF_TWO = ["data.easy=null", "data.hard=null"]


def test_one_source_may_take_the_place_of_two(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path))
    config = load_config(path, [ONE, *NONE_OF_TWO, "data.difficulty.folds=4", "data.difficulty.easy=0.3"])
    assert config.data.questions == {"characters": "reverse", "size": 200, "min_length": 2, "max_length": 5}
    assert (config.data.difficulty.easy, config.data.difficulty.hard, config.data.difficulty.folds) == (0.3, 0.5, 4)
    # What a run keeps of its configuration is read again, and another source replaces the first whole.
    kept = write(tmp_path, json.loads(json.dumps(config.results_key())) | {"name": "kept"}, "kept.json")
    assert load_config(kept).data == config.data
    assert load_config(kept, ["data.questions={file: a.jsonl}"]).data.questions == {"file": "a.jsonl"}
    assert load_config(kept, ["data.questions.size=300"]).data.questions["size"] == 300


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([ONE], r"data\.questions and data\.easy are two ways .*: give either data\.questions, .* or data\.easy and"),
        ([ONE, "data.easy=null"], r"data\.questions and data\.hard are two ways"),
        (["data.hard=null"], r"missing key data\.hard: give either data\.questions"),
        (NONE_OF_TWO, r"missing key data\.easy: give either data\.questions"),
        (["data.difficulty.folds=5"], r"data\.difficulty splits data\.questions, which is not given"),
        (
            [ONE, *NONE_OF_TWO, "data.difficulty.folds=1"],
            r"data\.difficulty\.folds must be at least 2, got 1",
        ),
        (
            [ONE, *NONE_OF_TWO, "data.difficulty.easy=0.7"],
            r"data\.difficulty: easy and hard must be shares .* easy=0\.7",
        ),
        ([ONE, *NONE_OF_TWO, "data.difficulty.tolerance=2"], r"data\.difficulty\.tolerance must be in \[0, 1\], got 2"),
        ([ONE, *NONE_OF_TWO, "data.difficulty.fold=2"], r"unknown key data\.difficulty\.fold: did you mean .*\.folds"),
        ([ONE, *NONE_OF_TWO, "data.difficulty.folds=all"], r"data\.difficulty\.folds must be int \| None, got 'all'"),
        ([*NONE_OF_TWO, "data.questions=5"], r"data\.questions must be dict.* got 5"),
    ],
)
def test_questions_come_from_one_source_or_from_two(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, settings(tmp_path)), overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.level={}"], "data.level says by either count or column what the level of a question is: give one"),
        (["data.level={count: a, column: b}"], "give one"),
        (["data.level={count: '('}"], r"data\.level\.count must be a regular expression, got '\('"),
        ([f"data.level.count={'a' * 101}"], r"data\.level\.count must have at most 100 characters, got 101"),
        ([f"data.level.column={'a' * 101}"], r"data\.level\.column must be a name of 1 to 100 characters"),
        (["data.level.column=''"], r"data\.level\.column must be a name"),
        (["data.level.count=3"], r"data\.level\.count must be str \| None, got 3"),
        (["data.level.words=3"], r"unknown key data\.level\.words"),
        (["data.level=words"], r"data\.level must be a mapping"),
    ],
)
def test_a_level_is_told_in_one_way(tmp_path: Path, overrides: list[str], message: str) -> None:
    plain = settings(tmp_path)
    del plain["data"]["level"]
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, plain), overrides)


def test_a_level_can_be_left_out_of_what_a_base_says_and_decides_no_result(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path))
    without = load_config(path, ["data.level=null"])
    assert without.data.level is None and "level" not in without.results_key()["data"]
    file = write(tmp_path, settings(tmp_path) | {"tasks": {"one": {}}, "seeds": 1}, "study.yaml")
    keys = [next(iter(load_study(file, given).cells())).key for given in ([], ["data.level=null"])]
    assert keys[0] == keys[1]


def test_where_results_are_kept_does_not_decide_them(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path) | {"task": "letters"})
    assert load_config(path).results_key() == load_config(path, ["name=other", "output_dir=x"]).results_key()
    assert load_config(path).results_key() != load_config(path, ["seed=1"]).results_key()


def test_a_setting_of_all_students_must_do_something_for_one(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path, students=STUDENTS))
    with pytest.raises(
        ValueError, match=r"student\.temperature=2 does nothing, because none of .*student_single.*soft"
    ):
        load_config(path, ["student.temperature=2"])
    # One reads it, the others are built without it.
    config = load_config(path, ["student.temperature=2", "students.student_ensemble.variant=soft"])
    found = {arm: config.student_arm_config(arm, tmp_path).temperature for arm in config.students}
    assert found == {"student_single": 1.0, "student_ensemble": 2, "ceiling": 1.0}
    with pytest.raises(ValueError, match=r"students\.ceiling\.temperature=2 does nothing without variant"):
        load_config(path, ["students.ceiling.temperature=2"])


def test_an_ensemble_inherits_what_it_reads(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path))
    config = load_config(path, ["boosting.shrinkage=0.5", "ensembles={same: {sampling: all}}"])
    assert config.ensemble_config("same", tmp_path).shrinkage == 1.0
    with pytest.raises(ValueError, match=r"ensembles\.own\.shrinkage=0.5 does nothing without weights"):
        load_config(path, ["ensembles={own: {sampling: all, shrinkage: 0.5}}"])
    with pytest.raises(ValueError, match=r"boosting\.lora_ranks needs adapters: give `lora` its settings"):
        load_config(path, ["lora=null", "boosting.lora_ranks=[1, 2]"])


def test_errors_of_transformers_and_peft_get_their_keys(tmp_path: Path) -> None:
    path = write(tmp_path, settings(tmp_path, students=STUDENTS))
    for override, message in (
        ("boosting.lr_scheduler_type=x", r"boosting\.lr_scheduler_type: x is not a valid SchedulerType"),
        ("student.save_strategy=x", r"student\.save_strategy: x is not a valid SaveStrategy"),
        ("lora.r=0", r"lora\.r must be at least 1, got 0"),
        ("student.num_train_epochs=-1", r"student\.num_train_epochs must be above 0 and finite, got -1"),
        ("students.ceiling.seed=1", r"unknown key students\.ceiling\.seed"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(path, [override])


def test_what_a_run_writes_of_its_name_is_read_back(tmp_path: Path) -> None:
    # JSON writes an emoji as two halves, which YAML would read as two characters.
    kept = write(tmp_path, settings(tmp_path) | {"name": "run 😀 \u2028 \x7f"}, "config.json")
    assert "\\ud83d" in kept.read_text()
    assert load_config(kept).name == "run 😀 \u2028 \x7f"


def test_huge_and_deep_settings_are_refused_in_few_words(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = {"a": deep}
    holding_itself: dict[str, Any] = {}
    holding_itself["a"] = holding_itself
    for value in (deep, holding_itself):
        with pytest.raises(ValueError, match="is nested more than 64 levels deep"):
            build_config(settings(tmp_path) | {"lora": value})
    with pytest.raises(ValueError, match=r"name must be str, got \['xxx") as caught:
        build_config(settings(tmp_path) | {"name": ["x" * 10**6] * 100})
    assert len(str(caught.value)) < 300
    for value in (b"x", {1}, object()):
        with pytest.raises(ValueError, match="name must be text, a number, true, false, null"):
            build_config(settings(tmp_path) | {"name": value})
