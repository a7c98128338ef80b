"""What a machine lacks is named before its GPU is used."""

from tests.gpu import missing


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    assert missing.missing() == []  # the tests need them all
    config = "[options]\ninstall_requires =\n    jax>=0.10\n    no.such_package[extra]>=1.2\n"
    (tmp_path / "setup.cfg").write_text(config)
    monkeypatch.setattr(missing, "CONFIG", tmp_path / "setup.cfg")
    assert missing.missing() == ["no.such_package[extra]>=1.2"]
