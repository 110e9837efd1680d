"""Folders of ours: claimed, locked, kept account of; nothing else is deleted, nothing damaged is used."""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemw2s.runtime import accounts, claims
from ensemw2s.runtime.accounts import ACCOUNT
from ensemw2s.runtime.claims import InUseError, Kind, claimed, held_file
from ensemw2s.runtime.files import (
    append_json_lines,
    map_array,
    new_file,
    new_folder,
    read_json,
    read_json_lines,
    settle,
    write_array,
    write_json,
    write_json_lines,
)

KIND = Kind("thing", "a thing", files=("parts", "*.npy"))


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "ours"
    with claimed(folder, KIND, {"a": 1}):
        write_json(folder / "parts" / "one.json", {"b": [1, 2, 3]})
        write_json_lines(folder / "parts" / "rows.jsonl", [{"i": i} for i in range(8)])
        write_array(folder / "array.npy", np.arange(6.0))
        with new_folder(folder / "parts" / "model") as aside:
            (aside / "weights").write_bytes(bytes(range(200)))
            (aside / "README.md").write_text("# words")
    yield folder


# One configuration


def test_the_same_claim_comes_back_and_another_names_what_differs(ours: Path) -> None:
    with claimed(ours, KIND, {"a": 1}):
        assert (ours / "array.npy").exists()
    message = r"ours holds a thing of another configuration; differing: a, b\. Choose another output_dir, or delete"
    with pytest.raises(ValueError, match=message), claimed(ours, KIND, {"a": 2, "b": {"c": 3}}):
        pass
    assert (ours / "array.npy").exists()


def test_overwriting_deletes_its_own_files_and_leaves_what_lies_beside_them(ours: Path) -> None:
    (ours / "thesis.txt").write_text("years of work")
    with claimed(ours, KIND, {"a": 2}, overwrite=True):
        assert sorted(p.name for p in ours.iterdir() if not p.name.startswith("ensemw2s.")) == ["thesis.txt"]
    assert (ours / "thesis.txt").read_text() == "years of work"


def link_to_elsewhere(folder: Path) -> Path:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "only_copy").write_text("x")
    (folder / "parts" / "link").symlink_to(folder.parent / "elsewhere")
    return folder / "parts" / "link"


def put(folder: Path, name: str) -> Path:
    (folder / name).write_text("only copy")
    return folder / name


@pytest.mark.parametrize(
    "place",
    [
        lambda folder: put(folder, "parts/notes.txt"),
        lambda folder: put(folder, "parts/model/only_copy.csv"),
        lambda folder: put(folder, "mine.npy"),
        link_to_elsewhere,
    ],
)
def test_overwriting_is_refused_where_strangers_files_lie_among_ours(ours: Path, place: Callable[[Path], Path]) -> None:
    before = sorted(ours.rglob("*"))
    strange = place(ours)
    with pytest.raises(ValueError, match=f"not ours: {strange.relative_to(ours)}. Nothing was deleted"):  # noqa: SIM117
        with claimed(ours, KIND, {"a": 2}, overwrite=True):
            pass
    assert sorted({*before, strange}) == sorted(ours.rglob("*"))


@pytest.mark.parametrize(
    "content", [b"{}", b'{"made_by": "someone", "kind": "thing", "description": {}}', b"\xff", b"["]
)
def test_a_name_alone_makes_no_folder_ours(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ensemw2s.thing.json").write_bytes(content)
    (tmp_path / "array.npy").write_bytes(b"precious")
    with (
        pytest.raises(
            ValueError, match=r"ensemw2s\.thing\.json is (no marker of this package|not valid JSON|not UTF-8)"
        ),
        claimed(tmp_path, KIND, {"a": 2}, overwrite=True),
    ):
        pass
    assert (tmp_path / "array.npy").read_bytes() == b"precious"


def test_a_folder_with_such_names_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    with (
        pytest.raises(
            ValueError, match=r"is not empty and holds no thing of ours .*, but parts, which is left as it is"
        ),
        claimed(tmp_path, KIND, {"a": 2}, overwrite=True),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


# One at a time


def child(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except InUseError as error:
            os.write(2, str(error).encode())
            os._exit(3)
        finally:
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def claim(folder: Path) -> None:
    with claimed(folder, KIND, {"a": 1}):
        pass


def test_a_folder_is_used_by_one_process_which_the_other_names(ours: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with claimed(ours, KIND, {"a": 1}):
        assert child(lambda: claim(ours)) == 3
        words = f"{ours} is in use by process {os.getpid()} on {platform.node()}, since "
        assert words in capfd.readouterr().err
        with pytest.raises(InUseError, match="is in use by process"):
            claim(ours)
    assert child(lambda: claim(ours)) == 0


def test_a_killed_process_holds_nothing(ours: Path) -> None:
    def die() -> None:
        with claimed(ours, KIND, {"a": 1}):
            os.kill(os.getpid(), signal.SIGKILL)

    assert child(die) == -signal.SIGKILL
    claim(ours)


def test_a_holder_on_another_machine_is_named_and_not_judged(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with claimed(ours, KIND, {"a": 1}):
        KIND.lock(ours).write_text(json.dumps({"host": "far-away", "pid": 7, "since": "yesterday"}))
        with pytest.raises(
            InUseError, match=r"process 7 on far-away.* If it is certain that far-away is gone, delete "
        ):
            claim(ours)
        KIND.lock(ours).write_text("")
        with pytest.raises(InUseError, match=r"by another process, says .*ensemw2s\.thing\.lock"):
            claim(ours)


def test_a_single_file_is_locked_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    with held_file(file):
        with pytest.raises(InUseError, match=r"labels\.jsonl is in use"), held_file(file):
            pass
        with held_file(tmp_path / "other.jsonl"):
            pass
    with held_file(file), held_file(None):
        pass
    assert list(tmp_path.iterdir()) == []


# What was written


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


READERS = {
    "parts/one.json": read_json, "parts/rows.jsonl": read_json_lines, "array.npy": map_array,
    "parts/model": accounts.check,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", [cut, flip, lambda file: file.write_bytes(b""), Path.unlink])
def test_what_is_damaged_is_refused_by_name(ours: Path, name: str, damage: Callable[[Path], None]) -> None:
    READERS[name](ours / name)
    file = ours / name if (ours / name).is_file() else ours / name / "weights"
    damage(file)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        READERS[name](ours / name)
    assert str(caught.value).startswith(f"{file} is ") and f"Delete {ours / name} and run the same" in str(caught.value)


def test_a_strangers_file_in_the_place_of_ours_is_refused(ours: Path) -> None:
    (ours / "parts" / "two.json").write_text("{}")
    with pytest.raises(ValueError, match=r"two\.json was not written here by this package"):
        read_json(ours / "parts" / "two.json")


def test_texts_beside_weights_are_a_readers_to_change(ours: Path) -> None:
    (ours / "parts/model/README.md").write_text("my words")
    accounts.check(ours / "parts/model")


def test_a_moved_folder_keeps_its_account(ours: Path, tmp_path: Path) -> None:
    moved = ours.rename(tmp_path / "moved")
    assert read_json(moved / "parts/one.json") == {"b": [1, 2, 3]}
    cut(moved / "array.npy")
    with pytest.raises(ValueError, match="is damaged: it has 88 bytes, written were 176"):
        map_array(moved / "array.npy")


def test_a_file_that_grew_is_checked_once_it_has_settled(ours: Path) -> None:
    file = ours / "parts" / "labels.jsonl"
    append_json_lines(file, [{"i": 1}])
    append_json_lines(file, [{"i": 2}])
    accounts.check(file)
    settle(file)
    accounts.check(file)
    cut(file)
    with pytest.raises(ValueError, match="is damaged"):
        accounts.check(file)


def test_a_damaged_account_is_no_account(ours: Path) -> None:
    lines = (ours / ACCOUNT).read_text().splitlines()
    (ours / ACCOUNT).write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"line 2, is damaged .* Move .*ours away"):
        read_json(ours / "parts/one.json")


def test_a_torn_entry_is_dropped_and_written_over(ours: Path) -> None:
    with (ours / ACCOUNT).open("a") as file:
        file.write('{"file": "parts/three.js')
    write_json(ours / "parts/three.json", 3)
    assert read_json(ours / "parts/three.json") == 3
    assert (ours / ACCOUNT).read_text().count("three.js") == 1


def test_what_a_claim_left_is_deleted_beside_a_torn_entry(ours: Path) -> None:
    with (ours / ACCOUNT).open("a") as file:
        file.write('{"file": "parts/three.js')
    claims.discard(ours, KIND)
    assert not (ours / "parts").exists()
    assert "parts/" not in (ours / ACCOUNT).read_text()


def test_a_folder_that_was_replaced_is_checked_for_what_is_in_it_now(ours: Path) -> None:
    model = ours / "parts" / "model"
    (model / "weights").rename(model / "other")
    settle(model)
    accounts.check(ours / "parts" / "model")
    claims.discard(ours, KIND)
    assert not (ours / "parts").exists()


# Temporary names


def test_two_writers_of_one_file_do_not_meet_and_the_last_one_wins(tmp_path: Path) -> None:
    with new_file(tmp_path / "x") as one, new_file(tmp_path / "x") as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "x").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_dead_process_left_unfinished_is_deleted_and_a_living_ones_is_not(tmp_path: Path) -> None:
    def die() -> None:
        with new_file(tmp_path / "x") as aside:
            aside.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert child(die) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with new_file(tmp_path / "x") as alive:
        alive.write_text("slow")
        write_json(tmp_path / "x", "quick")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, "x"])
    assert (tmp_path / "x").read_text() == "slow"


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "a.b.c"])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, 1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("value", "differing"), [(None, []), (3, ["new"])])
def test_a_setting_that_an_older_version_did_not_have_counts_as_null(value: Any, differing: list[str]) -> None:
    assert claims.differing_keys({"a": 1, "new": value}, {"a": 1}) == differing
