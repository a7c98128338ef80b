"""Files of prompts of benchmarks, in small, as they are published; what is no such file."""

from __future__ import annotations

import json

import pytest

from moe_diffusion.errors import UserError
from moe_diffusion.sampling import flags
from moe_diffusion.sampling.prompt_files import BENCHMARKS, categories_of, open_prompts

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}],
     "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}],
     "prompt": "a photo of a red cow"},
]  # fmt: skip
DPG = """item_id,text,keywords,proposition_id,dependency,category_broad
0,"a fox, red",,1,0,entity
0,"a fox, red",,2,1,attribute
partiprompts90,"two
lines",,1,0,entity
"""
PARTI = (
    'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\na "sign"\tArtifacts\tBasic\tx\n'
)


def write(folder):
    """benchmark -> its file."""
    texts = {
        "geneval": ("evaluation_metadata.jsonl", "\n".join(map(json.dumps, GENEVAL)) + "\n"),
        "dpg": ("dpg_bench.csv", DPG),
        "t2i_compbench": ("color_val.txt", "a red cat\na blue dog\ta cat\n"),
        "mjhq": ("meta_data.json", json.dumps({"a1": {"category": "food", "prompt": "soup"}})),
        "imagereward": ("bench.json", json.dumps([{"id": "5-0", "prompt": "été"}])),
        "mps": ("test.json", json.dumps([{"prompt": "x", "image_path": ["a"], "rank": [0]}])),
        "parti": ("PartiPrompts.tsv", PARTI),
    }
    for name, text in texts.values():
        (folder / name).write_text(text)
    return {benchmark: folder / name for benchmark, (name, _) in texts.items()}


def test_what_is_read(tmp_path):
    files = write(tmp_path)
    assert tuple(BENCHMARKS) == tuple(files) == flags.BENCHMARKS
    read = {name: open_prompts(path, name) for name, path in files.items()}
    assert [item[:3] for item in read["geneval"].items] == [
        ("a photo of a bench", "00000", "single_object"),
        ("a photo of a red cow", "00001", "colors"),
    ]  # fmt: skip
    assert read["geneval"].items[1].record == GENEVAL[1] and read["geneval"].images == 4
    assert [item[:2] for item in read["dpg"].items] == [
        ("a fox, red", "0"), ("two\nlines", "partiprompts90")
    ]  # fmt: skip
    assert read["t2i_compbench"].prompts == ["a red cat", "a blue dog"]
    assert read["mjhq"].items[0][:3] == ("soup", "a1", "food")
    assert read["imagereward"].items[0][:2] == ("été", "5-0")
    assert read["mps"].items[0][:2] == ("x", "00000")
    assert read["parti"].prompts == ["bond", 'a "sign"']
    assert categories_of(read["parti"]) == {"bond": "Abstract", 'a "sign"': "Artifacts"}
    (tmp_path / "hpd.json").write_text('["a fox", "a cup"]')
    assert open_prompts(tmp_path / "hpd.json", "mps").prompts == ["a fox", "a cup"]
    told = read["dpg"].describe()
    assert told["file"] == "dpg_bench.csv" and told["count"] == 2 and len(told["sha256"]) == 64


def test_a_folder_of_texts(tmp_path):
    """Numbers in their order; the digest is that of names and contents."""
    for name, text in (("10", "ten"), ("9", "nine \n"), ("b", "letter"), (".c", "hidden")):
        (tmp_path / f"{name}.txt").write_text(text)
    read = open_prompts(tmp_path, "dpg")
    assert [(item.id, item.prompt) for item in read.items] == [
        ("9", "nine"), ("10", "ten"), ("b", "letter")
    ]  # fmt: skip
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert open_prompts(tmp_path, "dpg").digest != read.digest


def test_every_file_is_of_its_own_benchmark(tmp_path):
    files = write(tmp_path)
    for name, path in files.items():
        for other in BENCHMARKS:
            if name == other or (name, other) == ("imagereward", "mps"):  # MPS judges those, too
                continue
            with pytest.raises(UserError) as raised:
                open_prompts(path, other)
            message = str(raised.value)
            assert f"{path} is no file of prompts of {other}: " in message
            assert f"it fits --benchmark {name}" in message


@pytest.mark.parametrize(
    ("benchmark", "name", "text", "message"),
    [
        ("geneval", "a.jsonl", '{"tag": "x", "prompt": "a"}', "line 1 lacks include"),
        ("geneval", "a.jsonl", "", "it has no prompts"),
        ("dpg", "a.csv", "item_id,text\n1,a\n1,b\n", "the item '1' has several texts"),
        ("dpg", "a.csv", "item_id,text\n1\n", "row 2 has too few columns"),
        ("dpg", "a.csv", "item_id,text\n../1,a\n", "'../1' is no plain name of a file"),
        ("mjhq", "a.json", '{"a/b": {"category": "x", "prompt": "y"}}', "is no plain name"),
        ("mjhq", "a.json", '{"a": {"prompt": "y"}}', "'a' lacks category"),
        ("mjhq", "a.json", "{", "is not valid JSON"),
        ("imagereward", "a.json", '[{"id": "a", "prompt": "b"}, {"id": "a", "prompt": "c"}]',
         "the id 'a' stands there twice"),
        ("imagereward", "a.json", '[{"id": 3, "prompt": "b"}]', "item 0: id is 3, not text"),
        ("mps", "a.json", '[{"prompt": " "}]', "the prompt of '00000' is empty"),
        ("parti", "a.tsv", "Prompt\tCategory\nx\n", "row 2 has too few columns"),
        ("genval", "a.txt", "x", "'genval' is not known: choose one of geneval, dpg"),
        ("geneval", None, "", "no file of prompts at"),
        ("mjhq", None, "", "no file of prompts at"),
    ],
)  # fmt: skip
def test_what_is_refused(benchmark, name, text, message, tmp_path):
    path = tmp_path / (name or "absent")
    if name:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        open_prompts(path, benchmark)
