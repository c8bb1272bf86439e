import json
import os
import subprocess
import sys

import pytest

from moesaic import recipes
from moesaic.cli.app import run

from .conftest import SIZES

VERBS = (
    ["train"], ["inspect"], ["generate"], ["recipes"], ["recipes", "show"],
    ["lab"], ["lab", "gallery"], ["lab", "balance"], ["lab", "precision"],
)  # fmt: skip


def said(capsys):
    out, err = capsys.readouterr()
    return out, err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert run([*verb, "--help"]) == 0
    out, _ = said(capsys)
    assert f"Example: moesaic {verb[0]}" in out.replace("\n", " ")


def test_help_lists_the_verbs_and_the_version_is_printed(capsys):
    assert run(["--help"]) == 0
    out, _ = said(capsys)
    assert all(verb[0] in out for verb in VERBS)
    assert run(["--version"]) == 0
    out, _ = said(capsys)
    assert out.startswith("moesaic ")


def test_help_waits_for_no_heavy_library():
    script = (
        "import sys; from moesaic.cli.app import run; assert run(['train', '--help']) == 0; "
        "heavy = {'transformers', 'accelerate', 'datasets', 'pyarrow', 'matplotlib', 'tensorboard'}; "
        "print('imported:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: []\n")


def test_python_dash_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "moesaic", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("moesaic ")


BAD_ARGUMENTS = [
    (["--recipe", "quantum"], f"recipe must be one of {', '.join(recipes.names())}, got"),
    (["--num-experts=2", "--top-k=5"], "top_k must be between 1 and num_experts=2, got 5."),
    (["--option", "jitter"], "--option must be key=value, got 'jitter'. Write for example --option jitter=0.01."),
    (["--aux", "switch=much"], "--aux must give a number, got 'much'. Write for example --aux switch=0.01."),
    (["--aux", "balance=0.5"], "aux_coefficients must name losses of recipe mixtral (switch), got balance."),
    (["--resume", "--overwrite"], "--resume goes on with a run and --overwrite deletes it, got both."),
    (["--preset", "nightly"], "preset must be one of demo, got 'nightly'."),
    (
        ["--recipe=switch", "--option", "capacity_factor=high"],
        "option capacity_factor of recipe switch must be a finite",
    ),
    (
        ["--balance", "switch=much"],
        "--balance must give a number, got 'much'. Write for example --balance switch=0.01.",
    ),
    (
        ["--recipe=hash", "--balance", "bias=0.01"],
        "Loss-free balancing adds a bias to the scores by which each token chooses its K best experts, as TopKRouter "
        "does, got HashRouter, which has no place for one.",
    ),
    (["--aux", "switch=nan"], "The coefficient of balance loss switch must be a finite number of at least 0, got nan."),
    (["--backbone=t5", "--context=33"], "context must be even for t5, half of it for the encoder and half for the"),
    (
        ["--layers=2", "--moe-layers=5"],
        "layers must be 'all', 'every-2' or a list of different indices in 0..1, got [5].",
    ),
    (["--lr=-1"], "lr must be a finite number above 0, got -1.0."),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_end_with_2_and_one_line_and_write_nothing(arguments, message, text, tmp_path, capsys):
    assert run(["train", "--data", str(text), "--out", str(tmp_path / "x"), "--no-report", *arguments]) == 2
    _, err = said(capsys)
    assert err.startswith(f"moesaic: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arguments", [["train"], ["train", "--out", "x", "--steps", "many"], ["fly"], ["--no-such"]])
def test_what_the_parser_refuses_ends_with_2(arguments, capsys):
    assert run(arguments) == 2
    assert "Traceback" not in said(capsys)[1]


FAILURES = [
    (["train", "--data", "{tmp}/absent.txt", "--out", "{tmp}/x", "--no-report"], "which does not exist"),
    (["train", "--resume", "--out", "{tmp}", "--no-report"], "is not a run folder: it has no run.json."),
    (["inspect", "{tmp}"], "is not a run folder: it has no run.json."),
    (["generate", "{tmp}/absent"], "There is no folder"),
    (["train", "--out", "{tmp}/file/x", "--no-report"], "Not a directory. Check the path, and who may read and write"),
]


@pytest.mark.parametrize(("arguments", "message"), FAILURES)
def test_a_failure_ends_with_1_and_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run([argument.format(tmp=tmp_path) for argument in arguments]) == 1
    _, err = said(capsys)
    assert err.startswith("moesaic: ")
    assert message in err
    assert err.count("\n") == 1


def test_training_prints_a_table_of_both_models(text, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", "--data", str(text), "--out", str(out), "--steps=4", "--twin", "--recipe=switch"]
    assert run([*arguments, "--option", "jitter=0.1", "--aux", "switch=0.5", *SIZES]) == 0
    printed, _ = said(capsys)
    for row in ("bits per byte, north", "bits per byte, mean", "tokens/s", "active parameters", "load max/mean"):
        assert row in printed
    assert "dense twin" in printed
    assert f"Report: {out}/report.html" in printed.replace("\n", "")
    assert (out / "report.html").is_file()
    settings = json.loads((out / "moe" / "run.json").read_text())["settings"]
    assert settings["options"] == {"jitter": 0.1}
    assert settings["aux_coefficients"] == {"switch": 0.5}


def test_a_finished_run_says_so_and_prints_its_figures(finished, capsys):
    assert run(["train", "--resume", "--out", str(finished), "--no-report", "--json"]) == 0
    out, err = said(capsys)
    assert json.loads(out) == json.loads((finished / "summary.json").read_text())
    assert "is finished: nothing to resume." in err.replace("\n", " ")


def test_a_run_is_neither_overwritten_nor_changed_by_accident(finished, text, capsys):
    before = (finished / "summary.json").read_text()
    assert run(["train", "--data", str(text), "--out", str(finished), "--no-report"]) == 2
    assert "already holds a run" in said(capsys)[1]
    assert run(["train", "--resume", "--out", str(finished), "--no-report", "--lr", "0.5"]) == 2
    assert "was started with lr=0.002, resuming asked for lr=0.5" in said(capsys)[1]
    assert (finished / "summary.json").read_text() == before


def test_inspect_writes_page_and_trace_and_prints_figures(finished, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert run(["inspect", str(finished), "--out", str(page), "--tokens=200", "--json"]) == 0
    figures = json.loads(said(capsys)[0])
    assert figures["domains"] == ["north", "south"]
    layers = ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert figures["num_experts"] == dict.fromkeys(layers, 4)
    assert list(figures["load_max_over_mean"]) == layers
    assert page.is_file()
    from moesaic import RoutingTrace

    assert len(RoutingTrace.load(page.with_suffix(".trace.parquet")).metadata.token_text) == 257
    assert run(["inspect", str(finished), "--out", str(page), "--tokens=200"]) == 0
    assert "Experts that got nothing:" in said(capsys)[0]


def test_inspect_puts_page_and_trace_into_a_folder_that_is_named(finished, tmp_path, capsys):
    assert run(["inspect", str(finished), "--out", str(tmp_path), "--tokens=200"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.trace.parquet", "report-figures"}


def test_inspecting_a_dense_model_is_refused(finished, capsys):
    assert run(["inspect", str(finished / "dense")]) == 2
    assert "has no MoE layers" in said(capsys)[1]


def test_a_model_folder_needs_data_to_be_inspected(finished, capsys):
    assert run(["inspect", str(finished / "moe" / "model")]) == 2
    assert said(capsys)[1] == (
        "moesaic: A model folder does not say what it was trained on. Name the text with --data.\n"
    )


@pytest.mark.parametrize("sampling", [["--temperature=0"], ["--seed=3"], ["--top-p=0", "--temperature=2"]])
def test_generated_text_goes_on_from_the_prompt_and_repeats_with_its_seed(finished, capsys, sampling):
    arguments = ["generate", str(finished), "--prompt", "abc ", "--max-new-tokens=15", *sampling]
    assert run(arguments) == 0
    streamed = said(capsys)[0]
    assert run([*arguments, "--json"]) == 0
    figures = json.loads(said(capsys)[0])
    assert streamed == "abc " + figures["text"] + "\n"
    assert 1 <= figures["new_tokens"] <= 15


def test_text_beyond_the_trained_length_is_warned_of(finished, capsys):
    assert run(["generate", str(finished / "moe" / "model"), "--max-new-tokens=40", "--json"]) == 0
    assert said(capsys)[1] == "Note: the model was trained on 24 tokens at a time; text beyond them is worse.\n"


@pytest.mark.parametrize(
    ("prompt", "way_out"),
    [
        ("four", "prompt and new tokens need 25. Shorten the prompt by 1 tokens, or lower --max-new-tokens to 19."),
        ("x" * 30, "prompt and new tokens need 51. Shorten the prompt by 27 tokens."),
    ],
)
def test_text_beyond_the_positions_of_a_model_is_refused_with_what_would_fit(prompt, way_out, text, tmp_path, capsys):
    arguments = ["--data", str(text), "--out", str(tmp_path / "x"), "--backbone=gpt2", "--steps=1", "--no-report"]
    assert run(["train", *arguments, *SIZES]) == 0
    said(capsys)
    assert run(["generate", str(tmp_path / "x"), "--prompt", prompt, "--max-new-tokens=20"]) == 2
    assert said(capsys)[1] == f"moesaic: this model has 24 positions, {way_out}\n"


@pytest.mark.parametrize("backbone", ["t5", "lstm"])
def test_other_backbones_train_with_a_report_and_write(backbone, text, tmp_path, capsys):
    arguments = ["--data", str(text), "--out", str(tmp_path / "x"), "--backbone", backbone, "--steps=2", "--layers=4"]
    sizes = [size for size in SIZES if not size.startswith(("--layers", *(["--heads"] if backbone == "lstm" else [])))]
    assert run(["train", *arguments, *sizes, "--moe-layers=every-2"]) == 0
    assert (tmp_path / "x" / "report.html").is_file()
    said(capsys)
    assert run(["inspect", str(tmp_path / "x"), "--json"]) == 0
    layers = {
        "t5": [f"{stack}.block.{block}" for stack in ("encoder", "decoder") for block in (1, 3)],
        "lstm": ["model.layers.1"],
    }
    figures = json.loads(said(capsys)[0])
    assert [name.rsplit(".", 3 if backbone == "t5" else 1)[0] for name in figures["num_experts"]] == layers[backbone]
    arguments = ["generate", str(tmp_path / "x"), "--prompt", "abc ", "--max-new-tokens=10"]
    assert run(arguments) == 0
    streamed = said(capsys)[0]
    assert run([*arguments, "--json"]) == 0
    figures = json.loads(said(capsys)[0])
    assert streamed == "abc " + figures["text"] + "\n"
    assert 1 <= figures["new_tokens"] <= 10


def test_text_beyond_what_a_stack_was_trained_on_is_warned_of(text, tmp_path, capsys):
    arguments = ["--data", str(text), "--out", str(tmp_path / "x"), "--backbone=t5", "--steps=1", "--no-report"]
    assert run(["train", *arguments, *SIZES]) == 0
    said(capsys)
    for prompt, new, note in (("x" * 11, 12, ""), ("x" * 12, 12, "Note"), ("x", 13, "Note")):
        assert run(["generate", str(tmp_path / "x"), "--prompt", prompt, f"--max-new-tokens={new}", "--json"]) == 0
        assert said(capsys)[1] == (
            note and "Note: the model was trained on 12 tokens at a time; text beyond them is worse.\n"
        )


def test_recipes_are_listed_and_shown(capsys):
    assert run(["recipes", "--json"]) == 0
    listed = json.loads(said(capsys)[0])
    assert [recipe["name"] for recipe in listed] == recipes.names()
    assert run(["recipes"]) == 0
    assert "deepseek-v3" in said(capsys)[0]
    assert run(["recipes", "show", "mixtral", "--json"]) == 0
    assert json.loads(said(capsys)[0]) == listed[recipes.names().index("mixtral")]
    assert run(["recipes", "show", "mixtral"]) == 0
    shown = said(capsys)[0]
    for line in (
        "  --top-k 2        section 2.1, table 1",
        "w = softmax(z over S);  y = sum_{e in S} w_e SwiGLU_e(x)",
        "  switch_loss, times 0.002; another coefficient with --aux switch=NUMBER",
    ):
        assert line in shown.splitlines()
    assert run(["recipes", "show", "deepseek-v3"]) == 0
    assert "  bias controller, stepped once per optimizer step: rate 0.001, rule sign" in said(capsys)[0].splitlines()
    assert run(["recipes", "show", "quantum"]) == 2


@pytest.mark.parametrize("wish", [None, "0"])
@pytest.mark.parametrize(
    "arguments", [["generate", "nowhere"], ["serve", "nowhere"], ["bench", "decode", "--case", "none"]], ids=str
)
def test_who_reads_weights_for_each_token_asks_for_large_pages_unless_told_otherwise(arguments, wish):
    """Read by PyTorch when it makes its first tensor, so asked for before it is there."""
    script = (
        "import os, sys\n"
        "from moesaic.cli.app import run\n"
        f"assert run({arguments!r}) != 0\n"
        "print(os.environ['THP_MEM_ALLOC_ENABLE'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if wish is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = wish
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == (wish or "1")
