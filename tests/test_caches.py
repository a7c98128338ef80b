"""Caches hold code that runs as it lies there, so they belong to the user alone."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moe_diffusion import caches

NOT_US = 12345


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    caches._temporary.cache_clear()
    yield tmp_path
    caches._temporary.cache_clear()


def mode(path):
    return path.stat().st_mode & 0o777


def test_the_folder_is_the_users_alone(home):
    folder = caches.cache_folder("kernels")
    assert folder == home / ".cache" / "moe_diffusion" / "kernels"
    assert mode(folder) == mode(folder.parent) == 0o700
    folder.parent.chmod(0o777)
    folder.chmod(0o775)
    assert caches.cache_folder("kernels") == folder
    assert mode(folder) == mode(folder.parent) == 0o700


@pytest.mark.parametrize("strange", ["kernels", ""])
def test_a_folder_of_another_user_is_not_used(strange, home, monkeypatch, caplog):
    folder = caches.cache_folder("kernels")
    wanted = folder.parent / strange
    found = os.stat
    monkeypatch.setattr(
        caches, "_strange", lambda path: "belongs to another user" if path == wanted else ""
    )
    with caplog.at_level(logging.WARNING):
        other = caches.cache_folder("kernels")
        assert caches.cache_folder("kernels") == other
    assert other.is_dir() and home not in other.parents and mode(other.parent) == 0o700
    (record,) = caplog.records
    assert "belongs to another user: compiled code is kept in" in record.getMessage()
    assert found is os.stat


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_whose_a_folder_is(home):
    folder = caches.cache_folder("kernels")
    (folder / "x.so").write_bytes(b"")
    (folder / "x.so").chmod(0o600)
    assert caches.is_ours(folder / "x.so") and caches._strange(folder) == ""
    os.chown(folder / "x.so", NOT_US, -1)
    os.chown(folder, NOT_US, -1)
    assert not caches.is_ours(folder / "x.so")
    assert caches._strange(folder) == "belongs to another user"


def test_files_that_others_could_write(tmp_path):
    file = tmp_path / "x.so"
    assert not caches.is_ours(file)
    file.write_bytes(b"")
    for bits, ours in ((0o700, True), (0o644, True), (0o664, False), (0o666, False)):
        file.chmod(bits)
        assert caches.is_ours(file) == ours
    link = tmp_path / "link.so"
    file.chmod(0o600)
    link.symlink_to(file)
    assert not caches.is_ours(link) and not caches.is_ours(tmp_path)


def test_no_home(home, monkeypatch, caplog):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    for name in ("jax", "kernels", "digits"):
        assert caches.cache_folder(name).is_dir()
    assert "Could not determine home directory." in caplog.text


def test_a_home_that_cannot_be_written(home, monkeypatch, caplog):
    (home / "file").write_text("")
    monkeypatch.setenv("HOME", str(home / "file"))
    folder = caches.cache_folder("kernels")
    assert folder.is_dir() and home not in folder.parents and caplog.records


def test_the_temporary_folder_goes_with_the_process(tmp_path):
    code = "from moe_diffusion.caches import cache_folder; print(cache_folder('jax'))"
    env = os.environ | {"HOME": "/dev/null/none", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert str(tmp_path) in done.stdout and done.stderr.count("\n") == 1
    assert list(tmp_path.glob("moe_diffusion-*")) == []


def test_a_named_folder_that_others_can_write_is_warned_of(tmp_path, caplog):
    before = jax.config.jax_compilation_cache_dir
    try:
        tmp_path.chmod(0o777)
        caches.keep_programs(str(tmp_path))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        assert "can be written by others" in caplog.text
        caplog.clear()
        tmp_path.chmod(0o700)
        caches.keep_programs(str(tmp_path))
        assert not caplog.records
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_where_programs_are_kept(home, tmp_path):
    before = (jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache)
    named = str(tmp_path / "named")
    try:
        caches.keep_programs(named)
        assert jax.config.jax_compilation_cache_dir == named
        caches.keep_programs("")  # what is set stays
        assert jax.config.jax_compilation_cache_dir == named
        caches.keep_programs("off")
        assert not jax.config.jax_enable_compilation_cache
        jax.config.update("jax_compilation_cache_dir", None)
        caches.keep_programs("")
        assert jax.config.jax_compilation_cache_dir == str(home / ".cache/moe_diffusion/jax")
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_enable_compilation_cache", before[1])
