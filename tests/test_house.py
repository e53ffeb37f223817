"""Rules of the house: who may import whom, and what no module does."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(
    path
    for pattern in ("*.py", "common/*.py", "models/*.py", "training/*.py", "sampling/*.py", "preprocessing/*.py",
                    "evaluations/*.py", "benchmarks/*.py", "quickstart/*.py")
    for path in ROOT.glob(pattern)
)
PACKAGES = {"common", "models", "training", "sampling", "preprocessing", "evaluations", "benchmarks", "quickstart", "tests"}
OURS = {p.stem for p in ROOT.glob("*.py")} | PACKAGES


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Dotted names of our modules that a file imports, at any depth."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # what is imported for annotations alone is no dependency
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    known = {name(p) for p in ROOMS} | {"tests"}
    return {module for module in found if module.split(".")[0] in OURS and (module in known)}


GRAPH = {name(path): imports(path) - {name(path)} for path in ROOMS}


def test_the_rooms_are_seen():
    """The graph below is not empty for want of reading."""
    assert "models.interpolant" in GRAPH["loss"] and "training.runner" in GRAPH["train"] and len(GRAPH) > 20


def test_no_module_imports_the_programs():
    """train and generate are imported by tests, the quickstart and benchmarks alone."""
    for module, found in GRAPH.items():
        if module.split(".")[0] not in ("quickstart", "benchmarks"):
            assert not found & {"train", "generate"}, module
        if module != "train" and module.split(".")[0] not in ("training", "quickstart", "benchmarks"):
            assert "training" not in {m.split(".")[0] for m in found}, module


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("models.interpolant", set()),
        ("models.state", set()),
        ("models.class_token", set()),
        ("models.philox", set()),
        ("models.sit", set()),
        ("models.ema", set()),
        ("models.hub", set()),
        ("models.encoder", {"models.hub"}),
        ("models.autoencoder", {"models.hub"}),
        ("loss", {"models.interpolant", "models.philox", "models.state"}),
        ("dataset", {"models.philox", "mapped", "shards"}),
        ("mapped", {"shards"}),
        ("shards", set()),
        ("config", set()),
        ("common.reporting", set()),
        ("common.crop", set()),
        ("common.presets", set()),
        ("common.pictures", set()),
        ("evaluations.statistics", set()),
        ("evaluations.metrics", {"evaluations.statistics", "evaluations.neighbours"}),
        ("evaluations.features", set()),
    ],
)
def test_import_law(room, allowed):
    """Rooms at the bottom of the house know nothing of those above them."""
    assert {m for m in GRAPH[room] if m not in ("models", "evaluations", "config")} <= allowed


def test_layers():
    """models never look at data, evaluation or programs; evaluations never at preprocessing; dataset at neither."""
    for module, found in GRAPH.items():
        tops = {m.split(".")[0] for m in found}
        if module.startswith("models"):
            assert tops <= {"models", "common", "config"}, (module, found)
        if module.startswith("evaluations"):
            assert "preprocessing" not in tops, (module, found)
        if not module.startswith("benchmarks"):
            assert not tops & {"benchmarks", "tests"}, (module, found)


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


@pytest.mark.parametrize("path", ROOMS, ids=name)
def test_habits(path):
    """No sys.path edits, exit(), unsafe unpickling, argparse namespaces below the programs, or file past 350 lines."""
    text = path.read_text()
    assert "sys.path" not in text
    assert not re.search(r"(?<![\w.])exit\(", text)
    assert "weights_only=False" not in text and "allow_pickle=True" not in text
    assert not re.search(r"\bTODO\b|\bFIXME\b", text)
    assert text.count("\n") <= 350, f"{path.name} has {text.count(chr(10))} lines"
    if path.parent.name == "models" or path.stem in ("loss", "dataset"):
        assert not re.search(r"\bargs\.", text)


def test_one_owner_of_the_interpolant():
    """alpha and sigma are written in models/interpolant.py and nowhere else."""
    for path in ROOMS:
        if path.stem != "interpolant":
            assert not re.search(r"pi / 2|\b1 - t\b", path.read_text()), path


def test_one_owner_of_the_latent_scale():
    """0.18215 is known to models/autoencoder.py alone."""
    for path in ROOMS:
        if path.stem != "autoencoder":
            assert "0.18215" not in path.read_text(), path


def test_the_core_imports_without_the_optional_packages():
    """Model, loss, samplers, data path and train step import on a machine with torch, timm, numpy and tqdm alone."""
    import subprocess
    import sys

    absent = ["diffusers", "wandb", "safetensors", "yaml", "scipy", "sklearn", "matplotlib", "torch_fidelity", "PIL"]
    modules = ["loss", "dataset", "train", "training.step", "models.sit", "models.samplers", "models.ema", "models.cost",
               "models.checkpoint",
               "models.encoder", "models.autoencoder"]  # fmt: skip
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
