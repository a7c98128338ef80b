"""A tiny FLUX.1 pipeline: tokenizers of some words, and text encoders with random weights."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from moe_diffusion.interop import text
from moe_diffusion.models.text import CLIPText, T5Encoder, TextEncoder

WORDS = "a handwritten seven three digit of the".split()
# Score of a piece; U+2581 stands for the space before a word. Numbers 0 to 2 are those of T5.
PIECES = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)]
PIECES += [(f"\u2581{word}", -2.0, 1) for word in WORDS]
PIECES += [("\u2581", -3.0, 1), ("s", -4.0, 1), ("hand", -4.0, 1), ("written", -4.0, 1)]


def clip_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt: letters, and words built letter by letter from the left."""
    letters = sorted({letter for word in WORDS for letter in word} | set("0123456789,."))
    tokens, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair, pieces = pieces[:2], ["".join(pieces[:2]), *pieces[2:]]
            if " ".join(pair) not in merges:
                merges.append(" ".join(pair))
                tokens.append(pieces[0])
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def _field(number: int, value: bytes | int | float) -> bytes:
    """A field of a protocol buffer; all numbers here fit into one byte, lengths into two."""
    if isinstance(value, float):
        return bytes([number * 8 + 5]) + struct.pack("<f", value)
    key = number * 8 + (0 if isinstance(value, int) else 2)
    key = bytes([key]) if key < 128 else bytes([key % 128 + 128, key // 128])
    if isinstance(value, int):
        return key + bytes([value])
    length = len(value)
    return (
        key
        + (bytes([length]) if length < 128 else bytes([length % 128 + 128, length // 128]))
        + value
    )


def spiece(path: Path) -> None:
    """A unigram model of sentencepiece, byte by byte, without a table of characters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = [
        _field(1, piece.encode()) + _field(2, score) + _field(3, kind)
        for piece, score, kind in PIECES
    ]
    trained = _field(3, 1) + b"".join(_field(40 + i, v) for i, v in enumerate((2, 127, 1, 0)))
    normal = _field(1, b"identity")
    path.write_bytes(
        b"".join(_field(1, p) for p in pieces) + _field(2, trained) + _field(3, normal)
    )


def encoder(kind: type, vocab_size: int, seed: int = 0, **options) -> TextEncoder:
    sizes = {"hidden_size": 16, "mlp_hidden_size": 24, "depth": 2, "num_heads": 2, "head_dim": 8}
    network = kind(vocab_size=vocab_size, **sizes | options)
    params = jax.jit(network.init)(jax.random.key(seed), np.zeros((1, 4), np.int32))["params"]
    params = jax.tree.map(np.asarray, dict(nn.meta.unbox(params)))
    for name in {"tokens", "positions", "position_bias"} & params.keys():
        params[name] = params[name] * 50  # they start at 0.02: all tokens would look alike
    return TextEncoder(network, params)


def replace_t5(folder: Path, seed: int) -> Path:
    """Puts another T5 of the same shape into a pipeline folder."""
    shutil.rmtree(folder / "text_encoder_2")
    text.save(encoder(T5Encoder, len(PIECES) + 3, seed), folder / "text_encoder_2")
    return folder


def write(folder: Path) -> Path:
    """Both tokenizers, text_encoder/ (12 tokens, 16 wide) and text_encoder_2/ (16 wide)."""
    clip_tokenizer(folder / "tokenizer")
    spiece(folder / "tokenizer_2" / "spiece.model")
    tokens = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    clip = encoder(CLIPText, len(tokens), max_length=12, eos_id=tokens["<|endoftext|>"])
    text.save(clip, folder / "text_encoder")
    text.save(encoder(T5Encoder, len(PIECES) + 3), folder / "text_encoder_2")
    return folder
