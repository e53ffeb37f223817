"""Installation: setup.sh, and requirements files that hold what is imported and nothing else."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("requirements.txt", "requirements-quickstart.txt", "requirements-dev.txt", "constraints.txt", "setup.sh")
# with timm, diffusers and accelerate; with wandb and diffusers; with torch for GPUs
COME_WITH_OTHERS = {"huggingface-hub", "requests", "triton"}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "torch_fidelity": "torch-fidelity"}
OURS = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
PIP = '#!/bin/sh\necho "$@" >> pip.log\nexit ${PIP_STATUS:-0}\n'


@pytest.fixture
def project(tmp_path):
    """A folder with the installation's files and a .venv whose python writes down what it is asked to do."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(PIP)
    python.chmod(0o755)
    return tmp_path


def setup(project, **environment):
    """Run setup.sh; returns the process and the pip commands it gave."""
    (project / "pip.log").unlink(missing_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name != "CONSTRAINTS"}
    environment = {**inherited, "PYTHON": sys.executable, **environment}
    done = subprocess.run(["bash", "setup.sh"], cwd=project, env=environment, capture_output=True, text=True)
    log = project / "pip.log"
    return done, log.read_text().splitlines() if log.exists() else []


def test_setup_installs_once_and_names_the_activation(project):
    """The tested versions go to pip; the last line is what to type next; a second run neither installs nor speaks."""
    done, commands = setup(project)
    assert done.returncode == 0, done.stderr
    assert len(commands) == 1 and commands[0].endswith("-r requirements-dev.txt -c constraints.txt")
    assert done.stdout.splitlines()[-1].endswith("source .venv/bin/activate")
    done, commands = setup(project)
    assert (done.returncode, done.stdout, commands) == (0, "", [])


@pytest.mark.parametrize("name", FILES[:4])
def test_setup_installs_again_when_a_file_has_changed(project, name):
    setup(project)
    with (project / name).open("a") as stream:
        stream.write("# changed\n")
    assert setup(project)[1]
    assert not setup(project)[1]


def test_setup_without_constraints(project):
    """CONSTRAINTS= takes the newest versions; it is another installation than the one with them."""
    setup(project)
    done, commands = setup(project, CONSTRAINTS="")
    assert done.returncode == 0 and len(commands) == 1 and "-c" not in commands[0].split()
    assert not setup(project, CONSTRAINTS="")[1]
    done, commands = setup(project, CONSTRAINTS="other.txt")
    assert done.returncode == 2 and "CONSTRAINTS=other.txt" in done.stderr and not commands


def test_setup_that_fails_is_tried_again(project):
    """A pip that fails ends setup.sh, names the way round, and leaves no stamp."""
    done, _ = setup(project, PIP_STATUS="1")
    assert done.returncode == 1 and "CONSTRAINTS= bash setup.sh" in done.stderr and "activate" not in done.stdout
    assert setup(project)[1]


def test_setup_refuses_an_old_python(project):
    old = project / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo Python 3.9.1; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    done, commands = setup(project, PYTHON=str(old))
    assert done.returncode == 2 and "Python 3.9.1 was found" in done.stderr and not commands


def requirements(name: str) -> set[str]:
    """Names in a requirements or constraints file, lower case; files that it includes are left out."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    names = [re.split(r"[<>=! ]", line)[0] for line in lines if line and not line.startswith("-")]
    return {name.lower().replace("_", "-") for name in names}


def imported(*folders: str) -> tuple[set[str], set[str]]:
    """Distributions that the files of some folders import, and those of them whose absence is caught there."""
    found, caught = set(), set()
    for path in (path for folder in folders for path in ROOT.glob(f"{folder}*.py")):
        tree = ast.parse(path.read_text())
        optional = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.Try)
            if any(ast.unparse(h.type) in ("ImportError", "ModuleNotFoundError") for h in block.handlers if h.type)
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in names:
                top = name.split(".")[0]
                if top not in OURS and top not in sys.stdlib_module_names:
                    found.add(DISTRIBUTIONS.get(top, top).replace("_", "-"))
                    if id(node) in optional:
                        caught.add(DISTRIBUTIONS.get(top, top).replace("_", "-"))
            if names == ["torch.utils.tensorboard"]:
                found.add("tensorboard")
    return found, caught


def test_requirements_are_what_is_imported():
    """requirements.txt: what the programs import. The other files: what the quickstart and the tests import besides.

    What a program can do without, with a sentence where it is missing, may be left to the user. torchvision is what
    timm and torch-fidelity import.
    """
    programs, optional = imported("", "common/", "models/", "training/", "sampling/", "preprocessing/", "evaluations/")
    listed = requirements("requirements.txt")
    assert programs - optional - COME_WITH_OTHERS <= listed
    assert listed <= programs | {"torchvision"}
    quickstart, _ = imported("quickstart/")
    assert quickstart - listed == requirements("requirements-quickstart.txt")
    tests, _ = imported("tests/", "benchmarks/")
    everything = listed | requirements("requirements-quickstart.txt") | requirements("requirements-dev.txt")
    assert (tests | programs) - COME_WITH_OTHERS <= everything


def test_constraints_name_what_is_required():
    """One exact version for every package that a requirements file names, and for the hub's client."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==\d+(\.\d+)+", line) for line in pins), pins
    named = set().union(*(requirements(name) for name in FILES[:3]))
    assert requirements("constraints.txt") == named | {"huggingface-hub"}
