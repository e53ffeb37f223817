"""docs/code.md: every file and name that it gives exists."""

import ast
import re

import pytest

from tests.test_architecture import LAYERS, ROOT

TEXT = (ROOT / "docs" / "code.md").read_text()
ROWS = re.findall(r"^\| .+ \| `([\w/.]+\.py)` \| (.*)\|$", TEXT, re.MULTILINE)


def names_of(path) -> set[str]:
    """Functions, classes, constants of a module, and methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def test_every_file_of_the_page_exists():
    named = set(re.findall(r"`((?:[\w]+/)*\w+\.py)`", TEXT))
    missing = sorted(file for file in named if not (ROOT / file).is_file())
    assert len(named) > 30 and not missing, missing


@pytest.mark.parametrize(("file", "names"), ROWS, ids=[f"{file}-{number}" for number, (file, _) in enumerate(ROWS)])
def test_names_are_where_the_page_says(file, names):
    missing = set(re.findall(r"`([\w.]+)`", names)) - names_of(ROOT / file)
    assert not missing, f"{file}: {missing}"


def test_the_layers_are_those_of_the_test():
    """From top to bottom, as tests/test_architecture.py has them from bottom to top."""
    drawing = re.search(r"```text\n(.*?)```", TEXT, re.DOTALL)[1]
    drawn = [re.findall(r"(\w+)(?:\.py|/)(?=\s)", line) for line in drawing.splitlines()]
    assert [sorted(names) for names in drawn if names] == [sorted(names) for names in reversed(LAYERS)]
