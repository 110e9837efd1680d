"""Saving into a folder that holds other things: they stay, and a kill leaves the old files or the new ones whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ensemw2s import TokenEnsemble
from ensemw2s.models.own_files import MANIFEST, own_files, settle, whole
from ensemw2s.runtime.files import DiskFullError, read_json
from tests.faults.folders import as_nobody
from tests.reference import WEIGHTS, model_ensemble, ragged_prompts
from tests.tiny import llama, lora, saved_model, tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write(folder: Path, files: dict[str, str], kind: str = "ensemble") -> None:
    with own_files(folder, kind) as aside:
        for name, text in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_text(text)


def texts(folder: Path) -> dict[str, str]:
    return {name: text.decode() for name, text in contents(folder).items() if name != MANIFEST}


@torch.no_grad()
def logits(ensemble: TokenEnsemble) -> torch.Tensor:
    return ensemble(input_ids=ragged_prompts(2)[0].clamp_min(2)).logits


# An ensemble among other things


def test_what_others_have_in_the_folder_stays(of_models: TokenEnsemble, tmp_path: Path) -> None:
    folder = tmp_path / "ensemble"
    tokenizer().save_pretrained(folder)
    (folder / "data").mkdir()
    (folder / "data" / "only_copy.csv").write_text("1,2,3")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]")
    (folder / "rounds").symlink_to(tmp_path)
    theirs = contents(folder)
    for ensemble in (of_models, of_models[:1], of_models[1:]):
        ensemble.save_pretrained(folder, processing_class=tokenizer())
        now = contents(folder)
        assert {name: now[name] for name in theirs} == theirs
        assert (folder / "rounds").is_symlink()
        assert torch.equal(logits(TokenEnsemble.from_pretrained(folder)), logits(ensemble))
        assert len(list((folder / "experts").iterdir())) == ensemble.num_experts


@pytest.mark.parametrize("kind", ["model", "adapter", "experiment", "student"])
def test_a_folder_with_another_model_or_a_run_is_refused_and_left(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    if kind == "model":
        saved_model(folder)
    elif kind == "adapter":
        from peft import get_peft_model

        get_peft_model(llama(0), lora()).save_pretrained(folder)
    elif kind == "experiment":
        (folder / "records").mkdir(parents=True)
        (folder / "config.json").write_text('{"name": "precious"}')
    else:
        write(folder, {"config.json": "{}"}, "student")
    before = contents(folder)
    with pytest.raises(
        FileExistsError, match=r"is in the way of the ensemble|holds another thing of ours, a 'student'"
    ):
        model_ensemble().save_pretrained(folder)
    assert contents(folder) == before


def test_rounds_of_a_trainer_survive_a_save_into_its_folder(of_adapters: TokenEnsemble, tmp_path: Path) -> None:
    (tmp_path / "run" / "rounds" / "1").mkdir(parents=True)
    (tmp_path / "run" / "rounds" / "1" / "weights.npy").write_bytes(b"weights")
    of_adapters.save_pretrained(tmp_path / "run")
    of_adapters.save_pretrained(tmp_path / "run")
    assert (tmp_path / "run" / "rounds" / "1" / "weights.npy").read_bytes() == b"weights"


def test_saving_into_the_working_directory_and_through_a_link(
    of_models: TokenEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    of_models.save_pretrained(".")
    of_models[:2].save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and Path.cwd() == tmp_path / "here"
    assert TokenEnsemble.from_pretrained(".").num_experts == 2


# The files themselves


def test_only_our_own_files_are_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a", {"one": "1", "sub/two": "2", "sub/deep/three": "3"})
    (tmp_path / "a" / "theirs").write_text("x")
    write(tmp_path / "a", {"one": "11", "other/four": "4"})
    assert texts(tmp_path / "a") == {"one": "11", "other/four": "4", "theirs": "x"}
    assert not (tmp_path / "a" / "sub").exists()


def test_a_readme_that_was_written_on_stays(tmp_path: Path) -> None:
    write(tmp_path / "a", {"README.md": "made"})
    write(tmp_path / "a", {"README.md": "made anew"})
    assert texts(tmp_path / "a") == {"README.md": "made anew"}
    (tmp_path / "a" / "README.md").write_text("written on")
    for _ in range(2):
        write(tmp_path / "a", {"README.md": "made again", "x": "1"})
        assert texts(tmp_path / "a") == {"README.md": "written on", "x": "1"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"x": "theirs"}, {"x": "ours"}),
        ({"experts/1/x": "theirs"}, {"experts/1/y": "ours"}),
        ({"experts/3/x": "theirs"}, {"experts/1/y": "ours"}),
        ({"experts": "theirs"}, {"experts/1/y": "ours"}),
        ({"x/y": "theirs"}, {"x": "ours"}),
        ({"model.safetensors": "theirs"}, {"x": "ours"}),
        ({"adapter_config.json": "theirs"}, {"x": "ours"}),
        ({".ensemw2s-partial/x": "theirs"}, {"x": "ours"}),
    ],
)
def test_what_is_in_the_way_is_named_and_stays(theirs: dict[str, str], ours: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for name, text in theirs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(FileExistsError, match=r"a/\S+ is in the way"):
        write(folder, ours)
    assert texts(folder) == theirs


def test_a_linked_folder_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "experts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="experts is in the way"):
        write(tmp_path / "a", {"experts/1": "ours"})
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["../precious", "/precious", "link/precious", "sub/../../precious"])
def test_a_list_that_names_files_elsewhere_deletes_nothing(name: str, tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": "1"})
    for place in (tmp_path / "precious", tmp_path / "elsewhere" / "precious"):
        place.parent.mkdir(exist_ok=True)
        place.write_text("only copy")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    listed = name if name[0] != "/" else str(tmp_path / "precious")
    (tmp_path / "a" / MANIFEST).write_text(f'{{"kind": "ensemble", "files": {{"{listed}": null}}}}')
    with pytest.raises(ValueError, match=r"ensemw2s\.json is no list of the files in its folder"):
        write(tmp_path / "a", {"y": "2"})
    assert (tmp_path / "precious").exists() and (tmp_path / "elsewhere" / "precious").exists()


def test_files_that_a_stranger_made_ready_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_text("only copy")
    write(tmp_path / "a", {"link/x": "theirs"})
    (tmp_path / "b").mkdir()
    (tmp_path / "a").rename(tmp_path / "b" / ".ensemw2s-ready")
    (tmp_path / "b" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="link/x would be written through a link"):
        write(tmp_path / "b", {"y": "ours"})
    assert (tmp_path / "elsewhere" / "x").read_text() == "only copy"


def test_a_failure_leaves_all_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": "1"})
    for error, expected in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "full"), DiskFullError)):
        for folder in (tmp_path / "a", tmp_path / "b"):
            with pytest.raises(expected), own_files(folder, "ensemble") as aside:
                (aside / "x").write_text("2")
                raise error
    assert texts(tmp_path / "a") == {"x": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [MANIFEST, "x"]


def test_a_file_and_a_closed_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file is a file: name a folder to save the ensemble in"):
        write(tmp_path / "file", {"x": "1"})
    (tmp_path / "closed").mkdir(mode=0o555)
    with as_nobody(tmp_path), pytest.raises(PermissionError, match="closed cannot be written"):
        write(tmp_path / "closed", {"x": "1"})


# Kills: the battery kills a process at every step; here each state between two steps is made by hand


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, replaced: int) -> None:
    """Save anew into `folder`, and stop after so many files are in their places."""
    moves = 0
    replace = Path.replace

    def stop(path: Path, target: Any) -> Any:
        nonlocal moves
        if moves == replaced:
            raise KeyboardInterrupt
        moves += 1
        return replace(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", stop)
        write(folder, {"a": "new a", "b": "new b", "d/e": "new e"})


@pytest.mark.parametrize("replaced", [0, 1, 2, 3])
def test_between_two_moves_the_new_files_count(replaced: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    write(folder, {"a": "old a", "b": "old b", "c/f": "old f"})
    (folder / "theirs").write_text("x")
    interrupted(folder, monkeypatch, replaced)
    new = {"a": "new a", "b": "new b", "d/e": "new e"}
    assert texts(whole(folder)) == new
    # Reading changes nothing; the next writer finishes, even if it is killed as well.
    state = texts(folder)
    assert texts(whole(folder)) == new and texts(folder) == state
    settle(folder)
    assert texts(folder) == new | {"theirs": "x"}
    assert whole(folder) == folder and not (folder / "c").exists()


def test_without_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(1, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "a", {"x": "1", "y": "1"})
    write(tmp_path / "a", {"x": "2"})
    assert texts(tmp_path / "a") == {"x": "2"}


def test_an_ensemble_is_loaded_from_where_it_is_ready(
    of_models: TokenEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    of_models.save_pretrained(folder, record={"rounds": [1]})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ensemw2s.models.own_files._put", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        of_models[:2].save_pretrained(folder, record={"rounds": [2]})
    assert TokenEnsemble.from_pretrained(folder).config.expert_weights == WEIGHTS[:2]
    assert AutoModelForCausalLM.from_pretrained(folder).config.expert_weights == WEIGHTS[:2]
    assert read_json(whole(folder) / "boosting.json") == {"rounds": [2]}
    of_models[2:].save_pretrained(folder)
    assert not (folder / "boosting.json").exists()
    assert TokenEnsemble.from_pretrained(folder).config.expert_weights == WEIGHTS[2:]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_others_may_read_what_is_saved(of_models: TokenEnsemble, tmp_path: Path) -> None:
    # safetensors keeps its files to their owner.
    before = os.umask(0o022)
    try:
        for _ in range(2):
            of_models.save_pretrained(tmp_path / "a")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "a").rglob("*") if file.is_file()} == {"0o644"}
    shutil.rmtree(tmp_path / "a")
    before = os.umask(0o077)
    try:
        of_models.save_pretrained(tmp_path / "a")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "a").rglob("*") if file.is_file()} == {"0o600"}
