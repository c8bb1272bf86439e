"""The openai package drives the service as it would drive OpenAI's."""

import openai
import pytest

from moesaic.serve import Settings, running
from tests.serve.conftest import make


@pytest.fixture(scope="module")
def api(url):
    with openai.OpenAI(base_url=f"{url}v1", api_key="none is needed", max_retries=0, timeout=30) as client:
        yield client


ASK = {"model": "tiny", "prompt": "It is a truth", "max_tokens": 12, "seed": 7}
TALK = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "seed": 7}


def test_a_completion_has_text_usage_and_a_reason(api):
    answer = api.completions.create(**ASK)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text
    # A token that begins the text, and a byte for each letter.
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (14, 12, 26)


def test_a_streamed_completion_is_the_whole_one_in_pieces(api):
    whole = api.completions.create(**ASK)
    chunks = list(api.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert len(chunks) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_answers_as_the_assistant(api):
    answer = api.chat.completions.create(**TALK)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens == len("user: Hello\nassistant:")


def test_a_streamed_chat_is_the_whole_one_in_pieces(api):
    whole = api.chat.completions.create(**TALK)
    chunks = list(api.chat.completions.create(**TALK, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_newer_name_for_the_limit_and_messages_in_parts_are_taken(api):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    answer = api.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_completion_tokens=12, seed=7
    )
    assert answer.choices[0].message.content == api.chat.completions.create(**TALK).choices[0].message.content


def test_seed_and_temperature_do_what_they_say(api):
    def text(**changes):
        return api.completions.create(**{**ASK, **changes}).choices[0].text

    assert text() == text()
    assert text() != text(seed=8)
    assert text(temperature=0) == text(temperature=0, seed=8)
    assert text(temperature=0) == text(top_p=1e-6)


def test_a_stop_string_ends_the_text_before_it(api):
    plain = api.completions.create(**ASK).choices[0].text
    stop = plain[len(plain) // 2 :][:2]
    stopped = api.completions.create(**ASK, stop=[stop, "never in it"])
    assert stopped.choices[0].text == plain.partition(stop)[0]
    assert stopped.choices[0].finish_reason == "stop"


def test_tokens_may_be_sent_instead_of_text(api):
    as_text = api.completions.create(**{**ASK, "prompt": "abc"})
    as_tokens = api.completions.create(**{**ASK, "prompt": [256, 97, 98, 99]})
    assert as_text.choices[0].text == as_tokens.choices[0].text


def test_without_a_limit_a_completion_has_sixteen_tokens_and_a_chat_what_the_service_writes(api):
    assert api.completions.create(model="tiny", prompt="a").usage.completion_tokens == 16
    talk = {name: value for name, value in TALK.items() if name != "max_tokens"}
    assert api.chat.completions.create(**talk).usage.completion_tokens == 200


def test_the_model_is_listed(api):
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").owned_by == "moesaic"


def test_another_model_is_not_found(api):
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4' here"):
        api.completions.create(**{**ASK, "model": "gpt-4"})
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("best_of", 3),
        ("echo", True),
        ("logprobs", 1),
        ("suffix", "end"),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"5": 1}),
    ],
)
def test_what_is_not_served_is_refused_by_name_and_not_ignored(api, field, value):
    with pytest.raises(openai.BadRequestError) as error:
        api.completions.create(**ASK, **{field: value})
    assert f"{field} is not served here" in error.value.message
    assert error.value.param == field
    assert error.value.code == "unsupported"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
    ],
)
def test_what_chat_does_not_serve_is_refused_by_name(api, field, value):
    with pytest.raises(openai.BadRequestError, match=f"{field} is not served here"):
        api.chat.completions.create(**TALK, **{field: value})


def test_a_value_that_changes_nothing_is_taken(api):
    answer = api.completions.create(**ASK, n=1, best_of=1, echo=False, frequency_penalty=0, logit_bias={}, user="me")
    assert answer.choices[0].text == api.completions.create(**ASK).choices[0].text


def test_an_answer_that_would_not_fit_is_refused_with_both_numbers(api):
    with pytest.raises(openai.BadRequestError) as error:
        api.completions.create(**{**ASK, "prompt": "x" * 249})
    assert error.value.code == "context_length_exceeded"
    assert "may have 256 tokens together, got 250 of the prompt and max_tokens 12" in error.value.message
    assert "lower max_tokens to 6" in error.value.message
    with pytest.raises(openai.BadRequestError, match="shorten the prompt by 46 tokens or more"):
        api.completions.create(**{**ASK, "prompt": "x" * 300})
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at most 200 here, got 201"):
        api.completions.create(**{**ASK, "max_tokens": 201})


def test_a_template_that_refuses_the_messages_is_quoted(api):
    with pytest.raises(openai.BadRequestError, match="does not take these messages: A user must speak first"):
        api.chat.completions.create(model="tiny", messages=[{"role": "assistant", "content": "Hello"}])


def test_a_model_that_was_not_taught_to_talk_says_so_in_a_sentence():
    with (
        running(make("mixtral"), Settings(port=0)) as url,
        openai.OpenAI(base_url=f"{url}v1", api_key="-", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**TALK)
        assert error.value.code == "no_chat_template"
        assert "The model tiny has no chat template: it goes on with text" in error.value.message
        assert client.completions.create(**ASK).usage.completion_tokens == 12
