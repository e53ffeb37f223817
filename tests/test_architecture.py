"""The architecture: layers, who may import whom, and what no module does."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom to the top: a module imports from its own package and from layers below it. Names of one line know nothing
# of each other.
LAYERS = (
    ("config",),
    ("common",),
    ("packed",),
    ("models",),
    ("loss", "dataset"),
    ("preprocessing", "evaluations"),
    ("sampling", "training"),
    ("sharing",),
    ("train", "generate", "convert"),
    ("quickstart", "benchmarks"),
    ("study",),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MODULES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "tests", "docs", "runs", "data", "samples"} & set(path.relative_to(ROOT).parts)
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


LIBRARY = [path for path in MODULES if module_name(path).split(".")[0] not in ("benchmarks", "quickstart")]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
NAMES = {module_name(path) for path in MODULES}


def imports(path: Path, text: str | None = None) -> set[str]:
    """Dotted names of our modules that a file imports: at any depth, for annotations alone, or relatively."""
    found = set()
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    deepest = {name for name in found if name in NAMES}
    return {name for name in deepest if not any(other.startswith(f"{name}.") for other in deepest)}


GRAPH = {module_name(path): imports(path) - {module_name(path)} for path in MODULES}


def test_imports_are_seen(tmp_path):
    """The graph is not empty for want of reading; relative imports and those under TYPE_CHECKING count."""
    assert "models.interpolant" in GRAPH["loss"] and len(GRAPH) > 60
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import sit\n    from .state import State\n"
    assert imports(ROOT / "models" / "x.py", text) == {"models.sit", "models.state"}


def test_every_module_has_a_layer():
    assert {name.split(".")[0] for name in NAMES} == set(HEIGHT)


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_nothing_imports_upward(module):
    """From its own package, or from a lower layer; not from a neighbour of the same one."""
    own = module.split(".")[0]
    for other in GRAPH[module]:
        top = other.split(".")[0]
        assert top == own or HEIGHT[top] < HEIGHT[own], f"{module} imports {other}"


def test_no_import_cycles():
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in GRAPH.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_habits(path):
    """No sys.path edits, exit(), unsafe unpickling, to-do notes, or argparse namespaces below the programs."""
    text = path.read_text()
    assert "sys.path" not in text
    assert not re.search(r"(?<![\w.])exit\(", text)
    assert "weights_only=False" not in text and "allow_pickle=True" not in text
    assert not re.search(r"\bTODO\b|\bFIXME\b", text)
    if path in LIBRARY and module_name(path) not in ("common.files", "common.arrays"):  # which read within bounds
        assert not re.search(r"\bnp\.load\(|\bjson\.load\(|\bjson\.loads\([^)\n]*\bread", text)
    if path.parent.name == "models" or path.stem in ("loss", "dataset"):
        assert not re.search(r"\bargs\.", text)


@pytest.mark.parametrize("path", MODULES + TESTS, ids=module_name)
def test_files_are_short(path):
    assert path.read_text().count("\n") <= 350, f"{path.name} has {path.read_text().count(chr(10))} lines"


def test_the_formatter_is_rarely_switched_off():
    """`# fmt: skip` keeps a table of numbers and nothing else."""
    mark = "fmt: " + "skip"
    found = [path.name for path in MODULES + TESTS for line in path.read_text().splitlines() if line.endswith(mark)]
    assert len(found) < 10, found


@pytest.mark.parametrize("folder", ["training", "sampling", "preprocessing", "evaluations", "sharing"])
def test_settings_import_no_more_than_their_words(folder):
    """A program's settings are read, and its --help printed, without torch: from config, the tables of words, and Python."""
    path = ROOT / folder / "settings.py"
    allowed = {"config", "models.choices", "common.presets"}
    assert GRAPH.get(f"{folder}.settings", set()) <= allowed
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top in HEIGHT, f"{path} imports {name}"


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_settings_are_typed(path):
    """A parameter that carries settings has the type of its dataclass, so that a typing error is found by mypy."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                if argument.arg in ("settings", "config", "args", "request"):
                    kind = ast.unparse(argument.annotation) if argument.annotation else "nothing"
                    assert kind not in ("nothing", "Any"), f"{path.name}, {node.name}: {argument.arg} is {kind}"


def opens_text_of_any_encoding(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes text in the encoding of the machine that it runs on."""
    attribute, name = isinstance(call.func, ast.Attribute), getattr(call.func, "attr", getattr(call.func, "id", ""))
    if {"encoding", None} & {keyword.arg for keyword in call.keywords}:
        return False
    if attribute and name in ("read_text", "write_text") and ast.unparse(call.func.value) != "files":
        return len(call.args) == (name == "write_text")
    if name != "open" or (attribute and ast.unparse(call.func.value) == "tarfile"):
        return False
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] + call.args[not attribute :]
    if not modes:
        return not call.keywords
    return isinstance(modes[0], ast.Constant) and isinstance(modes[0].value, str) and "b" not in modes[0].value


@pytest.mark.parametrize(("text", "found"), [
    ("p.read_text()", True), ("p.write_text(x)", True), ("open(p)", True), ("open(p, 'a')", True), ("p.open()", True),
    ("p.open('w')", True), ("p.open('rb')", False), ("open(p, mode='rb')", False), ("p.read_text(encoding='utf-8')", False),
    ("read_text(p)", False), ("Image.open(stream, formats=F)", False), ("archive.open(member)", False),
])  # fmt: skip
def test_text_without_an_encoding_is_seen(text, found):
    assert opens_text_of_any_encoding(ast.parse(text).body[0].value) == found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_text_has_an_encoding(path):
    """UTF-8, whatever the locale; what people write is read by `common.files.read_text`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert not opens_text_of_any_encoding(node), f"{path}, line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", [path for path in LIBRARY if path.stem != "files"], ids=module_name)
def test_files_are_written_in_one_place(path):
    """Temporary name, fsync, rename: common/files.py alone. A checkpoint is a folder and renamed as one."""
    if module_name(path) == "training.checkpoints":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, count = node.func.attr, len(node.args)
            renames = name == "rename" or (
                name == "replace" and count == 1 and not node.keywords
            )  # str.replace has two
            on_os = isinstance(node.func.value, ast.Name) and node.func.value.id == "os" and name == "replace"
            assert not renames and not on_os and name != "fsync", (
                f"{path.name}, line {node.lineno}: {ast.unparse(node)}"
            )


def test_one_owner_of_the_interpolant():
    """alpha(t), sigma(t) and w(t) are computed in models/interpolant.py and by the diffusion coefficient alone.

    Looked for in the syntax tree: 1 - t in whatever spelling, t a name or attribute called so, and sines and cosines of t.
    """
    times = {"t", "time", "times", "t_next", "timestep"}

    def mentions_time(node: ast.AST) -> bool:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        return bool(times & (names | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}))

    def owns_a_coefficient(node: ast.AST) -> bool:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
            one = isinstance(node.left, ast.Constant) and node.left.value in (1, 1.0)
            return one and isinstance(node.right, ast.Name | ast.Attribute) and mentions_time(node.right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("cos", "sin"):
            return mentions_time(node)
        return False

    found = {
        module_name(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if owns_a_coefficient(node) and not path.is_relative_to(ROOT / "quickstart")
    }
    assert found == {"models.interpolant"}, found


def test_one_owner_of_the_latent_scale():
    """0.18215 is known to models/autoencoder.py alone."""
    for path in MODULES:
        if path.stem != "autoencoder":
            assert "0.18215" not in path.read_text(), path


def test_the_core_imports_without_the_optional_packages():
    """Model, loss, samplers, data path and train step import on a machine with torch, timm, numpy and tqdm alone."""
    import subprocess
    import sys

    absent = ["diffusers", "wandb", "safetensors", "yaml", "scipy", "sklearn", "matplotlib", "torch_fidelity", "PIL"]
    modules = [
        "loss",
        "dataset",
        "train",
        "training.step",
        "models.sit",
        "models.samplers",
        "models.ema",
        "models.cost",
        "models.model_file",
        "models.encoder",
        "models.autoencoder",
        "benchmarks.train_variants",
        "benchmarks.ceilings",
        *(f"tests.{path.stem}" for path in TESTS if "mark.gpu" in path.read_text() and path != Path(__file__)),
    ]
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {absent!r} and not asked_by_a_package():\n"
        "            raise ImportError('blocked: ' + name)\n"
        "def asked_by_a_package():\n"
        "    frame = sys._getframe(2)\n"
        "    while frame:\n"
        "        if 'site-packages' in frame.f_code.co_filename: return True\n"
        "        frame = frame.f_back\n"
        "    return False\n"
        "sys.meta_path.insert(0, Block())\n"
        f"import importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
