"""A run goes on with other devices, hosts and presets, and sees the same data in the same order."""

from __future__ import annotations

import numpy as np
import pytest

from tests import cli

# (processes, devices of each, preset)
PLACES = ((1, 8, "dp"), (1, 4, "fsdp"), (2, 1, "zero1"), (1, 1, "fsdp_ep"))
STEPS = 3  # at each place


@pytest.mark.slow
def test_a_run_moves_to_other_devices_hosts_and_presets(tmp_path):
    total = STEPS * len(PLACES)

    def train(name, num_steps, processes, devices, preset):
        changes = {"train__num_steps": num_steps, "checkpoint__every": 100}
        changes |= {"optim__learning_rate": 1e-2, "parallel__preset": preset}
        args = [*cli.digits("token_choice", **changes), "--workdir", tmp_path / name]
        cli.together("train", *args, processes=processes, devices=devices, optimize=False)

    train("still", total, 1, 1, "dp")
    for number, place in enumerate(PLACES, 1):
        train("moved", number * STEPS, *place)
    still, moved = (cli.metrics(tmp_path / name) for name in ("still", "moved"))
    assert [line["step"] for line in moved] == [*range(1, total + 1)]
    losses = [[line["loss"] for line in lines] for lines in (still, moved)]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5, rtol=0)
    assert len(set(losses[0])) == total
    (a, data), (b, same) = (cli.read_checkpoint(tmp_path / n, total) for n in ("still", "moved"))
    assert data == same and a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(b[name], a[name], atol=1e-4, err_msg=name)
