import pytest
import torch

from moesaic.routers import PooledRouter
from tests.tolerances import assert_close


def test_without_norms_it_is_a_linear_map():
    router, mean_SD = PooledRouter(5, 3), torch.randn(4, 5)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert torch.equal(router(mean_SD), mean_SD @ router.weight.T)


def test_with_norms_neither_the_length_of_the_input_nor_that_of_the_map_matters():
    router = PooledRouter(5, 3, normalized=True, init=lambda weight, _: torch.nn.init.normal_(weight)).double()
    mean_SD = 30 * torch.randn(4, 5, dtype=torch.float64)
    logits_SE = router(mean_SD)
    with torch.no_grad():
        router.weight.mul_(30)
    assert_close(router(7 * mean_SD), logits_SE, "logits", torch.bfloat16)
    assert float(router.weight_norm.weight.detach().mean()) == pytest.approx(0.01)
    assert float(logits_SE.detach().abs().max()) < 0.1


def test_it_runs_in_float32_at_least():
    router = PooledRouter(5, 3, normalized=True).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert router(torch.randn(4, 5).bfloat16()).dtype == torch.float32
    assert router.double()(torch.randn(4, 5).double()).dtype == torch.float64
