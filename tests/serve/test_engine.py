"""Who is written when, who is sent away, and what is left at the end."""

import asyncio
import contextlib
import json
import queue
import threading
import time

import httpx
import pytest

from moesaic.serve import Settings, running
from moesaic.serve.engine import Engine
from moesaic.serve.events import Ask, Failed, Finished, Piece
from moesaic.serve.heard import Heard
from moesaic.serve.refusal import RefusedError
from tests.serve.conftest import make

PROMPT = list(b"It is")


@pytest.fixture
def engine(tiny):
    """An engine that has not begun to write."""
    made = Engine(tiny, Heard(tiny.layers, ()), max_active=2, max_waiting=1)
    yield made
    with contextlib.suppress(RuntimeError):
        made.start()
    made.stop(0)
    made.join()


def outcome(events, timeout=20):
    """The last event of an answer."""
    while True:
        event = events.get(timeout=timeout)
        if isinstance(event, Finished | Failed):
            return event


def test_a_short_request_does_not_wait_behind_a_long_one(engine):
    order, done = [], queue.Queue()
    for name, count in (("long", 60), ("short", 3)):

        def emit(event, name=name):
            order.append(name)
            if isinstance(event, Finished):
                done.put(name)

        engine.submit(Ask(prompt=PROMPT, max_tokens=count, temperature=0), emit)
    engine.start()
    assert [done.get(timeout=20), done.get(timeout=20)] == ["short", "long"]
    assert engine.outcomes["length"] == 2


def test_answers_written_in_turns_are_those_written_alone(tiny):
    def texts(max_active):
        made = Engine(tiny, Heard(tiny.layers, ()), max_active=max_active, max_waiting=9)
        made.start()
        boxes = [queue.Queue() for _ in range(6)]
        for seed, box in enumerate(boxes):
            made.submit(Ask(prompt=PROMPT, max_tokens=15, seed=seed), box.put)
        answers = []
        for box in boxes:
            text = ""
            while not isinstance(event := box.get(timeout=20), Finished):
                text += event.text
            answers.append(text)
        made.stop(0)
        made.join()
        return answers

    assert texts(1) == texts(4)


def test_more_requests_than_places_are_sent_away_with_a_time_to_come_again(engine):
    for _ in range(3):
        engine.submit(Ask(prompt=PROMPT, max_tokens=2), lambda _event: None)
    with pytest.raises(RefusedError) as refused:
        engine.submit(Ask(prompt=PROMPT, max_tokens=2), lambda _event: None)
    assert refused.value.status == 429
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
    assert str(refused.value) == (
        "The service writes 2 answers at a time and lets 1 requests wait, and all these places are taken. "
        "Ask again later."
    )


def test_those_who_left_hold_no_place_and_cost_nothing(engine):
    left = [engine.submit(Ask(prompt=PROMPT, max_tokens=10**6), lambda _event: None) for _ in range(3)]
    for job in left:
        job.cancel()
    box = queue.Queue()
    engine.submit(Ask(prompt=PROMPT, max_tokens=2), box.put)
    engine.start()
    assert outcome(box).reason == "length"
    assert engine.outcomes["cancelled"] == 3


def test_stopping_lets_running_answers_end(tiny):
    made = Engine(tiny, Heard(tiny.layers, ()), max_active=2, max_waiting=9)
    box = queue.Queue()
    made.submit(Ask(prompt=PROMPT, max_tokens=40), box.put)
    made.start()
    assert isinstance(box.get(timeout=20), Piece | Finished)
    made.stop(20)
    assert outcome(box).reason == "length"
    made.join()
    with pytest.raises(RefusedError, match="The service is stopping"):
        made.submit(Ask(prompt=PROMPT, max_tokens=1), box.put)


def test_an_answer_that_is_too_long_for_the_grace_breaks_off_with_a_word(tiny):
    made = Engine(tiny, Heard(tiny.layers, ()), max_active=1, max_waiting=9)
    running_box, waiting_box = queue.Queue(), queue.Queue()
    made.submit(Ask(prompt=PROMPT, max_tokens=10**6), running_box.put)
    made.submit(Ask(prompt=PROMPT, max_tokens=1), waiting_box.put)
    made.start()
    running_box.get(timeout=20)
    made.stop(0.1)
    for box in (running_box, waiting_box):
        refusal = outcome(box).refusal
        assert (refusal.status, refusal.code) == (503, "stopping")
    made.join()


def test_a_model_that_fails_fails_one_answer_and_not_the_service(tiny, caplog):
    made = Engine(tiny, Heard(tiny.layers, ()), max_active=2, max_waiting=9)
    made.start()
    bad, good = queue.Queue(), queue.Queue()
    # There is no such token: the embedding fails.
    made.submit(Ask(prompt=[10**6], max_tokens=2), bad.put)
    made.submit(Ask(prompt=PROMPT, max_tokens=2), good.put)
    refusal = outcome(bad).refusal
    assert refusal.status == 500
    assert refusal.message.startswith("The model failed: IndexError: ")
    assert outcome(good).reason == "length"
    assert "An answer failed" in caplog.text
    made.stop(0)
    made.join()


@pytest.fixture(scope="module")
def narrow():
    """A service that writes one answer at a time and lets one request wait."""
    with running(make(), Settings(port=0, max_active=1, max_waiting=1, max_tokens=10**6, max_context=10**6)) as url:
        yield url


LONG = {"prompt": "a", "max_tokens": 240, "stream": True, "temperature": 0}


def busy(url):
    return httpx.get(f"{url}healthz").json()["active"]


def wait_until(condition, timeout_s=20):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_when_the_client_of_a_stream_leaves_its_answer_is_dropped(narrow):
    cancelled = 'moesaic_answers_total{outcome="cancelled"} '
    before = int(httpx.get(f"{narrow}metrics").text.partition(cancelled)[2].split()[0])
    with httpx.stream("POST", f"{narrow}v1/completions", json=LONG) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    wait_until(lambda: busy(narrow) == 0)
    assert int(httpx.get(f"{narrow}metrics").text.partition(cancelled)[2].split()[0]) == before + 1


def test_when_the_client_of_a_whole_answer_leaves_it_is_dropped(narrow):
    cancelled = 'moesaic_answers_total{outcome="cancelled"} '
    before = int(httpx.get(f"{narrow}metrics").text.partition(cancelled)[2].split()[0])
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{narrow}v1/completions", json={**LONG, "stream": False}, timeout=0.1)
    wait_until(lambda: busy(narrow) == 0)
    assert int(httpx.get(f"{narrow}metrics").text.partition(cancelled)[2].split()[0]) == before + 1


def test_overload_is_told_over_http_and_passes(narrow):
    async def ask_all():
        async with httpx.AsyncClient(base_url=narrow, timeout=60) as client:
            body = {**LONG, "stream": False, "max_tokens": 60}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(8)))

    answers = asyncio.run(ask_all())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
    assert httpx.post(f"{narrow}v1/completions", json={**LONG, "stream": False, "max_tokens": 2}).status_code == 200


def test_many_clients_at_once_lose_nothing_and_each_gets_its_own_answer(url):
    """A short form of the load that ``tests/serve/load.py`` keeps up for a minute."""
    num_clients, texts = 32, {}

    def ask(client, number):
        body = {"prompt": f"client {number}", "max_tokens": 8, "seed": number, "stream": number % 2 == 0}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200
        if not body["stream"]:
            return answer.json()["choices"][0]["text"]
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])

    def work(number):
        with httpx.Client(base_url=url, timeout=60) as client:
            texts[number] = [ask(client, number) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == list(range(num_clients))
    assert all(first == second for first, second in texts.values())
    assert len({first for first, _ in texts.values()}) > num_clients // 2
