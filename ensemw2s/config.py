"""One YAML or JSON file describes an experiment; every key can be overridden, and a misspelt one is refused."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig

from ensemw2s.data import SOURCE_KINDS, QuestionFormat
from ensemw2s.difficulty import check_cut
from ensemw2s.models import check_dtype
from ensemw2s.recipes import BoostingConfig
from ensemw2s.student import StudentConfig
from ensemw2s.training import AnswerTrainingArguments

TRUTH = "truth"
CEILING = "ceiling"
# Arms that an ensemble cannot be called after.
_TAKEN = ("single_expert", "equal_cost", "ensemble", "uniform_average", "best_expert", "majority_vote", TRUTH, CEILING)
_ARM = re.compile(r"[a-z][a-z0-9_]*")
# What a run measures unless it says otherwise.
STUDENTS: dict[str, dict[str, Any]] = {
    "student_single": {"teacher": "single_expert"},
    "student_ensemble": {"teacher": "ensemble"},
    "ceiling": {"teacher": "truth"},
}
# Plain types that a setting can be declared with; a declaration with any other type is left to whoever uses it.
_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,), "int": (int,), "float": (int, float), "str": (str,), "None": (type(None),),
    "dict[str, Any]": (dict,), "dict[str, int]": (dict,),
}  # fmt: skip
SPLITS = ("train", "validation", "test_id", "unlabelled", "test_ood")
_SOURCES = ("easy", "hard", "questions")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `1e-3` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


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
        check_dtype(self.dtype)

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of `models.load_model` beside the source."""
        kwargs: dict[str, Any] = {"dtype": self.dtype}
        return kwargs | ({} if self.keep_layers is None else {"keep_layers": self.keep_layers})


@dataclass(frozen=True)
class DifficultyConfig:
    """How the questions of one source are split by their difficulty.

    Attributes:
        easy: the share of the easiest questions that count as easy, above 0; see `split_by_difficulty`.
        hard: the share of the hardest questions that count as hard, above 0.
        tolerance: how far off these shares may be, in [0, 1]: a cut falls between two values, never among ties.
        resolution: difficulties are rounded to its multiples before they are compared; 0 compares them as they are.
        folds: rate the questions first, by cross-fitting with so many folds (`difficulty.rate_difficulty`), at least 2;
            None takes their own column `difficulty`.
    """

    easy: float = 0.5
    hard: float = 0.5
    folds: int | None = None
    tolerance: float = 0.1
    resolution: float = 0.01

    def __post_init__(self) -> None:
        if self.folds is not None and self.folds < 2:
            raise ValueError(f"data.difficulty.folds must be at least 2, or null for an own column; got {self.folds}")
        try:
            check_cut(self.easy, self.hard, self.tolerance, self.resolution)
        except ValueError as error:
            raise ValueError(f"data.difficulty: {error}") from error


@dataclass(frozen=True)
class DataConfig:
    """Where easy and hard questions come from (`data.load_questions`), how many go where, how they become tokens.

    Attributes:
        sizes: the number of questions of each split: train, validation and test_id are easy, unlabelled and test_ood
            hard.
        easy: the source of easy questions, beside `hard`.
        hard: the source of hard questions; those that are easy ones too are left out.
        questions: in place of these two, one source, whose questions are split by `difficulty`.
        difficulty: how they are split; with `folds`, the weak model rates them first, trained as the weak baseline is.
        format: how a question becomes tokens.

    Raises:
        ValueError: not exactly one of the two ways, or `difficulty` without `questions`.
    """

    sizes: dict[str, int]
    easy: dict[str, Any] | None = None
    hard: dict[str, Any] | None = None
    questions: dict[str, Any] | None = None
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
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
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"labelling.{name} must be at least 1, got {getattr(self, name)}")


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
            number of rounds.
        equal_cost: whether there is an arm `equal_cost`: one expert, trained on all answer tokens for as long as those
            of `ensemble` together.
        student: settings of `StudentConfig`, for all students alike. The ceiling is trained with them as well, but on
            the truth by cross entropy. With `variant: soft` and `top_logprobs`, teachers keep a cache beside their
            answers.
        students: the students, by the names of their arms: `teacher` (`single_expert`, `equal_cost`, `ensemble`, one of
            `ensembles`, or `truth`) and settings that replace those of `student`.
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

    def boosting_config(self, folder: str | os.PathLike[str], **settings: Any) -> BoostingConfig:
        """Return the boosting settings for a trainer that works in `folder`."""
        return BoostingConfig(**{"output_dir": str(folder), "seed": self.seed, **self.boosting, **settings})

    def ensemble_config(self, arm: str, folder: str | os.PathLike[str], **settings: Any) -> BoostingConfig:
        """Return the settings of an arm that is an ensemble of experts, or one expert (`single_expert`, `equal_cost`).

        An expert alone is the first of a deep ensemble: all tokens weigh the same, and an expert of another arm with
        the same weights and seed is the same expert.
        """
        if arm == "ensemble":
            return self.boosting_config(folder, **settings)
        own: dict[str, Any] = {"recipe": "deep_ensemble", "num_rounds": 1}
        if arm in self.ensembles:
            own = self.ensembles[arm]
        inherited = dict(self.boosting)
        if "recipe" in own:
            shared = {field.name for field in dataclasses.fields(AnswerTrainingArguments)} | {"num_rounds"}
            inherited = {key: value for key, value in inherited.items() if key in shared}
        return BoostingConfig(**{"output_dir": str(folder), "seed": self.seed, **inherited, **own, **settings})

    def student_config(self, folder: str | os.PathLike[str], **settings: Any) -> StudentConfig:
        """Return the student settings for a trainer that works in `folder`."""
        return StudentConfig(**{"output_dir": str(folder), "seed": self.seed, **self.student, **settings})

    def student_arm_config(self, arm: str, folder: str | os.PathLike[str]) -> StudentConfig:
        """Return the settings of the student called `arm`."""
        own = {key: value for key, value in self.students[arm].items() if key != "teacher"}
        if self.students[arm]["teacher"] == TRUTH:
            own = self.student_config(folder).on_truth | own
        return self.student_config(folder, **own)

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
        plain["resolved"] = {arm: self._resolved(arm) for arm in ("ensemble", *self.ensembles)}
        return {key: value for key, value in plain.items() if key not in ("name", "output_dir", "store")}

    def _resolved(self, arm: str) -> dict[str, Any]:
        """Return the settings of an arm that say how its experts are boosted."""
        args = self.ensemble_config(arm, "")
        training = {field.name for field in dataclasses.fields(AnswerTrainingArguments)}
        own = [field.name for field in dataclasses.fields(BoostingConfig) if field.name not in training]
        return {name: getattr(args, name) for name in own if name != "overwrite"}


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, quick: bool = False
) -> ExperimentConfig:
    """Read an experiment from a YAML or JSON file.

    A key `base` names another such file, relative to this one: a top-level key that this file does not have is taken
    from there, with everything below it.

    Args:
        path: the file, or the folder of a run (which holds its own `config.json`).
        overrides: "dotted.key=value" each, the value in YAML, e.g. "boosting.num_rounds=5".
        quick: apply the file's section `quick`, which overrides other keys for a small version of the experiment.

    Raises:
        FileNotFoundError: no such file, or a folder that is no run.
        ValueError: unparsable text, files that are each other's base, an unknown key (names the nearest one), a
            missing key, or a bad value.
    """
    return build_config(read_settings(path, overrides, quick=quick))


def read_settings(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, quick: bool = False
) -> dict[str, Any]:
    """Return the keys and values of a file after the overrides, unchecked; see `load_config`."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a YAML or JSON file, or the folder of an earlier run")
    settings = _parse_with_base(path)
    # What a run's folder says beside its settings.
    settings.pop("resolved", None)
    small = settings.pop("quick", None)
    if quick:
        if not isinstance(small, dict):
            raise ValueError(f"{path} has no section `quick`: add one with the keys to override, or leave --quick out")
        settings = merge_settings(settings, small)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ValueError(f"cannot read the override {override!r}: expected key=value, e.g. boosting.num_rounds=5")
        try:
            parsed = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"cannot read the override {override!r}: its value is not valid YAML ({error})") from error
        settings = merge_settings(settings, _nested(key.split("."), parsed))
    return settings


def build_config(settings: Mapping[str, Any]) -> ExperimentConfig:
    """Build an experiment from a nested mapping, checking every key and value; see `load_config`."""
    config = _build(ExperimentConfig, settings, "")
    _check_settings(config.boosting, BoostingConfig, "boosting.", _settable(BoostingConfig))
    _check_settings(config.student, StudentConfig, "student.", _settable(StudentConfig))
    if config.lora is not None:
        _check_settings(config.lora, LoraConfig, "lora.", [f.name for f in dataclasses.fields(LoraConfig)])
    if not config.name:
        raise ValueError("name must not be empty: it names the run's folder")
    if config.task == "":
        raise ValueError("task must not be empty: name what the runs of several seeds share, or leave it out")
    _check_keys(config.data.sizes, SPLITS, "data.sizes.")
    for split in SPLITS:
        size = config.data.sizes.get(split)
        if not isinstance(size, int) or size < 2:
            # One question has no standard error.
            raise ValueError(f"data.sizes.{split} must be a whole number of questions, at least 2; got {size}")
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"threads must be a whole number, at least 1, or null; got {config.threads!r}")
    # Building the arguments checks their values now rather than minutes into a run.
    config.boosting_config(config.folder)
    for arm, own in config.ensembles.items():
        _check_arm(arm, own, "ensembles", _TAKEN)
        _check_settings(own, BoostingConfig, f"ensembles.{arm}.", _settable(BoostingConfig))
        config.ensemble_config(arm, config.folder)
    config.student_config(config.folder)
    for arm, own in config.students.items():
        _check_student(config, arm, own)
    return config


def _check_arm(arm: str, own: Any, section: str, taken: Sequence[str]) -> None:
    if not _ARM.fullmatch(arm) or arm in taken or re.fullmatch(r"expert_\d+", arm):
        raise ValueError(
            f"{section}.{arm}: the name of an arm is made of a-z, 0-9 and _, begins with a letter, and is none of "
            f"{', '.join(taken)} and expert_<number>"
        )
    if not isinstance(own, Mapping):
        raise ValueError(f"{section}.{arm} must be a mapping of settings to values, got {own!r}")


def _check_student(config: ExperimentConfig, arm: str, own: Any) -> None:
    _check_arm(arm, own, "students", [name for name in _TAKEN if name != CEILING] + list(config.ensembles))
    single = ["single_expert", *(["equal_cost"] if config.equal_cost else [])]
    teachers = [*single, "ensemble", *config.ensembles, TRUTH]
    if own.get("teacher") not in teachers:
        raise ValueError(f"students.{arm}.teacher must be one of {', '.join(teachers)}, got {own.get('teacher')!r}")
    if (own["teacher"] == TRUTH) != (arm == CEILING):
        raise ValueError(f"the student taught by {TRUTH} is called {CEILING}, and no other is: got students.{arm}")
    settings = {key: value for key, value in own.items() if key != "teacher"}
    _check_settings(settings, StudentConfig, f"students.{arm}.", _settable(StudentConfig))
    args = config.student_arm_config(arm, config.folder)
    teacher = own["teacher"]
    if teacher != TRUTH and args.variant == "soft" and config.ensemble_config(teacher, "").combine == "vote":
        raise ValueError(
            f"students.{arm}: variant=soft needs a teacher with a distribution, and {teacher} has none, because of "
            'combine=vote: use "prob" or "logprob", or variant=sft'
        )


def _settable(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.init and f.name not in ("output_dir", "seed", "overwrite")]


def _parse_with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    settings = _parse(path)
    base = settings.pop("base", None)
    if base is None:
        return settings
    file = path.parent / str(base)
    above = (*above, path.resolve())
    if file.resolve() in above:
        raise ValueError(f"{path}: base: {base} has this file as its own base: let one of them do without")
    if not file.is_file():
        raise FileNotFoundError(f"{path}: base: {file} does not exist: name a YAML or JSON file, relative to this one")
    return _parse_with_base(file, above) | settings


def _parse(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither valid YAML nor JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values, got {type(settings).__name__}")
    return settings


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


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


def _check_keys(settings: Mapping[str, Any], allowed: Sequence[str], prefix: str) -> None:
    for key in settings:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"valid keys are {', '.join(sorted(allowed))}"
            raise ValueError(f"unknown key {prefix}{key}: {hint}")


def _check_settings(settings: Mapping[str, Any], kind: type, prefix: str, allowed: Sequence[str]) -> None:
    """Check keys, and values against the types that the dataclass `kind` declares."""
    _check_keys(settings, allowed, prefix)
    declared = {f.name: f.type.__name__ if isinstance(f.type, type) else str(f.type) for f in dataclasses.fields(kind)}
    for key, value in settings.items():
        names = declared[key].split(" | ")
        # Not isinstance: a bool is an int to Python, and True is no number of rounds.
        if all(name in _TYPES for name in names) and not any(type(value) in _TYPES[name] for name in names):
            raise ValueError(f"{prefix}{key} must be {declared[key]}, got {value!r}")


def _build(kind: type, settings: Any, prefix: str) -> Any:
    if not isinstance(settings, Mapping):
        raise ValueError(f"{prefix.rstrip('.')} must be a mapping of keys to values, got {settings!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _check_settings(settings, kind, prefix, list(fields))
    nested = {"weak": ModelConfig, "strong": ModelConfig, "data": DataConfig, "labelling": LabellingConfig,
              "format": QuestionFormat, "difficulty": DifficultyConfig}  # fmt: skip
    missing = [
        name
        for name, f in fields.items()
        if name not in settings and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"missing key {prefix}{missing[0]} (needed: {', '.join(prefix + name for name in missing)})")
    return kind(**{
        key: _build(nested[key], value, f"{prefix}{key}.") if key in nested else value
        for key, value in settings.items()
    })  # fmt: skip
