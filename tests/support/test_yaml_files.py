"""YAML from anyone: plain values, or one line that says why not, at once."""

import datetime
import os
from pathlib import Path
from typing import Any

import pytest

from mergekit_vision.errors import InputError
from mergekit_vision.support.yaml_files import read_yaml

BOMB = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("\ufeffa: 1", {"a": 1}),
        ("a: &x [1, 2]\nb: *x\nc: {<<: {d: 4}, e: 5}", {"a": [1, 2], "b": [1, 2], "c": {"d": 4, "e": 5}}),
        ("{a: {b: 1}, c: {b: 2}, 1: 2020-01-02}", {"a": {"b": 1}, "c": {"b": 2}, 1: datetime.date(2020, 1, 2)}),
        ("'größe ✓ 🙂'", "größe ✓ 🙂"),
        (str(2**255), 2**255),
    ],
)
def test_plain_values_are_read(tmp_path: Path, text: str, expected: Any) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "x.yaml") == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, "aliases stand for more than"),
        (MERGES, "aliases stand for more than"),
        ("&a [*a]", "or for themselves"),
        ("&a {<<: *a}", "or for themselves"),
        (CHAIN, "nested more than 100 levels"),
        ("[" * 10_000, "nested more than 100 levels"),
        ("[" * 150 + "]" * 150, "nested more than 100 levels"),
        ("- " * 10_000, "nested more than 100 levels"),
        ("a: 1\n? [b]\n: 1", "line 2: found unhashable key"),
        ("? {b: c}\n: 1", "unhashable key"),
        ("a: 1\na: 2", "line 2: key 'a' is given twice"),
        ("d: 2020-13-45", "line 1: '2020-13-45' is no timestamp"),
        ("!!int ''", "is no int"),
        ("!!int x", "'x' is no int"),
        ("!!float ''", "is no float"),
        ("!!bool maybe", "'maybe' is no bool"),
        ("!!timestamp x", "'x' is no timestamp"),
        ("!!binary ü", "line 1"),
        ("!unknown x", "line 1: could not determine a constructor"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("!!map x", "expected a mapping node"),
        ("n: " + "9" * 5000, "is no int"),
        ("n: 0x" + "f" * 5000, "more than 77 digits"),
        (r'"\ud800"', "half of a character"),
        ("a: [", "line 1"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("--- a\n--- b", "found another document"),
        ("*nothing", "found undefined alias"),
        (b"a: \x00", "special characters are not allowed"),
        (b"a: \xff", "not UTF-8 text (byte 3)"),
        ("a: 1".encode("utf-16"), "not UTF-8 text (byte 0)"),
        (b"\x80\x02}q\x00.", "not UTF-8 text"),
        (b"#" * (5 << 20), "5242880 bytes"),
    ],
)
def test_anything_else_is_one_line(tmp_path: Path, content: str | bytes, reason: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert len(message.splitlines()) == 1
    assert len(message) < 300 + len(str(path))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path, "a directory"),
        (tmp_path / "pipe", "a pipe or device"),
        (Path("/dev/null"), "a pipe or device"),
        (tmp_path / "x.yaml", "No such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "pipe" / "x", "Not a directory"),
    ):
        with pytest.raises(InputError, match=reason):
            read_yaml(path)
