"""From sums of selection frequencies to tables; every value is worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moe_diffusion.evaluation import expert_tables


def test_averages_of_two_times():
    """Time 0.5 has three evaluations, time 1 has one, and time 0 none; a layer of two experts."""
    sums = np.array([[[0.0, 0.0]], [[1.5, 0.6]], [[1.0, 1.0]]])
    found = expert_tables.tables([0.0, 0.5, 1.0], sums, np.array([0.0, 3.0, 1.0]))
    assert found["times"] == [0.5, 1.0] and found["evaluations"] == 4
    np.testing.assert_allclose(found["selection_by_time"], [[[0.5, 0.2], [1, 1]]])
    np.testing.assert_allclose(found["capacity_by_time"], [[[1, 0.4], [2, 2]]])
    np.testing.assert_allclose(found["share_by_time"], [[[5 / 7, 2 / 7], [0.5, 0.5]]])
    np.testing.assert_allclose(found["selection"], [[2.5 / 4, 1.6 / 4]])
    np.testing.assert_allclose(found["share"], [[25 / 41, 16 / 41]])
    np.testing.assert_allclose(found["max_over_mean"], [50 / 41])
    np.testing.assert_allclose(found["per_layer_and_time"], [[0.7, 2]])
    np.testing.assert_allclose(found["per_layer"], [4.1 / 4])
    assert found["c_infer_avg"] == pytest.approx(4.1 / 4)


def test_classes_that_were_not_drawn_are_left_out():
    sums = np.array([[[2.0, 0.0]], [[0.0, 0.0]], [[0.5, 0.5]]])
    found = expert_tables.by_class(["0", "1", "null"], sums, np.array([4.0, 0.0, 1.0]))
    assert found["per_class"] == {"0": 0.5, "null": 1.0}
    assert found["selection_by_class"] == {"0": [[0.5, 0.0]], "null": [[0.5, 0.5]]}
    assert found["share_by_class"]["0"] == [[1.0, 0.0]]
    assert found["experts_in_use_by_class"] == {"0": [1], "null": [2]}
    assert found["effective_experts_by_class"] == {"0": [1.0], "null": [2.0]}


def test_the_effective_number_of_experts():
    """exp(entropy): of shares 1/2, 1/4, 1/4 the entropy is 1.5 ln 2."""
    share = np.array([[0.25] * 4, [1, 0, 0, 0], [0, 0.5, 0, 0.5], [0.5, 0.25, 0.25, 0], [0] * 4])
    np.testing.assert_allclose(expert_tables.effective(share), [4, 1, 2, 2**1.5, 0])


def test_a_layer_that_nobody_uses_has_shares_of_zero():
    found = expert_tables.shares(np.array([[0.0, 0.0], [0.5, 1.5]]))
    np.testing.assert_array_equal(found, [[0, 0], [0.25, 0.75]])


def test_the_hardest_and_the_easiest_classes():
    per_class = {"0": 1.5, "1": 1.0, "2": 2.0, "3": 1.5, "4": 0.5, "null": 9.0}
    assert expert_tables.extreme_classes(per_class) == (["2", "0"], ["4", "1"])
    assert expert_tables.extreme_classes(per_class, most=1) == (["2"], ["4"])
    many = {str(label): (label * 7) % 30 / 10 for label in range(30)} | {"null": 0.0}
    hardest, easiest = expert_tables.extreme_classes(many)
    # 7 label mod 30 is 29, 28, ... for label = 17, 4, ...: 13 is 7's inverse, 13 * 29 mod 30 = 17.
    assert hardest == [str(13 * rank % 30) for rank in range(29, 19, -1)]
    assert easiest == [str(13 * rank % 30) for rank in range(10)]
    # Rounding is no difference, and one class is neither hard nor easy.
    assert expert_tables.extreme_classes({"0": 2.0, "1": 2.0 + 1e-9}) == ([], [])
    assert expert_tables.extreme_classes({"3": 2.0, "null": 1.0}) == ([], [])


def test_rounding_keeps_everything_but_digits():
    given = {"a": [1.23456789, 3], "b": {"c": (0.000123456789, "text", True)}}
    assert expert_tables.rounded(given) == {
        "a": [1.2346, 3],
        "b": {"c": [0.00012346, "text", True]},
    }
