import re

import httpx
import torch

import moesaic as mz
from moesaic.serve import Settings, running
from moesaic.serve.meter import Meter, prometheus_text
from tests.serve.conftest import fields, make

LINE = re.compile(r'^(moesaic_\w+)(?:\{((?:\w+="(?:[^"\\\n]|\\\\|\\"|\\n)*",?)*)\})? (\d+(?:\.\d+)?)$')


def figures(text):
    """Every sample of an exposition, by name and labels; each line must be a comment or a sample."""
    found = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.match(r"^# (HELP|TYPE) moesaic_\w+ \S", line)
            continue
        name, labels, value = LINE.match(line).groups()
        found[name, tuple(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or ""))] = float(value)
    return found


def test_the_load_of_every_expert_is_what_the_routers_wrote():
    served = make("mixtral")
    prompt = "It is a truth"
    with running(served, Settings(port=0)) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 5, "temperature": 0})
        answer = client.get("/metrics")
        assert client.get("/elsewhere").status_code == client.get("/v1/models/other").status_code == 404
        again = figures(client.get("/metrics").text)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = figures(answer.text)
    ids = torch.tensor([list(prompt.encode())])
    with torch.no_grad(), mz.record(served.model) as trace:
        served.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    for layer, name in enumerate(served.layers):
        load = [int(((trace.layer == layer) & (trace.expert == expert)).sum()) for expert in range(4)]
        told = [found["moesaic_expert_choices_total", (("layer", name), ("expert", str(e)))] for e in range(4)]
        assert told == load
        # Thirteen of the prompt and four of the five new tokens are read, with two choices each.
        assert sum(load) == 34
    assert found["moesaic_tokens_total", (("kind", "prompt"),)] == 13
    assert found["moesaic_tokens_total", (("kind", "completion"),)] == 5
    assert found["moesaic_tokens_read_total", ()] == 17
    assert found["moesaic_answers_total", (("outcome", "length"),)] == 1
    assert found["moesaic_answers_active", ()] == 0
    assert found["moesaic_requests_total", (("path", "/v1/completions"), ("status", "200"))] == 1
    assert again["moesaic_requests_total", (("path", "other"), ("status", "404"))] == 2


def test_a_hostile_name_stays_within_its_quotes(tiny):
    class Quiet:
        outcomes, prompt_tokens, completion_tokens, num_active, num_waiting = {}, 0, 0, 0, 0

    from moesaic.serve.heard import Heard

    name = 'a"} 1\nevil{x="\\'
    served = type(tiny)(**{**fields(tiny), "layers": {name: 1}})
    found = figures(prometheus_text(Meter(), Quiet(), Heard(served.layers, ()), served))
    assert found["moesaic_expert_choices_total", (("layer", 'a\\"} 1\\nevil{x=\\"\\\\'), ("expert", "0"))] == 0
