"""Images with captions in every kind of place: what is found there, and what is refused."""

from __future__ import annotations

import gzip
import json
import tarfile

import pytest

from moe_diffusion.errors import UserError
from moe_diffusion.preparing.captions import open_pairs
from moe_diffusion.preparing.pairs import Unusable, usable
from tests.preparing import caption_places as places
from tests.preparing.caption_places import TEXTS, picture, write_tar
from tests.preparing.scenes import Scenes


def texts(pairs, index):
    return pairs.texts(pairs.pair(index))


def image(pairs, index):
    return pairs.image(pairs.pair(index))


def name(pairs, index):
    return pairs.pair(index).name


def texts_of(pairs):
    return [texts(pairs, i) for i in range(len(pairs))]


def reasons(pairs):
    """Why each pair is unusable, None where it is not."""
    found = []
    for i in range(len(pairs)):
        try:
            if defect := pairs.pair(i).defect:
                raise defect
            texts(pairs, i)
            found.append(None)
        except Unusable as error:
            found.append(error.reason)
    return found


def test_texts_beside_pictures(tmp_path):
    folder = places.write_folder(tmp_path / "x", 6)
    (folder / "part0" / "._000.txt").write_text("of the system")
    pairs = open_pairs(f"folder:{folder}")
    order = [0, 2, 4, 1, 3, 5]
    assert [name(pairs, i) for i in range(6)] == [f"{folder}/part{i % 2}/{i:03}.png" for i in order]
    assert texts_of(pairs) == [[TEXTS[i % 5]] for i in order]
    assert places.mean_colour(image(pairs, 1)) == [14, 90, 241]
    (folder / "part0" / "000.txt").unlink()
    (folder / "part0" / "002.txt").write_bytes(b"")
    (folder / "part1" / "001.txt").write_bytes("été".encode("latin-1"))
    (folder / "part1" / "alone.txt").write_text("a seven")
    pairs = open_pairs(str(folder))  # a path without a kind
    broken = ["no text", "broken text", None, "broken text", None, None, "no image"]
    assert reasons(pairs) == broken and name(pairs, 6) == f"{folder}/part1/alone.txt"
    assert str(pairs.pair(0).defect).startswith(f"{folder}/part0/000.png has no .txt beside it")
    for index, message in ((1, "part0/002.txt: its text is empty"), (3, "001.txt: its text is no")):
        with pytest.raises(Unusable, match=message):
            texts(pairs, index)


def test_metadata_with_several_captions(tmp_path):
    (tmp_path / "1.png").write_bytes(picture(1))
    rows = [
        {"file_name": "1.png", "text": "a seven", "captions": ["three", " a seven ", ""]},
        {"file_name": "./1.png", "captions": ["the digit", "七"]},
        {"file_name": "2.png", "text": "is not there"},
        {"file_name": "1.png", "text": "\ud800"},
        {"file_name": "1.png", "captions": [7]},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metadata.jsonl").write_text(lines + "no JSON\n")
    pairs = open_pairs(f"folder:{tmp_path}")
    assert [texts(pairs, i) for i in range(2)] == [["a seven", "three"], ["the digit", "七"]]
    assert reasons(pairs) == [None, None, "no image", *["broken text"] * 3]
    assert name(pairs, 5) == f"line 6 of {tmp_path}/metadata.jsonl"
    pairs = open_pairs(f"folder:{tmp_path}", "captions")
    assert texts(pairs, 0) == ["three", "a seven"]


def test_journeydb(tmp_path):
    path = places.write_journeydb(tmp_path, 1)
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"img_path": "./012/b.jpg"}) + "\n")
    for place in (tmp_path, path):
        pairs = open_pairs(f"journeydb:{place}")
        assert texts(pairs, 0) == [f"{TEXTS[0]} --ar 16:9", TEXTS[0]]
        assert name(pairs, 0) == f"{tmp_path}/imgs/012/0.jpg" and reasons(pairs) == [
            None,
            "no image",
        ]
    assert texts(open_pairs(f"journeydb:{tmp_path}", "Task2.Caption"), 0) == [TEXTS[0]]
    path.write_text(json.dumps(row | {"img_path": "../../a.jpg"}))
    with pytest.raises(UserError, match="line 1 of .* names '../../a.jpg', which leads out of it"):
        open_pairs(f"journeydb:{tmp_path}")
    (tmp_path / "other.jsonl").write_text("")
    with pytest.raises(UserError, match="must hold one .jsonl of annotations, it has other.jsonl,"):
        open_pairs(f"journeydb:{tmp_path}")


def test_shards(tmp_path):
    """In every way to name them; nothing is unpacked."""
    for number in range(3):
        write_tar(tmp_path / f"{number:05}.tar", places.shard(10 * number, 4 - number))
    for place in ("", "/*.tar", "/{00000..00002}.tar", "/{00000,00001,00002}.tar"):
        pairs = open_pairs(f"webdataset:{tmp_path}{place}")
        numbers = [0, 1, 2, 3, 10, 11, 12, 20, 21]
        assert texts_of(pairs) == [[TEXTS[i % 5]] for i in numbers]
        assert name(pairs, 4) == f"{tmp_path}/00001.tar: 000000010"
    assert places.mean_colour(image(pairs, 8)) == pytest.approx([147, 90, 108], abs=3)
    assert len(open_pairs(f"webdataset:{tmp_path}/00001.tar")) == 3
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_processes_share_many_shards(tmp_path):
    """They find what one process finds, and say what is wrong."""
    for number in range(40):
        write_tar(tmp_path / f"{number:05}.tar", places.shard(10 * number, 1 + number % 3))
    pairs = open_pairs(f"webdataset:{tmp_path}")
    numbers = [10 * n + i for n in range(40) for i in range(1 + n % 3)]
    assert [name(pairs, i)[-9:] for i in range(len(pairs))] == [f"{n:09}" for n in numbers]
    assert texts_of(pairs) == [[TEXTS[n % 5]] for n in numbers]
    write_tar(tmp_path / "00017.tar", {"../1.jpg": picture(1)})
    with pytest.raises(UserError, match="00017.tar names '../1.jpg', which leads out of it"):
        open_pairs(f"webdataset:{tmp_path}")


def test_what_lies_beside_pictures_in_a_shard(tmp_path):
    about = {"caption": "a seven", "captions": ["three", "the digit"], "dense": {"long": "a three"}}
    files = {
        "./x/1.jpg": picture(1),  # the suffix does not count
        "./x/1.json": json.dumps(about).encode(),
        "x/._1.jpg": b"of the system",
        "x/1.cls": b"3",
        "2.webp": picture(2, kind="webp"),
        "2.txt": "七\n".encode(),
        "2.json": b"{no JSON",
        "3.txt": b"a seven",
        "4.png": picture(4),
        "5.png": picture(5),
        "5.txt": b"",
        "6.png": picture(6),
        "6.json": b'{"url": "x"}',
        "7.png": picture(7),
        "7.txt": b"\xe9t\xe9",
    }
    path = write_tar(tmp_path / "a.tar", files)
    pairs = open_pairs(f"webdataset:{path}")
    expected = [None, None, "no image", "no text", *["broken text"] * 3]
    assert reasons(pairs) == expected and name(pairs, 0) == f"{path}: x/1"
    assert texts(pairs, 0) == ["a seven", "three", "the digit"] and texts(pairs, 1) == ["七"]
    for index, message in ((4, "5.txt: its text is empty"), (5, "no caption and no captions")):
        with pytest.raises(Unusable, match=message):
            texts(pairs, index)
    pairs = open_pairs(f"webdataset:{path}", "dense.long,caption")
    assert texts(pairs, 0) == ["a three", "a seven"]
    assert reasons(pairs)[1:3] == ["broken text", "no image"]


def header(name, kind, **values):
    made = tarfile.TarInfo(name)
    made.type = kind
    for key, value in values.items():
        setattr(made, key, value)
    return made


GOOD = {"1.jpg": picture(1), "1.txt": b"a seven"}
BAD_TARS = [
    ({"../1.jpg": picture(1)}, r"a.tar names '../1.jpg', which leads out of it"),
    ({"x/../../1.txt": b"a"}, r"names 'x/../../1.txt', which leads out of it"),
    ({"/etc/1.jpg": picture(1)}, r"names '/etc/1.jpg', which leads out of it"),
    (
        GOOD | {"2.jpg": header("2.jpg", tarfile.SYMTYPE, linkname="/etc/passwd")},
        "a.tar: 2.jpg is a link, a device or a sparse file",
    ),
    (GOOD | {"2.jpg": header("2.jpg", tarfile.LNKTYPE, linkname="1.jpg")}, "2.jpg is a link"),
    (GOOD | {"2.jpg": header("2.jpg", tarfile.FIFOTYPE)}, "2.jpg is a link, a device"),
    (GOOD | {"1.png": picture(1)}, r"a.tar has two images of the stem 1 \(1.png\): leave one"),
    (GOOD | {"./1.txt": b"b"}, r"a.tar has two .txt of the stem 1 \(1.txt\)"),
    ({"1.txt": b"a seven"}, "holds no images"),
]


@pytest.mark.parametrize("files, message", BAD_TARS, ids=[message for _, message in BAD_TARS])
def test_shards_that_are_refused(tmp_path, files, message):
    path = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(UserError, match=message):
        open_pairs(f"webdataset:{path}")


def test_shards_that_are_not_whole(tmp_path):
    data = write_tar(tmp_path / "a.tar", places.shard(0, 3)).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        second = tar.getmembers()[1].offset
    path = tmp_path / "b.tar"
    for damaged in (
        b"",
        b"no tar " * 200,
        data[: second - 600],  # inside of a file
        data[: second + 100],  # inside of a header
        data[:second],  # between two files
        data[:second] + b"\x77" * 512 + data[second + 512 :],
        data + data,
        data[:second] + b"\0" * 512 + data[second + 512 :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path} is .*: download it again"):
            open_pairs(f"webdataset:{path}")
    path.write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match=f"{path} is no whole tar"):
        open_pairs(f"webdataset:{path}")
    pairs = open_pairs(f"webdataset:{tmp_path}/a.tar")
    (tmp_path / "a.tar").write_bytes(data[:2000])  # cut after it was opened
    with pytest.raises(UserError, match="a.tar is shorter than it was at the start"):
        image(pairs, 2)


def test_places_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for place, message in (
        (f"folder:{tmp_path}/x", "there is no folder"),
        (f"folder:{tmp_path}/empty", "no metadata.jsonl in .* and no .txt beside its images"),
        (f"webdataset:{tmp_path}/x.tar", "there is no tar at"),
        (f"webdataset:{tmp_path}/*.tar", "there is no tar at"),
        (f"webdataset:{tmp_path}/{{0..2}}.tar", "there is no tar at .*/0.tar"),
        (f"webdataset:{tmp_path}/{{2..0}}.tar", "counts down"),
        (f"webdataset:{tmp_path}/{{0..9999999}}.tar", "more than 1,000,000 tars"),
        (f"webdataset:{tmp_path}/empty", "holds no .tar"),
        (f"journeydb:{tmp_path}", "must hold one .jsonl of annotations, it has none"),
        (f"journeydb:{tmp_path}/x.jsonl", "no x.jsonl at"),
        ("laion:x", "--captions laion:x is of no known kind: known are folder:PATH, webdataset:"),
    ):
        with pytest.raises(UserError, match=message):
            open_pairs(place)


def test_a_prepared_dataset(tmp_path):
    Scenes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    place = f"tfds:{tmp_path}/scenes/1.0.0"
    pairs = open_pairs(place)
    numbers = [places.mean_colour(image(pairs, i))[0] // 7 for i in range(2)]
    assert sorted(numbers) == [0, 1] and texts(pairs, numbers.index(0)) == [TEXTS[3]]
    assert reasons(pairs)[numbers.index(1)] == "broken text"
    assert name(pairs, 0) == f"record 0 of {place}"
    pairs = open_pairs(place, "captions.text")
    assert texts(pairs, numbers.index(1)) == [f"{TEXTS[0]} 1", f"{TEXTS[1]} 1"]
    for key, split, message in (
        ("prompt", "train", "it needs image and prompt"),
        ("caption", "test", "data.split='test' is not in"),
    ):
        with pytest.raises(UserError, match=message):
            open_pairs(place, key, split)
    assert reasons(open_pairs(place, "captions.id")) == ["broken text"] * 2


def test_usable_texts():
    assert usable([" a\n", b"\xef\xbb\xbfb", "a", ""], "x") == ["a", "b"]
    for text in (b"\xff", "\ufffd", "a\0", "\udcff", "", " \n"):
        with pytest.raises(Unusable) as caught:
            usable([text], "x")
        assert caught.value.reason == "broken text"
