"""What the service refuses, and in which words."""

import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest

from moesaic.core.errors import BackendError
from moesaic.serve import Settings, running
from tests.serve.conftest import make

ASK = {"prompt": "It is", "max_tokens": 4}


def told(answer):
    """The sentence of a refusal, in OpenAI's form."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    return error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt is needed and was not given."),
        ({"prompt": "a", "colour": "red"}, "colour is not a field that is served here. Leave it out."),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: input should be greater than or equal to 1."),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens: input should be a valid integer."),
        ({"prompt": "a", "temperature": -1}, "temperature: input should be greater than or equal to 0."),
        ({"prompt": "a", "top_p": 0}, "top_p: input should be greater than 0."),
        ({"prompt": "a", "stream_options": {}}, "stream_options is for streams alone. Send stream as true too."),
        ({"prompt": ["a", "b"]}, "prompt must be one text, got 2: this service writes one answer for each request."),
        ({"prompt": []}, "prompt is an empty list. Send a text, or its tokens."),
        ({"prompt": [5, 999]}, "prompt has the token 999, but this model's tokens are 0 to 259."),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop must be at most 4 strings of 1 to 256 characters, got 5 of"),
        ({"prompt": "a", "stop": ""}, "stop must be at most 4 strings of 1 to 256 characters, got 1 of [0]"),
    ],
    ids=str,
)
def test_a_bad_request_is_told_in_a_sentence(client, body, words):
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert told(answer).startswith(words)


def test_what_is_no_json_is_told(client):
    answer = client.post("/v1/completions", content=b"{oh", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert told(answer).startswith("The body is not JSON: ")


def test_numbers_that_are_not_finite_are_refused(client):
    body = b'{"prompt": "a", "temperature": NaN}'
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert told(answer).startswith("temperature: ")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_forms_that_any_page_can_send_are_refused(client, kind):
    headers = {"Content-Type": kind} if kind else {}
    answer = client.post("/v1/completions", content=json.dumps(ASK), headers=headers)
    assert answer.status_code == 415
    assert told(answer) == f"Send JSON with Content-Type: application/json, got {kind or 'no content type'}."


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example"])
def test_another_sites_name_for_this_machine_is_refused(client, host):
    answer = client.get("/healthz", headers={"Host": host})
    assert answer.status_code == 421
    assert told(answer).startswith(f"This service does not go by the name '{host.partition(':')[0]}'.")


def test_its_own_names_are_taken(client):
    for host in ("localhost", "localhost:8000", "[::1]:8000", "127.0.0.1"):
        assert client.get("/healthz", headers={"Host": host}).status_code == 200


def test_pages_of_other_sites_may_not_ask_and_are_allowed_nothing(client):
    answer = client.post("/v1/completions", json=ASK, headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403
    assert told(answer).startswith("Pages of https://evil.example may not use this service")
    asked = client.options("/v1/completions", headers={"Access-Control-Request-Method": "POST"})
    assert asked.status_code in (400, 405)
    for one in (answer, asked, client.get("/healthz")):
        assert not [name for name in one.headers if name.startswith("access-control")]


def test_the_services_own_page_may_ask(client, url):
    assert client.post("/v1/completions", json=ASK, headers={"Origin": url.rstrip("/")}).status_code == 200


def test_every_answer_forbids_what_a_page_does_not_need(client):
    for path in ("/", "/page.js", "/healthz", "/nowhere"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_a_path_that_is_not_there_is_told(client):
    answer = client.get("/v1/engines")
    assert answer.status_code == 404
    assert told(answer) == "There is no GET /v1/engines here. The page is at /, OpenAI's interface at /v1."
    assert client.get("/v1/completions").status_code == 405


@pytest.fixture(scope="module")
def small():
    """A service with a key and a small limit on the size of requests."""
    settings = Settings(port=0, api_key="open sesame", max_body_bytes=500, max_context=40)
    with running(make(), settings) as address, httpx.Client(base_url=address, timeout=30) as client:
        yield client


KEY = {"Authorization": "Bearer open sesame"}


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/api/model", "/api/experts/0/0"])
def test_without_its_key_a_service_tells_nothing(small, path):
    for headers, got in (({}, "none"), ({"Authorization": "Bearer open"}, "another one")):
        answer = small.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert told(answer).startswith(f"This service needs its API key as Authorization: Bearer, got {got}.")
    assert small.get(path, headers=KEY).status_code == 200


def test_the_page_and_whether_it_is_up_need_no_key(small):
    assert [small.get(path).status_code for path in ("/", "/page.css", "/page.js", "/healthz")] == [200] * 4


def test_a_long_request_is_refused_whether_its_length_is_told_or_not(small):
    body = json.dumps({"prompt": "x" * 600}).encode()
    headers = {**KEY, "Content-Type": "application/json"}
    told_length = small.post("/v1/completions", content=body, headers=headers)
    untold = small.post("/v1/completions", content=iter([body[:300], body[300:]]), headers=headers)
    for answer in (told_length, untold):
        assert answer.status_code == 413
        assert told(answer) == "A request may have 500 bytes here. Send a shorter one."


def test_the_services_own_limit_on_tokens_holds_too(small):
    answer = small.post("/v1/completions", json={"prompt": "x" * 30, "max_tokens": 20}, headers=KEY)
    assert answer.status_code == 400
    assert "may have 40 tokens together, got 31 of the prompt and max_tokens 20" in told(answer)


def test_an_address_that_is_taken_is_told(tiny):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(BackendError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"),
            running(tiny, Settings(port=port)),
        ):
            pass


def test_a_header_without_end_and_a_foreign_protocol_do_not_stop_the_service(url, client):
    place = urlsplit(url)
    for noise in (b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000, b"\x16\x03\x01\x02\x00", b"POST /v1 HTTP/9.9\r\n\r\n"):
        with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
            connection.sendall(noise)
    assert client.get("/healthz").json()["status"] == "ok"
