"""The shape of the package, read from its source: floors, alphabet, sizes, docstrings and messages.

Each check is a function from source text to a list of complaints, so that the tests below can show that it fails when
it should. Nothing is imported from the package but its alphabet.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from moesaic.core.shapes import ALPHABET

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "moesaic"
PAGE = ROOT / "docs" / "architecture.md"

FLOORS = {
    "core": 0,
    **dict.fromkeys(("kernels", "classic", "data", "zoo"), 1),
    **dict.fromkeys(("routers", "dispatch", "experts", "balance"), 2),
    **dict.fromkeys(("layer", "soft", "merge", "lora", "telemetry"), 3),
    "recipes": 4,
    "hf": 5,
    **dict.fromkeys(("convert", "train", "parallel", "lens", "probe", "plan"), 6),
    **dict.fromkeys(("lab", "bench", "doctor", "serve"), 7),
    "cli": 8,
    # The package's own __init__ and __main__ stand above everything.
    **dict.fromkeys(("", "__main__"), 9),
}
# What `import moesaic` must not wait for.
HEAVY = {
    "transformers",
    "accelerate",
    "tokenizers",
    "datasets",
    "pyarrow",
    "matplotlib",
    "tensorboard",
    "triton",
    "scipy",
    "sklearn",
}
ERRORS = {"MoesaicError", "ConfigError", "ShapeError", "DataError", "CheckpointError", "BackendError"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
GRAB_BAGS = {"utils.py", "common.py", "helpers.py", "misc.py"}


def sources() -> dict[str, str]:
    """Dotted module name to source text; a package goes by its folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("moesaic", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


SOURCES = sources()


# --- floors ---------------------------------------------------------------------------------------------------------


def unit(module: str) -> str:
    """The folder or top-level file that a module belongs to; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def imported(node: ast.AST, module: str) -> Iterator[str]:
    """Dotted names that one statement or call brings in; ``from a import b`` gives ``a.b``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = ".".join([*module.split(".")[: -node.level], base]).rstrip(".")
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
            yield node.args[0].value


def floor_complaints(source: str, module: str) -> list[str]:
    """Imports that go up or sideways, inside functions and under TYPE_CHECKING too."""
    here = unit(module)
    if here not in FLOORS:
        return [f"{module}: {here!r} has no floor. Give it one here and in docs/architecture.md."]
    complaints = []
    for node in ast.walk(ast.parse(source)):
        for name in imported(node, module):
            if name.split(".")[0] != "moesaic":
                continue
            there = unit(name) if unit(name) in FLOORS else ""
            if there != here and FLOORS[there] >= FLOORS[here]:
                line = getattr(node, "lineno", 0)
                complaints.append(
                    f"{module}:{line} is on floor {FLOORS[here]} and imports {name}, on floor {FLOORS[there]}"
                )
    return complaints


def test_every_import_goes_down_the_floors():
    assert [line for module, source in SOURCES.items() for line in floor_complaints(source, module)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moesaic.core.plan", "from moesaic.layer import MoELayer"),
        ("moesaic.routers.top_k", "import moesaic.dispatch.sort"),
        ("moesaic.lens.page", "def late():\n    from moesaic.train import Trainer"),
        ("moesaic.recipes.mixtral", "if TYPE_CHECKING:\n    from moesaic.hf import sparsify"),
        ("moesaic.layer", "from moesaic import telemetry"),
        ("moesaic.layer", "from moesaic import MoELayer"),
        ("moesaic.balance.losses", "from ..telemetry import summary"),
        ("moesaic.data.corpus", "import importlib\nimportlib.import_module('moesaic.hf')"),
        ("moesaic.attic.old", "import torch"),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_found(module, source):
    assert len(floor_complaints(source, module)) == 1


def test_an_import_that_goes_down_or_stays_at_home_is_allowed():
    source = (
        "from moesaic import recipes\nfrom moesaic.core import Plan\nfrom moesaic.hf.write import save\nimport torch"
    )
    assert floor_complaints(source, "moesaic.hf.sparsify") == []


# --- what `import moesaic` brings in --------------------------------------------------------------------------------


def eager(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when a module is imported: not in functions, not under TYPE_CHECKING."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def heavy_complaints(modules: Mapping[str, str], start: str) -> list[str]:
    """Heavy libraries that importing ``start`` imports, and through which of our modules."""
    seen, waiting, complaints = set(), [start], []
    while waiting:
        module = waiting.pop()
        if module in seen or module not in modules:
            continue
        seen.add(module)
        for node in eager(ast.parse(modules[module])):
            for name in imported(node, module):
                if name.split(".")[0] in HEAVY:
                    complaints.append(f"{module} imports {name.split('.')[0]}")
                # a.b.c imports a and a.b as well; c may be a name in a.b.
                parts = name.split(".")
                waiting.extend(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return complaints


def early_names(source: str) -> dict[str, str]:
    """The names of the package that need torch and nothing heavy, and the modules that they come from."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_EARLY":
            homes: dict[str, str] = ast.literal_eval(node.value)
            return {name: f"moesaic.{name}" if home == "moesaic" else home for name, home in homes.items()}
    return {}


EARLY = early_names(SOURCES["moesaic"])


@pytest.mark.parametrize("module", ["moesaic", *sorted(set(EARLY.values()))])
def test_importing_moesaic_and_its_early_names_needs_no_heavy_library_by_its_source(module):
    assert heavy_complaints(SOURCES, module) == []


def loaded_after(script: str) -> set[str]:
    """The libraries that a fresh process has loaded after a script."""
    whole = f"{script}; import sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_moesaic_and_its_early_names_needs_no_heavy_library_in_fact():
    assert len(EARLY) >= 19
    loaded = loaded_after(f"import moesaic; [getattr(moesaic, name) for name in {sorted(EARLY)}]")
    assert "torch" in loaded
    assert loaded & HEAVY == set()


def test_importing_moesaic_needs_not_even_torch_and_neither_do_the_classic_mixtures():
    assert loaded_after("import moesaic") & {"torch", *HEAVY} == set()
    # scikit-learn imports pandas where it is installed, and pandas pyarrow.
    assert loaded_after("import moesaic.classic") & {"torch", *HEAVY} <= {"scipy", "sklearn", "pyarrow"}


def test_a_heavy_library_is_found_behind_two_doors():
    modules = {
        "moesaic": "from moesaic.core import Plan",
        "moesaic.core": "from moesaic.core.plan import Plan",
        "moesaic.core.plan": "try:\n    import triton\nexcept ImportError:\n    triton = None",
    }
    assert heavy_complaints(modules, "moesaic") == ["moesaic.core.plan imports triton"]


def test_a_heavy_library_may_be_imported_late():
    modules = {"moesaic": "if TYPE_CHECKING:\n    import pyarrow\n\n\ndef save():\n    import pyarrow"}
    assert heavy_complaints(modules, "moesaic") == []


# --- the alphabet ---------------------------------------------------------------------------------------------------

_SHAPED = re.compile(r"^(?=.*[a-z]).*_(?=[A-Z1]*[A-Z])([A-Z1]+)$")


def names_in(source: str) -> Iterator[str]:
    """Every identifier that a source binds, reads or passes by keyword."""
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "arg", "attr", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield name.split(".")[-1]


def alphabet_complaints(source: str) -> list[str]:
    """Names whose shape letters are not in the alphabet; 1 is a dimension kept by a reduction."""
    complaints = []
    for name in sorted(set(names_in(source))):
        shape = _SHAPED.match(name)
        unknown = set(shape[1]) - set(ALPHABET) - {"1"} if shape else set()
        if unknown:
            complaints.append(f"{name} has the dimensions {', '.join(sorted(unknown))}, unknown to core/shapes.py")
    return complaints


def test_every_shape_letter_is_in_the_alphabet():
    assert [line for source in SOURCES.values() for line in alphabet_complaints(source)] == []


@pytest.mark.parametrize(
    "source", ["x_TX = 1", "def f(x_HD): pass", "f(mask_TJ=1)", "self.gate_EDZ = 1", "import a as b_YY"]
)
def test_an_unknown_shape_letter_is_found(source):
    assert len(alphabet_complaints(source)) == 1


def test_constants_and_known_shapes_are_no_complaint():
    assert alphabet_complaints("MAX_SIZE = _TOP = x_TD = total_T1 = self.w_EDF = top_k = signal.SIG_IGN") == []


# --- sizes, messages, leftovers -------------------------------------------------------------------------------------


def size_complaints(source: str, name: str) -> list[str]:
    """Files and functions too long to be one thing; docstrings of functions are not counted."""
    complaints = []
    num_lines = len(source.splitlines())
    if num_lines > MAX_FILE_LINES:
        complaints.append(f"{name} has {num_lines} lines, more than {MAX_FILE_LINES}: it wants to be two")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0] if ast.get_docstring(node) else None
            doc_lines = (doc.end_lineno or 0) - doc.lineno + 1 if doc else 0
            length = (node.end_lineno or 0) - node.lineno + 1 - doc_lines
            if length > MAX_FUNCTION_LINES:
                complaints.append(f"{name}: {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}")
    return complaints


def raise_complaints(source: str, name: str) -> list[str]:
    """Our errors raised without a word, or with braces that no f-string fills in."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        call = node.exc if isinstance(node.exc, ast.Call) else None
        raised = ast.unparse(call.func if call else node.exc).split(".")[-1]
        if raised not in ERRORS:
            continue
        where = f"{name}:{node.lineno} raises {raised}"
        if call is None or not call.args or ast.unparse(call.args[0]) in {"''", '""'}:
            complaints.append(f"{where} without a message")
        elif any(re.search(r"\{\w+[^{}]*\}", text) for text in plain_strings(call)):
            complaints.append(f"{where} with {{braces}} that nothing fills in")
    return complaints


def plain_strings(call: ast.Call) -> Iterator[str]:
    """String literals of a call that stand outside f-strings."""
    inside = {id(part) for node in ast.walk(call) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(call):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


@pytest.mark.parametrize("complaints", [size_complaints, raise_complaints])
def test_files_and_functions_are_short_and_errors_have_a_message(complaints):
    assert [line for module, source in SOURCES.items() for line in complaints(source, module)] == []


def test_nothing_is_left_for_later_and_nothing_is_a_grab_bag():
    marks = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|NotImplementedError)\b")
    assert [name for name, source in SOURCES.items() if marks.search(source)] == []
    assert [path for path in PACKAGE.rglob("*.py") if path.name in GRAB_BAGS] == []


def test_a_long_file_and_a_long_function_are_found():
    assert len(size_complaints("x = 1\n" * 401, "long")) == 1
    assert size_complaints("def f():\n" + "    x = 1\n" * 50, "long") == ["long: f has 51 lines, more than 50"]
    told = 'def f():\n    """' + "word\n" * 40 + '    """\n' + "    x = 1\n" * 49
    assert size_complaints(told, "told") == []


@pytest.mark.parametrize(
    "source",
    [
        "raise ConfigError",
        "raise ShapeError()",
        "raise errors.DataError('')",
        "raise ConfigError('top_k must be below {limit}')",
        "raise ConfigError(f'got {value}, ' + 'needed {limit!r}')",
    ],
)
def test_a_raise_that_says_nothing_is_found(source):
    assert len(raise_complaints(source, "bad")) == 1


def test_a_raise_that_speaks_is_no_complaint():
    source = "raise ConfigError(f'needed {{}} for {limit}')\nraise KeyError\nraise"
    assert raise_complaints(source, "good") == []


# --- public names ---------------------------------------------------------------------------------------------------


def exported(tree: ast.Module) -> list[str]:
    """The literal ``__all__`` of a module, or nothing."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def definition(modules: Mapping[str, str], module: str, name: str) -> ast.AST | None:
    """Where a name is defined, followed through re-exports, also those under TYPE_CHECKING."""
    if f"{module}.{name}" in modules:
        return ast.parse(modules[f"{module}.{name}"])
    for node in ast.walk(ast.parse(modules.get(module, ""))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name and node.module in modules and node.module != module:
                    return definition(modules, node.module, alias.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and any(getattr(t, "id", "") == name for t in targets):
            return node
    return None


def docstring_complaints(modules: Mapping[str, str]) -> list[str]:
    """Names in an ``__all__`` that do not exist, or that are a module, class or function without a docstring."""
    complaints = []
    for module, source in modules.items():
        for name in exported(ast.parse(source)):
            node = definition(modules, module, name)
            if node is None:
                complaints.append(f"{module}.{name} is exported and does not exist")
            elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and not ast.get_docstring(node):
                complaints.append(f"{module}.{name} has no docstring")
    return complaints


def test_every_public_name_exists_and_has_a_docstring():
    assert docstring_complaints(SOURCES) == []
    assert exported(ast.parse(SOURCES["moesaic"]))


def test_a_public_name_that_is_missing_or_undocumented_is_found():
    modules = {
        "moesaic": "from moesaic.core import Plan, gone\n__all__ = ['Plan', 'gone', 'core', 'FIRST']\nFIRST = 1",
        "moesaic.core": "class Plan:\n    pass",
    }
    assert docstring_complaints(modules) == [
        "moesaic.Plan has no docstring",
        "moesaic.gone is exported and does not exist",
        "moesaic.core has no docstring",
    ]


# --- the picture of the floors --------------------------------------------------------------------------------------

_TREE_LINE = re.compile(r"^  (\w+)(?:/|\.py) +\[(\d)\] (.*)$", re.MULTILINE)


def tree_complaints(page: str, existing: Iterable[str]) -> list[str]:
    """Where the tree in docs/architecture.md and the folders that exist, or their floors, differ."""
    drawn = {name: (int(floor), "to come" in what) for name, floor, what in _TREE_LINE.findall(page)}
    complaints = [f"{name} exists and is not in the tree" for name in sorted(set(existing) - set(drawn))]
    for name, (floor, to_come) in drawn.items():
        if FLOORS.get(name) != floor:
            complaints.append(f"{name} is drawn on floor {floor}, the test has {FLOORS.get(name)}")
        if to_come == (name in existing):
            complaints.append(f"{name} is {'there, but marked as to come' if to_come else 'drawn, but not there'}")
    return complaints


def test_the_tree_in_the_docs_names_what_exists_on_its_floor():
    existing = {unit(module) for module in SOURCES} - {"", "__main__"}
    assert tree_complaints(PAGE.read_text(encoding="utf-8"), existing) == []


def test_the_alphabet_in_the_docs_is_the_alphabet():
    assert set(re.findall(r"\| ([A-Z]) (?=\|)", PAGE.read_text(encoding="utf-8"))) == set(ALPHABET)


def test_a_tree_that_lies_is_found():
    page = "  core/  [0] the table\n  hf/    [4] the bridge\n  zoo/   [1] to come: shapes\n  lab/   [7] trials\n"
    assert tree_complaints(page, {"core", "hf", "zoo", "cli"}) == [
        "cli exists and is not in the tree",
        "hf is drawn on floor 4, the test has 5",
        "zoo is there, but marked as to come",
        "lab is drawn, but not there",
    ]
