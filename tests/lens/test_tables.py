import csv
from html.parser import HTMLParser
from io import StringIO

import numpy as np

from moesaic.lens import downloads
from moesaic.lens.tables import Column, Table

COLUMNS = (
    Column(name="token"),
    Column(name="layer", picks=True),
    Column(name="n", form=",d"),
    Column(name="share", form=".1%"),
)


def table(*rows, columns=COLUMNS):
    return Table(name="tokens", title="Some <tokens>", columns=columns, rows=rows)


def read(content):
    return list(csv.reader(StringIO(content.decode("utf-8"))))


def test_a_csv_has_all_digits_and_nothing_where_a_number_is_unknown():
    share = 0.1234567890123
    rows = read(
        table(("the", "layer 0", 12345, share), ("a", "layer 1", 3, float("nan")), ("b", "layer 1", 3, None)).csv()
    )
    assert rows[0] == ["token", "layer", "n", "share"]
    assert rows[1] == ["the", "layer 0", "12345", str(share)]
    assert float(rows[1][3]) == share
    assert rows[2][3] == rows[3][3] == ""


def test_a_csv_gives_quotes_commas_and_line_ends_back_as_they_were():
    texts = ['say "no"', "a,b", "two\nlines", "ünï", "\u2028"]
    rows = read(table(*((text, "x", 1, 0.5) for text in texts)).csv())
    assert [row[0] for row in rows[1:]] == texts


def test_text_that_a_spreadsheet_would_run_gets_an_apostrophe_and_numbers_do_not():
    texts = ["=1+1", "+x", "-x", "@sum", "\tx", "=", "plain", "'quoted"]
    rows = read(table(*((text, "x", -1, -0.5) for text in texts)).csv())
    assert [row[0] for row in rows[1:]] == ["'=1+1", "'+x", "'-x", "'@sum", "'\tx", "'=", "plain", "'quoted"]
    assert {row[2] for row in rows[1:]} == {"-1"}


def test_half_a_character_does_not_stop_a_csv():
    assert b"\\udcff" in table(("\udcff", "x", 1, 0.5)).csv()


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.cells, self.scopes, self.values = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag in ("th", "td"):
            self.cells.append("")
            self.scopes.append(attributes.get("scope"))
            self.values.append(attributes.get("data-v"))

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data.strip("\n")


def test_the_page_shows_rounded_numbers_and_keeps_their_values_for_the_script():
    seen = Cells(table(("</td><b>", "layer 0", 12345, 0.12345), ("a", "layer 1", 3, float("nan"))).html())
    assert seen.cells[:4] == ["token", "layer", "n", "share"]
    assert seen.cells[4:8] == ["</td><b>", "layer 0", "12,345", "12.3%"]
    assert seen.values[4:8] == [None, None, "12345", "0.12345"]
    assert seen.cells[-1] == "–"
    assert seen.values[-1] is None
    assert seen.scopes[:4] == ["col"] * 4
    assert seen.scopes[4::4] == ["row", "row"]


def test_numbers_of_numpy_are_numbers():
    share = np.float64(0.25)
    assert read(table(("a", "x", int(np.int64(3)), share)).csv())[1] == ["a", "x", "3", "0.25"]


def test_a_small_file_travels_in_the_page_and_a_large_one_beside_it():
    small = downloads.of_table(table(("a", "x", 1, 0.5)))
    large = downloads.Download(name="big one.csv", media="text/csv", content=b"x" * 2_000_000)
    html = downloads.links([small, large], 'a "title" & <more>', "page-figures")
    assert 'href="data:text/csv;base64,' in html
    assert 'href="page-figures/big%20one.csv"' in html
    assert 'aria-label="CSV of a &quot;title&quot; &amp; &lt;more&gt;"' in html
