"""What every test starts from: the same seed, one thread, and reproducible random examples."""

import os

import hypothesis
import pytest
import torch

# Triton reads this when it is first imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile(
    "moesaic", deadline=None, derandomize=True, database=None, max_examples=40, print_blob=False
)
hypothesis.settings.load_profile("moesaic")

# One thread: sums come out the same on every machine, and parallel test workers do not fight over cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
