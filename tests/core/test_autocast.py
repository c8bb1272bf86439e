from contextlib import nullcontext

import pytest
import torch

from moesaic.core.autocast import without_autocast


def test_a_product_within_autocast_is_worked_in_its_own_precision():
    x_TD = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x_TD @ x_TD.t()).dtype == torch.bfloat16
        with without_autocast(x_TD.device):
            assert (x_TD @ x_TD.t()).dtype == torch.float32
        assert (x_TD @ x_TD.t()).dtype == torch.bfloat16


def test_where_autocast_is_off_nothing_is_entered():
    assert isinstance(without_autocast(torch.device("cpu")), nullcontext)
    with torch.autocast("cpu", enabled=False):
        assert isinstance(without_autocast(torch.device("cpu")), nullcontext)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("enabled", [False, True])
def test_a_compiled_function_may_leave_autocast(enabled):
    def product(x_TD):
        with without_autocast(x_TD.device):
            return x_TD @ x_TD.t()

    torch._dynamo.reset()
    x_TD = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        assert torch.compile(product, fullgraph=True, backend="eager")(x_TD).dtype == torch.float32
