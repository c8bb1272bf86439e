"""``moesaic serve`` as a process: it says where it is, answers, and ends when it is told to."""

import json
import os
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from moesaic.cli.app import run
from moesaic.serve import Settings, load_served, running
from tests.cli.conftest import SIZES
from tests.serve.conftest import plain, tokenizer
from tests.train.conftest import write_text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with its report."""
    folder = tmp_path_factory.mktemp("served")
    text = write_text(folder / "corpus")
    out = folder / "a"
    assert run(["train", "--data", str(text), "--out", str(out), "--steps=4", "--no-report", *SIZES]) == 0
    assert run(["inspect", str(out), "--tokens=256"]) == 0
    return out


class Process:
    """The command in a process of its own."""

    def __init__(self, *arguments, **environment):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-W", "error::DeprecationWarning:moesaic", "-m", "moesaic", "serve", *arguments]
        self.process = subprocess.Popen(
            [*command, "--port", "0"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.first = self.process.stdout.readline()
        self.url = self.first.partition("at ")[2].partition(",")[0]

    def end(self, number=None):
        if number is not None:
            self.process.send_signal(number)
        try:
            out, err = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
        return self.process.returncode, out, err


def test_a_run_is_served_with_a_key_and_ends_after_its_running_answers(trained):
    service = Process(str(trained), "--grace", "30", MOESAIC_API_KEY="open sesame")
    try:
        assert service.first.startswith("The page is at http://127.0.0.1:")
        assert "OpenAI's interface at http://127.0.0.1:" in service.first
        with httpx.Client(base_url=service.url, timeout=60) as client:
            assert client.get("/v1/models").status_code == 401
            client.headers["Authorization"] = "Bearer open sesame"
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["a"]
            # The trace beside the run's report is known from the start.
            assert client.get("/api/experts/0/0").json()["tokens_from_trace"] > 100
            body = {"prompt": "abc", "max_tokens": 20, "stream": True, "temperature": 0}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
                service.process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
    finally:
        code, out, err = service.end()
    assert (code, out, err) == (0, "", "")


def test_an_answer_beyond_the_grace_ends_with_an_error_that_clients_understand(tmp_path):
    path = tmp_path / "lstm"
    # It reads the whole text again for every token, and its answers have no end.
    model, words = plain("lstm"), tokenizer()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    words.eos_token = None
    words.save_pretrained(path)
    service = Process(str(path), "--grace", "0")
    try:
        body = {"prompt": "abc", "max_tokens": 250, "stream": True, "seed": 1}
        with httpx.stream("POST", f"{service.url}v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            service.process.send_signal(signal.SIGINT)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
    finally:
        code, _, err = service.end()
    assert (code, err) == (0, "")


def test_a_folder_of_transformers_is_served_with_its_own_beginning(tmp_path):
    path = tmp_path / "native"
    plain("mixtral").save_pretrained(path)
    tokenizer(chat=True).save_pretrained(path)
    served = load_served(path, name="my/model")
    assert served.encode("ab") == [97, 98]
    with running(served, Settings(port=0)) as url:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "model": "my/model"}
        answer = httpx.post(f"{url}v1/chat/completions", json=body, timeout=30).json()
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert httpx.get(f"{url}v1/models/my/model").json()["id"] == "my/model"
        layers = httpx.get(f"{url}api/model").json()["layers"]
        assert [(one["label"], one["num_experts"]) for one in layers] == [("layer 0", 4), ("layer 1", 4)]


def test_listening_beyond_this_machine_without_a_key_is_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MOESAIC_API_KEY", raising=False)
    assert run(["serve", str(tmp_path / "nothing"), "--host", "0.0.0.0"]) == 2
    assert "needs an API key, got none" in capsys.readouterr().err


def test_a_folder_without_a_model_is_told(tmp_path, capsys):
    assert run(["serve", str(tmp_path), "--port", "0"]) == 1
    assert "is not a run folder" in capsys.readouterr().err


def test_without_fastapi_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("moesaic.serve.find_spec", lambda name: None if name == "fastapi" else find(name))
    assert run(["serve", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "moesaic: moesaic serve needs fastapi and uvicorn, got no fastapi. "
        "Install them with: pip install 'moesaic[serve]'.\n"
    )


def test_no_thread_is_left_after_a_service_in_the_background(tiny):
    with running(tiny, Settings(port=0)) as url:
        assert httpx.get(f"{url}healthz").status_code == 200
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("moesaic-")]
