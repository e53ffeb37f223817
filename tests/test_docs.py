"""The pages: every command is parsed by the program that it calls, links and pictures exist, and the tutorial runs."""

import argparse
import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from config import UserError
from tests import tiny

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
OTHERS = {
    "source",
    "ls",
    "cd",
    "export",
    "uv",
    "docker",
    "wandb",
    "hf",
    "git",
}  # commands of other projects, not parsed
PROGRAMS = (
    "train",
    "generate",
    "convert",
    "preprocessing.pack",
    "preprocessing.describe",
    "evaluations.evaluate",
    "evaluations.compare",
    "evaluations.cknna",
    "evaluations.report",
    "sharing.export",
)
SCRIPTS = {
    "quickstart.sh": "quickstart.__main__",
    "setup.sh": None,
    "test.sh": None,
    "benchmarks/gpu.sh": None,
    "benchmarks/gpu-all.sh": None,
}


class Command(NamedTuple):
    """A shell command of a page. module: the program of ours that it calls, None for other commands. arguments: what
    that program gets. whole: nothing is left out, as in a block; text may name a program with some of its flags."""

    text: str
    module: str | None
    arguments: list[str]
    whole: bool = True


class Parsed(Exception):
    """Raised in place of what a program does after parsing."""


def commands(page: Path) -> Iterator[Command]:
    """Those of the ```bash blocks, continuation lines joined, and inline code that starts with a launcher."""
    text = page.read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = shlex.split(line, comments=True)
            given = [word for word in words if word != "..."]
            if given:
                yield Command(line.strip(), *program(given), whole=given == words)
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for code in re.findall(r"`((?:python|torchrun|accelerate launch|bash)\s[^`]+)`", prose):
        words = [word for word in shlex.split(code) if word != "..."]
        if words[0] in ("torchrun", "accelerate") and not any(word.endswith(".py") for word in words):
            words.append("train.py")
        yield Command(" ".join(code.split()), *program(words), whole=False)


def program(words: list[str]) -> tuple[str | None, list[str]]:
    """The module of ours behind a command's words and its arguments, with launchers parsed by their own parsers."""
    while words and (re.match(r"^\w+=", words[0]) or words[0] == "exec"):
        words = words[1:]
    if not words or words[0] in OTHERS:
        return None, []
    name, rest = words[0], words[1:]
    if name == "pip":
        files = [rest[i + 1] for i, word in enumerate(rest) if word in ("-r", "-c")]
        assert rest[0] == "install" and all((ROOT / file).is_file() for file in files), words
        return None, []
    if name == "srun":
        rest = [word for word in rest if not word.startswith("--")]
        return program(rest)
    if name == "bash" and rest[0] == "-c":
        return program(shlex.split(rest[1]))
    if name == "bash":
        assert (ROOT / rest[0]).is_file() and rest[0] in SCRIPTS, rest
        return SCRIPTS[rest[0]], rest[1:]
    if name == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(rest)
        script = launched.training_script
        return script if launched.module else module_of(script), launched.training_script_args
    if name == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch", words
        launched = launch_command_parser().parse_args(rest[1:])
        return module_of(launched.training_script), launched.training_script_args
    assert name == "python", f"{' '.join(words)}: neither a program of ours nor a known tool"
    if rest[0] == "-m" and rest[1] == "pytest":
        assert all((ROOT / word).exists() for word in rest[2:] if word.startswith("tests")), words
        return None, []
    if rest[0] == "-m":
        package = (ROOT / rest[1] / "__main__.py").is_file()
        return (f"{rest[1]}.__main__" if package else rest[1]), rest[2:]
    return module_of(rest[0]), rest[1:]


def module_of(file: str) -> str:
    assert (ROOT / file).is_file(), f"{file}: there is no such program"
    return file.removesuffix(".py").replace("/", ".")


def parses(module):
    """The module that calls config.parse for a program: its own, or that of its settings."""
    return module if hasattr(module, "parse") or not hasattr(module, "read") else sys.modules[module.read.__module__]


def parse(command: Command, monkeypatch) -> None:
    """Let the program's own main parse the arguments (and required ones for those left out); stop it right after."""
    module = importlib.import_module(command.module)
    arguments = list(command.arguments)

    def stop_after(read):
        def parse_and_stop(*args, **kwargs):
            read(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    monkeypatch.chdir(ROOT)
    if hasattr(parses(module), "parse"):
        monkeypatch.setattr(parses(module), "parse", stop_after(parses(module).parse))
    else:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
    while True:
        monkeypatch.setattr(sys, "argv", [command.module, *arguments])
        try:
            module.main()
        except Parsed:
            return
        except SystemExit as stop:
            assert stop.code == 0 and "--help" in arguments, "refused"
            return
        except UserError as error:
            missing = re.match(r"(--[\w-]+) is required", str(error))
            if command.whole or not missing or missing[1] in arguments:
                raise
            arguments += [missing[1], "x"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_parsed_by_their_programs(page):
    """Each command of a page, in blocks and in the text, is one that its program, launcher or script takes."""
    failed = []
    for command in commands(page):
        if command.module is not None:
            with pytest.MonkeyPatch.context() as monkeypatch:
                try:
                    parse(command, monkeypatch)
                except (ValueError, AssertionError) as error:
                    failed.append(f"{command.text}\n    {error!r}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("module", PROGRAMS)
def test_examples_of_help_are_parsed(module, monkeypatch):
    """What a program shows at the end of its --help is what it, or the program named there, takes."""
    shown: list[str] = []

    def record(*args, examples=(), **kwargs):
        shown.extend(examples)
        raise Parsed

    with monkeypatch.context() as patched, pytest.raises(Parsed):
        patched.setattr(sys, "argv", [module])
        patched.setattr(parses(importlib.import_module(module)), "parse", record)
        importlib.import_module(module).main()
    for example in shown:
        with monkeypatch.context() as patched:
            parse(Command(example, *program(shlex.split(example, comments=True))), patched)


def test_commands_are_found():
    """The test above is not empty for want of reading."""
    found = [command for page in PAGES for command in commands(page)]
    assert sum(command.module is not None for command in found) > 40
    assert {"train", "generate", "preprocessing.pack", "evaluations.evaluate", "convert"} <= {c.module for c in found}
    assert any(c.module == "train" and "--requeue-command" in c.arguments for c in found)  # inside srun


@pytest.mark.parametrize(
    "line",
    [
        "pyhton train.py",
        "python trian.py --data-dir d --exp-name x",
        "torchrun --no-such train.py",
        "bash no.sh",
        "pip install -r requirement.txt",
    ],
)
def test_a_wrong_command_is_found(line):
    with pytest.raises((AssertionError, SystemExit)):
        program(shlex.split(line))


@pytest.mark.parametrize("wrong", ["--lr 1", "--batch-size x", "--config recipes/none.yaml"])
def test_a_wrong_flag_is_found(wrong, monkeypatch):
    with pytest.raises((ValueError, AssertionError)):
        parse(Command("", "train", ["--data-dir", "d", "--exp-name", "x", *wrong.split()]), monkeypatch)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    """Relative links and pictures lead to files of the project, their anchors to headings; pictures are small."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link} has no such heading"
        assert target.suffix not in (".png", ".svg") or target.stat().st_size < 150_000, link


def test_every_page_is_linked_from_the_first():
    """And starts with a command to copy and with who needs it."""
    first = (ROOT / "README.md").read_text()
    assert first.count("\n") <= 120
    for page in PAGES:
        if page.name != "README.md":
            assert f"]({page.relative_to(ROOT)})" in first, page.name
        if page.parent == ROOT / "docs":
            head = page.read_text()[:1500]
            assert re.match(r"# .+\n\n```bash\n", head) and "\n\nYou need this page if " in head, page.name


def test_the_dockerfile_copies_files_that_exist():
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line


@pytest.fixture
def tutorial(tmp_path, monkeypatch):
    """A folder with photos of two classes, the recipes and toy networks; and what makes each program's command tiny."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (12 + i, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    vae, encoder = str(tiny.write_vae(tmp_path / "vae")), str(tiny.write_encoder(tmp_path / "encoder"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REG_CACHE", str(tmp_path / "cache"))
    return tmp_path, {
        "preprocessing.pack": ["--resolution", "8", "--vae", vae, "--enc-type", encoder, "--num-workers", "0"],
        "preprocessing.describe": [],
        "train": [
            *tiny.FLAGS,
            "--batch-size",
            "8",
            "--gradient-accumulation-steps",
            "2",
            "--max-train-steps",
            "3",
            "--sampling-steps",
            "3",
            "--preview-steps",
            "2",
        ],
        "evaluations.report": [],
        "generate": ["--num-steps", "3", "--num-fid-samples", "16"],
        "evaluations.evaluate": ["--features", f"timm:{encoder}", "--resolution", "8", "--cache-dir", "cache"],
    }


def test_the_tutorial_runs(tutorial, monkeypatch, capsys):
    """Its commands, in their order, with tiny sizes added at the end, leave the files that it promises."""
    folder, smaller = tutorial
    ran = []
    for command in commands(ROOT / "docs/tutorial.md"):
        if command.module is None or not command.whole:
            continue
        if "--extend" in command.arguments:
            shutil.copy(folder / "photos/cat/1.png", folder / "photos/dog/new.png")
        monkeypatch.setattr(sys, "argv", [command.module, *command.arguments, *smaller[command.module]])
        importlib.import_module(command.module).main()
        ran.append(command.module)
    assert set(ran) == set(smaller)
    for name in (
        "data/photos/contact_sheet.png",
        "runs/photos/previews",
        "runs/photos/checkpoints",
        "report.html",
        "samples/preview/gallery.html",
        "samples/photos/samples.npz",
        "samples/photos/results.json",
        "samples/photos/memorization.png",
    ):
        assert (folder / name).exists(), name
