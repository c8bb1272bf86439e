"""Routers that ask which domain a text is of are told in training, in evaluation and on the command line."""

import json

import pytest
import torch

from moesaic.cli.app import run
from moesaic.core.errors import ConfigError
from moesaic.hf import observe
from moesaic.train import MoeTrainer, load_trained, train
from moesaic.train.build import build_model, check_models, training_arguments
from moesaic.train.material import Material
from moesaic.train.order import collate_with_domains

SIGMA = {"recipe": "pangu-sigma", "num_experts": 4, "options": {"num_domains": 2}}


@pytest.fixture(scope="module")
def sigma(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sigma"
    sizes = ["--width=16", "--layers=1", "--heads=2", "--hidden=16", "--num-experts=4", "--context=24", "--steps=3"]
    arguments = ["train", "--recipe=pangu-sigma", "--option", "num_domains=2", "--data", str(text), "--out", str(out)]
    assert run([*arguments, "--batch-size=2", "--no-report", *sizes]) == 0
    return out


def test_a_batch_says_which_domain_each_sequence_is_of():
    item = {"input_ids": torch.arange(3), "domain": torch.tensor(1)}
    batch = collate_with_domains([item, {**item, "domain": torch.tensor(0)}])
    assert batch["domain"].tolist() == [1, 0]
    assert "domain" not in collate_with_domains([{"input_ids": torch.arange(3)}])


def test_each_domain_gets_its_own_experts_in_training_and_evaluation(tiny):
    loads = {True: torch.zeros(4), False: torch.zeros(4)}
    config = tiny(**SIGMA)
    material = Material.load(config)
    model = build_model("moe", config, material.tokenizer)
    north = [block for block in material.blocks if int(block["domain"]) == 0]
    args = training_arguments(config, config.out)
    args.save_strategy = args.eval_strategy = "no"
    trainer = MoeTrainer(model=model, args=args, train_dataset=north, data_collator=collate_with_domains)

    def count(seen):
        loads[seen.training] += seen.routing.load_E

    with observe(model, count):
        trainer.train()
        material.evaluator(model)
    # Two experts for each of two domains: only the first domain's were trained, both were read.
    assert loads[True][:2].min() > 0
    assert loads[True][2:].tolist() == [0, 0]
    assert loads[False].min() > 0


def test_a_text_of_more_domains_than_there_are_experts_for_is_refused_before_anything_is_written(tiny):
    config = tiny(**SIGMA)
    material = Material.load(config)
    with pytest.raises(ConfigError) as error:
        check_models(config, material.tokenizer, ["code", "north", "south"])
    assert str(error.value) == (
        "recipe pangu-sigma needs experts for each of the text's 3 domains (code, north, south), got num_domains=2. "
        "Raise num_domains, or give 1 to tell no domains apart."
    )


@pytest.mark.parametrize("num_domains", [1, 4])
def test_one_domain_for_all_text_and_more_than_it_has_are_fine(tiny, num_domains):
    summary = train(tiny(recipe="pangu-sigma", num_experts=4, options={"num_domains": num_domains}, steps=2))
    assert 0 < summary["moe"]["bits_per_byte"]["north"] < 20


def test_generating_needs_a_domain_and_says_how_to_give_one(sigma, capsys):
    arguments = ["generate", str(sigma), "--prompt", "abc", "--max-new-tokens=4", "--json"]
    assert run(arguments) == 2
    assert "domains within moesaic.hf.domains(...)" in capsys.readouterr().err
    assert run([*arguments, "--domain=1"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] >= 1
    assert run([*arguments, "--domain=7"]) == 2
    assert "domains must be between 0 and 1, got 7 to 7." in capsys.readouterr().err


def test_the_domain_of_a_text_decides_its_experts(sigma):
    from moesaic.hf import domains

    model, loads = load_trained(sigma).model, []
    with torch.no_grad(), observe(model, lambda seen: loads.append(seen.routing.load_E)):
        for domain in (0, 1):
            with domains(domain):
                model(input_ids=torch.arange(3, 20)[None])
    assert [(int(load_E[:2].sum()), int(load_E[2:].sum())) for load_E in loads] == [(17, 0), (0, 17)]
