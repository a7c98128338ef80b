"""The config: defaults, files, arguments, overrides, JSON and comparison, with every message."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from moe_diffusion import config as configs
from moe_diffusion.config.ranges import CHOICES
from moe_diffusion.config.renamed import KEYS, VALUES
from moe_diffusion.config.schema import fields_of_others, leaves, shared
from moe_diffusion.errors import UserError
from moe_diffusion.moe.routers import DiffMoE, TokenChoice
from tests import cli


def raises(message: str):
    """Expects a UserError of one line that holds `message`."""
    return pytest.raises(UserError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$")


@pytest.fixture
def config_file(tmp_path):
    """Writes a config file whose get_config runs the given statements on `config`."""

    def write(body: str, name: str = "mine.py") -> str:
        lines = ["from moe_diffusion.config import default, parse_arg", "def get_config(arg=None):"]
        lines += ["    config = default()", *(f"    {line}" for line in body.splitlines())]
        (tmp_path / name).write_text("\n".join([*lines, "    return config", ""]))
        return str(tmp_path / name)

    return write


# Defaults


def test_default_is_valid_and_fresh():
    config = configs.default()
    configs.validate(config)
    configs.validate_devices(config, jax.devices())
    assert config.to_dict() == shared()
    assert configs.settle(config).to_dict().keys() == shared().keys()
    config.model.depth = 3
    config.loss_weights.balance = 0.5
    assert configs.default().model.depth == 12
    assert not configs.default().loss_weights


def test_default_is_locked_and_type_safe():
    config = configs.default()
    with pytest.raises(AttributeError):
        config.optim.lr = 1.0
    with pytest.raises(AttributeError):
        config.extra = 1
    with pytest.raises(TypeError):
        config.model.depth = "12"
    with pytest.raises(TypeError):
        config.model.depth = 12.0
    config.optim.learning_rate = 1  # an int passes for a float
    assert config.optim.learning_rate == 1.0


# Files


def test_load_finds_configs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.load("configs/digits.py").name == "digits_token_choice_tiny"


@pytest.mark.parametrize("name", ["digits", "digits.py", "configs/digits.py", "configs/digits"])
def test_a_bare_name_is_one_of_the_projects_configs(name, tmp_path, monkeypatch):
    """Also where a file or a folder of that name lies in the current folder."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        if name == "configs/digits":  # a path has its suffix
            with raises("no config file 'configs/digits'; in the project are: digits, digits_moe,"):
                configs.load(name)
        else:
            found = configs.load(f"{name}:router=dense")
            assert found.name == "digits_dense_tiny"
        (tmp_path / "digits").mkdir(exist_ok=True)


def test_a_path_is_a_file_of_the_user(config_file, tmp_path, monkeypatch):
    """The name of one of the project's files does not hide it; the bare name is the project's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    config_file("config.name = 'mine'", "configs/digits.py")
    config_file("config.name = 'here'", "digits.py")
    assert configs.load("configs/digits.py").name == "mine"
    assert configs.load("digits.py").name == configs.load("./digits.py").name == "here"
    assert configs.load("digits").name == "digits_token_choice_tiny"


def test_a_file_of_the_user_may_build_on_the_projects(tmp_path):
    """In a process whose `configs` is a package of the user's own that was imported before."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")
    (tmp_path / "configs" / "helper.py").write_text("depth = 4")
    (tmp_path / "mine.py").write_text(
        "from configs.families.digits import digits\nfrom configs import helper\n"
        "def get_config(arg=None):\n    config = digits('dense', 'tiny')\n"
        "    config.model.depth = helper.depth\n    return config\n"
    )
    code = "import configs.helper\nfrom moe_diffusion import config\n"
    code += "assert config.load('mine.py').model.depth == 4"
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{cli.ROOT}"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env)


def test_load_passes_the_argument_and_fills_in_kinds(config_file):
    path = config_file("config.model.depth = parse_arg(arg, depth=4).depth\nconfig.optim.b1 = 0")
    assert configs.load(path).model.depth == 4
    config = configs.load(f"{path}:depth=6")
    assert config.model.depth == 6 and isinstance(config.optim.b1, float)


def test_load_locks_what_a_file_unlocked(config_file):
    config = configs.load(config_file("config.unlock()"))
    with pytest.raises(AttributeError):
        config.optim.lr = 1.0


def test_missing_file_lists_the_known_ones(config_file, tmp_path):
    with raises("no config file 'configs/dsmoe.py'; in configs are: dsmoe_"):
        configs.load("configs/dsmoe.py")
    with raises("are: digits, "):
        configs.load("nowhere/digit.py:router=dense")
    config_file("pass", "here.py")
    with raises("are: here"):
        configs.load(f"{tmp_path}/there.py")


@pytest.mark.parametrize(
    "body, message",
    [
        ("config.optim.lr = 1.0", "unknown config key 'lr'; the nearest is optim.learning_rate"),
        ("config.modle.depth = 1", "unknown config key 'modle'; the nearest is model"),
        ("config.model.depth = 1.5", "TypeError: Could not override field 'depth'"),
        ("raise RuntimeError('two\\nlines')", "get_config failed: RuntimeError: two"),
        ("raise RuntimeError", "get_config failed: RuntimeError: "),
        ("3 .imag.x", "AttributeError: 'int' object has no attribute 'x'"),
        ("return 3", "get_config returned int, not a ConfigDict"),
        ("parse_arg('no=1', yes=2)", "mine.py: unknown argument 'no'; known are: yes"),
        ("config.unlock(); config.extra = 1", "mine.py: unknown config key 'extra'"),
        ("config.model.depth = True", "mine.py: model.depth = True is not an integer"),
        ("config.name = None", "mine.py: name = None is not text"),
    ],
)
def test_a_failing_get_config_names_the_file(config_file, body, message):
    with raises(message):
        configs.load(config_file(body))


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config(:", "cannot be imported: SyntaxError"),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named"),
        ("config = 3", "has no function get_config(arg=None)"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    (tmp_path / "broken.py").write_text(text)
    with raises(f"broken.py {message}"):
        configs.load(str(tmp_path / "broken.py"))


def test_a_file_that_is_no_python_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    with raises("config.yaml is not a Python file"):
        configs.load(str(tmp_path / "config.yaml"))


# Arguments of a config file


def test_parse_arg():
    defaults = dict(router="dense", size=4, rate=0.5, fast=False)
    assert configs.parse_arg(None, **defaults).to_dict() == defaults
    parsed = configs.parse_arg(" router = moe , size=8,rate=1,fast", **defaults)
    assert parsed.to_dict() == dict(router="moe", size=8, rate=1.0, fast=True)
    assert configs.parse_arg("fast=true", **defaults).fast
    assert configs.parse_arg("size=8", choices={"size": (4, 8)}, **defaults).size == 8


@pytest.mark.parametrize(
    "arg, message",
    [
        ("experts=16", "unknown argument 'experts'; known are: router, size"),
        ("router", "argument 'router' needs a value: router=dense"),
        ("size=big", "size = 'big' is not an integer"),
        ("router=dens", "router=dens is not possible; choose dense | moe"),
    ],
)
def test_parse_arg_errors(arg, message):
    with raises(message):
        configs.parse_arg(arg, choices={"router": ("dense", "moe")}, router="dense", size=4)


def test_argument_errors_name_the_config():
    with raises("configs/digits.py:router=moe: router=moe is not possible; choose token_choice |"):
        configs.load("configs/digits.py:router=moe")
    with raises("configs/dsmoe_3b.py:experts=48: experts=48 is not possible; choose 16"):
        configs.load("configs/dsmoe_3b.py:experts=48")


# Overrides


def test_overrides_of_every_kind():
    config = configs.load(
        "configs/digits.py",
        [
            "--config.name=a=b",
            "--seed=7",
            "config.optim.learning_rate=2e-4",
            "optim.clip_norm=1",
            "train.num_steps=20_000",
            "model.qk_norm=true",
            "data.split=test",
            "--config.ema.decays=0.9,0.99",
            "sampling.cfg_interval=(0, 0.5)",
            "loss_weights.router_z=1",
            "seed=8",
        ],
    )
    assert (config.name, config.seed, config.optim.learning_rate) == ("a=b", 8, 2e-4)
    assert isinstance(config.optim.clip_norm, float) and config.train.num_steps == 20_000
    assert config.model.qk_norm is True and config.data.split == "test"
    assert config.ema.decays == (0.9, 0.99) and config.sampling.cfg_interval == (0.0, 0.5)
    assert config.loss_weights.to_dict() == {"balance": 0.01, "router_z": 1.0}


def test_a_key_that_is_true_or_false_needs_no_value(tmp_path):
    on = configs.load("digits", ["--config.model.qk_norm"])
    assert on.model.qk_norm and configs.load("digits", ["model.qk_norm"]) == on
    off = configs.load("digits", ["--config.model.qk_norm", "--noconfig.model.qk_norm"])
    assert not off.model.qk_norm
    configs.save_json(on, tmp_path / "config.json")
    assert configs.load_json(tmp_path / "config.json", ["--noconfig.model.qk_norm"]) == off
    old = configs.load("digits", ["--noconfig.model.reverse_time"])  # a key under its old name
    assert not old.model.dit.reverse_time


def test_show_lists_every_key_and_what_differs():
    lines = configs.show(configs.load("digits:router=diffmoe", ["seed=3"])).splitlines()
    keys = [line.partition(" = ")[0] for line in lines]
    assert keys == sorted(leaves(configs.load("digits:router=diffmoe")), key=keys.index)
    assert len(keys) == len(set(keys)) > 90
    assert "seed = 3  # default: 0" in lines and "optim.b1 = 0.9" in lines
    assert "model.router.name = 'diffmoe'  # default: 'token_choice'" in lines
    assert "model.router.max_capacity = 4.0" in lines
    assert "loss_weights = {'capacity_predictor': 1.0}  # default: {}" in lines


def test_one_number_makes_a_list_of_one():
    assert configs.load("configs/digits.py", ["ema.decays=0.9"]).ema.decays == (0.9,)


def test_loss_weights_can_be_replaced_as_a_whole():
    overrides = ["model.router.name=expert_choice", "loss_weights={'router_z': 1}"]
    config = configs.load("configs/digits.py", overrides)
    assert config.loss_weights.to_dict() == {"router_z": 1.0}
    assert not configs.load("configs/digits.py", ["loss_weights={}"]).loss_weights


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.optim.lr=1", "unknown config key 'optim.lr'; the nearest is optim.learning_rat"),
        ("optim.wd=1", "the nearest is optim.weight_decay"),
        ("router.top_k=1", "the nearest is model.router.top_k"),
        ("model.hiden_size=1", "the nearest is model.hidden_size"),
        ("bath_size=1", "the nearest is data.batch_size"),
        ("zzz=1", "unknown config key 'zzz'; the nearest is "),
        ("model.router=dense", "'model.router' is a section of the config, not a key; set one in"),
        ("train.num_steps", "override 'train.num_steps' has no value; write train.num_steps=<"),
        ("train.num_steps=1e3", "train.num_steps = 1000.0 is not an integer (the default is 700"),
        ("train.num_steps=many", "train.num_steps = 'many' is not an integer"),
        ("train.num_steps=true", "train.num_steps = True is not an integer"),
        ("optim.learning_rate=fast", "optim.learning_rate = 'fast' is not a number"),
        ("optim.learning_rate=nan", "optim.learning_rate = 'nan' is not a number"),
        ("optim.learning_rate=1e999", "optim.learning_rate = inf is not a number"),
        ("optim.learning_rate=", "optim.learning_rate = '' is not a number"),
        ("model.qk_norm=1", "model.qk_norm = 1 is not true or false"),
        ("ema.decays=none", "ema.decays = 'none' is not a list of numbers like 0.5,1.0"),
        ("ema.decays=(0.9,'a')", "ema.decays = 'a' is not a number"),
        ("loss_weights=0.1", "loss_weights = 0.1 is not a table like {'balance': 0.01}"),
        ("loss_weights.balance=high", "loss_weights.balance = 'high' is not a number"),
        ("loss_weights={'balance': 'high'}", "loss_weights.balance = 'high' is not a number"),
        ("--config.data.source", "has no value; write data.source=<value>"),
        ("--noconfig.seed", "override '--noconfig.seed' has no value; write seed=<value>"),
        ("--noconfig.model.qk_norm=true", "has a value; write model.qk_norm=true, or leave it out"),
        ("--noconfig.sed", "unknown config key 'sed'"),
        ("loss_weights.a.b=1", "unknown config key 'loss_weights.a.b'"),
    ],
)
def test_override_errors(override, message):
    with raises(message):
        configs.load("configs/digits.py", [override])


def test_load_validates_after_the_overrides():
    with raises("model.num_heads = 5 does not divide"):
        configs.load("configs/digits.py", ["model.num_heads=5"])


# JSON and comparison


@pytest.mark.parametrize(
    "spec", ["configs/digits.py", "configs/digits.py:router=diffmoe", "configs/dsmoe_3b.py"]
)
def test_json_roundtrip(spec, tmp_path):
    config = configs.load(spec, ["optim.learning_rate=1.1e-7", "ema.decays=0.9,0.99"])
    configs.save_json(config, tmp_path / "config.json")
    loaded = configs.load_json(tmp_path / "config.json")
    assert loaded == config and loaded.is_locked
    assert isinstance(loaded.ema.decays, tuple)
    assert configs.compare(config, loaded) == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_save_json_replaces_and_reports(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")
    configs.save_json(configs.default(), path)
    assert configs.load_json(path) == configs.settle(configs.default())
    with raises("config.json (File exists): make room, or choose another folder"):
        configs.save_json(configs.default(), path / "config.json")
    assert configs.load_json(path) == configs.settle(configs.default())


def test_load_json_gives_defaults_to_new_keys(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model": {"depth": 3}, "loss_weights": {"router_z": 1}}'
    )
    config = configs.load_json(tmp_path / "config.json")
    assert config.model.depth == 3 and config.model.hidden_size == 384
    assert config.loss_weights.to_dict() == {"router_z": 1.0}


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "config.json (No such file or directory): is it a workdir?"),
        ('{"seed": 1', "config.json is not valid JSON ("),
        ("[1]", "config.json holds [1], not a table of names and values"),
        ('{"optim": {"lr": 1}}', "config.json: unknown config key 'optim.lr'; the nearest is opt"),
        ('{"seed": 1, "seed": 2}', "the key 'seed' stands there twice"),
        ('{"seed": 1e400}', "config.json: seed is inf, not a finite number"),
        ('{"seed": 9223372036854775808}', "config.json: seed is an integer beyond 64 bits"),
        ('{"model": {"depth": 1000000000}}', "model.depth = 1000000000 is beyond 4,096: lower it"),
        ('{"model": {"image_size": 16384}}', "make 67,108,864 tokens of model.hidden_size"),
        ('{"model": {"time_scale": 1e308}}', "model.time_scale = 1e+308 is not a number"),
        ('{"seed": "1"}', "config.json: seed = '1' is not an integer"),
        ('{"model": 1}', "config.json: 'model' is a section"),
        ('{"loss_weights": 1}', "config.json: loss_weights = 1 is not a table"),
    ],
)
def test_load_json_errors(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with raises(message):
        configs.load_json(tmp_path / "config.json")


def test_compare_names_what_makes_another_run():
    old = configs.load("configs/digits.py")
    new = configs.load(
        "configs/digits.py",
        ["optim.b1=0.8", "ema.decays=0.5,0.6", "loss_weights={'router_z': 0.1}", "name=x"],
    )
    assert configs.compare(old, new) == [
        "ema.decays: (0.999,) -> (0.5, 0.6)",
        "loss_weights.balance: 0.01 -> absent",
        "loss_weights.router_z: absent -> 0.1",
        "name: digits_token_choice_tiny -> x",
        "optim.b1: 0.9 -> 0.8",
    ]


def test_compare_ignores_run_control():
    overrides = ["train.num_steps=500", "checkpoint.every=7", "sampling.cfg=3", "compile_cache=off"]
    overrides += ["data.num_workers=1", "data.prefetch=3", "parallel.preset=fsdp"]
    new = configs.load("configs/digits.py", overrides)
    assert configs.compare(configs.load("configs/digits.py"), new) == []


# The router's section


def test_the_section_of_a_router_has_its_fields_alone(config_file):
    section = configs.load(config_file("pass")).model.router
    assert set(section) == {"name", "group", *TokenChoice.fields()}
    assert type(section) is ConfigDict and section.is_locked
    dense = configs.load(config_file("config.model.router.name = 'dense'")).model.router
    assert dense.to_dict() == {"name": "dense", "group": "sample"}


SET = ["config.model.router.max_capacity = 0", "config.model.router.top_k = 1"]
NAME = "config.model.router.name = 'diffmoe'"


@pytest.mark.parametrize("lines", [[NAME, *SET], [*SET, NAME], [SET[0], NAME, SET[1]]])
def test_a_router_may_be_named_before_or_after_its_fields(config_file, lines):
    """`top_k`, of another router, is accepted and dropped."""
    router = configs.load(config_file("\n".join(lines))).model.router
    assert router.max_capacity == 0.0 and isinstance(router.max_capacity, float)
    assert set(router) == {"name", "group", *DiffMoE.fields()}


def test_a_config_file_reads_defaults_of_the_router():
    config = configs.default()
    router = config.model.router
    assert (router.scores, router.top_k, router.get("no", 3)) == ("softmax", 2, 3)
    assert router.max_capacity == 4.0  # of another router
    router.name = "expert_race"
    assert router.scores == "identity"
    router.scores = "sigmoid"
    router.name = "token_choice"
    assert router.scores == "sigmoid"
    with pytest.raises(AttributeError):
        _ = router.no_such_field
    for copied in (copy.deepcopy(config), config.copy_and_resolve_references()):
        copied.model.router.update(capacity=3.0)
        assert copied.model.router.scores == "sigmoid" and copied.model.router.top_k == 2
        copied.model.dropout = 0.5
        assert copied.model.jit.dropout == 0.5
    assert "capacity" not in router and config.model.jit.dropout == 0


@pytest.mark.parametrize(
    "body, message",
    [
        (
            "router.topk = 1",
            "mine.py: unknown config key 'model.router.topk'; the nearest is model",
        ),
        (
            "router.top_k = '3'",
            "mine.py: model.router.top_k = '3' is not an integer",
        ),
        ("router.max_capacity = 'x'", "mine.py: model.router.max_capacity = 'x' is not a number"),
        ("router.no", "mine.py: get_config failed: unknown config key 'no'"),
        (
            "router.name = 'diffmo'",
            "mine.py: model.router.name = 'diffmo' is unknown; choose token",
        ),
        ("router.name = 3", "TypeError: Could not override field 'name'"),
    ],
)
def test_a_wrong_field_of_a_router(config_file, body, message):
    with raises(message):
        configs.load(config_file(f"config.model.{body}"))


@pytest.mark.parametrize("reverse", [False, True])
def test_overrides_switch_the_router_in_any_order(reverse, tmp_path):
    overrides = ["--config.model.router.name=diffmoe", "--config.model.router.threshold=0.4"]
    overrides += ["loss_weights={'capacity_predictor': 1}"]
    overrides = overrides[::-1] if reverse else overrides
    router = configs.load("configs/digits.py", overrides).model.router
    assert (router.name, router.threshold) == ("diffmoe", "0.4") and "top_k" not in router
    assert router.kernel_init == "kaiming_uniform"  # as the file says
    configs.save_json(configs.load("configs/digits.py"), tmp_path / "config.json")
    assert configs.load_json(tmp_path / "config.json", overrides).model.router == router


def test_an_override_mends_a_router_that_does_not_exist(config_file):
    path = config_file("config.model.router.name = 'gone:Gone'")
    with raises("mine.py: model.router.name = 'gone:Gone': module gone cannot be imported"):
        configs.load(path)
    assert configs.load(path, ["model.router.name=dense"]).model.router.name == "dense"
    with raises("model.router.name = 'nothing' is unknown; choose token_choice | "):
        configs.load(path, ["model.router.name=nothing"])


# Old names

OLD_FILE = """config.model.family = "jit"
config.model.update(bottleneck=64, in_context_tokens=8, in_context_start=2)
config.model.dropout = config.model.dropout + 0.1
config.diffusion.label_dropout = 0.2
config.model.router.update(name="diffmoe", scope="batch")
config.loss_weights.capacity = 0.5
config.model.moe.backend = "capacity"
config.model.moe["transport"] = "a2a_capacity"
assert config.model.family == "jit" and config.model.bottleneck == 64"""
OLD_OVERRIDES = ["model.family=jit", "model.bottleneck=64", "--config.model.in_context_tokens=8"]
OLD_OVERRIDES += ["model.in_context_start=2", "model.dropout=0.1", "diffusion.label_dropout=0.2"]
OLD_OVERRIDES += ["model.router.name=diffmoe", "model.router.scope=batch"]
OLD_OVERRIDES += ["loss_weights={'capacity': 0.5}", "model.moe.backend=capacity"]
OLD_OVERRIDES += ["model.moe.transport=a2a_capacity"]
OLD_JSON = {
    "model": {
        **{"family": "jit", "bottleneck": 64, "in_context_tokens": 8, "in_context_start": 2},
        **{"dropout": 0.1, "reverse_time": False},
        "moe": {"backend": "capacity", "transport": "a2a_capacity"},
        "router": {"name": "diffmoe", "scope": "batch", "top_k": 3, "null_expert": True},
    },
    "diffusion": {"label_dropout": 0.2},
    "loss_weights": {"capacity": 0.5},
}


def test_old_names_mean_the_new_ones(config_file, tmp_path):
    """In a config file, in overrides and in a config.json, which has no version."""
    new = configs.load(
        config_file("pass", "new.py"),
        [
            *("model.architecture=jit", "model.jit.bottleneck=64", "model.jit.in_context_tokens=8"),
            *("model.jit.in_context_start=2", "model.jit.dropout=0.1"),
            *("diffusion.cond_dropout=0.2", "model.router.name=diffmoe"),
            *("model.router.group=batch", "loss_weights.capacity_predictor=0.5"),
            *("model.moe.backend=slots", "model.moe.transport=a2a_slots"),
        ],
    )
    (tmp_path / "config.json").write_text(json.dumps(OLD_JSON))
    olds = [
        configs.load(config_file(OLD_FILE)),
        configs.load(config_file("pass"), OLD_OVERRIDES),
        configs.load_json(tmp_path / "config.json"),
    ]
    for old in olds:
        assert old == new and configs.compare(old, new) == []
    sections = """config.loss_weights = {"capacity": 1.0}
config.loss_weights.capacity = 0.5
config.diffusion = {**config.diffusion.to_dict(), "label_dropout": 0.2}
config.diffusion.label_dropout = 0.3
config.optim = load("configs/digits.py").optim
config.model.router = {"scope": "batch", "name": "diffmoe"}"""
    imported = "from moe_diffusion.config import load\n"
    sections = configs.load(config_file(imported + sections))
    assert sections.loss_weights.to_dict() == {"capacity_predictor": 0.5}
    assert sections.diffusion.cond_dropout == 0.3 and sections.optim.learning_rate == 1e-3
    assert sections.model.router.group == "batch" and sections.model.router.capacity == 1
    reverse = configs.load(config_file("config.model.reverse_time = True"))
    assert reverse.model.dit.reverse_time and "reverse_time" not in reverse.model
    assert configs.load(config_file("config.loss_weights = {'balance': 1}")).loss_weights.balance


def test_every_old_name_leads_to_a_key():
    known = leaves(shared()) | fields_of_others()
    for old, new in {**KEYS, **{key: key for key in VALUES}}.items():
        assert new in known or new.startswith("loss_weights.")
        # A section of a config file renames its own keys alone.
        assert new.startswith(old.rpartition(".")[0] + ".")
        assert old not in known or old in VALUES
    for key, values in VALUES.items():
        assert set(values.values()) <= set(CHOICES[key]) and not set(values) & set(CHOICES[key])


def test_config_json_of_a_later_version(tmp_path):
    path = tmp_path / "config.json"
    configs.save_json(configs.default(), path)
    saved = json.loads(path.read_text())
    assert saved["version"] == 2
    for version in (3, "2", None):
        path.write_text(json.dumps({**saved, "version": version, "a_later_key": 1}))
        with raises(
            f"config.json is of version {version!r}, and this code reads versions up to 2: u"
        ):
            configs.load_json(path)
    path.write_text(json.dumps({**saved, "a_later_key": 1}))
    with raises("config.json: unknown config key 'a_later_key'"):
        configs.load_json(path)


# Lists of text


@pytest.mark.parametrize(
    "text, patterns",
    [
        ("layers_0/*,final/*", ("layers_0/*", "final/*")),
        (" final/* ", ("final/*",)),
        ("('a', 'b')", ("a", "b")),
        ("5", ("5",)),
    ],
)
def test_a_list_of_texts(text, patterns):
    config = configs.load("configs/digits.py", [f"--config.optim.trainable={text}"])
    assert config.optim.trainable == patterns


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "optim.trainable = () trains nothing"),
        ("(1, 2)", "optim.trainable = 1 is not text"),
        ("(oops", "optim.trainable = '(oops' is not a list of texts like layers_0/*,final/*"),
    ],
)
def test_a_wrong_list_of_texts(text, message):
    with raises(message):
        configs.load("configs/digits.py", [f"--config.optim.trainable={text}"])
