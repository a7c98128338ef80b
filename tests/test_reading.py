"""The guarded reader: what a file may be, what it may hold, and what messages look like."""

from __future__ import annotations

import os
import time

import pytest

from moe_diffusion import reading
from moe_diffusion.checks import check_seed
from moe_diffusion.errors import UserError, explained, shown
from moe_diffusion.reading import Key


def test_what_is_no_regular_file(tmp_path):
    """A pipe would be waited for without end."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    for path, message in (
        (tmp_path / "pipe.json", "pipe.json is a device or pipe: name a regular file"),
        ("/dev/zero", "/dev/zero is a device or pipe"),
        (tmp_path, "is a folder: name a regular file"),
        (tmp_path / "none.json", "no config at .*none.json"),
        (tmp_path / "loop.json", "cannot read .*loop.json .Too many levels of symbolic links"),
        ("a\0b", "cannot read a.b .embedded null"),
        ("x" * 5000, "cannot read x+ .*File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            reading.read_json(path, what="config")
    (tmp_path / "file.json").write_text("[1]")
    (tmp_path / "link.json").symlink_to("file.json")
    assert reading.read_json(tmp_path / "link.json") == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is not valid JSON \(Expecting value"),
        ("{", "is not valid JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        ('{"a": [0, NaN]}', r"x.json: a\[1\] is nan, not a finite number: mend it"),
        ('{"a": {"b": -Infinity}}', "x.json: a.b is -inf, not a finite number"),
        ('{"a": 1e999}', "x.json: a is inf, not a finite"),
        ('{"a": 18446744073709551616}', "x.json: a is an integer beyond 64 bits: mend it"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("[" * 40 + "]" * 40, "is deeper or larger than 32 levels"),
        ("[" * 10**5, "is deeper than 32 levels: mend it"),
        ('{"\u00e9": "\\ud800"}', None),  # half a character is a text, too
        ("\ufeff[1]", None),  # a byte order mark
    ],
)
def test_json(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    if message is None:
        assert reading.read_json(path, "mend it")
        return
    with pytest.raises(UserError, match=message):
        reading.read_json(path, "mend it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "it refers to itself"),
        ("a: &a {<<: *a}", "it refers to itself"),
        ("a: [&b [1], *b]\nc: *b", None),  # the same list in three places
        (
            "a0: &a0 [0]\n"
            + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 99)),
            r"its references \(\*name\) unfold to more than 2,000,000 values",
        ),
        (
            "a0: &a0 {k: 0}\n"
            + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 99)),
            "unfold to more than",
        ),
        ("a: " + "[" * 40 + "]" * 40, "is deeper or larger than 32 levels"),
        ("a: " + "[" * 10**5, "is deeper than 32 levels"),
        ("a: 1\na: 2", "the key 'a' stands there twice"),
        ("a: .nan", "a is nan, not a finite number"),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
        ("a: !!binary aGVsbG8=", "a is a bytes, no plain value"),
        ("a: !!set {b}", "a is a set, no plain value"),
        ("1: 2", "it has the key 1, no text"),
        ("? [1]\n: 2", "unhashable key"),
        ("a: *b", "undefined alias"),
    ],
)
def test_yaml(text, message, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    start = time.process_time()
    if message is None:
        assert reading.read_table(path)["c"] == [1]
    else:
        with pytest.raises(UserError, match=message):
            reading.read_table(path)
    assert time.process_time() - start < 5


def test_yaml_values_are_those_of_the_authors_code(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("rope: 2d\nrf: True\nday: 2024-01-02\nx: 1.5\nn:\nbase: &b {k: 1}\nm: {<<: *b}")
    values = {"rope": "2d", "rf": True, "day": "2024-01-02", "x": 1.5, "n": None}
    assert reading.read_table(path) == values | {"base": {"k": 1}, "m": {"k": 1}}


def test_what_is_too_large_or_no_text(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(" " * 100 + "1")
    with pytest.raises(UserError, match="x.json is larger than 100 bytes: it is no index"):
        reading.read_text(path, "index", 100)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="x.json is no text in UTF-8 .*: restore or delete it$"):
        reading.read_json(path, "restore or delete it")
    path.write_text("3")
    with pytest.raises(UserError, match="holds 3, not a table of names and values: write one"):
        reading.read_table(path, "write one")


def test_lines_that_are_no_tables():
    assert reading.table_of('{"step": 1}\n') == {"step": 1}
    for line in ("", '{"step": 1', "[1]", "null", '{"a": NaN}', "[" * 10**5):
        assert reading.table_of(line) is None


KEYS = {
    "n": Key((int,), least=1, most=9),
    "x": Key((float,), 0.5),
    "on": Key((bool,), False),
    "sides": Key((list,), [], least=2, most=2, items=Key((int,), least=0)),
    "who": Key((str, type(None)), None),
}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "f lacks n: mend it"),
        ({"n": "3"}, "f: n is '3', not an integer: mend it"),
        ({"n": True}, "f: n is True, not an integer"),
        ({"n": 3.0}, "f: n is 3.0, not an integer"),
        ({"n": 0}, r"f: n is 0, outside 1\.\.9: mend it"),
        ({"n": 3, "x": float("nan")}, "f: x is nan, not a number"),
        ({"n": 3, "x": 10**400}, "f: x is <int>|f: x is 1000.*, not a number"),
        ({"n": 3, "on": 2}, "f: on is 2, not true or false"),
        ({"n": 3, "sides": [1]}, r"f: sides has 1 items, outside 2\.\.2"),
        ({"n": 3, "sides": [1, -1]}, r"f: sides\[1\] is -1, outside 0\.\.inf"),
        ({"n": 3, "who": 1}, "f: who is 1, not text or null"),
        ({"n": 3, "who": None, "x": 1, "on": 1, "sides": [0, 2], "other": object}, None),
    ],
)
def test_keys(table, message):
    if message is None:
        reading.check_keys(table, KEYS, "f", "mend it")
        return
    with pytest.raises(UserError, match=message):
        reading.check_keys(table, KEYS, "f", "mend it")


def test_names_stay_in_their_folder():
    assert reading.plain_name("a-1.safetensors", "f") == "a-1.safetensors"
    for name in ("", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0", "x" * 256):
        with pytest.raises(UserError, match="f: .* is no plain name of a file beside it"):
            reading.plain_name(name, "f")


def test_messages_are_short_single_printable_lines():
    message = str(UserError("a\x1b[31mred\x1b[0m\n\tb\0c" + "x" * 89_000 + ": remedy"))
    assert message.startswith("ared  b?cx") and message.endswith("x: remedy")
    assert len(message) < 3100 and message.isprintable()
    assert str(UserError("caf\u00e9 \ud800")) == "caf\u00e9 ?"
    assert shown("12") == "'12'" and shown([1, 2]) == "[1, 2]"
    assert len(shown("x" * 10**6)) < 100 and len(shown([["x" * 99] * 99] * 99)) < 5000
    assert shown(10**5000) == "<int>"
    with pytest.raises(UserError, match="^inner$"):
        with explained("outer", "mend it"):
            raise UserError("inner")


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 10**5000], ids="abcd")
def test_seeds_that_cannot_be(seed):
    with pytest.raises(UserError, match=r"--seed = .* must be from 0 to 2\^63 - 1"):
        check_seed("--seed", seed)
    check_seed("--seed", 2**63 - 1)
