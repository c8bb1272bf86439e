"""Each recipe against the plain loops: the same rows, weights, outputs, losses and every gradient, in float64."""

import pytest
import torch
from torch import Tensor

from moesaic import Routing, recipes
from tests.laws.settings import SETTINGS, WIDTH, Setting, context_for, every_setting, plain, some_padding, tokens
from tests.oracle.case import Answer, Case
from tests.oracle.recipes import ORACLES
from tests.tolerances import assert_close

SIZES = (0, 1, 7, 63)


def _same_weights(layer: torch.nn.Module) -> dict[str, Tensor]:
    """The layer's state for the oracle: leaves of their own, so that gradients do not mix."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    return parameters | dict(layer.named_buffers())


def _assert_same_table(routing: Routing, answer: Answer) -> None:
    table = answer.table
    assert routing.expert_N.tolist() == [row.expert for row in table.rows]
    assert routing.token_N.tolist() == [row.token for row in table.rows]
    assert routing.choice_N.tolist() == [row.choice for row in table.rows]
    assert routing.kept_N.tolist() == answer.kept
    if table.rows:
        assert_close(routing.weight_N, torch.stack([row.weight for row in table.rows]), "weight_N")
        assert_close(routing.logits_TE, torch.stack([torch.stack(line) for line in table.logits]), "logits_TE")
        assert_close(routing.scores_TE, torch.stack([torch.stack(line) for line in table.scores]), "scores_TE")


def _compare(setting: Setting, num_tokens: int, *, padded: bool, training: bool, kernel: str, seed: int) -> None:
    torch.manual_seed(seed)
    layer = setting.deterministic_layer(kernel=kernel).double().train(training)
    weights = _same_weights(layer)
    x_TD = tokens(num_tokens, dtype=torch.float64).requires_grad_()
    x_oracle_TD = x_TD.detach().clone().requires_grad_()
    valid_T = some_padding(num_tokens) if padded else None
    context = context_for(num_tokens, setting)
    case = Case(
        x=x_oracle_TD,
        valid=[True] * num_tokens if valid_T is None else valid_T.tolist(),
        sequences=context.sequence_T.tolist(),
        ids=context.id_T.tolist(),
        domains=context.domain_T.tolist(),
        below=context.below_TE,
        training=training,
    )

    # Whoever draws random numbers draws the same ones.
    torch.manual_seed(seed + 1000)
    y_TD, routing = layer(x_TD, valid_T, context)
    routing = setting.rewarded(routing)
    case.rewards = routing.extras.get("reward_T", torch.zeros(num_tokens)).tolist()
    torch.manual_seed(seed + 1000)
    answer = ORACLES[setting.recipe_name](case, weights, setting.options)

    _assert_same_table(routing, answer)
    assert_close(y_TD, answer.y, "y_TD")
    assert sorted(term.name for term in setting.losses) == sorted(answer.losses)
    probe_TD = torch.randn_like(y_TD)
    total, total_oracle = (y_TD * probe_TD).sum(), (answer.y * probe_TD).sum()
    for term in setting.losses:
        assert_close(term.loss(routing), answer.losses[term.name], f"{term.name} loss")
        total, total_oracle = total + 3 * term.loss(routing), total_oracle + 3 * answer.losses[term.name]
    total.backward()
    total_oracle.backward()
    assert_close(x_TD.grad, x_oracle_TD.grad if num_tokens else x_TD, "gradient of x_TD")
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad:
            continue
        expected = weights[name].grad
        assert parameter.grad is not None, f"{name} has no gradient"
        assert_close(parameter.grad, torch.zeros_like(parameter) if expected is None else expected, f"grad of {name}")


@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padded"])
@pytest.mark.parametrize("num_tokens", SIZES)
@every_setting(*SETTINGS)
def test_every_recipe_agrees_with_plain_loops_in_rows_outputs_losses_and_gradients(setting, num_tokens, padded):
    for seed in range(1 if num_tokens in (0, 63) else 3):
        _compare(setting, num_tokens, padded=padded, training=True, kernel="auto", seed=seed)


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
@every_setting(*SETTINGS)
def test_every_recipe_agrees_with_plain_loops_on_the_reference_kernel_and_in_evaluation(setting, training):
    for seed in range(2):
        _compare(setting, 17, padded=True, training=training, kernel="reference", seed=100 + seed)


def test_every_recipe_has_an_oracle_and_every_oracle_a_recipe():
    assert sorted(ORACLES) == sorted(recipes.names())


@pytest.mark.parametrize("name", recipes.names())
def test_numbers_compared_with_the_oracle_are_far_from_zero(name):
    setting = plain(name)
    layer = setting.deterministic_layer().double().eval()
    y_TD, routing = layer(tokens(63, WIDTH, torch.float64), None, context_for(63, setting))
    assert y_TD.abs().mean() > 0.05
    assert routing.weight_N.abs().mean() > 0.05
    # A draw by chance is the same for every expert.
    assert routing.logits_TE.std() > (0.3 if name != "thor" else -1)
