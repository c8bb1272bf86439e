"""A case so small that all contenders run through it in milliseconds."""

import pytest
import torch

from moesaic.bench.case import Case
from moesaic.bench.draw import draw

CPU = torch.device("cpu")
# Sizes of whole 16 bytes in half precision: torch's grouped product asks for that.
TINY = Case(name="tiny", num_experts=6, top_k=2, hidden=16, width=16, num_tokens=40)


@pytest.fixture
def drawn():
    return draw(TINY, dtype=torch.float32, device=CPU)


@pytest.fixture
def drawn_shared():
    return draw(TINY.with_shared(), dtype=torch.float32, device=CPU)
