"""Every block of README.md, CONTRIBUTING.md and docs/ runs; hubs, hours and GPUs have tiny stand-ins."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from packaging.requirements import Requirement

import ensemw2s
from benchmarks.ops.predict_gpu import ROWS, refreshed
from ensemw2s import TokenEnsemble, __version__, load_model
from tests.boosting_runs import base
from tests.documents import PAGES, ROOT, require_alike, run_page
from tests.tiny import FORMAT, questions, saved_adapters, tokenizer

# A run of seconds, in place of each example that takes minutes on a real model.
TRAINING = {"num_train_epochs": 1, "learning_rate": 2e-2, "per_device_train_batch_size": 16, "disable_tqdm": True}
SMALL = {
    "weak": {"source": "path-or-hub-id"},
    "strong": {"source": "bigger"},
    "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "data": {
        "format": {"prompt_template": FORMAT.prompt_template, "answer_prefix": FORMAT.answer_prefix},
        "easy": {"file": "easy.jsonl"},
        "hard": {"file": "hard.jsonl"},
        "sizes": {"train": 12, "validation": 6, "test_id": 6, "unlabelled": 12, "test_ood": 6},
    },
    "boosting": {"num_rounds": 2, **TRAINING},
    "student": TRAINING,
    "students": {"student_ensemble": {"teacher": "ensemble"}},
    "labelling": {"max_new_tokens": 6},
}
TASK = """
task: arc_easy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}:"
doc_to_choice: [a, b]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
# Tiny models in place of those of a hub.
HUB_IDS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "path-or-hub-id", "HuggingFaceTB/SmolLM2-360M-Instruct": "bigger"}
LONG_RUNS = ("insert_letters.yaml", "syllogisms.yaml")


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a page may take for granted, under the names that it uses."""
    folder = tmp_path_factory.mktemp("documentation")
    for name in ("examples", "docs/results"):
        shutil.copytree(ROOT / name, folder / name)
    for name in LONG_RUNS:
        settings = {"name": Path(name).stem, "seed": 0, **SMALL}
        (folder / "examples" / name).write_text(yaml.safe_dump(settings))
    for name in ("path-or-hub-id", "bigger"):
        base().save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    questions(120).to_json(folder / "easy.jsonl")
    questions(40, seed=8, start=300).to_json(folder / "hard.jsonl")
    saved_adapters(folder / "adapters", count=3, intermediate_size=base().config.intermediate_size)
    return folder


@pytest.fixture
def desk(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a copy of that folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(shutil.copytree(stand_ins, tmp_path / "desk"))
    return tmp_path / "desk"


@pytest.fixture
def names(desk: Path) -> dict[str, Any]:
    """Return the objects that a page may take for granted."""
    adapters = [desk / "adapters" / f"adapter-{t}" for t in range(3)]
    ensemble = TokenEnsemble.from_adapters(load_model("path-or-hub-id"), adapters, [2.0, 1.0, 0.5])
    ensemble.save_pretrained("run/ensemble", processing_class=tokenizer())
    return {"ensemble": ensemble, "tokenizer": tokenizer(), "hard": questions(12, seed=8, start=300)}


def local_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lm-evaluation-harness find a task of ours under the name of one whose questions are on the hub."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folder.mkdir()
    (folder / "questions.jsonl").write_text('{"question": "ab"}\n{"question": "cd"}\n')
    (folder / "arc_easy.yaml").write_text(TASK.format(questions=folder / "questions.jsonl"))

    def only_ours(**options: Any) -> TaskManager:
        return TaskManager(**(options | {"include_path": str(folder), "include_defaults": False}))

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", only_ours)
    monkeypatch.setattr("lm_eval.evaluator.TaskManager", only_ours)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(
    page: Path, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.name == "lm-eval.md":
        local_tasks(tmp_path / "tasks", monkeypatch)
    run_page(page, names)


@pytest.mark.parametrize("printed", ["share 0.30 of 4", "share 0.31 of 9", "share 0.5 of 4"])
def test_outputs_are_alike_where_words_are_the_same_and_figures_about_so(printed: str) -> None:
    require_alike("share 0.31 of 4\n", printed)


@pytest.mark.parametrize(
    "printed", ["part 0.31 of 4", "share 0.31 of 400", "share 0.9 of 4", "share 0.31 of 4\nmore", ""]
)
def test_other_outputs_are_not_alike(printed: str) -> None:
    with pytest.raises(AssertionError):
        require_alike("share 0.31 of 4\n", printed)


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("```python\nundefined_name\n```", "undefined_name"),
        ('```python\nprint(1)\n```\n\n```text title="Output"\ntwo\n```', "expected"),
        ("```bash\nensemw2s run nothing.yaml\n```", "ended with an error"),
        ("```bash\nensemw2s study examples/real.yaml --records docs/results/real.jsonl\n```", "lacks cells"),
        ("```bash\nmake nothing\n```", "nothing"),
        ('```bash\npip install "ensemw2s[nothing]"\n```', "no extra"),
        ("```bash\nrm -rf run\n```", "nobody knows"),
        ("```bash\npython examples/nothing.py\n```", "does not exist"),
        ("```bash\naccelerate launch -m ensemw2s run examples/nothing.yaml\n```", "does not exist"),
        ("```yaml\nboosting: {num_round: 3}\n```", "num_rounds"),
        ("```\nno language\n```", "no language"),
    ],
)
def test_a_block_that_does_not_work_fails(block: str, complaint: str, desk: Path) -> None:
    page = desk / "page.md"
    page.write_text(f"# A page\n\n{block}\n")
    with pytest.raises(Exception, match=complaint):
        run_page(page, {})


def outputs(notebook: nbformat.NotebookNode) -> list[tuple[int, set[str], str]]:
    """Return cell, kinds and text of all that a notebook shows, but for what libraries say on stderr."""
    shown = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stdout":
                shown.append((number, {"text/plain"}, output.text))
            elif output.output_type != "stream":
                shown.append((number, set(output.data), output.data["text/plain"]))
    return shown


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_showed(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shown = outputs(notebook)
    NotebookClient(notebook, kernel_name="python3", timeout=300).execute(cwd=str(tmp_path))
    found = outputs(notebook)
    assert [place for *place, _ in shown] == [place for *place, _ in found]
    for (*_, expected), (*_, printed) in zip(shown, found, strict=True):
        require_alike(expected, printed)
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_was_run_from_top_to_bottom_and_is_small() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    said = [output for cell in cells for output in cell.outputs]
    assert not [output for output in said if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in said) == 4
    assert NOTEBOOK.stat().st_size < 300_000


def test_what_the_notebook_says_of_real_models_runs(desk: Path) -> None:
    last = next(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if "real models\n" in cell.source)
    for hub_id, stand_in in HUB_IDS.items():
        assert hub_id in last
        last = last.replace(hub_id, stand_in)
    (desk / "page.md").write_text(last)
    assert run_page(desk / "page.md", {name: getattr(ensemw2s, name) for name in ensemw2s.__all__}) == 1


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("https://")]
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_metadata_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"] == __version__
    assert citation["license"] == project["license"]
    assert citation["preferred-citation"]["url"] == project["urls"]["Paper"]
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    tried = jobs["test"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: 3."
    assert [f"3.{name.removeprefix(prefix)}" for name in project["classifiers"] if name.startswith(prefix)] == tried
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["make lint", "make test", "make test-lowest", "make test TORCH=torch", "make check-wheel"]


def test_every_dependency_has_a_floor() -> None:
    # Without one, `make test-lowest` would take a release of many years ago.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"^LOWEST_EXTRAS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    wanted = [Requirement(line) for lines in lists for line in lines]
    assert len(wanted) > 25
    assert [w.name for w in wanted if not {s.operator for s in w.specifier} & {">=", "==", "~="}] == []
    lowest_python = re.search(r"^LOWEST_PYTHON \?= python(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert project["requires-python"] == f">={lowest_python}"


def test_the_predicted_times_are_those_that_the_model_gives() -> None:
    page = (ROOT / "docs" / "explanation" / "gpu.md").read_text()
    assert refreshed(page) == page
    assert page.count("| `mixture_sample` | greedy | cuda |") == len(ROWS)
