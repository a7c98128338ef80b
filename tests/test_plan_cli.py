from __future__ import annotations

import json

import pytest

from moe_diffusion.plan import main
from tests import cli


def test_plans_for_what_is_here_and_ends_with_json(capsys):
    args = cli.digits("expert_choice", ema__decays="()")
    main([*args, "--topology", "local", "--own-preset", "--json"])
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].endswith("train on local (8 x cpu), preset dp")
    values = json.loads(last)
    assert values["fits"] and values["chips"] == 8 and values["micro_batch"] == 2
    assert values["flops_per_chip"] > 0 and values["compile_seconds"] > 0
    assert values["collective_bytes"]["all-reduce"] > 0


@pytest.mark.parametrize(
    "topology,batch,message",
    [
        ("v9:2x2", 16, "v5e:16x16"),
        ("local", 12, "data.batch_size / optim.accumulate = 12"),
        ("v5e:4", 16, "a shape of v5e has 2 sizes"),
    ],
)
def test_what_cannot_be_planned(capfd, topology, batch, message):
    args = cli.digits("expert_choice", data__batch_size=batch)
    assert message in cli.refused(capfd, main, [*args, "--topology", topology])
