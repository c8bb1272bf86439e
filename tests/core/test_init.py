import pytest
import torch

from moesaic.core.init import normal, scaled_by_fan_in, truncated_normal


def test_a_normal_draw_has_the_width_asked_for_whatever_the_fan_in():
    weight = torch.empty(200, 200)
    normal(0.3)(weight, 7)
    assert float(weight.std()) == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize(("scale", "fan_in"), [(0.1, 40), (1.0, 10)])
def test_a_draw_scaled_by_fan_in_is_cut_off_at_two_standard_deviations(scale, fan_in):
    weight = torch.empty(200, 200)
    scaled_by_fan_in(scale)(weight, fan_in)
    std = (scale / fan_in) ** 0.5
    assert float(weight.abs().max()) <= 2 * std
    assert float(weight.abs().max()) > 1.95 * std
    assert float(weight.std()) == pytest.approx(0.88 * std, rel=0.03)  # what the cut leaves of it


def test_a_truncated_draw_is_cut_off_where_asked():
    weight = torch.empty(300, 300)
    truncated_normal(0.1, deviations=3)(weight, 7)
    assert 0.28 < float(weight.abs().max()) <= 0.3
    assert float(weight.std()) == pytest.approx(0.987 * 0.1, rel=0.02)
