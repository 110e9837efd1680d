"""Files that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemw2s.experiments.config import build_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.runtime.accounts import is_partial
from ensemw2s.runtime.files import (
    DiskFullError,
    append_json_lines,
    is_disk_full,
    map_array,
    new_array,
    new_file,
    new_folder,
    read_array,
    read_complete_lines,
    read_json,
    write_array,
    write_json,
    write_json_lines,
)
from ensemw2s.training.checkpoints import seal_checkpoint
from tests.faults import runs


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError, match="half way"), new_file(path) as aside:
        aside.write_text("half")
        raise RuntimeError("half way")
    assert read_json(path) == {"a": 1}
    assert names(tmp_path) == ["value.json"]


def test_a_folder_appears_whole_and_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    with new_folder(path) as aside:
        (aside / "old").write_text("1")
        assert not names(path)
    with pytest.raises(FileExistsError, match="model exists, and is not deleted"), new_folder(path) as aside:
        raise AssertionError("the block must not run")
    with pytest.raises(FileExistsError, match="old exists"), new_folder(path / "old") as aside:
        raise AssertionError("the block must not run")
    assert names(path) == ["old"] and (path / "old").read_text() == "1"
    assert names(tmp_path) == ["model"]


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "model") as aside:
        (aside / "new").write_text("2")
        raise KeyboardInterrupt
    assert not names(tmp_path)


def test_a_full_disk_is_named_and_harms_nothing(tmp_path: Path) -> None:
    # /dev/full refuses every byte with ENOSPC, as a full disk does.
    path = tmp_path / "weights.npy"
    write_array(path, np.arange(3))
    refused = pytest.raises(DiskFullError, match=r"no space left on the disk that holds .*weights\.npy")
    with refused, new_file(path), Path("/dev/full").open("wb") as full:
        full.write(b"x" * 10_000)
        full.flush()
    np.testing.assert_array_equal(read_array(path), np.arange(3))
    assert names(tmp_path) == ["weights.npy"]


def test_a_full_disk_is_known_from_what_torch_says() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.save({"weight": torch.zeros(10_000)}, "/dev/full")
    assert is_disk_full(caught.value)


def test_numpy_and_safetensors_report_a_full_disk_in_words() -> None:
    assert is_disk_full(OSError("1000 requested and 24 written"))
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.EACCES, "denied"))


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_json_lines(path, [{"i": 0}, {"i": 1}])
    with path.open("a") as file:
        file.write('{"i": 2, "answ')
    assert read_complete_lines(path) == [{"i": 0}, {"i": 1}]
    with path.open("a") as file:
        file.write(json.dumps({"i": 3}) + "\n")
    assert [row["i"] for row in read_complete_lines(path)] == [0, 1, 3]


def test_floats_keep_every_bit_and_nan_is_refused(tmp_path: Path) -> None:
    value = float(np.nextafter(0.1, 1))
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert read_json(tmp_path / "x.json") == value


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not valid JSON"):
        read_json(tmp_path / "broken.json")


def test_no_pickle_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_array(tmp_path / "bad.npy")


def test_a_new_array_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    with new_array(tmp_path / "a.npy", 1000) as array:
        array[:] = values
        assert not (tmp_path / "a.npy").exists()
    mapped = map_array(tmp_path / "a.npy")
    np.testing.assert_array_equal(mapped, values)
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
    with pytest.raises(KeyError), new_array(tmp_path / "a.npy", 3) as array:
        raise KeyError("stop")
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), values)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_a_disk_too_small_for_a_new_array_is_told_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        assert length >= 8000
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=r"a\.npy"), new_array(tmp_path / "a.npy", 1000):
        raise AssertionError("the block must not run")
    assert not list(tmp_path.iterdir())


def test_a_strangers_file_is_not_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for text in (b"precious", b'{"a": 1}\nnotes', b"[1, 2]", b'{"a": 1}\n[2]\n{"b'):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"notes\.txt"):
            read_complete_lines(path)
        assert path.read_bytes() == text


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": }\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is not valid JSON"):
        read_complete_lines(path)


# What a power cut cannot undo


class Synced:
    """Notes what is brought to the disk, and refuses a name for what is not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: set[tuple[int, int, int]] = set()
        self.owed: set[Path] = set()
        fsync, replace = os.fsync, os.replace

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            self.known.add(self._state(os.fstat(descriptor)))
            self.owed.discard(Path(f"/proc/self/fd/{descriptor}").readlink())

        def renamed(source: Path, target: Path, **options: Any) -> None:
            source = Path(source)
            if any(map(is_partial, source.parts[:-1])):
                # A part of what is brought to the disk as a whole.
                return replace(source, target, **options)
            for path in [source, *(source.rglob("*") if source.is_dir() else ())]:
                assert self._state(path.stat()) in self.known, f"{path} is not on the disk, and gets its name"
            replace(source, target, **options)
            self.owed.add(Path(target).parent)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", renamed)

    @staticmethod
    def _state(found: os.stat_result) -> tuple[int, int, int]:
        return found.st_ino, found.st_size, found.st_mtime_ns


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "weights").write_bytes(bytes(1000))
    (folder / "settings").write_text("x")


def test_what_has_a_name_is_on_the_disk_and_so_is_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = Synced(monkeypatch)
    write_json(tmp_path / "a" / "b" / "value.json", 1)
    write_array(tmp_path / "array.npy", np.arange(3))
    with new_array(tmp_path / "mapped.npy", 10) as array:
        array[:] = 2
    with new_folder(tmp_path / "model") as aside:
        fill(aside)
        write_json(aside / "cost.json", 3)
    append_json_lines(tmp_path / "rows.jsonl", [{"i": 1}])
    assert Synced._state((tmp_path / "rows.jsonl").stat()) in synced.known
    assert not synced.owed
    # The folders that were made on the way.
    assert all(
        Synced._state(path.stat())[0] in {inode for inode, _, _ in synced.known} for path in (tmp_path / "a", tmp_path)
    )


def test_all_that_a_run_keeps_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = Synced(monkeypatch)
    config = runs.settings(runs.sources(tmp_path), tmp_path)
    Experiment(build_config(config)).run(("data", "boost", "label"))
    assert not any(folder.exists() for folder in synced.owed)
    kept = [
        path
        for path in (tmp_path / "small").rglob("*")
        if path.is_file() and not path.name.endswith((".lock", "costs.jsonl"))
    ]
    lost = [path for path in kept if Synced._state(path.stat()) not in synced.known]
    assert len(kept) > 50 and not lost


def test_a_checkpoint_counts_once_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = Synced(monkeypatch)
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    fill(folder)
    seal_checkpoint(folder, {"seconds": 1.0})
    for path in folder.rglob("*"):
        assert Synced._state(path.stat()) in synced.known or path.is_dir()
    assert (folder / "complete.json").exists()
