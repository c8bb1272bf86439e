"""Balance losses that wait for the end of a forward, that are scaled anew each step, or that are named by hand."""

import contextlib
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from moesaic import ConfigError, recipes
from moesaic.balance import TERMS, LossTerm, check, global_batch_loss, named, reinforce_loss, switch_loss, z_loss
from moesaic.hf import balance, controllers, global_batch, moe_layers, observe, sparsify
from moesaic.hf.layers import blocks
from moesaic.hf.loss import token_rewards
from moesaic.hf.register import register
from tests.hf.test_every_recipe import seeded
from tests.hf.test_every_recipe import sparse as of_recipe
from tests.hf.test_forward import padded, sparse
from tests.hf.tiny import OPTIONS, batch, build, gradients, recompute


def with_terms(*terms, family="llama"):
    """A top-2 model with these balance losses in place of its own."""
    model = sparse(family).train()
    for block in blocks(model).values():
        block.terms = terms
    return model


def seen_in(model, inputs, **kwargs):
    seen = []
    with observe(model, lambda one: seen.append(one.routing)):
        model(**inputs, **kwargs)
    return seen


# --- adaptive -------------------------------------------------------------------------------------------------------


def test_an_adaptive_loss_is_scaled_by_its_layers_own_coefficient():
    model, inputs = of_recipe("relu").train(), batch("llama")
    layers = list(moe_layers(model).values())
    for layer, value in zip(layers, (0.5, 3.0), strict=True):
        layer.coefficient.fill_(value)
    with balance(model) as terms:
        output = model(**inputs)
    (term,) = recipes.get("relu").losses
    routings = seen_in(model, inputs)
    expected = sum(value * term.loss(routing) for value, routing in zip((0.5, 3.0), routings, strict=True))
    torch.testing.assert_close(output.aux_loss, expected)
    torch.testing.assert_close(terms.total, expected)
    torch.testing.assert_close(terms.means["l1"], sum(term.loss(routing) for routing in routings).detach() / 2)


# --- rewarded -------------------------------------------------------------------------------------------------------

REINFORCE = LossTerm(name="reinforce", loss=reinforce_loss, coefficient=0.5, rewarded=True)


def rewards_of(model, inputs):
    """What the loss is given, by layer."""
    given = []

    def loss(routing):
        given.append(routing)
        return routing.logits_TE.sum() * 0

    for block in blocks(model).values():
        block.terms = (replace(REINFORCE, loss=loss),)
    output = model(**inputs)
    return given, output


def test_a_token_is_rewarded_with_minus_the_loss_of_the_prediction_that_it_makes():
    model, inputs = with_terms(), padded(batch("llama"), "left")
    inputs["labels"][0, 6] = -100
    given, output = rewards_of(model, inputs)
    log_BPV = output.logits.detach().log_softmax(dim=-1)
    rewarded = 0
    for sequence in range(3):
        for position in range(11):
            token = sequence * 11 + position
            label = int(inputs["labels"][sequence, position + 1]) if position < 10 else -100
            known = label != -100 and bool(inputs["attention_mask"][sequence, position])
            for routing in given:
                assert bool(routing.valid_T[token]) == known
                if known:
                    torch.testing.assert_close(routing.extras["reward_T"][token], log_BPV[sequence, position, label])
            rewarded += known
    assert rewarded == 3 * 6 - 1
    assert len(given) == 2
    mean = -sum(given[0].extras["reward_T"]) / 3 / 6
    # The label of a padding token's prediction, the first real token, belongs to no layer's token.
    assert float(mean) > 0
    assert not given[0].extras["reward_T"].requires_grad


def test_rewards_of_logits_in_low_precision_are_worked_out_in_float32():
    logits_BPV, labels = torch.randn(2, 5, 61).bfloat16(), torch.randint(61, (2, 5))
    reward_T = token_rewards({"logits": logits_BPV}, labels, None)
    assert reward_T.dtype == torch.float32
    torch.testing.assert_close(
        reward_T, token_rewards({"logits": logits_BPV.float()}, labels, None), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("tuples", [False, True])
def test_a_rewarded_loss_joins_the_loss_and_moves_the_router(tuples):
    model, inputs = with_terms(REINFORCE), batch("llama")
    with balance(model) as terms:
        output = model(**inputs, return_dict=not tuples)
    loss = output[0]
    with torch.no_grad():
        own = model(**inputs).loss
    assert set(terms.means) == {"reinforce"}
    torch.testing.assert_close(loss, own + terms.total)
    terms.total.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in moe_layers(model).values())


def test_labels_that_the_caller_shifts_give_the_same_rewards():
    model, inputs = with_terms(REINFORCE), batch("llama")
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).aux_loss, model(**inputs).aux_loss)


def test_a_rewarded_loss_shrinks_with_the_share_of_the_batch():
    model, inputs = with_terms(REINFORCE), batch("llama")
    whole, half = model(**inputs), model(**inputs, num_items_in_batch=36)
    torch.testing.assert_close(half.loss, whole.loss / 2)


def test_rewards_are_those_without_checkpointing():
    model, inputs = with_terms(REINFORCE), padded(batch("llama"), "right")
    model(**inputs, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    recompute(model)
    model(**inputs, use_cache=False).loss.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)


def test_without_labels_a_rewarded_loss_is_left_out_and_says_so():
    model, inputs = with_terms(REINFORCE), batch("llama")
    del inputs["labels"]
    with pytest.warns(UserWarning, match="reinforce") as warned, balance(model) as terms:
        assert "aux_loss" not in model(**inputs)
    assert [str(one.message) for one in warned] == [
        "The balance losses reinforce need the model's loss at each token as their reward, and this forward in "
        "training had no labels: they are left out. Pass labels."
    ]
    assert terms.total is None
    with torch.no_grad():
        model(**inputs)  # no training: nothing to warn of
    model.eval()(**inputs)


def test_a_model_that_does_not_predict_the_next_token_has_no_rewards():
    for family in ("t5", "vit"):
        model = with_terms(REINFORCE, family=family)
        with pytest.raises(ConfigError, match=r"^A rewarded balance loss needs a causal language model, in which each"):
            model(**batch(family))


# --- over the global batch ------------------------------------------------------------------------------------------

GLOBAL = LossTerm(name="global-batch", loss=global_batch_loss, coefficient=2.0)


def by_hand(routings, load_E):
    return sum(2.0 * global_batch_loss(routing, load_E=load) for routing, load in zip(routings, load_E, strict=True))


def test_without_a_global_batch_a_forward_reads_its_own_load():
    model, inputs = with_terms(GLOBAL), batch("llama")
    routings = seen_in(model, inputs)
    torch.testing.assert_close(model(**inputs).aux_loss, sum(2.0 * switch_loss(routing) for routing in routings))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_micro_batch_reads_the_load_of_the_step_so_far_and_the_last_one_of_all(checkpointing):
    """Reference, 17.4 (4)."""
    model, parts = with_terms(GLOBAL), [batch("llama"), padded(batch("llama"), "left"), batch("llama", sequences=1)]
    tables = [seen_in(model, part) for part in parts]
    if checkpointing:
        recompute(model)
    with global_batch(model) as step:
        for _ in range(2):
            so_far = [torch.zeros(4, dtype=torch.int64)] * 2
            for part, routings in zip(parts, tables, strict=True):
                so_far = [before_E + routing.load_E for before_E, routing in zip(so_far, routings, strict=True)]
                output = model(**part, use_cache=False)
                torch.testing.assert_close(output.aux_loss, by_hand(routings, so_far))
                output.loss.backward()
            step.step()
    routings = tables[0]
    torch.testing.assert_close(model(**parts[0]).aux_loss, by_hand(routings, [r.load_E for r in routings]))


def test_evaluation_and_forwards_without_gradient_do_not_count():
    model, inputs = with_terms(GLOBAL), batch("llama")
    alone = model(**inputs).aux_loss
    with global_batch(model):
        with torch.no_grad():
            model(**batch("llama"))
        model.eval()
        with balance(model):
            model(**batch("llama"))
        torch.testing.assert_close(model.train()(**inputs).aux_loss, alone)


def test_equal_micro_batches_with_the_load_of_all_have_the_loss_of_the_whole_batch():
    """Reference, 17.4 (3): the loss is linear in P, and f is shared."""
    model, whole = with_terms(GLOBAL), batch("llama", sequences=4)
    expected = model(**whole).aux_loss
    loads = [routing.load_E for routing in seen_in(model, whole)]
    halves = [{name: value[half] for name, value in whole.items()} for half in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(by_hand(seen_in(model, half), loads) for half in halves) / 2, expected)


def test_a_whole_model_under_a_checkpoint_cannot_know_the_batch_again():
    model, inputs = with_terms(GLOBAL), batch("llama")
    loss = checkpoint(lambda: model(**inputs, use_cache=False).loss, use_reentrant=False)
    with pytest.raises(ConfigError, match=r"^A balance loss over the global batch cannot be worked out again in back"):
        loss.backward()


def test_losses_at_once_and_those_that_wait_add_up():
    z = LossTerm(name="z", loss=z_loss, coefficient=0.1)
    inputs, totals = batch("llama"), []
    for terms in ((z,), (GLOBAL,), (REINFORCE,), (z, GLOBAL, REINFORCE)):
        torch.manual_seed(0)
        totals.append(with_terms(*terms)(**inputs).aux_loss)
    torch.testing.assert_close(totals[3], totals[0] + totals[1] + totals[2])


# --- by name --------------------------------------------------------------------------------------------------------


def test_another_balance_takes_the_place_of_the_recipes_and_is_saved_with_it(tmp_path):
    register()
    model = sparsify(build("llama"), "deepseek-v3", **OPTIONS["deepseek-v3"], balance={"switch": 0.25, "z": 0.5})
    assert controllers(model) == []
    routings = seen_in(model.train(), batch_once := batch("llama"))
    expected = sum(0.25 * switch_loss(routing) + 0.5 * z_loss(routing) for routing in routings)
    torch.testing.assert_close(model(**batch_once).aux_loss, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert loaded.config.moesaic["format_version"] == 2
    assert loaded.config.moesaic["balance"] == {"switch": 0.25, "z": 0.5}
    torch.testing.assert_close(loaded(**batch_once).aux_loss, expected)


def test_a_model_with_its_recipes_own_balance_is_written_as_older_versions_read_it():
    spec = sparse("llama").config.moesaic
    assert spec["format_version"] == 1
    assert "balance" not in spec


def test_no_balance_is_a_balance():
    model = sparsify(build("llama"), "mixtral", **OPTIONS["mixtral"], balance={}).train()
    assert "aux_loss" not in model(**batch("llama"))


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        (
            "hash",
            {"switch": 0.1},
            "Balance loss switch moves a router's weights, got a MoELayer whose router has none: its loads are fixed. "
            "Leave the loss out.",
        ),
        (
            "mixtral",
            {"threshold": 0.1},
            "threshold_loss needs routing.extras['threshold_E'], which this routing does not have. It comes from "
            "BatchwiseRouter: use the two together, or another loss.",
        ),
        (
            "mixtral",
            {"adaptive-l1": 0.1},
            "adaptive loss adaptive-l1 needs routing.extras['coefficient'], which this routing does not have. It comes "
            "from a layer built with coefficient=: use the two together, or another loss.",
        ),
        (
            "mixtral",
            {"swich": 0.1},
            f"balance must name terms of moesaic.balance.TERMS ({', '.join(TERMS)}), got swich. Pick from these.",
        ),
        (
            "mixtral",
            {"switch": -0.5},
            "The number of balance term switch must be finite and at least 0, got -0.5. Give a loss its coefficient, a "
            "controller its rate.",
        ),
    ],
)
def test_a_balance_that_does_nothing_is_refused_and_the_model_is_untouched(recipe, given, message):
    model = build("llama")
    before = torch.get_rng_state()
    with pytest.raises(ConfigError) as error:
        sparsify(model, recipe, **OPTIONS[recipe], balance=given)
    assert str(error.value) == message
    assert torch.equal(torch.get_rng_state(), before)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_every_kind_of_layer_of_the_model_is_tried():
    """In the second layer each token takes both experts: loads are even whatever the router does."""
    sparsify(build("llama"), "mixtral", num_experts=[4, 2], balance={"z": 0.1})
    with pytest.raises(ConfigError) as error:
        sparsify(build("llama"), "mixtral", num_experts=[4, 2], balance={"switch": 0.1})
    assert str(error.value) == (
        "Balance loss switch pushes TopKRouter nowhere: with its routing the loss has one value, whatever the weights. "
        "Use another loss."
    )


def test_coefficients_of_the_recipes_losses_do_not_go_with_another_balance():
    with pytest.raises(ConfigError) as error:
        sparsify(build("llama"), "mixtral", **OPTIONS["mixtral"], balance={"z": 0.1}, aux_coefficients={"switch": 0.2})
    assert str(error.value) == (
        "aux_coefficients change the recipe's balance and balance replaces it, got both: switch and z. "
        "Give all coefficients in balance."
    )
    with pytest.raises(ConfigError) as error:
        sparsify(build("llama"), "hash", **OPTIONS["hash"], aux_coefficients={"switch": 0.2})
    assert str(error.value) == (
        "aux_coefficients must name losses of recipe hash (it has none), got switch. Leave out what the recipe does "
        "not have, or replace its balance with sparsify's balance."
    )


def test_every_balance_of_every_recipe_has_a_name():
    for recipe in recipes.names():
        for term in recipes.get(recipe).balance:
            if isinstance(term, LossTerm):
                assert any(
                    isinstance(one, LossTerm) and one.loss == term.loss and one.rewarded == term.rewarded
                    for one in named(dict.fromkeys(TERMS, 2.0))
                ), (recipe, term.name)
            else:
                assert any(type(one) is type(term) for one in named(dict.fromkeys(TERMS, 2.0))), (recipe, term)


def model_of(recipe, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return sparsify(build("llama"), recipe, **OPTIONS[recipe] | changes)


def taken_by(recipe):
    """The terms that a recipe takes in place of its own."""
    layer = recipes.get(recipe).layer(8, hidden=8, **OPTIONS[recipe])
    for name in TERMS:
        with contextlib.suppress(ConfigError):
            check(named({name: 2.0}), layer, 8)
            yield name


@pytest.mark.parametrize("recipe", recipes.names())
def test_any_term_goes_with_any_router_or_is_refused(recipe):
    """Each that is taken gives a small layer's router a gradient; all together, a model's a finite one."""
    taken = list(taken_by(recipe))
    losses = {name: 2.0 for name in taken if isinstance(named({name: 2.0})[0], LossTerm)}
    if losses:
        model = model_of(recipe, balance=losses).train()
        with balance(model) as terms:
            seeded(model, batch("llama"))
        assert set(terms.means) == set(losses)
        terms.total.backward()
        assert gradients(model)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients(model).values())
    for name in set(taken) - set(losses):
        assert controllers(model_of(recipe, balance={name: 2.0})), name
    layer = next(iter(moe_layers(model_of(recipe)).values()))
    has_weights = any(True for _ in getattr(layer, "router", layer).parameters())
    assert bool(taken) == has_weights
