"""What a download leaves in place of a file: a pointer of Git LFS, or a page that asks for a login.

Weights of some publishers, FLUX.1 [dev] among them, are given only to who has agreed to terms.
"""

from __future__ import annotations

import os

from moe_diffusion.errors import UserError, shown

_READ = 512  # bytes that are looked at
_POINTER = b"version https://git-lfs"
_ANSWERS = (b"<!doctype", b"<html", b"<?xml", b"access to model", b"invalid username")
_ANSWERS += (b"invalid credentials", b"unauthorized", b"entry not found", b"repository not found")
_ANSWERS += (b'{"error"',)


def check_download(path: str | os.PathLike) -> None:
    """Raises a UserError if a file is not what its name says, but what a refused download leaves.

    A file that is not there, or cannot be read, is left to whoever reads it.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(_READ)
    except OSError:
        return
    if begin.startswith(_POINTER):
        raise UserError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` there")
    if begin.lstrip().lower().startswith(_ANSWERS):
        text = begin[:60].decode(errors="replace")
        raise UserError(
            f"{path} is the answer of a server ({shown(text)}), not the file: agree to the terms "
            "of its publisher, log in, and fetch it again"
        )
