"""The folder of a run: whose it is, where what lies in it, and what is read back from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig

from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.experiments.config import ExperimentConfig, ModelConfig
from ensemw2s.inference.label_files import read_labels
from ensemw2s.models import own_files
from ensemw2s.models.loading import load_model, load_tokenizer
from ensemw2s.runtime.accounts import check, entered
from ensemw2s.runtime.claims import Kind, claimed
from ensemw2s.runtime.files import read_json, read_json_lines, write_json, write_json_lines
from ensemw2s.runtime.meter import total
from ensemw2s.runtime.records import CONFIG_FILE, POOLED_KINDS, REPORT_FILE, RESULTS_FILE
from ensemw2s.student.relabel import FOLDER, RESULT_FILE
from ensemw2s.student.trainer import load_trained
from ensemw2s.training.trainer import on_device

PHASES = ("data", "boost", "label", "student", "evaluate", "report")
# All that a run keeps in its folder.
RUN = Kind("run", "a run", (
    CONFIG_FILE, "data", "difficulty", "records", "boosting", "ensembles", "ensemble", "labels", "students", "scores",
    "store", RESULTS_FILE, REPORT_FILE,
), setting="name or output_dir", alone=True)  # fmt: skip


class RunFolder:
    """The folder of one run, `config.folder`; what is read from it once is kept in memory."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self.path = config.folder
        self.task = config.task or config.name
        self._tokenizers: dict[str, Any] = {}
        self._questions: dict[str, Dataset] = {}
        self._examples: dict[tuple[str, str], Dataset] = {}

    def claimed(self, overwrite: bool = False) -> AbstractContextManager[None]:
        """Return the right to work in the folder, for a block; see `ensemw2s.runtime.claims.claimed`."""
        remedy = "pass --overwrite to delete that run"
        return claimed(self.path, RUN, self._description(), overwrite=overwrite, remedy=remedy)

    def keep_config(self) -> None:
        """Write the configuration beside what it leads to, unless it is there."""
        file = self.path / CONFIG_FILE
        if not file.exists():
            own = {"name": self.config.name, "output_dir": self.config.output_dir}
            write_json(file, {**own, **self._description()})

    def _description(self) -> dict[str, Any]:
        """Return what decides the results and, by name, what the records are of, also when the folder is renamed."""
        return {**self.config.results_key(), "task": self.task}

    def data_file(self, split: str) -> Path:
        """Return the file of a split's questions."""
        return self.path / "data" / f"{split}.jsonl"

    def boosting(self, arm: str) -> Path:
        """Return the folder in which an arm's experts are trained."""
        return self.path / ("boosting" if arm == "ensemble" else f"ensembles/{arm}/boosting")

    def ensemble(self, arm: str) -> Path:
        """Return the folder of an arm's saved ensemble."""
        return self.path / ("ensemble" if arm == "ensemble" else f"ensembles/{arm}/ensemble")

    def labels_file(self, teacher: str) -> Path:
        """Return the file of a teacher's answers."""
        return self.path / "labels" / f"{teacher}.jsonl"

    def student(self, arm: str) -> Path:
        """Return the folder of a saved student."""
        return self.path / "students" / arm

    def has_student(self, arm: str) -> bool:
        """Say whether a student was saved whole, whatever else lies in its folder; on the main process alone."""
        own_files.settle(self.student(arm))
        return (self.student(arm) / own_files.MANIFEST).is_file()

    def records_file(self, phase: str) -> Path:
        """Return the file of a phase's records, which is there when the phase is done."""
        return self.path / "records" / f"{phase}.jsonl"

    def records(self, phase: str) -> list[dict[str, Any]]:
        """Return the records of a phase that is done."""
        return read_json_lines(self.records_file(phase))

    def write_records(self, phase: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the records of a phase, by which it is done."""
        write_json_lines(self.records_file(phase), map(self.of_this_run, records))

    def of_this_run(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record with this run's task and seed, where a report of many runs tells runs apart by them."""
        run = {"task": self.task, "seed": self.config.seed}
        return {**record, **(run if record["kind"] in POOLED_KINDS else {})}

    def collect_results(self) -> None:
        """Write the records of all phases that are done into one file."""
        done = [phase for phase in PHASES if self.records_file(phase).exists()]
        write_json_lines(self.path / RESULTS_FILE, [row for phase in done for row in self.records(phase)])

    def require_earlier(self, phase: str) -> None:
        """Raise FileNotFoundError unless all phases before this one are done."""
        for earlier in PHASES[: PHASES.index(phase)]:
            if not self.records_file(earlier).exists():
                # The command `boost` makes the data, too.
                command = "boost" if earlier == "data" else earlier
                raise FileNotFoundError(
                    f"{phase} needs what {command} leaves in {self.path}, which is not there: run {command} first"
                )

    def check_left(self, phase: str, path: Path) -> None:
        """Refuse what a phase left and what is gone or damaged, as `accounts.check`, and say how it is made anew."""
        remedy = f"Delete {path} and {self.records_file(phase)}, and run the same command again: {phase} makes it anew"
        check(path, remedy)

    # What phases left; each refuses as `check_left` does

    def questions(self, split: str) -> Dataset:
        """Return the questions of a split."""
        self.check_left("data", self.data_file(split))
        if split not in self._questions:
            self._questions[split] = Dataset.from_list(read_json_lines(self.data_file(split)))
        return self._questions[split]

    def examples(self, split: str, model: ModelConfig) -> Dataset:
        """Return the questions of a split with their answers, in a model's tokens."""
        questions, key = self.questions(split), (split, model.source)
        if key not in self._examples:
            self._examples[key] = tokenize_questions(questions, self.tokenizer(model), self.config.data.format, split)
        return self._examples[key]

    def tokenizer(self, model: ModelConfig) -> Any:
        """Return a model's tokenizer, which everything that reads or saves it shares."""
        if model.source not in self._tokenizers:
            self._tokenizers[model.source] = load_tokenizer(model.source)
        return self._tokenizers[model.source]

    def labels(self, teacher: str, questions: Dataset) -> Dataset:
        """Return a teacher's answers to `questions`, in their order."""
        file = self.labels_file(teacher)
        self.check_left("label", file)
        rows = {row["id"]: row for row in read_labels(file)}
        return Dataset.from_list([rows[row_id] for row_id in questions["id"]])

    def boosting_cost(self, arm: str) -> dict[str, float | None]:
        """Return what training the experts of an arm took: seconds, tokens, FLOPs."""
        if self.config.ensemble_config(arm, "").recipe == "co_boosted":
            return dict(read_json(self.boosting(arm) / "cost.json"))
        files = entered(self.boosting(arm), "rounds/*/attempt-*/record.json")
        rounds = [read_json(file) for file in files]
        return {name: total(record[f"train_{name}"] for record in rounds) for name in ("seconds", "tokens", "flops")}

    def student_cost(self, arm: str) -> dict[str, Any]:
        """Return what training a student took: seconds, tokens, FLOPs."""
        self.check_left("student", self.student(arm))
        return dict(read_json(self.student(arm) / "cost.json"))

    def relabelled(self, arm: str) -> list[dict[str, Any]]:
        """Return what out-of-fold students made of the answers that a student was trained on."""
        file = self.student(arm) / FOLDER / RESULT_FILE
        check(file, f"Delete {self.student(arm)} and run the same command again: student makes it anew")
        return read_json_lines(file)

    # Models, on the device that this process trains on

    def untrained(self, model: ModelConfig) -> Any:
        """Return a pre-trained model."""
        return self.placed(load_model(model.source, **model.init_kwargs))

    def trained(self, arm: str) -> Any:
        """Return a student."""
        self.check_left("student", self.student(arm))
        return self.placed(load_trained(self.student(arm), self.config.strong.source, **self.config.strong.init_kwargs))

    def teacher(self, arm: str) -> TokenEnsemble:
        """Return the ensemble of an arm, to be asked for the mixture itself."""
        self.check_left("boost", self.ensemble(arm))
        teacher = TokenEnsemble.from_pretrained(self.ensemble(arm))
        # Whatever the weak model's authors recommend for chats.
        teacher.generation_config = GenerationConfig(eos_token_id=teacher.generation_config.eos_token_id)
        return self.placed(teacher)

    def of_experts(self, folders: list[Path]) -> TokenEnsemble:
        """Return saved experts as one ensemble of equal weights."""
        for folder in folders:
            self.check_left("boost", folder)
        return self.combined(self.config.weak, folders)

    def combined(self, model: ModelConfig, folders: list[Path]) -> TokenEnsemble:
        """Return what was trained from a model and saved in these folders, as one ensemble of equal weights."""
        ones = [1.0] * len(folders)
        if self.config.lora is None:
            return self.placed(TokenEnsemble.from_models([load_trained(folder) for folder in folders], ones))
        return self.placed(TokenEnsemble.from_adapters(self.untrained(model), folders, ones))

    def placed(self, model: Any) -> Any:
        """Return a model on the device that this process trains on."""
        return on_device(model, self.config.ensemble_config("single_expert", self.path))
