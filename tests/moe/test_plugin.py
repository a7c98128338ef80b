"""A router from outside the package: the example of docs/architecture.md, and wrong names."""

from __future__ import annotations

import json
import re
import sys

import pytest

from moe_diffusion import config as configs
from moe_diffusion import train
from moe_diffusion.config.schema import router_fields
from moe_diffusion.errors import UserError
from moe_diffusion.moe import routers
from tests import cli

OTHERS = """
from moe_diffusion.moe.router import Router
class NoRouter:
    pass
class Unset(Router):
    rank: int | None = None
class Ranged(Router):
    slope: float = 1.0
    mode: str = "up"
    top_k: int = 3
    positive = ("slope",)
    choices = {"mode": ("up", "down")}
    share = "top_k"
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The current folder, with the example as hash_router.py and other classes as others.py."""
    docs = (cli.ROOT / "docs" / "architecture.md").read_text()
    (example,) = re.findall(
        r"```python\n((?:(?!```).)*class Hash\(Router\).*?)```", docs, re.DOTALL
    )
    (tmp_path / "hash_router.py").write_text(example)
    (tmp_path / "others.py").write_text(OTHERS)
    (tmp_path / "broken_router.py").write_text("def (:")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("hash_router", "others"):
        sys.modules.pop(name, None)
    router_fields.cache_clear()


def test_the_example_of_the_docs_trains(outside):
    """Named in a config file, with a field of its own; it trains and resumes."""
    name = "--config.model.router.name=hash_router:Hash"
    weights = "--config.loss_weights={}"
    args = [*cli.digits(train__num_steps=2), "--config.model.router.offset=1", name, weights]
    train.main([*args, "--workdir", "run"])
    saved = json.loads((outside / "run" / "config.json").read_text())["model"]["router"]
    assert saved == {
        **{"name": "hash_router:Hash", "group": "sample"},
        **{"offset": 1, "kernel_init": "kaiming_uniform"},
    }
    lines = cli.metrics(outside / "run")
    # The patches of an image, 4, over 4 experts.
    assert [line["step"] for line in lines] == [1, 2] and lines[1]["load_max"] == 1
    assert lines[1]["loss"] != lines[0]["loss"]
    train.main([*args, "--config.train.num_steps=3", "--workdir", "run"])
    assert cli.metrics(outside / "run")[-1]["step"] == 3


def test_a_config_file_names_it_and_sets_its_field(outside):
    (outside / "mine.py").write_text(
        "from moe_diffusion.config import default\n"
        "def get_config(arg=None):\n"
        "    config = default()\n"
        "    config.model.router.offset = 3\n"
        "    config.model.router.name = 'hash_router:Hash'\n"
        "    assert config.model.router.kernel_init == 'kaiming_normal'\n"
        "    return config\n"
    )
    assert configs.load("mine.py").model.router.offset == 3
    with pytest.raises(UserError, match="model.router.offset = -1 must be zero or positive"):
        configs.load("mine.py", ["model.router.offset=-1"])
    with pytest.raises(UserError, match="'model.router.ofset'; the nearest is model.router.offset"):
        configs.load("mine.py", ["model.router.ofset=1"])
    with pytest.raises(UserError, match="model.router.offset = 'x' is not an integer"):
        configs.load("mine.py", ["model.router.offset=x"])
    with pytest.raises(UserError, match="hash_router:Hash, which has none: remove it"):
        configs.load("mine.py", ["loss_weights.balance=1"])
    with pytest.raises(UserError, match="unknown config key 'model.router.offset'"):
        configs.load("mine.py", ["model.router.name=diffmoe"])


def test_class_variables_say_what_a_field_may_be(outside):
    name = "model.router.name=others:Ranged"
    for change, message in (
        ("slope=0", "model.router.slope = 0.0 must be positive"),
        ("mode=left", "model.router.mode = 'left' is unknown; choose up | down"),
        ("kernel_init=left", "model.router.kernel_init = 'left' is unknown; choose kaiming_normal"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            configs.load("configs/digits.py", [name, "loss_weights={}", f"model.router.{change}"])
    assert routers.find("others:Ranged")(4, top_k=2).experts_per_token == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_module:Hash", "module no_module cannot be imported (ModuleNotFoundError: No module"),
        ("broken_router:Hash", "module broken_router cannot be imported (SyntaxError: "),
        ("hash_router:Hush", "hash_router.py has no Hush: name a class of that file"),
        ("others:NoRouter", "'others:NoRouter' is no router: derive it from moe_diffusion.moe.rou"),
        (
            "others:Unset",
            "field 'rank' of router Unset cannot stand in a config: give it a default",
        ),
        ("hash_router", "'hash_router' is unknown; choose token_choice | "),
        (":Hash", "':Hash' is unknown; choose "),
    ],
)
def test_a_path_that_leads_to_no_router(outside, name, message):
    with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$"):
        configs.load("configs/digits.py", [f"model.router.name={name}"])
