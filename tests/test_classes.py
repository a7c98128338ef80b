"""What is known of the classes of data: names, counts, and the file that a run keeps."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from moe_diffusion import classes
from moe_diffusion.classes import Classes
from moe_diffusion.conditions import Field
from moe_diffusion.data.sources import Digits
from moe_diffusion.errors import UserError
from moe_diffusion.models.stack import Model
from moe_diffusion.sampling import labels
from moe_diffusion.sampling.conditions import captions, default_conditions

PETS = Classes({"label": 3}, ("cat", "7", "grey\nowl"), (120, 1500, 42), "folder:/pets", 1662)


class Pets(SimpleNamespace):
    def __len__(self):
        return 1662


class Thousand(Model):
    def cond_spec(self):
        return {"label": Field((), "int32", 1000)}


def pets():
    """A source of PETS."""
    return Pets(
        cond_spec={"label": Field((), "int32", 3), "text": Field((4,), "int32", 99)},
        class_names=list(PETS.names),
        labels=np.repeat([0, 1, 2], PETS.counts),
    )


def test_a_table_of_classes():
    assert classes.of_source(pets(), "folder:/pets") == PETS
    assert classes.table(PETS).splitlines() == [
        "classes            3",
        "fewest images     42  grey?owl",
        "most images    1,500  7",
    ]
    assert classes.table(classes.of_source(Digits("train"))).splitlines() == [
        "classes         10",
        "fewest images  139  class 8",
        "most images    146  class 1",
    ]
    assert classes.table(Classes({"label": 3})) == "classes        3"
    assert classes.table(Classes({"style": 3})) == classes.table(classes.NOTHING) == ""


def test_a_class_without_an_image_is_counted():
    source = SimpleNamespace(cond_spec={"label": Field((), "int32", 4)}, labels=np.array([2, 0, 2]))
    assert classes.of_source(source).counts == (1, 0, 2, 0)


def test_what_does_not_fit_the_number_of_classes_is_not_known():
    for changes in ({"class_names": ["a"]}, {"class_counts": [1]}, {"labels": np.array([0, 4])}):
        source = SimpleNamespace(cond_spec={"label": Field((), "int32", 4)}, **changes)
        assert classes.of_source(source) == Classes({"label": 4})
    source = SimpleNamespace(cond_spec={"label": Field((), "int32")}, class_names=["a"])
    assert classes.of_source(source) == classes.NOTHING


def test_a_run_keeps_its_classes(tmp_path):
    assert classes.of_run(tmp_path) == classes.NOTHING
    PETS.save(tmp_path)
    assert classes.of_run(tmp_path) == PETS
    stored = json.loads((tmp_path / "data.json").read_text())
    assert stored["records"] == 1662 and stored["class_counts"] == [120, 1500, 42]
    few = Classes({"label": 3}, source="tfds:pets")
    few.save(tmp_path)
    assert classes.of_run(tmp_path) == few


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "[" * 100_000,
        '{"num_values": [3]}',
        '{"num_values": {"label": "3"}}',
        '{"num_values": {"label": 0}}',
        '{"num_values": {"label": -1}}',
        '{"num_values": {"label": NaN}}',
        '{"num_values": {"label": true}}',
        '{"num_values": {"label": 1e9}}',
        '{"num_values": {"label": 99999999999}}',
        '{"num_values": {"label": null}}',
        '{"num_values": {"label": 2}, "class_names": ["cat"]}',
        '{"num_values": {"label": 2}, "class_names": ["cat", 7]}',
        '{"num_values": {"label": 2}, "class_names": "ab"}',
        '{"num_values": {"label": 1}, "class_counts": [-1]}',
        '{"num_values": {"label": 1}, "source": 3}',
        '{"class_names": ["cat"]}',
    ],
)
def test_a_damaged_file_is_named(text, tmp_path):
    (tmp_path / "data.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="data.json.*: restore it, or delete it to draw"):
        classes.of_run(tmp_path)


def test_labels_keep_their_meaning_when_a_run_is_resumed():
    def now(**changes):
        return Classes(
            **{"num_values": {"label": 3}, "names": ("a", "b", "c"), "source": "x"} | changes
        )

    before = now()
    for same in (
        now(),
        now(names=()),
        now(source="y", names=("b", "c", "d")),
        now(counts=(1, 2, 3)),
    ):
        classes.check_same(before, same, "W")
    classes.check_same(classes.NOTHING, now(), "W")
    for other, what in (
        (now(names=("a", "aa", "b")), "class 1 was b, now it is aa"),
        (
            now(num_values={"label": 4}, names=("a", "b", "c", "d")),
            "it had 3 classes, now it has 4",
        ),
        (now(num_values={"label": 2}, names=()), "it had 3 classes, now it has 2"),
    ):
        with pytest.raises(
            UserError, match=f"x has other classes than when W began .{what}.: restore"
        ):
            classes.check_same(before, other, "W")


def test_only_what_was_trained_is_drawn():
    model = Thousand()
    assert default_conditions(model, 6, known=PETS)["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert default_conditions(model, 6, source=pets())["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert default_conditions(model, 4)["label"].tolist() == [0, 1, 2, 3]
    assert labels.num_labels(model, "x", PETS) == 3 and labels.num_labels(model, "x") == 1000
    line = "the data has 3 of the 1,000 classes that the model knows: only these are drawn"
    assert labels.untrained(model, PETS) == line
    for all_of_them in (classes.NOTHING, Classes({"label": 1000}), Classes({"style": 3})):
        assert labels.untrained(model, all_of_them) is None


def test_labels_by_name_and_number():
    def chosen(text, known=PETS):
        return labels.parse_labels(text, Thousand(), known).tolist()

    assert chosen("cat") == [0] and chosen("cat,2") == [0, 2] == chosen(" cat , 2 ")
    assert chosen("7") == [1]  # exactly a name, though a number, too
    assert chosen("7,1") == [1, 1]
    assert chosen("7", classes.NOTHING) == [7]
    assert chosen("2,0,cat") == [2, 0, 0]
    fish = Classes({"label": 4}, ("tench, Tinca tinca", "tench", "crane", "crane"))
    assert chosen("tench, Tinca tinca", fish) == [0] and chosen("tench", fish) == [1]
    assert chosen("tench,tench, Tinca tinca,3", fish) == [1, 0, 3]
    assert chosen("tench,Tinca", Classes({"label": 2}, ("tench,Tinca", "x"))) == [0]
    for text, known, message in (
        ("crane", fish, "--labels: crane is the name of 2 and 3: give a number"),
        ("Cta", PETS, "--labels: no class is called 'Cta'; nearest: cat"),
        ("grey owl", PETS, "no class is called 'grey owl'; nearest: grey.owl"),
        ("xyz", PETS, "no class is called 'xyz'; nearest: cat is one"),
        ("cat,", PETS, "no class is called ''"),
        ("3", PETS, "--labels: 3 is no class; the data of this run has 0 to 2"),
        ("-1", PETS, "--labels: -1 is no class"),
        ("cat", classes.NOTHING, "--labels: 'cat' is not a number like 3"),
        ("1000", classes.NOTHING, "1000 is no class; this model knows 0 to 999"),
        ("9" * 30, classes.NOTHING, "9 is no class"),
        ("9" * 9000, classes.NOTHING, "--labels: '9+...9+' is not a number"),
    ):
        with pytest.raises(UserError, match=message):
            chosen(text, known)
    assert labels.described(np.array([2, 0, 2, 1]), PETS) == "0 cat, 1 7, 2 grey?owl"


def test_captions_are_names_where_there_are_names():
    cond = {"label": np.array([0, 2, 5])}
    assert captions(Thousand(), cond, PETS) == ["cat", "grey?owl", "5"]
    assert captions(Thousand(), cond) == ["0", "2", "5"]


def test_a_file_of_names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("Katze\nHund\nKäuzchen\n", encoding="utf-8")
    named = classes.with_names(PETS, path, 1000)
    assert named.names == ("Katze", "Hund", "Käuzchen") and named.num_values == {"label": 3}
    path.write_text("".join(f"class {i}\r\n" for i in range(1000)))
    assert len(classes.with_names(classes.NOTHING, path, 1000).names) == 1000
    assert classes.with_names(PETS, path, 1000).names == ("class 0", "class 1", "class 2")
    for content, message in (
        (b"a\nb\n", "names.txt has 2 names for 3 classes: give one for each"),
        (b"a\n\nc\n", "line 2 of .*names.txt is empty: name every class"),
        (b"\xff\n", "names.txt cannot be read .*: give a text file"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            classes.with_names(PETS, path, 1000)
    with pytest.raises(UserError, match="cannot be read .no such file.: give a text file"):
        classes.with_names(PETS, tmp_path, 1000)
