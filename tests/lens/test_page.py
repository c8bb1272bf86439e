import base64
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from moesaic.core.errors import BackendError, CheckpointError, DataError
from moesaic.lens import drawing, page, palette, report
from moesaic.lens.figures.domains import domain_heat_map, domain_table
from moesaic.lens.figures.drawn import Figures
from moesaic.lens.figures.training import drops_and_entropy
from moesaic.lens.passages import passages
from moesaic.lens.runs import read_run
from moesaic.lens.study import study
from tests.lens.conftest import random_trace, write_run

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = (
    "<script>alert(1)</script>",
    "</style><b>",
    "</script>",
    "\"'&amp;&lt;",
    "]]>--><!--",
    "$x_^{\\frac",
    "${title}",
    "<img src=x onerror=alert(1)>",
    "\u202egnp.exe",
    "\udcff\x00",
)


class Outline(HTMLParser):
    """What a browser would see: elements, attributes and text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.attributes, self.texts, self.comments, self.open = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def handle_comment(self, data):
        self.comments.append(data)

    def text(self):
        return "".join(data for tag, data in self.texts if tag not in ("script", "style")).replace("\xa0", " ")


@pytest.fixture(scope="module")
def twin_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twins")
    trace = random_trace(lean=1.5)
    runs = {
        "moe": write_run(folder / "moe", trace),
        "dense": write_run(folder / "dense", trace, dense=True, offset=0.1),
    }
    return report(trace, folder / "out" / "page.html", runs=runs, title="Demo")


def test_the_page_tells_everything_of_a_moe_and_its_twin(twin_page):
    assert twin_page.name == "page.html"
    seen = Outline(twin_page.read_text(encoding="utf-8"))
    assert seen.open == []
    for words in (
        "better than its dense twin: 1.775 against 1.875 bits per byte",
        "1 k of 3 k",
        "Which expert takes which domain",
        "How the work is spread over the experts",
        "Where in the model each domain has experts of its own",
        "Do experts follow words or subjects?",
        "What expert, word and subject tell about each other",
        "How often a token keeps the expert of the token before it",
        "Which experts work together",
        "How well a layer's expert gives away the next layer's",
        "What each domain leans to",
        "Which expert takes a token first",
        "How well the models learn to predict the text",
        "Held-out bits per byte, by domain",
        "How uneven the load is while the model learns",
        "Who does the work, from the first step to the last",
        "What is dropped, and how sure the routers are",
        "Tokens that each expert prefers",
        "Read along with the experts",
        "How these figures were made",
    ):
        assert words in seen.text()


def test_every_figure_lies_beside_the_page_as_png_and_svg_and_every_table_as_csv(twin_page):
    folder = twin_page.parent / "page-figures"
    figures = {
        "by_domain", "domains", "drops_entropy", "film", "imbalance", "information", "layers_by_domain", "load", "loss",
        "next_layer", "repetition", "together", "words_or_subjects",
    }  # fmt: skip
    assert {file.stem for file in folder.glob("*.png")} == figures
    assert {file.stem for file in folder.glob("*.svg")} == figures
    assert {"domains", "load", "tokens", "domain_leans", "together"} <= {file.stem for file in folder.glob("*.csv")}
    assert {file.suffix for file in folder.iterdir()} == {".png", ".svg", ".csv"}
    for file in folder.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    for file in folder.glob("*.svg"):
        drawing = ElementTree.parse(file).getroot()
        assert [child.tag.rpartition("}")[2] for child in drawing[:2]] == ["title", "desc"]
        assert "n = " in drawing[1].text or "n (" in drawing[1].text
        assert "var(--" not in file.read_text("utf-8")
    assert Outline(twin_page.read_text(encoding="utf-8")).elements.count("svg") == len(figures)


def test_the_links_of_the_page_save_the_files_that_lie_beside_it(twin_page):
    seen = Outline(twin_page.read_text(encoding="utf-8"))
    names = [value for tag, name, value in seen.attributes if (tag, name) == ("a", "download")]
    inside = [value for tag, name, value in seen.attributes if (tag, name) == ("a", "href") and value[:5] == "data:"]
    folder = twin_page.parent / "page-figures"
    assert sorted(names) == sorted(file.name for file in folder.iterdir())
    for name, address in zip(names, inside, strict=True):
        assert base64.b64decode(address.partition("base64,")[2]) == (folder / name).read_bytes()


def test_headings_go_down_one_step_at_a_time_and_everything_drawn_has_words(twin_page):
    seen = Outline(twin_page.read_text(encoding="utf-8"))
    levels = [int(tag[1]) for tag in seen.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for tag, wanted in (("svg", "aria-label"), ("section", "aria-labelledby"), ("nav", "aria-label")):
        assert seen.elements.count(tag) == sum((one, name) == (tag, wanted) for one, name, _ in seen.attributes)
    scopes = [value for tag, name, value in seen.attributes if (tag, name) == ("th", "scope")]
    assert len(scopes) == seen.elements.count("th")
    assert seen.elements.count("caption") == seen.elements.count("table")


def test_every_figure_says_n_and_what_chance_would_give(twin_page):
    text = twin_page.read_text(encoding="utf-8")
    notes = re.findall(r"<figure.*?<p class=\"note\">(.*?)</p>", text, re.DOTALL)
    assert len(notes) == 13
    for note in notes:
        assert re.search(r"\bn (=|\()", note), note
        assert re.search("chance|uniform|perfect balance|random|cannot decide", note), note


def test_the_page_needs_no_network_and_no_other_file(twin_page):
    seen = Outline(twin_page.read_text(encoding="utf-8"))
    assert not {"link", "iframe", "img", "object", "embed", "base", "form"} & set(seen.elements)
    for tag, name, value in seen.attributes:
        if name in ("src", "srcset", "action", "data", "poster"):
            pytest.fail(f"<{tag} {name}={value!r}>")
        if name in ("href", "xlink:href"):
            assert value.startswith(("#", "data:")), value
    styles = "".join(data for tag, data in seen.texts if tag == "style")
    assert "@import" not in styles
    assert "url(" not in styles
    assert "fetch(" not in page._asset("page.js")
    assert "http" not in page._asset("page.js")


def test_ids_are_used_once_and_references_lead_somewhere(twin_page):
    seen = Outline(twin_page.read_text(encoding="utf-8"))
    ids = [value for _, name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for _, name, value in seen.attributes if name == "xlink:href" and value[0] == "#"} <= set(ids)


def hostile_trace(trace):
    texts = list(trace.metadata.token_text)
    for token, text in zip(np.unique(trace.token_id), HOSTILE * 10, strict=False):
        texts[token] = text
    metadata = replace(
        trace.metadata,
        token_text=tuple(texts),
        domains=HOSTILE[:3],
        layer_names=(f"{HOSTILE[0]}.a", f"{HOSTILE[3]}.b"),
        model=HOSTILE[1],
        recipe=HOSTILE[7],
    )
    return replace(trace, metadata=metadata)


def test_nothing_hostile_in_names_tokens_or_titles_arrives_unescaped(tmp_path, random_trace, write_run):
    trace = hostile_trace(random_trace(num_sequences=60, lean=2.0))
    names = trace.metadata.layer_names
    runs = {
        HOSTILE[0]: write_run(tmp_path / "moe", trace, domains=HOSTILE[:3], names=names),
        HOSTILE[5]: write_run(tmp_path / "dense", trace, dense=True, domains=HOSTILE[:3]),
    }
    title = " ".join(HOSTILE)
    text = report(trace, tmp_path / "page.html", runs=runs, title=title).read_text(encoding="utf-8")
    seen = Outline(text)
    assert seen.open == []
    assert seen.elements.count("script") == 2
    assert seen.elements.count("style") == 1
    assert not {"b", "img"} & set(seen.elements)
    assert not [name for _, name, _ in seen.attributes if name.startswith("on")]
    assert not any("gnp" in comment or "alert" in comment for comment in seen.comments)
    assert [data for tag, data in seen.texts if tag == "title"] == [page.one_line(title)]
    for words in HOSTILE[:9]:
        assert words.replace("\u202e", "\\u{202E}") in seen.text()
    assert "\u202e" not in text
    (data,) = [data for tag, data in seen.texts if tag == "script" and data.startswith("{")]
    assert "<" not in data
    assert json.loads(data)["reading"]["layers"] == [page.one_line(name) for name in names]


def test_the_same_trace_gives_the_same_page(tmp_path, random_trace):
    first = report(random_trace(), tmp_path / "one").read_bytes()
    assert report(random_trace(), tmp_path / "two").read_bytes() == first


def test_a_folder_gets_report_html(tmp_path, random_trace, monkeypatch):
    none = Figures(compared=[], learning=[], domains=[], load=[], relations=[], settling=[])
    monkeypatch.setattr(page, "figures", lambda *_: none)
    (tmp_path / "odd.html").mkdir()
    assert report(random_trace(), tmp_path / "new") == tmp_path / "new" / "report.html"
    assert report(random_trace(), tmp_path / "odd.html") == tmp_path / "odd.html" / "report.html"


@pytest.mark.slow
def test_one_run_of_a_dense_model_still_makes_a_page(tmp_path, random_trace, write_run):
    run = write_run(tmp_path / "dense", random_trace(), dense=True)
    text = report(random_trace(), tmp_path / "out", runs={"dense": run}).read_text(encoding="utf-8")
    assert "dense: 1.775 bits for a byte" in text
    assert not (tmp_path / "out" / "report-figures" / "film.png").exists()


@pytest.mark.slow
def test_a_run_that_has_hardly_begun_makes_a_page(tmp_path, random_trace, write_run):
    for steps in (0, 1):
        run = write_run(tmp_path / f"run{steps}", random_trace(), steps=steps)
        assert report(random_trace(), tmp_path / "out", runs={"moe": run}).exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_experts", [(1,), (4, 7, 16), (40,)])
def test_layers_of_any_and_of_different_sizes_make_a_page(tmp_path, random_trace, write_run, num_experts):
    trace = random_trace(num_experts=num_experts, top_k=min(2, *num_experts), num_sequences=3)
    run = write_run(tmp_path / "moe", trace)
    seen = Outline(report(trace, tmp_path, runs={"moe": run}).read_text(encoding="utf-8"))
    assert seen.open == []
    assert "top " in seen.text()


def with_choices(trace, keep, top_k=None):
    """The rows at which ``keep`` is True, as of a router that takes as many experts as it likes."""
    return replace(trace.where(keep), metadata=replace(trace.metadata, top_k=top_k))


@pytest.mark.slow
def test_tokens_with_different_numbers_of_experts_make_a_page(tmp_path, random_trace):
    """One, two or three experts, and in one layer none at all for some tokens, as expert choice has it."""
    whole = random_trace(top_k=3)
    some = (whole.choice <= whole.position % 3) & ((whole.layer == 0) | (whole.position % 4 > 0))
    trace = with_choices(whole, some)
    seen = Outline(report(trace, tmp_path).read_text(encoding="utf-8"))
    assert seen.open == []
    average = np.mean([(trace.layer == layer).sum() / len(np.unique(place(trace, layer))) for layer in (0, 1)])
    assert f"4 experts, {average:.3g} for a token on average" in seen.text()
    assert "choices for each token" not in seen.text()
    assert "None" not in seen.text()


def place(trace, layer):
    return (trace.sequence * 10_000 + trace.position)[trace.layer == layer]


@pytest.mark.slow
def test_every_expert_for_every_token_makes_a_page(tmp_path, random_trace):
    trace = random_trace(top_k=4)
    seen = Outline(report(trace, tmp_path).read_text(encoding="utf-8"))
    assert seen.open == []
    assert "4 experts, all for every token" in seen.text()
    assert "With 4 choices for each token, 25 % means that the expert takes it every time." in seen.text()
    assert "takes 1.00 times the average load" in seen.text()


@pytest.mark.slow
def test_more_layers_than_the_page_shows_are_thinned_and_counted(tmp_path, random_trace):
    trace = random_trace(num_experts=(3,) * 20, num_sequences=3, length=8)
    seen = Outline(report(trace, tmp_path).read_text(encoding="utf-8"))
    assert "12 of 20 layers are shown." in seen.text()
    assert len([text for tag, text in seen.texts if tag == "summary" and text.startswith("layer ")]) == 12


def test_traces_without_domains_tokens_or_text_make_a_page(tmp_path, random_trace, without_domains, make_trace):
    unknown = without_domains(random_trace())
    no_tokens = replace(unknown, token_id=np.full(unknown.num_rows, -1))
    no_text = replace(unknown, metadata=replace(unknown.metadata, token_text=(), domains=()))
    single = make_trace([(0, 0, 0, 0, 65, 0, 0)])
    for trace in (unknown, no_tokens, no_text, single):
        assert Outline(report(trace, tmp_path).read_text(encoding="utf-8")).open == []


def test_a_trace_without_rows_is_refused_with_a_way_out(tmp_path, make_trace):
    with pytest.raises(DataError) as error:
        report(make_trace([]), tmp_path / "page.html")
    assert str(error.value) == (
        "A report needs a trace with rows, and this one has none. Run at least one batch of text through the "
        "model while recording."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_the_old_page(tmp_path, monkeypatch, random_trace):
    path = report(random_trace(), tmp_path)
    before = path.read_bytes()
    replace = type(path).replace

    def disk_full(self, target):
        if target.name == "report.html":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(type(path), "replace", disk_full)
    with pytest.raises(CheckpointError) as error:
        report(random_trace(seed=1), tmp_path)
    assert str(error.value) == (
        f"The report could not be written to {path}: No space left on device. "
        "Free some space or give another path; what stood there before is untouched."
    )
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report-figures", "report.html"]


def test_matplotlib_and_pyarrow_are_imported_only_when_needed():
    code = (
        "import sys, moesaic.lens, moesaic.lens.page, moesaic.telemetry.trace;"
        "print([name for name in ('matplotlib', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_matplotlib_says_what_to_install(monkeypatch, random_trace, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError) as error:
        report(random_trace(), tmp_path)
    assert str(error.value) == ("Figures need matplotlib, which is not installed. Try: pip install 'moesaic[report]'")


def test_drawing_leaves_matplotlibs_settings_alone(random_trace, tmp_path):
    import matplotlib

    before = matplotlib.rcParams.copy()
    report(random_trace(), tmp_path)
    assert matplotlib.rcParams.copy() == before


def test_drawing_needs_no_pyplot():
    code = (
        "import sys; from moesaic.lens.drawing import draw; draw('a', 'b', 'c', 1.0, lambda figure: figure.subplots());"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_heat_map_prints_the_shares_in_per_cent(make_trace):
    rows = [(0, n, 0, 0, 65, 2 if n < 73 else 0, 0) for n in range(100)] + [(1, n, 0, 0, 65, 1, 1) for n in range(50)]
    svg = domain_heat_map(study(make_trace(rows))).svg
    for number, times in (("73", 1), ("27", 1), ("100", 1)):
        assert svg.count(f">{number}</text>") == times
    assert "var(--more)" in svg
    assert palette.MORE not in svg


@pytest.mark.parametrize("num_experts", [1, 8, 9, 10, 64])
def test_no_two_experts_share_a_colour_in_either_form(num_experts):
    for form in zip(*palette.expert_colours(num_experts), strict=True):
        assert len(set(form)) == num_experts


def test_names_at_line_ends_keep_apart_and_stay_close():
    placed = drawing._apart([0.0, 0.1, 0.2, 9.0], 1.0)
    assert placed == pytest.approx([-0.9, 0.1, 1.1, 9.0])


def test_a_character_cut_over_byte_tokens_is_shown_whole(make_trace):
    raw = "é—x".encode() + b"\xff"
    trace = make_trace([(0, place, 0, 0, byte, 0, 0) for place, byte in enumerate(raw)])
    (passage,) = passages(trace)
    assert passage.texts == ["é", "", "—", "", "", "x", "\\xFF"]
    assert passage.choices[0][0] == [(0, 0.5)]


def test_a_passage_is_the_longest_text_of_its_domain_and_no_longer_than_asked(make_trace):
    rows = [(0, n, 0, 0, 65, 0, 0) for n in range(3)] + [(1, n, 0, 0, 66, 1, 0) for n in range(9)]
    (passage,) = passages(make_trace(rows), max_tokens=4)
    assert passage.texts == ["B"] * 4


def test_a_passage_of_an_encoder_and_a_decoder_shows_what_the_decoder_read(make_trace):
    encoder = [(0, place, 0, 0, token, 1, 0) for place, token in enumerate(b"abcd")]
    decoder = [(0, place, 1, 0, token, 2, 0) for place, token in enumerate(b"xyz")]
    (passage,) = passages(make_trace(decoder + encoder, num_experts=(4, 4)))
    assert passage.texts == ["x", "y", "z"]
    assert passage.choices == {1: [[(2, 0.5)]] * 3}


def test_a_run_that_drops_nothing_says_so_instead_of_drawing_zeros(tmp_path, random_trace, write_run):
    folder = write_run(tmp_path, random_trace())
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for line in history:
        line["drop_rate"] = dict.fromkeys(line.get("drop_rate", {}), 0.0)
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, history)))
    picture = drops_and_entropy(read_run("moe", folder))
    assert picture.title == "How sure the routers are"
    assert picture.note.startswith("No choice was dropped at any logged step. Entropy:")
    assert "dropped for lack of room" not in picture.svg


def test_an_expert_that_no_domain_uses_leaves_the_other_leans_as_they_are(make_trace):
    rows = [(0, n, 0, 0, 65, 1, 0) for n in range(20)] + [(1, n, 0, 0, 66, n % 2, 1) for n in range(20)]
    code, literature = domain_table(study(make_trace(rows, top_k=1))).rows
    assert code[:7] == ("code", "layer 0", 20, 1, 1.0, 0.75, pytest.approx(4 / 3))
    assert literature[:7] == ("literature", "layer 0", 20, 0, 0.5, 0.25, 2.0)
    assert code[8] is None
