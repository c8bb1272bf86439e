import torch

from moesaic.train.order import SeededOrder, collate


def test_each_pass_reads_everything_once_in_another_order():
    order = list(SeededOrder(10, length=25, seed=3))
    assert len(order) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert len(set(order[20:])) == 5


def test_the_order_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = list(SeededOrder(50, length=70, seed=3))
    torch.manual_seed(2)
    assert list(SeededOrder(50, length=70, seed=3)) == first
    assert list(SeededOrder(50, length=70, seed=4)) != first


def test_drawing_the_order_moves_no_other_generator():
    before = torch.random.get_rng_state()
    list(SeededOrder(10, length=10, seed=0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_mask_is_left_out_where_nothing_is_padded():
    full = {"input_ids": torch.arange(3), "labels": torch.arange(3), "attention_mask": torch.ones(3, dtype=torch.int64)}
    padded = {**full, "attention_mask": torch.tensor([1, 1, 0])}
    assert set(collate([full, full])) == {"input_ids", "labels"}
    assert collate([full, padded])["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    decoder = {**full, "decoder_attention_mask": padded["attention_mask"], "domain": torch.tensor(1)}
    assert set(collate([decoder])) == {"input_ids", "labels", "decoder_attention_mask"}
