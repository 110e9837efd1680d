"""What the site holds beside its pages: the examples, every key of a configuration, the help of the command line.

A page asks for text with a line such as `<!-- generated: boosting -->`; the names are the keys of `GENERATED`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from griffe import Docstring, DocstringAttribute, DocstringSectionAttributes
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from transformers import TrainingArguments

from ensemw2s import BoostingConfig, QuestionFormat, StudentConfig
from ensemw2s.cli import _parser
from ensemw2s.experiments.config import ExperimentConfig, LevelConfig, settable
from ensemw2s.experiments.study import StudyConfig
from ensemw2s.training.arguments import REFUSED, AnswerTrainingArguments

ROOT = Path(__file__).parent.parent.parent
SHOWN = ("examples/*.yaml", "examples/*.py", "benchmarks/results/*.csv", "CHANGELOG.md", "CITATION.cff")
_REQUEST = re.compile(r"^<!-- generated: ([a-z ]+) -->$", re.MULTILINE)
# The site shows notebooks as pages.
_NOTEBOOK = re.compile(r"\]\((examples/\w+)\.ipynb\)")
# Links out of docs/ to files that the site shows; the site has them beside its pages, one folder further in.
_LINK_OUT = re.compile(r"\]\(\.\./((?:\.\./)*(?:examples|benchmarks/results)/|CHANGELOG\.md|CITATION\.cff)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of docs/ that pages link to."""
    for path in sorted(path for pattern in SHOWN for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        _show_notebook(path, files, config)
    return files


def _show_notebook(path: Path, files: Files, config: MkDocsConfig) -> None:
    """Add a notebook as a page, with its pictures in a folder of its own, and the notebook itself beside it."""
    content, resources = MarkdownExporter().from_filename(str(path), {"output_files_dir": path.stem})
    page = f"{path.parent.name}/{path.stem}.md"
    files.append(File.generated(config, page, content=content.replace("](../docs/", "](../")))
    for name, picture in resources["outputs"].items():
        files.append(File.generated(config, f"{path.parent.name}/{name}", content=picture))
    files.append(File.generated(config, f"{path.parent.name}/{path.name}", abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Put in what a page asks for, and point its links at the site's own copies."""
    filled = _REQUEST.sub(lambda found: _generated(found[1], page), markdown)
    return _NOTEBOOK.sub(r"](\1.md)", _LINK_OUT.sub(r"](\1", filled))


def _generated(name: str, page: Page) -> str:
    if name not in GENERATED:
        raise PluginError(f"{page.file.src_uri} asks for {name!r}, expected one of {', '.join(GENERATED)}")
    return "\n".join(GENERATED[name]())


def keys_of(kind: type, prefix: str = "", only: Sequence[str] | None = None) -> Iterator[str]:
    """Yield the keys that a dataclass gives to a configuration, each with its type, default and meaning."""
    meanings, types = described(kind), get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if only is not None and field.name not in only:
            continue
        if field.name not in meanings:
            raise PluginError(f"{kind.__name__} does not say what {field.name} is: add it to `Attributes:`")
        declared = "keys of its own, below" if dataclasses.is_dataclass(types[field.name]) else _type(field)
        yield f"`{prefix}{field.name}` · {declared}, {_default(field)}"
        yield f":   {meanings[field.name]}\n"


def described(kind: type) -> dict[str, str]:
    """Return what the docstring of a dataclass says of each attribute."""
    sections = Docstring(kind.__doc__ or "", parser="google").parse()
    attributes: list[DocstringAttribute] = [
        item for section in sections if isinstance(section, DocstringSectionAttributes) for item in section.value
    ]
    return {item.name: " ".join(item.description.split()) for item in attributes}


def _type(field: dataclasses.Field[Any]) -> str:
    named = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    return f"`{named.replace('algorithm.', '')}`"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value: Any = field.default_factory()
        return f"default `{value}`" if value and isinstance(value, dict) else "optional"
    return "needed" if field.default is dataclasses.MISSING else f"default `{field.default!r}`"


def _own(kind: type) -> list[str]:
    """Return the settable keys of our own: the rest is transformers' `TrainingArguments`."""
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    return [name for name in settable(kind) if name not in theirs | {"padding_free"}]


def training_defaults() -> Iterator[str]:
    """Yield the training settings whose defaults are not those of transformers."""
    theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    yield "| key | default | in transformers |"
    yield "|---|---|---|"
    for field in dataclasses.fields(AnswerTrainingArguments):
        other = theirs.get(field.name)
        if other is None:
            yield f"| `{field.name}` | {_value(field)} | – |"
        elif (field.default, field.default_factory) != (other.default, other.default_factory):
            yield f"| `{field.name}` | {_value(field)} | {_value(other)} |"


def refused_settings() -> Iterator[str]:
    """Yield the settings of transformers that are refused, and why."""
    yield "| key | why it is refused |"
    yield "|---|---|"
    yield from (f"| `{name}` | {reason} |" for name, reason in sorted(REFUSED.items()))


def _value(field: dataclasses.Field[Any]) -> str:
    return "as the machine has it" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def help_texts() -> Iterator[str]:
    """Yield the help of the command line and of each command."""
    parser = _parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in {"ensemw2s": parser, **commands.choices}.items():
        command.formatter_class = functools.partial(argparse.RawDescriptionHelpFormatter, width=100)
        title = name if command is parser else f"ensemw2s {name}"
        yield f"## `{title}`\n\n```text\n{command.format_help().rstrip()}\n```\n"


def _nested(name: str) -> type:
    """Return the dataclass behind a section of the configuration, e.g. "data difficulty"."""
    kind: Any = ExperimentConfig
    for part in name.split():
        kind = get_type_hints(kind)[part]
    return kind


GENERATED: dict[str, Callable[[], Iterator[str]]] = {
    "experiment": lambda: keys_of(ExperimentConfig),
    "weak": lambda: keys_of(_nested("weak")),
    "data": lambda: keys_of(_nested("data"), "data."),
    "data format": lambda: keys_of(QuestionFormat, "data.format."),
    "data difficulty": lambda: keys_of(_nested("data difficulty"), "data.difficulty."),
    "data level": lambda: keys_of(LevelConfig, "data.level."),
    "boosting": lambda: keys_of(BoostingConfig, "boosting.", _own(BoostingConfig)),
    "student": lambda: keys_of(StudentConfig, "student.", _own(StudentConfig)),
    "labelling": lambda: keys_of(_nested("labelling"), "labelling."),
    "study": lambda: keys_of(StudyConfig, only=("tasks", "seeds", "comparisons", "primary_split")),
    "training defaults": training_defaults,
    "refused settings": refused_settings,
    "help": help_texts,
}
