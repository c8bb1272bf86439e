"""Laws of the whole package: what importing needs, what is shared, and what tests may not do."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic import recipes
from tests.laws.settings import every_setting, tokens

TESTS = Path(__file__).parent.parent

BARE_MACHINE = """
import builtins, json, os, socket, sys
for name in list(os.environ):
    if name.startswith(("CUDA", "TRITON", "TORCH")):
        del os.environ[name]
os.environ["CUDA_VISIBLE_DEVICES"] = ""
real_import = builtins.__import__
def no_triton(name, *arguments, **keywords):
    if name.split(".")[0] == "triton":
        raise ImportError("no triton here")
    return real_import(name, *arguments, **keywords)
import torch
builtins.__import__ = no_triton
def no_network(*arguments, **keywords):
    raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = no_network
torch.cuda.is_available = lambda: False
import moesaic
used = []
for name in moesaic.recipes.names():
    recipe = moesaic.recipes.get(name)
    sizes = {"num_experts": 8, "top_k": 1 if recipe.options.get("top_k") == 1 else 2, "vocab_size": 9}
    layer = recipe.layer(8, hidden=6, **{key: size for key, size in sizes.items() if key in recipe.options})
    zeros_T = torch.zeros(5, dtype=torch.int64)
    context = moesaic.Context(sequence_T=zeros_T, id_T=zeros_T, domain_T=zeros_T)
    layer(torch.randn(5, 8, requires_grad=True), None, context)[0].sum().backward()
    used.append(name)
print(json.dumps({"used": used, "cuda": torch.cuda.is_initialized()}))
"""


def test_nothing_needs_cuda_triton_or_the_network():
    """Trap 23."""
    done = subprocess.run([sys.executable, "-c", BARE_MACHINE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"used": recipes.names(), "cuda": False}


def _containers() -> dict[str, str]:
    """Every list, dict and set that a module of the package holds, as text."""
    found = {}
    for module_name, module in sorted(sys.modules.items()):
        if module_name == "moesaic" or module_name.startswith("moesaic."):
            for name, value in vars(module).items():
                if isinstance(value, list | dict | set) and not name.startswith("__"):
                    found[f"{module_name}.{name}"] = repr(value)
    return found


@every_setting()
def test_building_and_running_a_layer_leaves_no_trace_in_the_package(setting):
    """Trap 23: no global mutable state."""
    before = _containers()
    layer = setting.layer()
    y_TD, routing = layer(tokens(20))
    (y_TD.sum() + setting.aux_loss(routing)).backward()
    layer.eval()(tokens(5))
    after = _containers()
    assert {name: after[name] for name in before} == before


def _parametrize_names(decorator: ast.expr) -> list[str]:
    """The argument names of a ``pytest.mark.parametrize`` decorator."""
    if not (isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("mark.parametrize")):
        return []
    named = decorator.args[0] if decorator.args else None
    if isinstance(named, ast.Constant):
        return [name.strip() for name in named.value.split(",")]
    if isinstance(named, ast.Tuple | ast.List):
        return [element.value for element in named.elts]
    return []


def _unused_parameters(source: str) -> Iterator[str]:
    """``test: parameter`` for each parameter that its test never reads."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    for function in functions:
        named = [name for decorator in function.decorator_list for name in _parametrize_names(decorator)]
        # Decorators kept under a name of their own (`every_kernel`) fill arguments too.
        fixtures = {"monkeypatch", "capsys", "tmp_path", "request"}
        named += [a.arg for a in function.args.args if function.decorator_list and a.arg not in fixtures]
        read = {node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)}
        yield from (f"{function.name}: {name}" for name in sorted(set(named) - read))


def _silent_gates(source: str) -> Iterator[str]:
    """Skips that do not say why, by line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            says = {keyword.arg for keyword in node.keywords}
            if name.endswith(("mark.skipif", "mark.xfail")) and "reason" not in says:
                yield f"line {node.lineno}: {name} without a reason"
            if name in ("pytest.skip", "pytest.mark.skip") and not (node.args or says & {"reason", "msg"}):
                yield f"line {node.lineno}: {name} without a reason"


TEST_FILES = sorted(TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_a_parametrised_test_uses_its_parameters_and_a_gate_says_why(path):
    """Trap 24."""
    source = path.read_text(encoding="utf-8")
    assert list(_unused_parameters(source)) == []
    assert list(_silent_gates(source)) == []


def test_the_law_of_tests_fails_on_an_unused_parameter_and_a_silent_gate():
    """Trap 24, the mutants."""
    unused = "@pytest.mark.parametrize(('a', 'b'), [(1, 2)])\ndef test_x(a, b):\n    assert a\n"
    assert list(_unused_parameters(unused)) == ["test_x: b"]
    assert list(_unused_parameters("@every_kernel\ndef test_y(kernel, tmp_path):\n    pass\n")) == ["test_y: kernel"]
    silent = "@pytest.mark.skipif(True)\ndef test_z():\n    pytest.skip()\n"
    assert len(list(_silent_gates(silent))) == 2
    assert list(_silent_gates("pytest.skip('no GPU here')")) == []
