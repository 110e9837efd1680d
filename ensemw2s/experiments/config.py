"""One YAML or JSON file describes an experiment; every key can be overridden, and a misspelt one is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ensemw2s.boosting.config import BoostingConfig
from ensemw2s.data.difficulty import check_cut
from ensemw2s.data.levels import LONGEST_RULE, check_count
from ensemw2s.data.questions import SOURCE_KINDS
from ensemw2s.data.tokens import QuestionFormat
from ensemw2s.models.adapters import check_peft_config
from ensemw2s.models.loading import check_dtype
from ensemw2s.report.arms import CEILING, TAKEN, TRUTH
from ensemw2s.runtime.accounts import RESERVED, absolute
from ensemw2s.runtime.parsing import MOST_BYTES, MOST_LEVELS, parse_json, parse_yaml, read_text, require_file
from ensemw2s.runtime.records import CONFIG_FILE
from ensemw2s.runtime.values import (
    LARGEST,
    IdleSettingError,
    check_fields,
    check_names,
    check_value,
    has_surrogates,
    shown,
    shown_names,
)
from ensemw2s.student.trainer import USES_OF_SETTINGS, StudentConfig
from ensemw2s.training.arguments import AnswerTrainingArguments

_ARM = re.compile(r"[a-z][a-z0-9_]{0,99}")
# What a run measures unless it says otherwise.
STUDENTS: dict[str, dict[str, Any]] = {
    "student_single": {"teacher": "single_expert"},
    "student_ensemble": {"teacher": "ensemble"},
    "ceiling": {"teacher": "truth"},
}
SPLITS = ("train", "validation", "test_id", "unlabelled", "test_ood")
_SOURCES = ("easy", "hard", "questions")
# What a file system and a page have room for, beside what is put around it.
_LONGEST_NAME = 200
# The keys of a student that its trainer knows nothing of.
_OF_ARM = ("teacher", "easy_answers")
# What makes a file a study's; see `ensemw2s.experiments.study.load_study`.
_OF_STUDY = ("tasks", "seeds", "comparisons", "primary_split")
_MOST_BASES = 20


@dataclass(frozen=True)
class ModelConfig:
    """A model.

    Attributes:
        source: a folder, a hub id, `package:NAME` or `scratch:NAME`; see `load_model`.
        keep_layers: the decoder layers to keep, e.g. "0-11,22-29", numbered from 0; None keeps all.
        dtype: of its weights: "float32", "bfloat16" or "float16", or "auto" for the one that they are saved in.
    """

    source: str
    keep_layers: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.source:
            raise ValueError("source must not be empty: name a model's folder, a hub id, package:NAME or scratch:NAME")
        check_dtype(self.dtype)

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of `ensemw2s.load_model` beside the source."""
        return {"dtype": self.dtype} | ({} if self.keep_layers is None else {"keep_layers": self.keep_layers})


@dataclass(frozen=True)
class DifficultyConfig:
    """How the questions of one source are split by their difficulty.

    Attributes:
        easy: the share of the easiest questions that count as easy, above 0; see `split_by_difficulty`.
        hard: the share of the hardest questions that count as hard, above 0.
        tolerance: how far off these shares may be, in [0, 1]: a cut falls between two values, never among ties.
        resolution: difficulties are rounded to its multiples before they are compared; 0 compares them as they are.
        folds: rate the questions first, by cross-fitting with so many folds (`ensemw2s.rate_difficulty`), at least 2;
            None takes their own column `difficulty`.
    """

    easy: float = 0.5
    hard: float = 0.5
    folds: int | None = None
    tolerance: float = 0.1
    resolution: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            check_cut(self.easy, self.hard, self.tolerance, self.resolution)
        except ValueError as error:
            raise ValueError(f"data.difficulty: {error}") from error


@dataclass(frozen=True)
class LevelConfig:
    """What the level of a question is (its length, its depth, its number of hops), by which accuracies are shown apart.

    Attributes:
        count: a regular expression; the level is the number of its matches in the prompt.
        column: in place of `count`, the column of the questions that holds the level, whole numbers or texts.

    Raises:
        ValueError: both, neither, a `count` that is no regular expression, or either of more than 100 characters.
    """

    count: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.count is None) == (self.column is None):
            raise ValueError("data.level says by either count or column what the level of a question is: give one")
        if self.count is not None:
            check_count(self.count)
        elif not self.column or len(self.column) > LONGEST_RULE:
            raise ValueError(f"column must be a name of 1 to {LONGEST_RULE} characters, got {shown(self.column)}")

    @property
    def rule(self) -> str:
        """Return what a level is, in words."""
        return f"matches of {self.count} in the prompt" if self.column is None else f"column {self.column}"


@dataclass(frozen=True)
class DataConfig:
    """Where easy and hard questions come from (`ensemw2s.load_questions`), how many go where, how they become tokens.

    Attributes:
        sizes: the number of questions of each split: train, validation and test_id are easy, unlabelled and test_ood
            hard.
        easy: the source of easy questions, beside `hard`.
        hard: the source of hard questions; those that are easy ones too are left out.
        questions: in place of these two, one source, whose questions are split by `difficulty`.
        difficulty: how they are split; with `folds`, the weak model rates them first, trained as the weak baseline is.
        level: what the level of a question is; None has no levels. It decides how results are shown and none of them.
        format: how a question becomes tokens.

    Raises:
        ValueError: not exactly one of the two ways, or `difficulty` without `questions`.
    """

    sizes: dict[str, int]
    easy: dict[str, Any] | None = None
    hard: dict[str, Any] | None = None
    questions: dict[str, Any] | None = None
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
    level: LevelConfig | None = None
    format: QuestionFormat = field(default_factory=QuestionFormat)

    def __post_init__(self) -> None:
        ways = "give either data.questions, to be split by their difficulty, or data.easy and data.hard"
        given = [name for name in ("easy", "hard") if getattr(self, name) is not None]
        if self.questions is not None and given:
            raise ValueError(
                f"data.questions and data.{given[0]} are two ways to say where questions come from: {ways}"
            )
        if self.questions is None and len(given) < 2:
            missing = next(name for name in ("easy", "hard") if name not in given)
            raise ValueError(f"missing key data.{missing}: {ways}")
        if self.questions is None and self.difficulty != DifficultyConfig():
            raise ValueError(f"data.difficulty splits data.questions, which is not given: {ways}")


@dataclass(frozen=True)
class LabellingConfig:
    """How teachers answer the unlabelled questions: greedily, in batches.

    Attributes:
        max_new_tokens: the longest pseudo-answer in tokens, its end token included.
        batch_size: questions decoded together, on each process.
    """

    max_new_tokens: int = 32
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class ExperimentConfig:
    """A whole experiment.

    Attributes:
        name: the run's folder is `output_dir/name`.
        weak: the experts' pre-trained model.
        strong: the student's pre-trained model.
        data: questions.
        lora: settings of `peft.LoraConfig` for experts and students; None trains all weights.
        boosting: settings of `BoostingConfig`, for the arm `ensemble`. The weak baseline is trained with the same
            learning rate, epochs and other training settings.
        ensembles: further ensembles of experts to compare with, by the names of their arms: settings that replace those
            of `boosting`. An entry that names a `recipe` takes from `boosting` only the training settings and the
            number of rounds. With `recipe: co_boosted`, here or in `boosting`, students of the strong model that are
            trained as `student` says, in `relabel_folds` folds, judge the experts' answers to unlabelled questions.
        equal_cost: whether there is an arm `equal_cost`: one expert, trained on all answer tokens for as long as those
            of `ensemble` together; if that is co-boosted, for as many FLOPs, those of the judges among them.
        student: settings of `StudentConfig`, for all students alike, and `easy_answers`: whether they are also taught
            the easy training questions with their true answers, in as many steps [choice]. That is true unless given,
            but never with `variant: soft`, since true answers have no distribution. The ceiling is trained with these
            settings as well, but on the truth by cross entropy. With `variant: soft` and `top_logprobs`, teachers keep
            a cache beside their answers.
        students: the students, by the names of their arms: `teacher` (`single_expert`, `equal_cost`, `ensemble`, one of
            `ensembles`, or `truth`), and settings that replace those of `student`.
        store: folder in which experts are kept for other runs, and found if another has left them there; None keeps
            them in the run's folder, for its own ensembles.
        labelling: how pseudo-answers are decoded.
        seed: decides everything that is random.
        threads: CPU threads of each process; None leaves it to torch, or shares the machine's CPUs among several
            processes. Sums are rounded differently with another number.
        output_dir: where run folders are made.
        task: a name that runs with other seeds share, by which a report pools them; None takes the run's own name.
    """

    name: str
    weak: ModelConfig
    strong: ModelConfig
    data: DataConfig
    lora: dict[str, Any] | None = None
    boosting: dict[str, Any] = field(default_factory=dict)
    ensembles: dict[str, Any] = field(default_factory=dict)
    equal_cost: bool = False
    student: dict[str, Any] = field(default_factory=dict)
    students: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(STUDENTS))
    labelling: LabellingConfig = field(default_factory=LabellingConfig)
    seed: int = 0
    threads: int | None = None
    output_dir: str = "run"
    store: str | None = None
    task: str | None = None

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.output_dir) / self.name

    def ensemble_config(self, arm: str, folder: str | os.PathLike[str], **settings: Any) -> BoostingConfig:
        """Return the settings of an arm that is an ensemble of experts, or one expert (`single_expert`, `equal_cost`).

        An expert alone is the first of a deep ensemble: all tokens weigh the same, and an expert of another arm with
        the same weights and seed is the same expert.
        """
        if arm == "ensemble":
            return BoostingConfig(**self._placed(folder) | self.boosting | settings)
        own: dict[str, Any] = {"recipe": "deep_ensemble", "num_rounds": 1}
        if arm in self.ensembles:
            own = self.ensembles[arm]
        inherited = dict(self.boosting)
        if "recipe" in own:
            shared = {field.name for field in dataclasses.fields(AnswerTrainingArguments)} | {"num_rounds"}
            inherited = {key: value for key, value in inherited.items() if key in shared}
        return _built(BoostingConfig, self._placed(folder) | inherited, {**own, **settings})

    def student_config(self, folder: str | os.PathLike[str], **settings: Any) -> StudentConfig:
        """Return the student settings for a trainer that works in `folder`, without those that `settings` idle."""
        return _built(StudentConfig, self._placed(folder) | own_settings(self.student), settings)

    def _placed(self, folder: str | os.PathLike[str]) -> dict[str, Any]:
        return {"output_dir": str(folder), "seed": self.seed}

    def student_arm_config(self, arm: str, folder: str | os.PathLike[str]) -> StudentConfig:
        """Return the settings of the student called `arm`."""
        own = own_settings(self.students[arm])
        if self.students[arm]["teacher"] == TRUTH:
            own = self.student_config(folder).on_truth | own
        return self.student_config(folder, **own)

    def learns_easy_answers(self, arm: str) -> bool:
        """Say whether the student called `arm` is also taught the easy training questions with their true answers."""
        wanted = {**self.student, **self.students[arm]}.get("easy_answers", True)
        return wanted and self.student_arm_config(arm, self.folder).variant != "soft"

    def judge_config(self, folder: str | os.PathLike[str]) -> StudentConfig:
        """Return the settings of the students that judge the answers of a co-boosted ensemble."""
        judging = {"relabel": "cross_fit", "relabel_keep": "agree", "relabel_rounds": 1, "keep_unfinished": False}
        return self.student_config(folder, **(self.student_config(folder).on_truth | judging))

    def expert_arms(self) -> list[str]:
        """Return the arms whose experts are trained here, in the order in which they can be."""
        return ["single_expert", "ensemble", *self.ensembles, *(["equal_cost"] if self.equal_cost else [])]

    def teachers(self) -> list[str]:
        """Return the arms that answer the unlabelled questions."""
        named = dict.fromkeys(student["teacher"] for student in self.students.values())
        return [teacher for teacher in named if teacher != TRUTH]

    def cache_settings(self, teacher: str) -> dict[str, Any]:
        """Return how a teacher labels, as arguments of `TokenEnsemble.label`: with the cache that its students read."""
        for arm, student in self.students.items():
            args = self.student_arm_config(arm, self.folder)
            if student["teacher"] == teacher and args.variant == "soft" and args.top_logprobs is not None:
                return {"top_logprobs": args.top_logprobs, "top_temperature": args.temperature}
        return {}

    def peft_config(self) -> LoraConfig | None:
        """Return a fresh LoRA configuration, or None for full weights."""
        return None if self.lora is None else LoraConfig(**{"task_type": "CAUSAL_LM", **self.lora})

    def results_key(self) -> dict[str, Any]:
        """Return what decides the results, as plain JSON: everything but where they are kept.

        `resolved` holds what recipes and defaults stand for, so that results of another version's are not mistaken.
        """
        plain = json.loads(json.dumps(dataclasses.asdict(self)))
        plain["data"]["format"] = self.data.format.describe()
        if self.data.level is None:
            # Runs from before there were levels are the same without them.
            del plain["data"]["level"]
        # Said for each student, since it is the default for most and not for all.
        plain["student"] = own_settings(plain["student"])
        for arm, student in plain["students"].items():
            easy = {"easy_answers": True} if self.learns_easy_answers(arm) else {}
            plain["students"][arm] = {"teacher": student["teacher"], **own_settings(student), **easy}
        training = {field.name for field in dataclasses.fields(AnswerTrainingArguments)}
        names = [field.name for field in dataclasses.fields(BoostingConfig)]
        boosting = [name for name in names if name not in training | {"overwrite"}]
        plain["resolved"] = {}
        for arm in ("ensemble", *self.ensembles):
            args = self.ensemble_config(arm, "")
            # What a recipe has no use for decides nothing: figures from before there was such a setting hold.
            idle = {"generations", "generation_weights"} if args.recipe != "co_boosted" else set()
            idle |= {name for name in ("loss_tail", "chain_gain") if not getattr(args, name)}
            used = [name for name in boosting if name not in idle]
            plain["resolved"][arm] = {name: getattr(args, name) for name in used}
        return {key: value for key, value in plain.items() if key not in ("name", "output_dir", "store")}


_NESTED = {
    "weak": ModelConfig, "strong": ModelConfig, "data": DataConfig, "labelling": LabellingConfig,
    "format": QuestionFormat, "difficulty": DifficultyConfig, "level": LevelConfig,
}  # fmt: skip


def own_settings(student: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of `student`, or of an entry of `students`, is settings of `StudentConfig`."""
    return {key: value for key, value in student.items() if key not in _OF_ARM}


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, quick: bool = False
) -> ExperimentConfig:
    """Read an experiment from a YAML or JSON file.

    A key `base` names another such file, relative to this one: a top-level key that this file does not have is taken
    from there, with everything below it.

    Args:
        path: the file, or the folder of a run (which holds its own `config.json`). It is then this folder that the
            experiment works in, wherever the run was made, unless an override names another `name` or `output_dir`.
        overrides: "dotted.key=value" each, the value in YAML, e.g. "boosting.num_rounds=5".
        quick: apply the file's section `quick`, which overrides other keys for a small version of the experiment.

    Raises:
        FileNotFoundError: no such file, or a folder that is no run.
        ValueError: unparsable text, files that are each other's base, a study in place of an experiment, an unknown key
            (names the nearest one), a missing key, or a bad value.
    """
    settings = read_settings(path, overrides, quick=quick)
    _refuse_study(path, settings, overrides)
    return build_config(settings)


def _refuse_study(path: str | os.PathLike[str], settings: Mapping[str, Any], overrides: Sequence[str]) -> None:
    overridden = {override.partition("=")[0] for override in overrides}
    found = [key for key in _OF_STUDY if key in settings and key not in overridden]
    if found:
        raise ValueError(
            f"{path} is a study, of many experiments, by its keys {', '.join(found)}: `ensemw2s study {path}` runs it. "
            "Other commands take one experiment: its base, a file without these keys, or the folder of one of its cells"
        )


def read_settings(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    quick: bool = False,
    not_inherited: Collection[str] = (),
) -> dict[str, Any]:
    """Return the keys and values of a file after the overrides, unchecked; see `load_config`.

    Keys that are `not_inherited` count where the file itself has them, and not where its base does.
    """
    if not os.fspath(path):
        raise ValueError("the name of the configuration is empty: give a YAML or JSON file, or the folder of a run")
    path = Path(path)
    # The folder of a run is given, or the configuration in one.
    in_run = path.name == CONFIG_FILE and (path.parent / f"{RESERVED}run.json").is_file()
    folder = absolute(path.parent if in_run else path) if in_run or path.is_dir() else None
    path = path if folder is None else folder / CONFIG_FILE
    require_file(path, "give a YAML or JSON file, or the folder of an earlier run")
    settings = _parse_with_base(path, not_inherited)
    if folder is not None:
        # Wherever it was made.
        settings |= {"name": folder.name, "output_dir": str(folder.parent)}
    # What a run's folder says beside its settings.
    settings.pop("resolved", None)
    small = settings.pop("quick", None)
    if quick:
        if not isinstance(small, dict):
            raise ValueError(f"{path} has no section `quick`: add one with the keys to override, or leave --quick out")
        settings = merge_settings(settings, small)
    changes = [_override(override) for override in overrides]
    for place, (key, change) in enumerate(changes):
        if key in [earlier for earlier, _ in changes[:place]]:
            raise ValueError(f"the override {shown(key)} is given twice: keep one of them")
        settings = merge_settings(settings, change)
    return settings


def check_folder_name(name: str) -> None:
    """Raise ValueError unless a folder of this name lies in the folder that it is made in."""
    if not name:
        raise ValueError("name must not be empty: it names the run's folder")
    if name in (".", "..") or "/" in name or "\0" in name:
        raise ValueError(
            f'name must be the name of one folder, got {shown(name)}: without "/", and neither "." nor ".."; '
            "output_dir says where that folder is made"
        )
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise ValueError(
            f"name must have at most {_LONGEST_NAME} bytes, since it names the run's folder; got {shown(name)}"
        )


def _override(override: str) -> tuple[str, dict[str, Any]]:
    """Return the key of an override, and what it changes."""
    key, separator, value = override.partition("=")
    if not separator or not all(key.split(".")) or key.count(".") > MOST_LEVELS:
        raise ValueError(f"cannot read the override {shown(override)}: expected key=value, e.g. boosting.num_rounds=5")
    try:
        change = parse_yaml(value, f"cannot read the override {shown(override)}: its value")
    except ValueError as error:
        raise ValueError(f"{error}. Text that YAML would read otherwise is put in quotes: {key}='\"...\"'") from error
    for part in reversed(key.split(".")):
        change = {part: change}
    return key, change


def build_config(settings: Mapping[str, Any]) -> ExperimentConfig:
    """Build an experiment from a nested mapping, checking every key and value; see `load_config`."""
    _check_plain(settings)
    config = _build(ExperimentConfig, settings, "")
    check_folder_name(config.name)
    if config.task == "":
        raise ValueError("task must not be empty: name what the runs of several seeds share, or leave it out")
    for key in ("output_dir", "store"):
        if getattr(config, key) == "":
            raise ValueError(f"{key} must not be empty: name a folder, or leave it out")
    check_names(config.data.sizes, SPLITS, "data.sizes.")
    for split in SPLITS:
        size = config.data.sizes.get(split)
        if type(size) is not int or not 2 <= size <= LARGEST:
            # One question has no standard error.
            raise ValueError(f"data.sizes.{split} must be a whole number of questions, at least 2; got {shown(size)}")
    # Building the arguments checks their values now rather than minutes into a run.
    with _checked("boosting.", BoostingConfig, config.boosting):
        config.ensemble_config("ensemble", config.folder)
    with _checked("lora.", LoraConfig, config.lora or {}):
        built = config.peft_config()
    if built is not None:
        check_peft_config(built, "lora")
    for arm, own in config.ensembles.items():
        _check_arm(arm, own, "ensembles", TAKEN)
        with _checked(f"ensembles.{arm}.", BoostingConfig, own):
            config.ensemble_config(arm, config.folder)
    sections = {"boosting": config.boosting} | {f"ensembles.{arm}": own for arm, own in config.ensembles.items()}
    for section, own in sections.items():
        if own.get("lora_ranks") is not None and config.lora is None:
            raise ValueError(f"{section}.lora_ranks needs adapters: give `lora` its settings, or leave lora_ranks out")
    _check_easy_answers("student", config.student)
    with _checked("student.", StudentConfig, own_settings(config.student)):
        config.student_config(config.folder)
    for arm, own in config.students.items():
        _check_student(config, arm, own)
    _check_student_settings_in_use(config)
    return config


def _check_plain(settings: Any, place: str = "", level: int = 1) -> None:
    """Refuse what is no plain value, and text that no file could hold; `place` is the dotted path, for errors."""
    if level > MOST_LEVELS:
        raise ValueError(f"{place:.100} ... is nested more than {MOST_LEVELS} levels deep, expected a few")
    if isinstance(settings, Mapping | list):
        for key, value in settings.items() if isinstance(settings, Mapping) else enumerate(settings):
            _check_plain(key, f"a key of {place or 'the settings'}", level)
            _check_plain(value, f"{place}.{key}" if place else str(key), level + 1)
    elif not isinstance(settings, str | bool | int | float | None):
        raise ValueError(
            f"{place} must be text, a number, true, false, null, or a list or mapping of these; got {shown(settings)}"
        )
    elif isinstance(settings, str) and ("\0" in settings or has_surrogates(settings)):
        raise ValueError(f"{place} holds a character that no file can hold: {shown(settings)}")


def _check_student_settings_in_use(config: ExperimentConfig) -> None:
    """Refuse a key of `student` that none of the students reads."""
    arms = [config.student_arm_config(arm, config.folder) for arm in config.students]
    for key in USES_OF_SETTINGS.keys() & config.student.keys() if arms else ():
        if all(getattr(args, key) != config.student[key] for args in arms):
            raise ValueError(
                f"student.{key}={shown(config.student[key])} does nothing, because none of "
                f"{shown_names(config.students)} has {USES_OF_SETTINGS[key][1]}: leave it out, or give that to one"
            )
    if config.student.get("easy_answers") and arms and not any(map(config.learns_easy_answers, config.students)):
        raise ValueError(
            "student.easy_answers=true does nothing, because each student learns distributions (variant=soft) or says "
            f"otherwise: {shown_names(config.students)}. Leave it out, or use variant=sft or confidence"
        )


def _check_arm(arm: str, own: Any, section: str, taken: Sequence[str]) -> None:
    if not _ARM.fullmatch(arm) or arm in taken or re.fullmatch(r"expert_\d+", arm):
        raise ValueError(
            f"{section}.{arm:.60}: the name of an arm is made of a-z, 0-9 and _, begins with a letter, has at most 100 "
            f"characters, and is none of {', '.join(taken)} and expert_<number>"
        )
    if not isinstance(own, Mapping):
        raise ValueError(f"{section}.{arm} must be a mapping of settings to values, got {shown(own)}")


def _check_student(config: ExperimentConfig, arm: str, own: Any) -> None:
    _check_arm(arm, own, "students", [name for name in TAKEN if name != CEILING] + list(config.ensembles))
    single = ["single_expert", *(["equal_cost"] if config.equal_cost else [])]
    teachers = [*single, "ensemble", *config.ensembles, TRUTH]
    if own.get("teacher") not in teachers:
        raise ValueError(
            f"students.{arm}.teacher must be one of {shown_names(teachers)}, got {shown(own.get('teacher'))}"
        )
    if (own["teacher"] == TRUTH) != (arm == CEILING):
        raise ValueError(f"the student taught by {TRUTH} is called {CEILING}, and no other is: got students.{arm}")
    _check_easy_answers(f"students.{arm}", own)
    settings = own_settings(own)
    with _checked(f"students.{arm}.", StudentConfig, settings):
        args = config.student_arm_config(arm, config.folder)
    teacher = own["teacher"]
    if teacher != TRUTH and args.variant == "soft" and config.ensemble_config(teacher, "").combine == "vote":
        raise ValueError(
            f"students.{arm}: variant=soft needs a teacher with a distribution, and {teacher} has none, because of "
            'combine=vote: use "prob" or "logprob", or variant=sft'
        )
    if own.get("easy_answers") and args.variant == "soft":
        raise ValueError(
            f"students.{arm}.easy_answers: variant=soft learns distributions, which true answers do not have: leave it "
            "out, or use variant=sft or confidence"
        )
    if args.relabel_keep == "all" and args.variant == "soft" and args.top_logprobs is not None:
        raise ValueError(
            f"students.{arm}.relabel_keep=all replaces answers, and top_logprobs keeps what the teacher says along its "
            "own: use relabel_keep=agree, or leave out top_logprobs"
        )


def _check_easy_answers(section: str, settings: Mapping[str, Any]) -> None:
    if not isinstance(settings.get("easy_answers", True), bool):
        raise ValueError(f"{section}.easy_answers must be true or false, got {shown(settings['easy_answers'])}")


def _built(kind: type, inherited: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """Return arguments of `kind`; an inherited setting that would do nothing beside the arm's own ones is left out."""
    inherited = dict(inherited)
    while True:
        try:
            return kind(**{**inherited, **own})
        except IdleSettingError as error:
            if error.setting in own or error.setting not in inherited:
                raise
            del inherited[error.setting]


def settable(kind: type) -> list[str]:
    """Return the keys of a section that becomes arguments of `kind`; the experiment itself says the others."""
    return [f.name for f in dataclasses.fields(kind) if f.init and f.name not in ("output_dir", "seed", "overwrite")]


def keys_called(name: str, *, study: bool = False) -> list[str]:
    """Return the dotted keys of an experiment, or of a study, that are called `name`, in any of its sections."""
    sections = {"": {f.name for f in dataclasses.fields(ExperimentConfig)} | set(_OF_STUDY if study else ())}
    sections |= {"boosting": set(settable(BoostingConfig)), "student": {*settable(StudentConfig), "easy_answers"}}
    sections |= {
        key: {f.name for f in dataclasses.fields(kind)} for key, kind in _NESTED.items() if key in sections[""]
    }
    if study:
        sections[""] -= {"seed", "task"}
    section, _, last = name.rpartition(".")
    if section:
        return [name] if last in sections.get(section, ()) else []
    return [f"{section}.{name}".lstrip(".") for section, keys in sections.items() if name in keys]


@contextmanager
def _checked(prefix: str, kind: type, settings: Mapping[str, Any]) -> Iterator[None]:
    """Check the keys and values of a section, from which the block then builds arguments; see `_named`."""
    _check_settings(settings, kind, prefix, settable(kind))
    with _named(prefix, kind, settings):
        yield


@contextmanager
def _named(prefix: str, kind: type, settings: Mapping[str, Any]) -> Iterator[None]:
    """Write in front of an error where the setting stands that it speaks of."""
    try:
        yield
    except (ValueError, TypeError) as error:
        message, fields = str(error), [f.name for f in dataclasses.fields(kind)]
        if re.split(r"\W", message, maxsplit=1)[0] in fields:
            message = f"{prefix}{message}"
        elif not re.search(rf"\b{re.escape(prefix.rstrip('.'))}\b", message):
            message = f"{f'{prefix}{_culprit(kind, settings)}'.rstrip('.')}: {message}"
        raise ValueError(message) from error


def _culprit(kind: type, settings: Mapping[str, Any]) -> str:
    """Return the setting that is refused by itself: transformers' errors do not always name it. "" if there is none."""
    for name, value in settings.items():
        try:
            kind(**{name: value})
        except (ValueError, TypeError):
            return name
    return ""


def _parse_with_base(path: Path, not_inherited: Collection[str], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    settings = _parse(path)
    base = settings.pop("base", None)
    if base is None:
        return settings
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: base must be the name of a YAML or JSON file, got {shown(base)}")
    file = path.parent / base
    try:
        require_file(file, "name a YAML or JSON file, relative to this one")
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{path}: base: {error}") from error
    above = (*above, path.resolve())
    if file.resolve() in above:
        raise ValueError(f"{path}: base: {base} has this file as its own base: let one of them do without")
    if len(above) > _MOST_BASES:
        raise ValueError(
            f"{path}: base: {base} is the {len(above)}th in a chain of bases: expected at most {_MOST_BASES}"
        )
    inherited = _parse_with_base(file, not_inherited, above)
    return {key: value for key, value in inherited.items() if key not in not_inherited} | settings


def _parse(path: Path) -> dict[str, Any]:
    text = read_text(path, most_bytes=MOST_BYTES)
    # Not one reader for both: YAML reads what JSON writes for an emoji as two halves of a character.
    settings = parse_json(text, str(path)) if path.suffix == ".json" else parse_yaml(text, str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values, got {type(settings).__name__}")
    return settings


def merge_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Override key by key; a question source is replaced whole, since its keys depend on its kind."""
    merged = dict(settings)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        other_source = both and key in _SOURCES and _source_kind(value) not in (None, _source_kind(merged[key]))
        merged[key] = merge_settings(merged[key], value) if both and not other_source else value
    return merged


def _source_kind(source: Mapping[str, Any]) -> str | None:
    return next((key for key in SOURCE_KINDS if key in source), None)


def _check_settings(settings: Mapping[str, Any], kind: type, prefix: str, allowed: Sequence[str]) -> None:
    """Check keys, and values against the types that the dataclass `kind` declares."""
    check_names(settings, allowed, prefix)
    for key in settings.keys() - _NESTED.keys():
        try:
            check_value(kind, key, settings[key], prefix)
        except TypeError as error:
            raise ValueError(str(error)) from error


def _build(kind: type, settings: Any, prefix: str) -> Any:
    if not isinstance(settings, Mapping):
        raise ValueError(f"{prefix.rstrip('.')} must be a mapping of keys to values, got {shown(settings)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _check_settings(settings, kind, prefix, list(fields))
    missing = [
        name
        for name, f in fields.items()
        if name not in settings and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"missing key {prefix}{missing[0]} (needed: {', '.join(prefix + name for name in missing)})")
    values = {
        key: value
        if key not in _NESTED or (value is None and fields[key].default is None)
        else _build(_NESTED[key], value, f"{prefix}{key}.")
        for key, value in settings.items()
    }
    with _named(prefix, kind, {}):
        return kind(**values)
