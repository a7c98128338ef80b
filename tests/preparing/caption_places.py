"""Images with captions in tars and folders, as people have them, with what goes wrong there."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

# Words of `pipeline_folder`, and some that its tokenizers do not know.
TEXTS = [
    "a handwritten seven",
    "the digit",
    "été: 七 seven",
    "Ψηφίο three 🦊",
    "three of the digit",
]
BROKEN = b"\xff\xd8 no picture"


def picture(index: int, size: tuple[int, int] = (20, 24), kind: str = "png") -> bytes:
    """The file of a picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, (7 * index % 256, 90, 255 - 7 * index % 256)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    """A tar of files, or of whatever headers are given in their place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
                continue
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def shard(first: int, count: int) -> dict[str, bytes]:
    """The files of a tar as img2dataset writes it: 000000012.jpg, .txt and .json."""
    files = {}
    for i in range(first, first + count):
        text, stem = TEXTS[i % len(TEXTS)], f"{i:09}"
        files[f"{stem}.jpg"] = picture(i, kind="jpeg")
        files[f"{stem}.txt"] = text.encode()
        about = {"caption": text, "url": f"https://x/{i}", "key": stem, "width": 20, "height": 24}
        files[f"{stem}.json"] = json.dumps(about).encode()
    return files


def write_folder(folder: Path, count: int) -> Path:
    """a.png with a.txt beside it, in two sub-folders; the last text is that of its folder."""
    for i in range(count):
        place = folder / f"part{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:03}.png").write_bytes(picture(i))
        name = f"{i:03}.txt" if i < count - 1 else "caption.txt"
        (place / name).write_text(TEXTS[i % len(TEXTS)], encoding="utf-8")
    return folder


def write_journeydb(folder: Path, count: int) -> Path:
    """imgs/012/0.jpg, ..., and the file of annotations, which is returned."""
    (folder / "imgs" / "012").mkdir(parents=True)
    rows = []
    for i in range(count):
        (folder / "imgs" / "012" / f"{i}.jpg").write_bytes(picture(i, kind="jpeg"))
        text = TEXTS[i % len(TEXTS)]
        row = {"img_path": f"./012/{i}.jpg", "prompt": f"{text} --ar 16:9", "Task1": {"Label": []}}
        rows.append(row | {"Task2": {"Caption": text}})
    path = folder / "train_anno_realease_repo.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mean_colour(image: str | bytes) -> list[int]:
    """Of a path or the content of a picture's file."""
    file = io.BytesIO(image) if isinstance(image, bytes) else image
    with Image.open(file) as opened:
        return np.asarray(opened.convert("RGB")).reshape(-1, 3).mean(0).round().astype(int).tolist()
