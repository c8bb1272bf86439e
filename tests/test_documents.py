"""What the documents say is true: their code runs and prints what they show, their commands and links exist.

* A ```` ```python ```` block runs, in its page's order and namespace, in an empty folder. If a ```` ```text ```` block
  follows it directly, that is what it must have printed. ```` ```{.python .excerpt} ```` must stand in the source.
* A line of a ```` ```console ```` or ```` ```bash ```` block that starts with ``moesaic`` must parse; ``make`` targets
  must exist.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

_BLOCK = re.compile(r"^( *)```(\S[^\n]*)?\n(.*?)^\1```[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    kind: str
    text: str
    line: int
    output: str | None


def blocks(page: str) -> list[Block]:
    """All fenced blocks; a text block right after a python block is that block's output."""
    found = list(_BLOCK.finditer(page))
    result = []
    for match, following in zip_longest(found, found[1:]):
        adjoins = following is not None and not page[match.end() : following.start()].strip()
        shown = following[3] if following and adjoins and following[2] == "text" else None
        line = page.count("\n", 0, match.start(3)) + 1
        output = shown if match[2] == "python" else None
        result.append(Block(kind=match[2] or "", text=match[3], line=line, output=output))
    return result


def run_page(page: str, name: str) -> None:
    """Run the python blocks of a page in one namespace and compare what they print with what the page shows."""
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Line numbers in a traceback are those of the page.
            exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), namespace)
        if block.output is not None:
            shown = [line.rstrip() for line in block.output.splitlines()]
            came = [line.rstrip() for line in printed.getvalue().splitlines()]
            assert came == shown, f"{name}:{block.line} printed something else than the page shows"


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


WITH_CODE = [path for path in PAGES if any(block.kind == "python" for block in blocks(path.read_text("utf-8")))]


@pytest.mark.parametrize("path", WITH_CODE, ids=page_id)
def test_code_of_a_page_runs_and_prints_what_the_page_shows(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(path.read_text("utf-8"), page_id(path))


@pytest.mark.parametrize("path", EXAMPLES, ids=page_id)
def test_an_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_a_page_whose_output_is_wrong_is_found():
    page = "```python\nx = 1\nprint(x)\n```\n\n```text\n2\n```\n"
    with pytest.raises(AssertionError, match=r"page\.md:2 printed something else"):
        run_page(page, "page.md")


def test_text_after_a_sentence_is_not_an_output():
    page = "```python\nprint(1)\n```\n\nA picture:\n\n```text\n-->\n```\n"
    assert blocks(page)[0].output is None


def test_a_block_in_a_list_is_found():
    page = "1. First\n\n    ```python\n    x = 1\n    ```\n"
    assert [block.kind for block in blocks(page)] == ["python"]


def test_excerpts_stand_in_the_source():
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    lines = {line.strip() for line in source.splitlines()}
    for path in PAGES:
        for block in blocks(path.read_text("utf-8")):
            if block.kind == "{.python .excerpt}":
                missing = [line for line in block.text.splitlines() if line.strip() not in lines]
                assert missing == [], f"{page_id(path)}:{block.line}"


# --- commands -------------------------------------------------------------------------------------------------------


def commands(page: str) -> Iterator[str]:
    """Command lines of console and bash blocks, continuation lines joined, comments and prompts taken off."""
    for block in blocks(page):
        if block.kind in {"console", "bash"}:
            joined = block.text.replace("\\\n", " ")
            for line in joined.splitlines():
                command = line.removeprefix("$ ").partition(" #")[0].strip()
                if command and not command.startswith("#"):
                    yield command


ALL_COMMANDS = sorted({(page_id(path), command) for path in PAGES for command in commands(path.read_text("utf-8"))})


def complaint(command: str) -> str | None:
    """Why the command line would refuse its arguments, or None; nothing is run."""
    # typer brings its own copy of click: everything goes through its objects.
    import typer

    from moesaic.cli.app import app

    group = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    try:
        with contextlib.redirect_stdout(io.StringIO()), group.make_context("moesaic", list(words)) as context:
            name, verb, rest = group.resolve_command(context, [*context._protected_args, *context.args])
            with verb.make_context(name, list(rest), parent=context):
                return None
    except SystemExit as exit_:
        return None if not exit_.code else f"exits with {exit_.code}"
    except Exception as error:
        return None if type(error).__name__ == "Exit" else f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("page", "command"), [item for item in ALL_COMMANDS if item[1].split()[0] == "moesaic"], ids=str
)
def test_a_command_in_the_documents_parses(page, command):
    assert complaint(command) is None, f"{page}: {command}"


@pytest.mark.parametrize(
    "command", ["moesaic tarin", "moesaic train --recepie mixtral", "moesaic train --steps many", "moesaic inspect"]
)
def test_a_command_that_does_not_parse_is_found(command):
    assert complaint(command) is not None


@pytest.mark.parametrize("command", ["moesaic recipes", "moesaic recipes show mixtral", "moesaic train --help"])
def test_a_quick_command_runs(command, capfd):
    from moesaic.cli.app import run

    assert run(shlex.split(command)[1:]) == 0
    assert "mixtral" in capfd.readouterr().out


def test_make_targets_in_the_documents_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {word for _, command in ALL_COMMANDS if command.startswith("make") for word in command.split()[1:]}
    for path in PAGES:
        named |= set(re.findall(r"`make ([\w-]+)`", path.read_text("utf-8")))
    assert named <= targets
    assert {"demo", "test", "check"} <= named


# --- links ----------------------------------------------------------------------------------------------------------

_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")


def anchors(page: str) -> set[str]:
    """What a link may point to within a page: its headings, as GitHub and mkdocs spell them."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def broken_links(page: str, path: Path) -> list[str]:
    """Links to files or headings that are not there."""
    broken = []
    for match in _LINK.finditer(_BLOCK.sub("", page)):
        target, _, anchor = (match[1] or match[2]).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text("utf-8"))):
            broken.append(match[1] or match[2])
    return broken


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_between_pages_lead_somewhere(path):
    assert broken_links(path.read_text("utf-8"), path) == []


def test_a_broken_link_is_found():
    page = '[gone](docs/gone.md) [away](README.md#nowhere) [fine](docs/architecture.md#the-floors) <img src="no.svg">'
    assert broken_links(page, ROOT / "README.md") == ["docs/gone.md", "README.md#nowhere", "no.svg"]


# --- pages that are written from the code ---------------------------------------------------------------------------


def test_the_catalogue_is_what_the_recipes_say_about_themselves():
    """If this fails: ``python tools/catalogue.py docs/catalogue.md``."""
    written = runpy.run_path(str(ROOT / "tools" / "catalogue.py"))["page"]()
    assert (ROOT / "docs" / "catalogue.md").read_text("utf-8").splitlines() == written.splitlines()


# --- nothing of the machine that it was written on ------------------------------------------------------------------

# Absolute paths into a work folder or a home, private hosts, and settings that name a package index. Every machine
# calls itself 127.0.0.1.
_PRIVATE = re.compile(
    r"(?<![\w.~/-])/(?:home/\w+|root|Users/\w+)/\w"
    r"|https?://(?!127\.0\.0\.1\b)[^\s/\"'<>]*(?:\d+\.\d+\.\d+\.\d+|\.internal|\.corp|\.lan|\.local)\b"
    r"|--(?:extra-)?index-url|--find-links|PIP_(?:EXTRA_)?INDEX_URL|PIP_FIND_LINKS"
)


def tracked() -> list[Path]:
    """Files that git holds or would hold; every file where there is no git."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("not a git checkout: cannot tell which files belong to the repository")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_file_names_the_machine_that_it_was_written_on():
    found = []
    for path in tracked():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if path != Path(__file__) and path.suffix not in {".gz", ".png"}:
            found += [f"{page_id(path)}: {match[0]}" for match in _PRIVATE.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    "text", ["see /root/notes.md", "open('/home/me/a')", "http://10.0.0.7:8080/simple", "pip --index-url x"]
)
def test_a_private_path_is_found(text):
    assert _PRIVATE.search(text)


def test_the_address_of_any_machine_itself_is_not_private():
    assert not _PRIVATE.search("http://127.0.0.1:8000/v1")


def test_the_page_of_laws_has_a_line_for_each_recipe_and_nothing_that_fails():
    """`make pages` writes it from a run of the laws; this only sees that nobody forgot to."""
    from moesaic import recipes

    page = (ROOT / "docs" / "laws.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\S+)` \|", page, re.MULTILINE) == recipes.names()
    assert "✗" not in page
    assert "not run" not in page
