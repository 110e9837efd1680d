"""Run the blocks of a Markdown page in their order, as its reader would: Python, shell commands, files, outputs.

Blocks of one page share their names and their working directory. What a machine without hub, GPU and hours cannot run
is checked as far as it goes: a launcher's own parser reads its command line, pip's reads pip's, make says what it would
do. A block that nobody knows how to check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from ensemw2s import cli
from ensemw2s.experiments.config import build_config, load_config, merge_settings, read_settings
from ensemw2s.experiments.study import load_study

ROOT = Path(__file__).parent.parent
_TEXTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
PAGES = [page for page in _TEXTS if "```" in page.read_text(encoding="utf-8")]
_INFO = re.compile(r"(?P<language>\w*)(?P<attributes>[^\n]*)\n")
_TITLE = re.compile(r'title="([^"]+)"')
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=\S*")
_PRINTED = "_printed"  # in a page's namespace: what its last block printed


def blocks(document: Document) -> Iterator[Region]:
    """Yield the fenced blocks of a page, each with the evaluator of its language."""
    for region in RawFencedCodeBlockLexer(_INFO)(document):
        language, attributes = region.lexemes["language"], region.lexemes["attributes"]
        title = _TITLE.search(attributes)
        region.lexemes["title"] = title[1] if title else None
        region.parsed = region.lexemes["source"]
        region.evaluator = EVALUATORS.get(language, _unknown)
        yield region


def run_page(path: Path, names: dict[str, Any]) -> int:
    """Run all blocks of a page, which start with `names`, and return how many there were."""
    document = Sybil(parsers=[blocks]).parse(path)
    document.namespace.update(names)
    examples = list(document)
    for example in examples:
        example.evaluate()
    return len(examples)


def _unknown(example: Example) -> None:
    language = example.region.lexemes["language"]
    raise AssertionError(f"a block of {language or 'no'} language: expected one of {', '.join(EVALUATORS)}")


def _python(example: Example) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        PythonEvaluator()(example)
    example.namespace[_PRINTED] = printed.getvalue()


def _shell(example: Example) -> None:
    printed = io.StringIO()
    script = example.parsed.replace("\\\n", " ")
    with contextlib.redirect_stdout(printed):
        for line in script.splitlines():
            for command in line.split("&&"):
                _run(shlex.split(command, comments=True))
    example.namespace[_PRINTED] = printed.getvalue()


def _json(example: Example) -> None:
    """Write a block with a title to the file of that name; later blocks read it."""
    Path(example.region.lexemes["title"]).write_text(example.parsed, encoding="utf-8")


def _yaml(example: Example) -> None:
    """Read a block with a title as the study that it is, and one without as a part of a configuration."""
    title = example.region.lexemes["title"]
    if title:
        Path(title).write_text(example.parsed, encoding="utf-8")
        load_study(title)
    else:
        build_config(merge_settings(read_settings("examples/insert_letters.yaml"), yaml.safe_load(example.parsed)))


def _text(example: Example) -> None:
    """Compare what the block before has printed; a text without the title "Output" is a drawing."""
    if example.region.lexemes["title"] == "Output":
        require_alike(str(example.parsed), example.namespace[_PRINTED])


def require_alike(expected: str, printed: str) -> None:
    """Raise AssertionError unless the words are the same and the figures about the same.

    Models that are trained here differ from machine to machine: a share may be off by 0.15 (15 %), anything by a third.
    """
    expected, printed = ("\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (expected, printed))
    assert _NUMBER.sub("#", printed) == _NUMBER.sub("#", expected), f"printed:\n{printed}\nexpected:\n{expected}"
    for wanted, found in zip(_NUMBER.findall(expected), _NUMBER.findall(printed), strict=True):
        a, b = float(wanted), float(found)
        slack = max(abs(a), abs(b)) / 3 + (0.15 if "." in wanted else 15)
        assert abs(a - b) <= slack, f"{found} is far from {wanted} in\n{printed}"


EVALUATORS: dict[str, Callable[[Example], None]] = {
    "python": _python, "bash": _shell, "yaml": _yaml, "json": _json, "text": _text,
}  # fmt: skip


# Commands


def _run(words: list[str]) -> None:
    environment = [words.pop(0) for _ in range(len(words)) if words and _ASSIGNMENT.fullmatch(words[0])]
    if not words:
        assert not environment, f"{environment} stands before no command"
        return
    program, *arguments = words
    assert program in COMMANDS, f"nobody knows how to check {program!r}: expected one of {', '.join(COMMANDS)}"
    with _set(environment):
        COMMANDS[program](arguments)


@contextlib.contextmanager
def _set(environment: list[str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(dict(word.split("=", 1) for word in environment))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _ensemw2s(arguments: list[str]) -> None:
    if arguments[0] == "study":
        _require_measured(cli._parse(arguments))
    assert cli.main(arguments) == 0, f"ensemw2s {shlex.join(arguments)} ended with an error"


def _require_measured(options: argparse.Namespace) -> None:
    """Refuse to begin a cell of a study here, which would take minutes or hours."""
    study = load_study(options.config, options.overrides)
    if options.tasks:
        study = study.with_tasks(options.tasks.split(","))
    records = map(json.loads, Path(options.records).read_text(encoding="utf-8").splitlines())
    measured = {record["key"] for record in records if record["kind"] == "cell"}
    assert all(cell.key in measured for cell in study.cells()), f"{options.records} lacks cells of {options.config}"


def _parses(arguments: list[str]) -> None:
    """Check the arguments of a run that several processes would share."""
    assert arguments[:2] == ["-m", "ensemw2s"], f"expected -m ensemw2s, got {arguments}"
    options = cli._parse(arguments[2:])
    load_config(options.config, options.overrides, quick=options.quick)


def _accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments.pop(0) == "launch"
    options = launch_command_parser().parse_args(arguments)
    assert options.module
    _parses(["-m", options.training_script, *options.training_script_args])


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import parse_args

    options = parse_args(arguments)
    assert options.module
    _parses(["-m", options.training_script, *options.training_script_args])


def _python_program(arguments: list[str]) -> None:
    """Run a program of a few lines in this process; examples/*.py have a test of their own."""
    first, *rest = arguments
    if first != "-c":
        assert Path(first).is_file(), f"{first} does not exist"
        return
    code, *rest = rest
    before = sys.argv
    sys.argv = ["-c", *rest]
    try:
        exec(compile(code, "<command line>", "exec"), {"__name__": "__main__"})
    finally:
        sys.argv = before


def _make(arguments: list[str]) -> None:
    """Ask make what it would do, and check the commands of ours among that."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.replace("\\\n", " ").splitlines():
        if line.startswith(".venv/bin/ensemw2s "):
            cli._parse(shlex.split(line)[1:])


def _pip(arguments: list[str]) -> None:
    from pip._internal.commands import create_command

    assert arguments.pop(0) == "install"
    assert os.environ.get("ENSEMW2S_BUILD", "auto") in ("auto", "cpu", "cuda", "none")
    _, wanted = create_command("install").parse_args(arguments)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package in wanted:
        name, _, extras = package.rstrip("]").partition("[")
        assert name in (".", project["name"], "vllm"), f"{name} is not this package"
        unknown = set(filter(None, extras.split(","))) - set(project["optional-dependencies"])
        assert not unknown, f"no extra {unknown}"


def _vllm(arguments: list[str]) -> None:
    """Read what vLLM would be told of the model; its own options are its own."""
    command, folder, *_ = arguments
    assert command == "serve", f"vllm {command} is not what a page should ask for"
    from ensemw2s.serving.config import ServedEnsembleConfig

    assert ServedEnsembleConfig.from_pretrained(folder).expert_configs


def _curl(arguments: list[str]) -> None:
    """Read what would be sent, and to which route."""
    address = next(word for word in arguments if word.startswith("localhost:8000/"))
    assert address.partition("/")[2] in ("v1/completions", "v1/ensemble/expert_weights"), address
    if "-d" in arguments:
        sent = json.loads(arguments[arguments.index("-d") + 1])
        assert sent.get("model", "run/ensemble") == "run/ensemble"


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "ensemw2s": _ensemw2s, "accelerate": _accelerate, "torchrun": _torchrun, "python": _python_program, "make": _make,
    "pip": _pip, "vllm": _vllm, "curl": _curl,
}  # fmt: skip
