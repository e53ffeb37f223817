"""Docstrings: they exist, their `Args:` are those of the signature, and mathematics names its source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.test_architecture import LIBRARY, ROOT, module_name

EXPLAINED = ("config", "loss", "dataset", "common", "packed", "models")  # every public name has a docstring
SOURCE = re.compile(r"\b(eq\. \d|section \d|algorithm \d|figure \d|(19|20)\d\d\b|arXiv \d)")
CITED = {  # what implements a formula => where it is
    "loss": ("Objective", "Objective.__call__", "Objective.total", "alignment"),
    "models.interpolant": (
        "Interpolant",
        "Interpolant.coefficients",
        "Interpolant.interpolate",
        "Interpolant.velocity",
        "Interpolant.score",
        "Interpolant.denoised",
    ),
    "models.guidance": ("Guidance", "network_velocity"),
    "models.solvers": ("Diffusion", "euler", "heun", "euler_maruyama", "dpm_solver_pp", "dormand_prince"),
    "models.samplers": ("shifted",),
    "models.philox": ("philox4x32",),
    "evaluations.metrics": ("frechet_distance", "InceptionScore", "kernel_distance", "clip_mmd"),
    "evaluations.neighbours": ("PrecisionRecall", "DensityCoverage"),
    "models.sit": ("SiT", "SiT.forward", "Projector"),
    "models.embedders": ("ClassTokenEmbedder",),
}


class Definition(NamedTuple):
    """name: dotted, within its module. node: function or class. public: no part of the name begins with an underscore."""

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public: bool


def definitions(path: Path) -> Iterator[Definition]:
    """Functions and classes of a module and methods of its classes; not what is defined inside of a function."""

    def of(body: list[ast.stmt], prefix: str) -> Iterator[Definition]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{node.name}"
                yield Definition(name, node, not any(part.startswith("_") for part in name.split(".")))
                if isinstance(node, ast.ClassDef):
                    yield from of(node.body, f"{name}.")

    return of(ast.parse(path.read_text()).body, "")


def documented_arguments(docstring: str) -> list[str]:
    """Names in the `Args:` section of a docstring; several may share a line: `low, high: ...`."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    if not section:
        return []
    entries = re.findall(r"^ {4}([\w*][\w*, ]*):(?:\s|$)", section[1], re.MULTILINE)
    return [name.strip().lstrip("*") for entry in entries for name in entry.split(",")]


def arguments(node: ast.AST) -> set[str]:
    a = node.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return {one.arg for one in named}


def test_the_section_is_read():
    text = "Do.\n\nArgs:\n    a: one (N,): so.\n        More: of it.\n    b, *c: two\n\nReturns:\n    d: three\n"
    assert documented_arguments(text) == ["a", "b", "c"]
    assert documented_arguments("Do with d: no section.") == []


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_documented_arguments_are_those_of_the_signature(path):
    """A name that `Args:` explains exists; a class's are those of its __init__ or its fields."""
    for name, node, _ in definitions(path):
        documented = documented_arguments(ast.get_docstring(node) or "")
        if isinstance(node, ast.ClassDef):
            known = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    known |= arguments(method)
        else:
            known = arguments(node)
        assert set(documented) <= known, f"{module_name(path)}.{name}: {sorted(set(documented) - known)}"
        assert len(set(documented)) == len(documented), f"{module_name(path)}.{name} explains an argument twice"


@pytest.mark.parametrize(
    "path", [path for path in LIBRARY if module_name(path).split(".")[0] in EXPLAINED], ids=module_name
)
def test_every_public_name_has_a_docstring(path):
    """Of modules, classes, functions and methods. `forward` of a module is explained by its class, a property of few words
    by its name and type."""
    assert path.name == "__init__.py" or ast.get_docstring(ast.parse(path.read_text())), path
    missing = [
        name
        for name, node, public in definitions(path)
        if public
        and not ast.get_docstring(node)
        and node.name != "forward"
        and not any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
    ]
    assert not missing, f"{module_name(path)}: no docstring: {', '.join(missing)}"


@pytest.mark.parametrize("module", CITED)
def test_formulas_name_their_source(module):
    """Equation, section or algorithm of a paper, or author and year."""
    found = {d.name: ast.get_docstring(d.node) or "" for d in definitions(ROOT / f"{module.replace('.', '/')}.py")}
    for name in CITED[module]:
        assert SOURCE.search(found.get(name, "")), f"{module}.{name} names no source"
