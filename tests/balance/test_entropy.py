import math
from dataclasses import replace

import pytest
import torch

from moesaic import Routing
from moesaic.balance import entropy_loss, mutual_information_loss

ROWS = {
    "uniform": [[0.25] * 4] * 8,
    "balanced one-hot": [[float(e == t % 4) for e in range(4)] for t in range(8)],
    "constant one-hot": [[0.0, 1.0, 0.0, 0.0]] * 8,
}


def _routing(scores: list[list[float]], valid_T: torch.Tensor | None = None) -> Routing:
    scores_TE = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    expert_TK = scores_TE.detach().argmax(dim=-1, keepdim=True)
    return Routing.from_choices(expert_TK, scores_TE.gather(1, expert_TK), scores_TE.log(), scores_TE, valid_T)


@pytest.mark.parametrize(
    ("name", "entropy", "information"),
    [
        ("uniform", math.log(4), 0.0),
        ("balanced one-hot", 0.0, -math.log(4)),
        ("constant one-hot", 0.0, 0.0),
    ],
)
def test_the_stated_values(name, entropy, information):
    """Reference 12.2 and 19."""
    routing = _routing(ROWS[name])
    assert float(entropy_loss(routing).detach()) == pytest.approx(entropy, abs=1e-12)
    assert float(mutual_information_loss(routing).detach()) == pytest.approx(information, abs=1e-12)


def test_a_worked_mixture():
    routing = _routing([[0.5, 0.5], [0.9, 0.1]])
    first, second = math.log(2), -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    mean = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    assert float(entropy_loss(routing).detach()) == pytest.approx((first + second) / 2)
    assert float(mutual_information_loss(routing).detach()) == pytest.approx((first + second) / 2 - mean)


def test_information_is_never_below_minus_the_logarithm_of_e_nor_above_0():
    """Reference 12.2."""
    for std in (0.0, 0.1, 1.0, 10.0, 1000.0):
        routing = _routing((std * torch.randn(30, 5)).double().softmax(dim=-1).tolist())
        assert -math.log(5) - 1e-12 <= float(mutual_information_loss(routing).detach()) <= 1e-12


def test_padding_counts_nowhere():
    valid_T = torch.tensor([True, False, True, False])
    scores = [[0.5, 0.5], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]
    padded, alone = _routing(scores, valid_T), _routing([scores[0], scores[2]])
    for loss in (entropy_loss, mutual_information_loss):
        assert float(loss(padded).detach()) == pytest.approx(float(loss(alone).detach()))


def test_no_token_gives_zero_attached():
    for loss in (entropy_loss, mutual_information_loss):
        value = loss(_routing([[0.5, 0.5]], torch.tensor([False])))
        value.backward()
        assert float(value.detach()) == 0


@pytest.mark.parametrize("loss", [entropy_loss, mutual_information_loss])
@pytest.mark.parametrize("spread", [1.0, 200.0, 1e4])
def test_gradients_are_finite_where_probabilities_underflow(loss, spread):
    logits_TE = (spread * torch.tensor([[0.0, 1.0, -1.0], [0.5, -1.0, 0.0]])).requires_grad_()
    routing = Routing.from_choices(
        torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), logits_TE, logits_TE.softmax(dim=-1)
    )
    loss(routing).backward()
    assert logits_TE.grad.isfinite().all()
    assert (logits_TE.grad.abs().max() > 1e-2) == (spread == 1.0)


@pytest.mark.parametrize("loss", [entropy_loss, mutual_information_loss])
def test_gradients_agree_with_differences(loss):
    logits_TE = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    choice_TK = torch.zeros(5, 1, dtype=torch.int64)

    def of(logits_TE):
        routing = Routing.from_choices(choice_TK, torch.ones(5, 1).double(), logits_TE, logits_TE.softmax(dim=-1))
        return loss(routing)

    assert torch.autograd.gradcheck(of, logits_TE)


def test_shrinking_all_scores_gains_nothing():
    routing = _routing([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    for loss in (entropy_loss, mutual_information_loss):
        shrunk = replace(routing, scores_TE=routing.scores_TE * 1e-25)
        assert float(loss(shrunk).detach()) == pytest.approx(float(loss(routing).detach()))
