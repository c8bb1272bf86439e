"""What a layer may ask beside the hidden states: ids, sequences, domains, and the logits of the layer below."""

import pytest
import torch
from torch import nn

from moesaic import ConfigError
from moesaic.hf import domains, moe_layers, observe, record, sparsify, trace_domain
from moesaic.hf.layers import blocks
from moesaic.hf.modeling import lend_logits
from moesaic.routers import TopKRouter
from tests.hf.test_forward import padded, sparse
from tests.hf.tiny import OPTIONS, batch, build, gradients, recompute


class Below(TopKRouter):
    """Adds the logits of the layer below to its own, and keeps what it was told."""

    uses_below = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.told = []
        self.mix = nn.Parameter(0.5 * torch.eye(self.num_experts))

    def forward(self, x_TD, valid_T=None, context=None):
        self.told.append(context)
        self.below_TE = context.below_TE
        return super().forward(x_TD, valid_T, context)

    def logits(self, x_TD):
        own_TE = super().logits(x_TD)
        return own_TE if self.below_TE is None else own_TE + self.below_TE @ self.mix


def listening(family="llama", **changes):
    """A model of which each router keeps what it was told."""
    model = sparse(family, **changes)
    for layer in moe_layers(model).values():
        weight = layer.router.weight
        layer.router = Below(weight.shape[1], 4, top_k=2)
        with torch.no_grad():
            layer.router.weight.copy_(weight)
    lend_logits(model)
    return model.train()


def told(model):
    return [layer.router.told[-1] for layer in moe_layers(model).values()]


def test_tokens_have_their_ids_and_sequences():
    model, inputs = listening(), padded(batch("llama"), "left")
    model(**inputs)
    for context in told(model):
        assert torch.equal(context.id_T, inputs["input_ids"].flatten())
        assert torch.equal(context.sequence_T, torch.arange(3).repeat_interleave(11))
        assert context.domain_T is None


def test_encoder_and_decoder_each_have_their_own_ids():
    model, inputs = listening("t5"), batch("t5")
    model(**inputs)
    encoder, _, decoder, _ = told(model)
    assert torch.equal(encoder.id_T, inputs["input_ids"].flatten())
    assert torch.equal(decoder.id_T.view(3, 5)[:, 1:], inputs["labels"][:, :-1])


def test_images_and_embeddings_have_no_ids():
    images, embedded = listening("vit"), listening()
    images(**batch("vit"))
    embedded(inputs_embeds=torch.randn(2, 5, 16))
    assert [context.id_T for context in told(images) + told(embedded)] == [None] * 4


def test_steps_with_a_cache_have_the_id_that_they_read():
    model = listening().eval()
    new = model.generate(torch.randint(3, 61, (2, 5)), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    seen = [context.id_T.view(2, -1) for context in next(iter(moe_layers(model).values())).router.told]
    assert torch.equal(torch.cat(seen, dim=1), new[:, :-1])


@pytest.mark.parametrize("given", [2, [2, 2, 2], torch.tensor([2, 2, 2])])
def test_domains_reach_the_routers(given):
    model = listening()
    with domains(given):
        model(**batch("llama"))
    assert [context.domain_T.tolist() for context in told(model)] == [[2] * 21] * 2
    with domains([1, 0, 3]):
        model(**batch("llama"))
    assert told(model)[0].domain_T.tolist() == [1] * 7 + [0] * 7 + [3] * 7
    model(**batch("llama"))
    assert told(model)[0].domain_T is None


def test_a_domain_for_each_sequence_is_counted():
    with pytest.raises(ConfigError) as error, domains([1, 0]):
        sparse("llama")(**batch("llama"))
    assert str(error.value) == (
        "domains needs one number for all or one for each of the batch's 3 sequences, got (2,). Give one for each; "
        "beams of generate and cut batches count as sequences."
    )


def test_a_trace_takes_domains_by_the_order_of_its_names():
    model = sparse("llama")
    with record(model, domains=["prose", "code"]) as trace:
        with domains([1, 0, 2]):
            model(**batch("llama"))
        with domains(0), trace_domain("code"):
            model(**batch("llama", sequences=1))
    by_sequence = {int(s): {int(d) for d in trace.domain[trace.sequence == s]} for s in range(4)}
    assert by_sequence == {0: {1}, 1: {0}, 2: {-1}, 3: {1}}
    with record(model) as unnamed, domains(0):
        model(**batch("llama"))
    assert (unnamed.domain == -1).all()


def test_each_layer_has_the_logits_of_the_one_below_with_their_gradient():
    model, seen = listening(num_hidden_layers=3), []
    with observe(model, seen.append):
        model(**batch("llama"))
    first, second, third = told(model)
    assert first.below_TE is None
    assert torch.equal(second.below_TE, seen[0].routing.logits_TE)
    assert torch.equal(third.below_TE, seen[1].routing.logits_TE)
    third.below_TE.sum().backward()
    assert [layer.router.weight.grad is not None for layer in moe_layers(model).values()] == [True, True, False]


def test_each_stack_begins_without_logits_from_below():
    model = listening("t5")
    model(**batch("t5"))
    assert [context.below_TE is None for context in told(model)] == [True, False, True, False]


def test_nothing_is_kept_for_routers_that_do_not_ask():
    model, inputs = sparse("llama"), batch("llama")
    assert not any(block.lends_logits for block in blocks(model).values())
    moe = model.model.layers[1].mlp.moe
    with torch.no_grad():
        moe.register_forward_pre_hook(lambda _m, given: seen.append(given[2]))
        seen = []
        model(**inputs)
    assert seen[0].below_TE is None


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_through_the_layers_below_are_those_without_checkpointing(micro_batches):
    model = listening(num_hidden_layers=3)
    inputs = [padded(batch("llama", positions=7 + index), "left") for index in range(micro_batches)]

    def backward():
        model.zero_grad()
        losses = [model(**one, use_cache=False).loss for one in inputs]
        for loss in losses:
            loss.backward()
        return gradients(model)

    expected = backward()
    recompute(model)
    torch.testing.assert_close(backward(), expected, rtol=0, atol=0)
    assert model.model.layers[2].mlp.moe.router.mix.grad.abs().sum() > 0
    # The first forward's own logits, not those of a recomputation, which come in the order of the backward.
    assert model.model.layers[0].mlp.moe.router.weight.grad.abs().sum() > 0


def test_a_graph_that_is_kept_is_recomputed_with_the_same_logits_from_below():
    model, inputs = listening(num_hidden_layers=3), batch("llama")
    recompute(model)
    loss = model(**inputs, use_cache=False).loss
    loss.backward(retain_graph=True)
    once = gradients(model)
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close(gradients(model), once, rtol=0, atol=0)


def test_domains_are_kept_for_recomputation():
    model, inputs = listening(), batch("llama")
    recompute(model)
    with domains([1, 0, 2]):
        loss = model(**inputs, use_cache=False).loss
    loss.backward()
    routers = [layer.router for layer in moe_layers(model).values()]
    assert all(len(router.told) == 2 for router in routers)
    assert all(torch.equal(router.told[0].domain_T, router.told[1].domain_T) for router in routers)


def test_the_vocabulary_of_the_model_is_that_of_its_tables():
    model = sparsify(build("llama"), "hash", **OPTIONS["hash"])
    assert [layer.router.table_V.shape for layer in moe_layers(model).values()] == [(61,)] * 2
    model(**batch("llama"))
    given = sparsify(build("llama"), "hash", **OPTIONS["hash"], vocab_size=99)
    assert next(iter(moe_layers(given).values())).router.table_V.shape == (99,)
    with pytest.raises(ConfigError, match=r"^Hash routing needs Context\.id_T, got none"):
        model(inputs_embeds=torch.randn(2, 5, 16))
