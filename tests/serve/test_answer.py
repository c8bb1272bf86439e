"""What one answer says and reports, against transformers' generate and our own record."""

import pytest
import torch

import moesaic as mz
from moesaic.core.errors import ConfigError
from moesaic.hf import SwitchOff
from moesaic.serve import prepare
from moesaic.serve.answer import Answer
from moesaic.serve.events import Ask, Finished, Piece, PromptRead
from moesaic.serve.heard import Heard
from moesaic.serve.refusal import RefusedError
from tests.hf.tiny import build
from tests.serve.conftest import make, plain, tokenizer

FAMILIES = ["llama", "gpt2", "jamba", "lstm", "mixtral"]
PROMPT = list(b"It is a truth")


def write(served, ask, heard=None):
    events = []
    answer = Answer(served, ask, heard or Heard(served.layers, ()), events.append)
    while not answer.advance():
        pass
    return events


def tokens(events):
    return [event.token.token_id for event in events if isinstance(event, Piece) and event.token]


def text(events):
    return "".join(event.text for event in events if isinstance(event, Piece))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_likeliest_tokens_are_those_of_generate(family):
    served = make(family)
    ids = torch.tensor([PROMPT])
    wanted = plain(family).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    events = write(served, Ask(prompt=PROMPT, max_tokens=12, temperature=0, wants_routing=True))
    assert tokens(events) == wanted[0, len(PROMPT) :].tolist()
    assert text(events) == served.decode(wanted[0, len(PROMPT) :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_comes_with_the_experts_that_a_recording_of_the_whole_text_finds(family):
    served = make(family)
    events = write(served, Ask(prompt=PROMPT, max_tokens=6, temperature=0, wants_routing=True))
    (read,) = [event for event in events if isinstance(event, PromptRead)]
    told = [*read.tokens, *(event.token for event in events if isinstance(event, Piece) and event.token)]
    with torch.no_grad(), mz.record(served.model) as trace:
        served.model(torch.tensor([[token.token_id for token in told]]))
    for layer in range(len(served.layers)):
        rows = trace.where(trace.layer == layer)
        experts = [choice[0] for token in told for choice in token.routed[layer]]
        weights = [choice[1] for token in told for choice in token.routed[layer]]
        assert experts == rows.expert.tolist()
        assert weights == pytest.approx(rows.weight.tolist(), abs=1e-5)
    assert len(set(experts)) > 1


def test_text_is_the_same_with_and_without_its_experts():
    served = make()
    asks = [Ask(prompt=PROMPT, max_tokens=20, temperature=0.7, seed=5, wants_routing=wants) for wants in (False, True)]
    assert text(write(served, asks[0])) == text(write(served, asks[1])) != ""


def test_one_seed_writes_one_text_and_another_seed_another():
    served = make()
    texts = [text(write(served, Ask(prompt=PROMPT, max_tokens=20, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_small_top_p_leaves_the_likeliest_token_alone():
    served = make()
    drawn = write(served, Ask(prompt=PROMPT, max_tokens=10, top_p=1e-6, seed=3, wants_routing=True))
    assert tokens(drawn) == tokens(write(served, Ask(prompt=PROMPT, max_tokens=10, temperature=0, wants_routing=True)))


def test_drawn_tokens_follow_the_models_own_probabilities():
    served, count = make(), 150
    with torch.no_grad():
        wanted_V = served.model(torch.tensor([[65]])).logits[0, -1].div(0.5).softmax(-1)
    firsts = [
        tokens(write(served, Ask(prompt=[65], max_tokens=1, temperature=0.5, seed=seed, wants_routing=True)))[0]
        for seed in range(count)
    ]
    best = int(wanted_V.argmax())
    share, wanted = firsts.count(best) / count, float(wanted_V[best])
    assert 0.05 < wanted < 0.95
    # Four standard deviations of a share of 150.
    assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / count) ** 0.5


def test_a_switched_off_expert_is_chosen_nowhere_and_the_text_is_that_of_intervene():
    served = make()
    off = SwitchOff(layer=1, expert=(2,))
    events = write(served, Ask(prompt=PROMPT, max_tokens=12, temperature=0, interventions=[off], wants_routing=True))
    pieces = [event.token for event in events if isinstance(event, Piece)]
    assert {choice[0] for token in pieces for choice in token.routed[1]} <= {0, 1, 3}
    ids = torch.tensor([PROMPT])
    with mz.hf.intervene(served.model, off):
        wanted = served.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert tokens(events) == wanted[0, len(PROMPT) :].tolist()
    plainly = write(served, Ask(prompt=PROMPT, max_tokens=12, temperature=0, wants_routing=True))
    assert any(choice[0] == 2 for event in plainly if isinstance(event, Piece) for choice in event.token.routed[1])


def test_an_answer_ends_at_a_stop_string_or_at_its_limit():
    served = make()
    whole = text(write(served, Ask(prompt=PROMPT, max_tokens=30, temperature=0)))
    stop = whole[8:10]
    events = write(served, Ask(prompt=PROMPT, max_tokens=30, temperature=0, stops=[stop]))
    assert text(events) == whole.partition(stop)[0]
    assert events[-1].reason == "stop"
    limited = write(served, Ask(prompt=PROMPT, max_tokens=5, temperature=0))
    assert limited[-1] == Finished(reason="length", prompt_tokens=len(PROMPT), completion_tokens=5)


@pytest.mark.parametrize("wants_routing", [False, True])
def test_an_answer_ends_where_the_model_ends_it(wants_routing):
    endless = make()
    written = tokens(write(endless, Ask(prompt=PROMPT, max_tokens=8, temperature=0, wants_routing=True)))
    served = make()
    object.__setattr__(served, "ends", frozenset({written[4]}))
    first = written.index(written[4])
    events = write(served, Ask(prompt=PROMPT, max_tokens=8, temperature=0, wants_routing=wants_routing))
    assert events[-1].reason == "stop"
    assert events[-1].completion_tokens == first + 1
    assert text(events) == served.decode(written[:first])


def test_a_model_that_predicts_no_numbers_is_told_so():
    served = make()
    with torch.no_grad():
        served.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RefusedError, match="not finite numbers"):
        write(served, Ask(prompt=PROMPT, max_tokens=2))


def test_what_experts_took_is_counted_once_for_each_token_that_was_read():
    for family in ("llama", "lstm"):
        served = make(family)
        heard = Heard(served.layers, ())
        write(served, Ask(prompt=PROMPT, max_tokens=6, temperature=0, wants_routing=True), heard)
        # 13 of the prompt and 6 of the answer, two choices each.
        assert [int(heard.load(layer).sum()) for layer in range(len(served.layers))] == [38] * len(served.layers)
        assert heard.from_service == 19


def test_a_model_without_experts_is_refused():
    with pytest.raises(ConfigError, match="needs a model with MoE layers, got LlamaForCausalLM, which has none"):
        prepare(build("llama"), tokenizer(), name="dense")


def test_a_model_with_an_encoder_is_refused():
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration, which has an encoder"):
        prepare(build("t5"), tokenizer(), name="t5")


def test_a_model_whose_tokens_need_later_ones_is_refused():
    with pytest.warns(UserWarning, match="depend on later tokens"):
        model = mz.sparsify(build("llama"), "soft-moe")
    with pytest.raises(ConfigError, match="a token does not depend on later ones, got recipe soft-moe"):
        prepare(model, tokenizer(), name="soft")
