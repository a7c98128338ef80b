"""Tokenizers from local files: ids worked by hand, what is cut, and what is refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from moe_diffusion.errors import UserError
from moe_diffusion.interop.tokens import encode_prompts, open_tokenizer

from . import pipeline_folder as lib


def test_clip_from_its_vocabulary_and_merges(tmp_path):
    """Lower case, any white space, words of merged letters, one token per digit and sign."""
    lib.clip_tokenizer(tmp_path)
    ids = json.loads((tmp_path / "vocab.json").read_text())
    wanted = ["<|startoftext|>", "a</w>", "handwritten</w>", "seven</w>", ",</w>", "4</w>", "2</w>"]
    wanted += ["<|endoftext|>"] * 3
    found = encode_prompts(["A  HANDWRITTEN\nSeven, 42"], tmp_path, 10)
    assert found.dtype == np.int32 and found.tolist() == [[ids[token] for token in wanted]]


def test_t5_from_a_file_of_sentencepiece(tmp_path, capfd):
    """The likeliest pieces, </s> (1), then padding (0); an unknown letter is 2.

    "sevens" is U+2581seven (-2), s (-4); the word of 11 letters is one piece (-2), not
    U+2581 hand written (-11).
    """
    lib.spiece(tmp_path / "spiece.model")
    number = {piece: i for i, (piece, _, _) in enumerate(lib.PIECES)}
    found = encode_prompts(["  a  handwritten sevens ", "the q"], tmp_path, 6)
    first = [number[p] for p in ("\u2581a", "\u2581handwritten", "\u2581seven", "s")]
    assert found.tolist() == [[*first, 1, 0], [number["\u2581the"], number["\u2581"], 2, 1, 0, 0]]
    assert capfd.readouterr().err == ""


def test_a_file_that_says_it_all(tmp_path):
    """tokenizer.json comes first, and tokenizer_config.json names the padding token."""
    import tokenizers

    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "digit": 2, "!": 3}, "[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_padding(length=9)  # what the file says of lengths does not count
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has no padding token: name its pad_token in"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "!"}}')
    assert encode_prompts(["a nice digit"], tmp_path, 4).tolist() == [[1, 0, 2, 3]]
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json .*copy it again"):
        open_tokenizer(tmp_path)


def test_words_that_are_cut_are_named(tmp_path, capfd):
    """Six places hold begin, four words and the end; of five, the fifth is lost."""
    lib.clip_tokenizer(tmp_path)
    prompts = ["a digit", "the handwritten digit of SEVEN  a three", "a a a digits"]
    found = encode_prompts(prompts, tmp_path, 6)
    assert capfd.readouterr().err.splitlines() == [
        "warning: a prompt of more than 6 tokens is cut; lost: SEVEN a three",
        "warning: a prompt of more than 6 tokens is cut; lost: digits",
    ]
    end = open_tokenizer(tmp_path).pad
    with pytest.raises(UserError, match="1 tokens are too few: a prompt's ends are 2 already"):
        encode_prompts(prompts, tmp_path, 1)
    assert found[1:, -1].tolist() == [end, end] and (found[0, -3:] == end).all()


def test_what_is_missing_or_damaged(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no tokenizer at .*: put tokenizer.json there, or vocab"):
        open_tokenizer(tmp_path)
    lib.clip_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match="no tokenizer at"):
        open_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"<html>no such file</html>")
    with pytest.raises(UserError, match="spiece.model is the answer of a server .'<html>no such "):
        open_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\xff")
    with pytest.raises(UserError, match="holds a damaged tokenizer .*copy its files again"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="holds a damaged tokenizer"):
        open_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'moe_diffusion\[text\]'"):
        open_tokenizer(tmp_path)
