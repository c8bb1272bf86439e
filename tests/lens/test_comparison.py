import re
from dataclasses import replace

import numpy as np
import pytest

from moesaic.core.errors import DataError
from moesaic.lens import report
from moesaic.lens.comparison import compare, comparison_sentences, comparison_table
from moesaic.lens.study import study


def swapped(trace, share, seed=0):
    """The trace with a share of its rows given to the next expert."""
    moved = np.random.default_rng(seed).random(trace.num_rows) < share
    return replace(trace, expert=np.where(moved, (trace.expert + 1) % 4, trace.expert))


def named(trace, model, **changes):
    return replace(trace, metadata=replace(trace.metadata, model=model, **changes))


@pytest.fixture(name="trace")
def _trace(random_trace):
    return random_trace(lean=1.5)


def test_a_trace_beside_itself_chose_the_same_everywhere(trace):
    pair = compare(study(trace), study(trace))
    assert pair.same.value == pytest.approx([1, 1])
    assert (pair.same.chance < 0.7).all()
    assert pair.names == ("runs/toy (first)", "runs/toy (second)")
    rows = {row[0]: row[1:] for row in comparison_table(pair).rows}
    assert all(cells[:2] == cells[2:] for cells in rows.values())


def test_the_table_has_the_numbers_of_both_in_their_columns(trace):
    other = named(trace.where(trace.sequence < 6), "runs/half")
    pair = compare(study(trace), study(other))
    table = comparison_table(pair)
    assert [column.name for column in table.columns] == [
        "measure", "runs/toy", "chance, runs/toy", "runs/half", "chance, runs/half",
    ]  # fmt: skip
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["tokens traced"] == (f"{trace.num_tokens:,}", "–", f"{other.num_tokens:,}", "–")
    assert rows["experts of a token"] == ("2.00", "–", "2.00", "–")
    for place, one in ((0, study(trace)), (2, study(other))):
        layer = int(np.argmax(one.worst.value))
        assert rows["busiest over mean, worst layer"][place : place + 2] == (
            f"{one.worst.value[layer]:.2f}", f"{one.worst.chance[layer]:.2f}",
        )  # fmt: skip


def test_sentences_name_the_more_even_of_the_two_whichever_comes_first(random_trace):
    even = random_trace(lean=4.0)
    # Half of expert 0's rows go to expert 1, in texts of every domain alike.
    moved = (even.expert == 0) & (even.position % 2 == 0)
    uneven = named(replace(even, expert=np.where(moved, 1, even.expert)), "uneven")
    even = named(even, "even")
    for one, other in ((even, uneven), (uneven, even)):
        sentences = comparison_sentences(compare(study(one), study(other)))
        assert sentences[0].startswith("even spreads its work more evenly than uneven: ")
        assert sentences[1].startswith("Beyond chance, the expert of even tells ")
        assert sentences[2].startswith("On the same text they choose the same experts for ")


def test_traces_of_other_layers_are_compared_in_all_but_their_single_choices(trace, random_trace, tmp_path):
    other = named(random_trace(num_experts=(8, 8, 8)), "runs/other")
    pair = compare(study(trace), study(other))
    assert pair.same is None
    page = report(trace, tmp_path, compare=other).read_text(encoding="utf-8")
    assert "Single choices are not compared: " in page
    assert 'id="compare_depth"' in page
    assert 'id="same_choices"' not in page


def test_texts_that_differ_are_told(trace):
    other = replace(trace, token_id=trace.token_id + 1)
    assert compare(study(trace), study(other)).why_not.startswith("Saturation needs two traces of one text")


def test_the_page_of_two_shows_both_and_how_many_choices_are_the_same(trace, tmp_path):
    other = named(swapped(trace, 0.5), "runs/<later>")
    page = report(trace, tmp_path, compare=other).read_text(encoding="utf-8")
    for name in ("compare_depth", "compare_domains", "same_choices"):
        assert f'<figure id="{name}">' in page
        assert (tmp_path / "report-figures" / f"{name}.svg").is_file()
    assert "runs/&lt;later&gt;" in page
    assert "<later>" not in re.sub(r'"data:[^"]*"', "", page)
    assert (tmp_path / "report-figures" / "comparison.csv").read_text().startswith("measure,runs/toy,")


def test_a_second_trace_without_rows_is_refused(trace, tmp_path):
    with pytest.raises(DataError, match="A report needs a trace with rows"):
        report(trace, tmp_path, compare=trace.where(trace.layer < 0))
