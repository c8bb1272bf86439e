import math

import pytest
import torch

from moesaic import ConfigError, Context, MoELayer, ShapeError
from moesaic.balance import z_loss
from moesaic.experts import MLPExperts
from moesaic.routers import DomainHashRouter, HashRouter, balanced_table, clustered_table, random_table


def test_the_same_id_goes_to_the_same_expert_at_every_place_and_step():
    router = HashRouter(8, vocab_size=20, seed=3)
    id_T = torch.tensor([4, 7, 4, 19, 4, 7])
    for training in (True, False):
        routing = router.train(training)(torch.randn(6, 5), None, Context(id_T=id_T))
        assert routing.expert_N.tolist() == router.table_V[id_T].tolist()
        assert routing.weight_N.tolist() == [1.0] * 6


def test_there_is_nothing_to_learn_and_nothing_of_the_vectors_is_read():
    router = HashRouter(8, vocab_size=20)
    assert list(router.parameters()) == []
    context = Context(id_T=torch.arange(20))
    routings = [router(x_TD, None, context) for x_TD in (torch.randn(20, 5), torch.full((20, 5), float("nan")))]
    assert torch.equal(routings[0].expert_N, routings[1].expert_N)
    assert not routings[0].weight_N.requires_grad


def test_an_expert_learns_from_its_own_ids_alone():
    layer = MoELayer(HashRouter(4, vocab_size=20, seed=1), MLPExperts(4, 5, 6))
    id_T = torch.tensor([0, 1, 2, 0])
    layer(torch.randn(4, 5), None, Context(id_T=id_T))[0].square().sum().backward()
    used = set(layer.router.table_V[id_T].tolist())
    assert 0 < len(used) < 4
    for expert in range(4):
        assert bool(layer.experts.up_EDF.grad[expert].abs().sum() > 0) == (expert in used)


def test_probabilities_are_the_choices_and_the_z_loss_is_zero():
    routing = HashRouter(4, vocab_size=20)(torch.randn(10, 5), None, Context(id_T=torch.arange(10)))
    assert torch.equal(routing.probability_TE, torch.eye(4)[routing.expert_N])
    assert routing.logits_TE.isfinite().all()
    torch.testing.assert_close(routing.logits_TE.softmax(dim=-1), routing.scores_TE)
    assert float(z_loss(routing)) == 0


def test_the_random_table_is_the_same_for_the_same_seed_and_uniform():
    table_V = random_table(40_000, 8, 5)
    assert table_V.dtype == torch.int64
    assert torch.equal(random_table(40_000, 8, 5), table_V)
    assert not torch.equal(random_table(40_000, 8, 6), table_V)
    three_sigma = 3 * math.sqrt(40_000 * (1 / 8) * (7 / 8))
    assert (torch.bincount(table_V) - 5_000).abs().max() < three_sigma
    state = torch.get_rng_state()
    random_table(10, 3, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_table_survives_saving_casts_and_the_meta_device():
    router = HashRouter(8, vocab_size=20, seed=1)
    table_V = router.table_V.clone()
    other = HashRouter(8, vocab_size=20, seed=2)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.table_V, table_V)
    assert torch.equal(router.bfloat16().table_V, table_V)
    with torch.device("meta"):
        assert torch.equal(HashRouter(8, vocab_size=20, seed=1).table_V, table_V)


def test_the_balanced_table_gives_the_most_frequent_to_the_lightest():
    counts_V = torch.tensor([1, 9, 4, 4, 3, 1])
    # 9 -> 0, 4 -> 1, 4 -> 2, 3 -> 1 (4 = 4: fewest ids equal, lowest), 1 -> 2 (4), 1 -> 2 (5 < 7)
    assert balanced_table(counts_V, 3).tolist() == [2, 0, 1, 2, 1, 2]


def test_the_balanced_table_is_balanced_over_a_zipfian_corpus():
    counts_V = (1e6 / torch.arange(100, 3100)).long()
    load_E = torch.zeros(16, dtype=torch.int64).index_add_(0, balanced_table(counts_V, 16), counts_V)
    assert float(load_E.max() / load_E.double().mean()) < 1.001
    at_random_E = torch.zeros(16, dtype=torch.int64).index_add_(0, random_table(3000, 16, 0), counts_V)
    assert float(at_random_E.max() / at_random_E.double().mean()) > 1.05


def test_an_id_more_frequent_than_a_share_has_an_expert_for_itself():
    assert balanced_table(torch.tensor([100, 1, 1, 1]), 2).tolist() == [0, 1, 1, 1]


def test_ids_never_seen_are_shared_out():
    assert torch.bincount(balanced_table(torch.zeros(12), 4)).tolist() == [3, 3, 3, 3]
    table_V = balanced_table(torch.tensor([5, 5, 5, 5] + [0] * 8), 4)
    assert torch.bincount(table_V[4:]).tolist() == [2, 2, 2, 2]


def test_the_clustered_table_puts_like_embeddings_together():
    torch.manual_seed(0)
    centre_ED = torch.randn(5, 8) * 10
    truth_V = torch.arange(100) % 5
    table_V = clustered_table(centre_ED[truth_V] + 0.1 * torch.randn(100, 8), 5, seed=1)
    within = [len(set(table_V[truth_V == cluster].tolist())) for cluster in range(5)]
    assert within.count(1) >= 3  # k-means may join two clusters and cut another
    assert set(table_V.tolist()) == set(range(5))
    assert torch.equal(clustered_table(centre_ED[truth_V], 5, seed=1), clustered_table(centre_ED[truth_V], 5, seed=1))


@pytest.mark.parametrize("num_experts", [1, 2, 6])
def test_the_clustered_table_of_few_or_equal_embeddings(num_experts):
    assert set(clustered_table(torch.eye(6), num_experts, seed=0).tolist()) == set(range(num_experts))
    assert clustered_table(torch.ones(6, 3), num_experts, seed=0).shape == (6,)


def test_another_table_may_be_put_in_its_place():
    router = HashRouter(4, vocab_size=6)
    router.load_table(torch.tensor([3, 2, 1, 0, 1, 2]))
    routing = router(torch.randn(3, 5), None, Context(id_T=torch.tensor([0, 5, 3])))
    assert routing.expert_N.tolist() == [3, 2, 0]


def test_domains_share_no_expert_and_the_group_depends_on_the_domain_alone():
    router = DomainHashRouter(12, vocab_size=2000, num_domains=4, seed=2)
    seen = []
    for domain in range(4):
        context = Context(id_T=torch.arange(2000), domain_T=torch.full((2000,), domain))
        seen.append(router(torch.randn(2000, 3), None, context).expert_N)
    assert [set(expert_T.tolist()) for expert_T in seen] == [set(range(3 * q, 3 * q + 3)) for q in range(4)]
    three_sigma = 3 * math.sqrt(2000 * (1 / 3) * (2 / 3))
    for domain, expert_T in enumerate(seen):
        assert (torch.bincount(expert_T - 3 * domain) - 2000 / 3).abs().max() < three_sigma
    assert not torch.equal(seen[0], seen[1] - 3), "tables of two domains are the same"


def test_one_domain_needs_not_be_named():
    router = DomainHashRouter(4, vocab_size=10, num_domains=1)
    assert router(torch.randn(10, 3), None, Context(id_T=torch.arange(10))).load_E.sum() == 10


def test_no_tokens_and_padding():
    empty = torch.zeros(0, dtype=torch.int64)
    for router in (HashRouter(4, vocab_size=10), DomainHashRouter(4, vocab_size=10, num_domains=2)):
        assert router(torch.randn(0, 3), None, Context(id_T=empty, domain_T=empty)).num_rows == 0
        zeros = torch.zeros(5, dtype=torch.int64)
        routing = router(torch.randn(5, 3), torch.tensor([1, 0, 1, 0, 0]), Context(id_T=zeros, domain_T=zeros))
        assert int(routing.load_E.sum()) == 2


ERRORS = [
    (
        lambda: HashRouter(4, vocab_size=10)(torch.randn(2, 3)),
        "Hash routing needs Context.id_T, got none. Call layer(x_TD, valid_T, Context(id_T=...)); a model of "
        "moesaic.sparsify passes token ids and sequences by itself, and domains within moesaic.hf.domains(...).",
    ),
    (
        lambda: HashRouter(4, vocab_size=10)(torch.randn(2, 3), None, Context(id_T=torch.tensor([3, 10]))),
        "token ids must be between 0 and 9, got 3 to 10. Build the router with a larger vocab_size.",
    ),
    (
        lambda: DomainHashRouter(4, vocab_size=10, num_domains=2)(
            torch.randn(1, 3), None, Context(id_T=torch.tensor([3]))
        ),
        "Domain hash routing with 2 domains needs Context.domain_T, got none. Call layer(x_TD, valid_T, "
        "Context(domain_T=...)); a model of moesaic.sparsify passes token ids and sequences by itself, and domains "
        "within moesaic.hf.domains(...).",
    ),
    (
        lambda: DomainHashRouter(4, vocab_size=10, num_domains=2)(
            torch.randn(1, 3), None, Context(id_T=torch.tensor([3]), domain_T=torch.tensor([-1]))
        ),
        "domains must be between 0 and 1, got -1 to -1. Build the router with a larger num_domains.",
    ),
    (
        lambda: DomainHashRouter(6, vocab_size=10, num_domains=4),
        "num_domains must divide num_experts=6, got 4. Change one so that every domain has as many experts.",
    ),
    (
        lambda: HashRouter(4, vocab_size=0),
        "a table needs at least 1 token id and 1 expert, got vocab_size=0 and num_experts=4. Pass the size of the "
        "tokenizer's vocabulary.",
    ),
    (
        lambda: HashRouter(4, vocab_size=10).load_table(torch.tensor([1, 2])),
        "table_V must be (10,), one expert for each token id, got (2,). Build the router with the vocab_size of the "
        "table.",
    ),
    (
        lambda: HashRouter(4, vocab_size=3).load_table(torch.tensor([1, 4, 0])),
        "table_V must hold whole numbers from 0 to 3, got torch.int64 from 0 to 4. Make the table for num_experts=4.",
    ),
    (
        lambda: balanced_table(torch.tensor([3, -1]), 2),
        "a balanced table needs counts of at least 0 and 1 expert, got counts from -1 and num_experts=2. Count the "
        "token ids of the training text.",
    ),
    (
        lambda: clustered_table(torch.randn(3, 2), 4, seed=0),
        "a clustered table needs between 1 and 3 experts, one id for each, got 4. Use fewer experts.",
    ),
    (
        lambda: HashRouter(4, vocab_size=10)(torch.randn(1, 2, 3), None, Context(id_T=torch.tensor([3]))),
        "x_TD must be (tokens, width), got (1, 2, 3). Flatten batch and position into one dimension.",
    ),
]


@pytest.mark.parametrize(("build", "message"), ERRORS)
def test_what_cannot_be_looked_up_is_refused(build, message):
    with pytest.raises((ConfigError, ShapeError)) as error:
        build()
    assert str(error.value) == message
