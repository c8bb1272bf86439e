import pytest
import torch

from moesaic.experts import ConstantExpert, CopyExpert, ZeroExpert
from tests.tolerances import assert_close


@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_zero_gives_zeros_and_copy_its_input(num_rows):
    x_MD = torch.randn(num_rows, 3)
    assert torch.equal(ZeroExpert()(x_MD), torch.zeros(num_rows, 3))
    assert torch.equal(CopyExpert()(x_MD), x_MD)


def test_a_constant_mixes_its_input_and_a_learned_vector_by_two_numbers_that_add_up_to_one():
    expert = ConstantExpert(3, init=lambda weight, _: torch.nn.init.normal_(weight)).double()
    x_MD = torch.randn(5, 3, dtype=torch.float64)
    y_MD = expert(x_MD)
    for x_D, y_D in zip(x_MD, y_MD, strict=True):
        a, b = (expert.mix_weight @ x_D).exp() / (expert.mix_weight @ x_D).exp().sum()
        assert_close(y_D, a * x_D + b * expert.constant_D, "constant")


def test_a_constant_starts_standard_normal_whatever_the_model_s_width_of_weights():
    torch.manual_seed(0)
    expert = ConstantExpert(4000)
    assert float(expert.constant_D.detach().std()) == pytest.approx(1.0, rel=0.05)
    assert float(expert.mix_weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_low_precision_stays_low():
    assert ConstantExpert(3).bfloat16()(torch.randn(2, 3).bfloat16()).dtype == torch.bfloat16
