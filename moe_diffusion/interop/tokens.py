"""Tokenizers in local files, and prompts as rows of token ids.

| file                        | of                            | read by                          |
|-----------------------------|-------------------------------|----------------------------------|
| `tokenizer.json`            | any                           | the package `tokenizers`         |
| `vocab.json`, `merges.txt`  | CLIP (`tokenizer/`)           | `tokenizers`, built here         |
| `spiece.model`              | T5 (`tokenizer_2/`)           | `tokenizers`, built here         |

`pip install 'moe_diffusion[text]'` installs that package. Nothing is downloaded.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_diffusion.errors import UserError, explained
from moe_diffusion.interop.downloads import check_download
from moe_diffusion.reading import read_table
from moe_diffusion.vocabulary import warn_of_loss

_START, _END = "<|startoftext|>", "<|endoftext|>"  # CLIP's
# CLIP's words (Radford et al., 2103.00020): contractions, letters, single digits, other signs.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_UNIGRAM = 1  # the kind of model in a file of sentencepiece that T5 has
# The tokens that fill up a row, where no file names one.
_PADS = ("<pad>", "[PAD]", _END)


class PromptTokenizer:
    """Prompts -> ids i32[B, length]: cut with a warning, or filled up with the padding token.

    Attributes:
      tokenizer: of the package `tokenizers`; it adds the tokens that begin and end a prompt.
      pad: the id that fills up.
    """

    def __init__(self, tokenizer: Any, pad: int):
        self.tokenizer, self.pad = tokenizer, pad
        tokenizer.no_padding()

    def __len__(self) -> int:
        """How many ids there are."""
        return self.tokenizer.get_vocab_size()

    def __call__(self, prompts: Sequence[str], length: int) -> np.ndarray:
        """Ids of the prompts; a line on stderr names the words of a prompt that do not fit.

        Raises:
          UserError: the tokens that begin and end a prompt are more than `length`.
        """
        return self.with_mask(prompts, length)[0]

    def with_mask(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids i32[B, length], mask bool[B, length]) of the prompts; False is padding.

        Raises:
          UserError: see `__call__`.
        """
        least = self.tokenizer.num_special_tokens_to_add(False)
        if length < least:
            raise UserError(f"{length} tokens are too few: a prompt's ends are {least} already")
        self.tokenizer.enable_truncation(length)
        ids = np.full((len(prompts), length), self.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, prompt, found in zip(
            range(len(ids)), prompts, self.tokenizer.encode_batch(list(prompts)), strict=True
        ):
            ids[row, : len(found.ids)] = found.ids
            mask[row, : len(found.ids)] = True
            if found.overflowing:
                warn_of_loss(length, _lost(prompt, found))
        return ids, mask


def open_tokenizer(folder: str | os.PathLike) -> PromptTokenizer:
    """The tokenizer whose files lie in a folder; the table above says which.

    Raises:
      UserError: a file is missing or damaged, or the package `tokenizers` is not installed.
    """
    folder = Path(folder)
    try:
        import tokenizers
    except ImportError:
        raise UserError("prompts need a tokenizer: pip install 'moe_diffusion[text]'") from None
    for names, build in (
        (("tokenizer.json",), lambda path: tokenizers.Tokenizer.from_file(str(path))),
        (("vocab.json", "merges.txt"), _clip),
        (("spiece.model",), _t5),
    ):
        paths = [folder / name for name in names]
        if all(path.is_file() for path in paths):
            for path in paths:
                check_download(path)
            what, remedy = f"{folder} holds a damaged tokenizer", "copy its files again"
            with explained(what, remedy):
                tokenizer = build(*paths)
            return PromptTokenizer(tokenizer, _pad(folder, tokenizer))
    raise UserError(
        f"no tokenizer at {folder}: put tokenizer.json there, or vocab.json and merges.txt (CLIP), "
        "or spiece.model (T5)"
    )


def encode_prompts(prompts: Sequence[str], folder: str | os.PathLike, length: int) -> np.ndarray:
    """Ids i32[B, length] of prompts, by the tokenizer of a folder; see `PromptTokenizer`."""
    return open_tokenizer(folder)(prompts, length)


def _lost(prompt: str, found: Any) -> str:
    """The end of a prompt that its tokens do not hold, from the word on that is cut."""
    rest = found.overflowing[0]
    places = zip(rest.offsets, rest.special_tokens_mask, strict=True)
    start = next(begin for (begin, _), special in places if not special)
    while start and not prompt[start - 1].isspace() and not prompt[start].isspace():
        start -= 1
    return " ".join(prompt[start:].split())


def _pad(folder: Path, tokenizer: Any) -> int:
    """The id of the padding token, by the files beside the tokenizer or by its usual names."""
    names = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = read_table(folder / name, "copy it again").get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            names += [token] if isinstance(token, str) else []
    known = (tokenizer.token_to_id(name) for name in (*names, *_PADS) if name)
    pad = next((number for number in known if number is not None), None)
    if pad is None:
        raise UserError(
            f"the tokenizer of {folder} has no padding token: name its pad_token in "
            "tokenizer_config.json"
        )
    return pad


def _clip(vocabulary: Path, merges: Path) -> Any:
    """CLIP's tokenizer: words of lower-case letters, in bytes, merged by pairs."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    model = models.BPE.from_file(
        str(vocabulary), str(merges), unk_token=_END, end_of_word_suffix="</w>"
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    ends = {name: made.token_to_id(name) for name in (_START, _END)}
    if None in ends.values():
        raise UserError(f"{vocabulary} lacks {_START} or {_END}")
    made.add_special_tokens(list(ends))
    made.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=list(ends.items())
    )
    return made


def _t5(path: Path) -> Any:
    """T5's tokenizer of a file of sentencepiece: the likeliest pieces of words, then </s>.

    A piece begins with U+2581 where a word does.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces, unknown, charsmap, kind = [], 0, b"", _UNIGRAM
    for number, value in _fields(path.read_bytes()):
        if number == 1:  # a piece: text, score
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), piece.get(2, 0.0)))
        elif number == 2:  # how the model was trained
            trained = dict(_fields(value))
            unknown, kind = trained.get(40, 0), trained.get(3, _UNIGRAM)
        elif number == 3:  # how text is normalized
            charsmap = dict(_fields(value)).get(2, b"")
    if kind != _UNIGRAM:
        raise UserError(f"{path} is no unigram model, as T5 has it")
    made = Tokenizer(models.Unigram(pieces, unknown, byte_fallback=False))
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    first = [normalizers.Precompiled(charsmap)] if charsmap else []
    made.normalizer = normalizers.Sequence([*first, normalizers.Strip(), spaces])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    ends = [(name, made.token_to_id(name)) for name in ("</s>", "<pad>")]
    made.add_special_tokens([name for name, number in ends if number is not None])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=ends[:1])
    return made


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protocol buffer; a value is an int, a float or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            value |= (byte & 127) << shift
            place, shift = place + 1, shift + 7
            if byte < 128:
                return value

    while place < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        value, place = message[place : place + size], place + size
        if kind == 1:
            value = struct.unpack("<d", value)[0]
        elif kind == 5:
            value = struct.unpack("<f", value)[0]
        yield number, value
