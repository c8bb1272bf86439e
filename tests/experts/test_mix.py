import torch

from moesaic.experts import LearnedMix
from tests.tolerances import assert_close


def test_two_outputs_are_mixed_by_numbers_that_add_up_to_one():
    mix = LearnedMix(3, init=lambda weight, _: torch.nn.init.normal_(weight)).double()
    torch.nn.init.normal_(mix.mix_bias)
    x_TD, routed_TD, shared_TD = torch.randn(3, 5, 3, dtype=torch.float64)
    y_TD = mix(x_TD, routed_TD, shared_TD)
    for t in range(5):
        a, b = (mix.mix_weight @ x_TD[t] + mix.mix_bias).softmax(dim=0)
        assert_close(y_TD[t], a * routed_TD[t] + b * shared_TD[t], "mix")
    assert_close(mix(x_TD, shared_TD, shared_TD), shared_TD, "equal outputs")


def test_without_preference_it_is_the_mean():
    mix = LearnedMix(3, init=lambda weight, _: torch.nn.init.zeros_(weight))
    x_TD, routed_TD, shared_TD = torch.randn(3, 5, 3)
    assert_close(mix(x_TD, routed_TD, shared_TD), (routed_TD + shared_TD) / 2, "mean")
