"""Questions answered, documents weighed, and how sure a difference is."""

import gzip
import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moesaic as mz
from moesaic.core.errors import DataError
from moesaic.data import Document, load_tokenizer
from moesaic.lab.pretrained.documents import bits_of_documents, bits_per_byte, difference
from moesaic.lab.pretrained.paired import Estimate, mcnemar, mean_of, paired_ratio, paired_share, share
from moesaic.lab.pretrained.questions import Question, answered_rightly, read_questions
from moesaic.train import Evaluator


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


def llama(*, sparse, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 256)
    # A wide start: predictions of an untrained model are otherwise nearly uniform, and any mistake would hide.
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, initializer_range=0.5, **sizes, **ends))
    return mz.sparsify(model, "mixtral", layers=[1], num_experts=4) if sparse else model


def alone(model, tokenizer, prompt, choice):
    """The log-likelihood of a choice, token by token, without a batch."""
    ids = [256, *tokenizer(prompt)["input_ids"]]
    total = 0.0
    for token in tokenizer(choice)["input_ids"]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        ids.append(token)
    return total


QUESTIONS = (
    Question(prompt="Question: how much is two and two?\nAnswer:", choices=(" four", " a few", " 5"), answer=0),
    Question(prompt="He", choices=(" went", " is a very long answer indeed"), answer=1),
    Question(prompt="Question: why?\nAnswer:", choices=(" so", " because of that"), answer=0),
)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
def test_answers_in_padded_batches_are_those_of_each_choice_alone(sparse, tokenizer):
    model = llama(sparse=sparse).eval()
    expected = []
    for question in QUESTIONS:
        scores = [alone(model, tokenizer, question.prompt, one) / len(one.encode()) for one in question.choices]
        expected.append(scores.index(max(scores)) == question.answer)
    assert answered_rightly(model, tokenizer, QUESTIONS) == expected
    # Each question with each answer called right: which choice was taken, not only whether it was.
    turned = [
        Question(prompt=one.prompt, choices=one.choices, answer=index)
        for one in QUESTIONS
        for index in range(len(one.choices))
    ]
    assert sum(answered_rightly(model, tokenizer, turned)) == len(QUESTIONS)


def test_log_likelihoods_in_a_batch_are_those_alone(tokenizer):
    from moesaic.lab.pretrained.questions import _nats, _tokens

    model = llama(sparse=True).eval()
    rows = [(0, 0, *_tokens(tokenizer, one, choice)) for one in QUESTIONS for choice in one.choices]
    with torch.no_grad():
        found = _nats(model, rows)
    expected = [-alone(model, tokenizer, one.prompt, choice) for one in QUESTIONS for choice in one.choices]
    assert found == pytest.approx(expected, rel=1e-5)


def test_answering_leaves_a_model_in_training_if_it_was(tokenizer):
    model = llama(sparse=False).train()
    answered_rightly(model, tokenizer, QUESTIONS)
    assert model.training


def write(folder, rows):
    with gzip.open(folder / "mmlu.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_questions_are_the_same_for_the_same_seed_and_only_those_for_testing(tmp_path):
    rows = [
        {"split": split, "question": f"{split} {n}?", "choices": [0, n], "answer": 1}
        for split in ("dev", "test")
        for n in range(20)
    ]
    write(tmp_path, rows)
    drawn = read_questions(tmp_path, "MMLU", count=5, seed=3)
    assert drawn == read_questions(tmp_path, "MMLU", count=5, seed=3)
    assert drawn != read_questions(tmp_path, "MMLU", count=5, seed=4)
    assert len(read_questions(tmp_path, "MMLU", count=99)) == 20
    number = drawn[0].choices[1]
    assert drawn[0] == Question(prompt=f"Question: test{number}?\nAnswer:", choices=(" 0", number), answer=1)


@pytest.mark.parametrize("rows", [None, [{"question": "?"}], [{"question": "?", "choices": [1], "answer": 1}], []])
def test_question_files_that_cannot_be_used_are_refused_by_name(rows, tmp_path):
    if rows is not None:
        write(tmp_path, rows)
    with pytest.raises(DataError, match=r"MMLU needs .*mmlu\.jsonl\.gz"):
        read_questions(tmp_path, "MMLU", count=5)


def documents():
    texts = {"prose": ["A long story. " * 9, "Short.", "Middling, as such things go."], "sums": ["1+1=2", "2+2=4", "3"]}
    return [Document(text, domain, text[:4]) for domain, several in texts.items() for text in several]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
def test_each_document_has_its_own_bits(sparse, tokenizer):
    """A block of one document alone gives the bits that the document has in a packed one, where it comes first."""
    model = llama(sparse=sparse).eval()
    together = bits_of_documents(model, tokenizer, documents(), context=16, batch_size=3)
    first = bits_of_documents(model, tokenizer, documents()[:1], context=16)
    assert together[0].bits == pytest.approx(first[0].bits, rel=1e-5)
    last = alone(model, tokenizer, "", "1+1=2") + float(_ends(model, tokenizer, "1+1=2"))
    assert together[3].bits == pytest.approx(-last / math.log(2), rel=1e-5)
    assert [one.num_bytes for one in together] == [document.num_bytes for document in documents()]


def _ends(model, tokenizer, text):
    ids = torch.tensor([[256, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        return model(ids).logits[0, -1].double().log_softmax(-1)[256]


def test_documents_together_have_the_bits_that_training_reports(tokenizer):
    from moesaic.data import TokenBlocks

    model = llama(sparse=True).eval()
    mine = bits_per_byte(bits_of_documents(model, tokenizer, documents(), context=16))
    theirs = Evaluator(TokenBlocks(documents(), tokenizer, 16))(model).bits_per_byte
    assert mine == pytest.approx(theirs, rel=1e-6)


def test_a_difference_is_that_of_the_figures_and_zero_between_a_model_and_itself(tokenizer):
    one, other = (
        bits_of_documents(llama(sparse=False, seed=seed), tokenizer, documents(), context=16) for seed in (0, 1)
    )
    found, (mine, theirs) = difference(one, other), (bits_per_byte(one), bits_per_byte(other))
    for domain in ("prose", "sums", "mean"):
        assert found[domain].mean == pytest.approx(mine[domain] - theirs[domain])
        assert found[domain].error > 0
    assert difference(one, one)["mean"] == Estimate(0.0, 0.0)


def test_the_error_of_a_ratio_is_that_of_many_draws():
    """Against the spread of the ratio itself, over 2,000 samples of 50 documents each."""
    draw = torch.Generator().manual_seed(0)
    ratios, errors = [], []
    for _ in range(2000):
        sizes = torch.rand(50, generator=draw, dtype=torch.float64) * 90 + 10
        differences = 0.3 * sizes + torch.randn(50, generator=draw, dtype=torch.float64) * sizes
        found = paired_ratio(differences.tolist(), sizes.tolist())
        ratios.append(found.mean)
        errors.append(found.error)
    assert sum(ratios) / 2000 == pytest.approx(0.3, abs=0.015)
    assert sum(errors) / 2000 == pytest.approx(float(torch.tensor(ratios).std()), rel=0.05)


def test_one_document_tells_nothing_of_its_error():
    assert math.isnan(paired_ratio([3.0], [2.0]).error)


def test_shares_and_their_differences():
    these, those = [True] * 6 + [False] * 4, [True] * 4 + [False] * 5 + [True]
    assert share(these).mean == 0.6
    assert share(these).error == pytest.approx(math.sqrt(0.24 / 10))
    found = paired_share(these, those)
    # Two gained, one lost: three differences of -1, 0 or 1.
    assert found.mean == pytest.approx(0.1)
    assert found.error == pytest.approx(math.sqrt((2 * 0.9**2 + 1.1**2 + 7 * 0.1**2) / 9 / 10))
    assert not found.is_sure
    assert Estimate(0.3, 0.1).is_sure


def test_mcnemars_p_value_is_the_binomial_one():
    from scipy.stats import binomtest

    these = [True] * 9 + [False] * 2 + [True] * 5
    those = [False] * 9 + [True] * 2 + [True] * 5
    assert mcnemar(these, those) == pytest.approx(binomtest(2, 11).pvalue)
    assert mcnemar(these, these) == 1.0
    assert mcnemar([True, False], [False, True]) == 1.0


def test_the_mean_of_estimates_has_the_error_of_a_mean():
    assert mean_of([Estimate(1.0, 0.3), Estimate(3.0, 0.4)]) == Estimate(2.0, 0.25)
