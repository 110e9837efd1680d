"""JSON and YAML that somebody else wrote: bounded, every key once, and words that mean what they say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ensemw2s.runtime.parsing import MOST_LEVELS, parse_json, parse_yaml, read_text, require_file

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_values_come_back_from_json(value: Any) -> None:
    assert parse_json(json.dumps(value), "f") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"), "f") == value


class Quoted(yaml.SafeDumper):
    """Puts every text in quotes; of its own accord PyYAML leaves 0E0 or 08 bare, which YAML 1.2 reads as numbers."""


Quoted.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


@given(PLAIN)
def test_plain_values_come_back_from_yaml(value: Any) -> None:
    assert parse_yaml(yaml.dump(value, Dumper=Quoted), "f") == value


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("1e-3", 0.001), ("1.5e3", 1500.0), (".5", 0.5), ("1.", 1.0), ("0x10", 16), ("0o17", 15), ("-0", 0), ("+7", 7),
        ("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None), (".inf", float("inf")),
        ("2024-01-01", "2024-01-01"), ("y", "y"), ("=", "="), ("'no'", "no"), ('"012"', "012"), ("0b11", "0b11"),
        ("None", "None"), ("nan", "nan"), ("1e", "1e"), ("1_a", "1_a"), ("😀", "😀"),
    ],
)  # fmt: skip
def test_plain_words_mean_what_they_mean_in_yaml_1_2(word: str, meant: Any) -> None:
    found = parse_yaml(f"a: {word}", "f")["a"]
    assert (type(found), found) == (type(meant), meant)


@pytest.mark.parametrize("word", ["no", "Yes", "ON", "off", "012", "00", "1_000", "1:30", "-0_1", "190:20:30"])
def test_words_that_yaml_1_1_and_1_2_read_differently_are_refused(word: str) -> None:
    for text in (f"a: {word}", f"a: [{word}]", f"{word}: a", f"a: {{b: {word}}}"):
        with pytest.raises(ValueError, match=rf"f cannot be read as YAML, line 1, column .*{word} means one thing"):
            parse_yaml(text, "f")


def test_merged_keys_may_be_set_again_but_written_ones_not() -> None:
    text = "x: &x {a: 1, b: 2}\ny: &y {<<: *x, b: 3}\nz: {<<: *y, a: 4}\n"
    assert parse_yaml(text, "f")["z"] == {"a": 4, "b": 3}
    # The first of a list of mappings comes first.
    text = "x: &x {a: 1, long: 1}\ny: &y {a: 2, long: 2, c: 2}\nz: {<<: [*x, *y]}\n"
    assert parse_yaml(text, "f")["z"] == {"a": 1, "long": 1, "c": 2}
    with pytest.raises(ValueError, match="line 1, column 9: << takes mappings alone"):
        parse_yaml("z: {<<: 5}", "f")
    with pytest.raises(ValueError, match=r"f cannot be read as YAML, line 3, column 1: the key 'a' .* first in line 1"):
        parse_yaml("a: 1\nb: 2\na: 3\n", "f")
    with pytest.raises(ValueError, match=r"the key '<<' stands twice"):
        parse_yaml("x: &x {a: 1}\ny: {<<: *x, <<: *x}", "f")
    with pytest.raises(ValueError, match=r"f: the key 'a' stands twice in one object \(lines 2, 4\)"):
        parse_json('{"b": {\n"a": 1,\n"c": 2,\n"a": 3}}', "f")


def test_levels_are_bounded_the_same_in_both() -> None:
    for parse in (parse_json, parse_yaml):
        assert parse("[" * MOST_LEVELS + "]" * MOST_LEVELS, "f")
        for depth in (MOST_LEVELS + 1, 100_000):
            with pytest.raises(ValueError, match=f"nested more than {MOST_LEVELS} levels deep"):
                parse("[" * depth + "]" * depth, "f")


def test_anchors_count_for_what_they_stand_for() -> None:
    def doubled(times: int) -> str:
        return "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, times))

    assert parse_yaml(doubled(10), "f")["a9"]
    with pytest.raises(ValueError, match="more than 100,000 values, those that aliases stand for included"):
        parse_yaml(doubled(30), "f")
    with pytest.raises(ValueError, match="line 1, column 8: an alias within what it stands for"):
        parse_yaml("a: &a [*a]", "f")


@pytest.mark.parametrize("tag", ["!!set {a}", "!!binary aGk=", "!!timestamp 2024-01-01", "!!omap [a: 1]", "!x 1"])
def test_only_plain_values_can_be_made(tag: str) -> None:
    with pytest.raises(ValueError, match=r"f cannot be read as YAML.*could not determine a constructor"):
        parse_yaml(f"a: {tag}", "f")


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfx")
    for name, error, message in (
        ("pipe", ValueError, "pipe is a pipe, socket or device, not a file: give one"),
        ("link", FileNotFoundError, "link is a link to gone, which does not exist: give one"),
        ("text/below", FileNotFoundError, "text/below does not exist: give one"),
        (".", ValueError, "is a folder, not a file: give one"),
        ("a\0b", ValueError, "is no name of a file .*: give one"),
    ):
        with pytest.raises(error, match=message):
            require_file(tmp_path / name, "give one")
    assert read_text(require_file(tmp_path / "text", "give one")) == "x"
    with pytest.raises(ValueError, match="text has 4 bytes, expected at most 3"):
        read_text(tmp_path / "text", most_bytes=3)
