"""What every design must do beside the laws: any size, any precision, no look at the future that it does not own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic import ConfigError, Context, recipes
from moesaic.recipes import Recipe
from tests.laws.settings import VOCABULARY, Setting, context_for, plain, rows, some_padding, tokens
from tests.tolerances import assert_close

every_design = pytest.mark.parametrize("name", recipes.names())


def _layer(name: str, width: int, *, hidden: int = 16):
    """As a user builds it: published numbers but for the sizes."""
    published = recipes.get(name).options
    options = {key: value for key, value in plain(name).options.items() if key in published}
    return recipes.get(name).layer(width, hidden=hidden, **options)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "num_tokens"), [(32, 0), (32, 1), (32, 4096), (512, 33)])
@every_design
def test_runs_forward_and_backward_at_any_size(name, width, num_tokens, dtype, training):
    layer = _layer(name, width).to(dtype).train(training)
    x_TD = tokens(num_tokens, width, dtype).requires_grad_()
    context = Context(
        sequence_T=torch.arange(num_tokens) // 128,
        id_T=torch.randint(VOCABULARY, (num_tokens,)),
        domain_T=torch.arange(num_tokens) // 128 % 2,
    )
    y_TD, routing = layer(x_TD, None, context)
    assert y_TD.shape == (num_tokens, width)
    assert y_TD.dtype == dtype
    assert y_TD.isfinite().all()
    setting = plain(name)
    (y_TD.sum() + setting.aux_loss(routing)).backward()
    assert x_TD.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    assert {tensor.dtype for tensor in (routing.logits_TE, routing.scores_TE, routing.weight_N)} == {torch.float32}


@every_design
def test_the_table_names_the_sequences_that_the_context_named(name):
    """Losses within sequences read them there, whichever layer wrote the table."""
    layer, context = _layer(name, 32), context_for(12, plain(name), torch.float32)
    assert torch.equal(layer(tokens(12, 32), None, context)[1].sequence_T, context.sequence_T)


@every_design
def test_the_kernel_is_reported_and_parameters_are_counted(name):
    layer = _layer(name, 32)
    assert layer.kernel_report()
    assert layer.num_params == sum(p.numel() for p in layer.parameters())
    assert 0 < layer.num_active_params <= layer.num_params


def _looks_ahead(setting: Setting, *, training: bool) -> bool:
    """Whether the outputs of early tokens change with the last ones of their sequence."""
    torch.manual_seed(4)
    layer = setting.layer(**_without_drops(setting)).double().train(training)
    x_TD, context = tokens(40, dtype=torch.float64), context_for(40, setting)
    context = Context(
        sequence_T=torch.zeros(40, dtype=torch.int64),
        id_T=context.id_T,
        domain_T=torch.zeros(40, dtype=torch.int64),
        below_TE=context.below_TE,
    )
    other_TD = x_TD.clone()
    other_TD[30:] = 10 * tokens(10, dtype=torch.float64)
    outputs = []
    for batch_TD in (x_TD, other_TD):
        torch.manual_seed(5)
        outputs.append(layer(batch_TD, None, context)[0][:30].detach())
    return not torch.allclose(*outputs, atol=1e-9)


def _without_drops(setting: Setting) -> dict[str, float]:
    """A capacity for everything: what is dropped depends on the rest of the batch by its nature."""
    if setting.recipe_name == "expert-choice":  # its factor drops nothing: it is the experts per token
        return {}
    factors = ("capacity_factor", "eval_capacity_factor", "device_capacity_factor", "capacity_gamma")
    return {name: 100.0 for name in factors if name in setting.recipe.options}


@every_design
def test_a_design_looks_at_the_future_exactly_when_it_says_so(name):
    setting, causality = plain(name), recipes.get(name).causality
    in_training, in_evaluation = (_looks_ahead(setting, training=training) for training in (True, False))
    expected = {"causal": (False, False), "in evaluation": (True, False), "never": (True, True)}[causality]
    assert (in_training, in_evaluation) == expected


@every_design
def test_outputs_in_lower_precision_are_close_to_float64(name):
    """The router runs in float32 whatever the model's dtype, so that nobody goes elsewhere."""
    setting = plain(name)
    layer = setting.layer().eval().bfloat16()
    x_TD, context = tokens(40, dtype=torch.bfloat16), context_for(40, setting)
    low_TD, low = layer(x_TD, None, context)
    exact_TD, exact = layer.double()(x_TD.double(), None, context)
    # As sets: the rank of an expert may change where a router reads what experts have rounded.
    assert rows(low) == rows(exact)
    assert_close(low_TD, exact_TD, "bfloat16")


@every_design
def test_what_a_recipe_says_about_itself_is_complete(name):
    recipe: Recipe = recipes.get(name)
    for text in (recipe.summary, recipe.router, recipe.formula, recipe.citation, recipe.differences):
        assert text.strip(), "every recipe says what it does, where it comes from, and what differs elsewhere"
    assert set(recipe.sources) <= set(recipe.options)
    unsaid = set(recipe.options) - set(recipe.sources) - {"kernel", "init_std"}
    assert not unsaid, f"no source for {sorted(unsaid)}"
    assert 1991 <= recipe.year <= 2026


ENTRIES = st.sampled_from([0.0, 1.0, -1.0, 2.0, 100.0, -100.0, 1e4, -1e4])


@st.composite
def batches(draw):
    """Any recipe, its router and tokens made of few values so that ties, saturation and underflow are common."""
    name = draw(st.sampled_from(recipes.names()))
    options = plain(name).options
    num_tokens = draw(st.integers(0, 9))
    torch.manual_seed(draw(st.integers(0, 9)))
    layer = recipes.get(name).layer(3, hidden=2, **options)
    entry = draw(ENTRIES)
    for part, parameter in layer.named_parameters():
        if part.startswith("router.") and draw(st.booleans()):
            parameter.data.copy_(torch.randint(-1, 2, parameter.shape) * entry)
    small = st.sampled_from([0.0, 1.0, -1.0, 0.5])
    x_TD = torch.tensor(draw(st.lists(small, min_size=num_tokens * 3, max_size=num_tokens * 3))).view(num_tokens, 3)
    valid = draw(st.none() | st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    valid_T = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    return plain(name), layer.train(draw(st.booleans())), x_TD, valid_T


@given(batches())
def test_any_batch_gives_a_sound_table_finite_outputs_losses_and_gradients(batch):
    setting, layer, x_TD, valid_T = batch
    x_TD.requires_grad_()
    num_tokens = x_TD.shape[0]
    y_TD, routing = layer(x_TD, valid_T, context_for(num_tokens, setting))
    pairs = list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs), "a token visits an expert twice"
    assert all(0 <= t < num_tokens and 0 <= e < setting.num_experts for t, e in pairs)
    assert routing.weight_N.isfinite().all()
    assert routing.probability_TE.sum(dim=-1).tolist() == pytest.approx([1.0] * num_tokens, abs=1e-5)
    loss = (y_TD.square().mean() if y_TD.numel() else y_TD.sum()) + setting.aux_loss(routing)
    assert loss.isfinite()
    loss.backward()
    assert x_TD.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@every_design
def test_one_expert_and_as_many_choices_as_experts(name):
    """The smallest mixture, and the one that leaves nobody out, where the design allows them."""
    published = recipes.get(name).options
    for options in ({"num_experts": 1, "top_k": 1}, {"num_experts": 4, "top_k": 4}):
        sizes = {key: value for key, value in {**plain(name).options, **options}.items() if key in published}
        setting = Setting(name, sizes)
        try:
            layer = setting.layer()
        except ConfigError as error:
            assert ", got " in str(error)  # noqa: PT017
            continue
        y_TD, routing = layer(tokens(12), some_padding(12), context_for(12, setting))
        assert y_TD.isfinite().all()
        assert math.isfinite(float(setting.aux_loss(routing).detach()))
