"""The quickstart: its images, its stage runner, and its table."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from config import parse
from quickstart.__main__ import EARLY, RUNS, prepare, train_and_sample
from quickstart.digits import SIZE, read_image_folder, write_image_folders
from quickstart.stages import Runner, Stage
from quickstart.summary import rows
from training.settings import TrainConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    out = tmp_path_factory.mktemp("images")
    return out, write_image_folders(out)


def test_digits_are_split_once_and_for_all(images):
    """All 1,797 scans, every class in both parts, no file in both, the ink not inverted."""
    out, (train, test) = images
    assert (train, test) == (1433, 364)
    pixels, labels = read_image_folder(out / "test")
    assert pixels.shape == (364, SIZE, SIZE, 3) and pixels.dtype == np.uint8
    assert set(labels) == set(range(10)) and min(np.bincount(labels)) >= 34
    assert not {p.name for p in (out / "train/3").iterdir()} & {p.name for p in (out / "test/3").iterdir()}
    assert pixels[:, :, :2].mean() < 20 < pixels[:, 4:12, 4:12].mean()


def stage(tmp_path, code, name="a", after=()):
    return Stage(name, ("python", "-c", code), (tmp_path / f"{name}.txt",), after)


def test_a_finished_stage_is_not_run_again(tmp_path, capfd):
    """The same command with its outputs in place is skipped, also by a new process; a changed one is not."""
    code = f"open({str(tmp_path / 'a.txt')!r}, 'a').write('x')"
    first = Runner(tmp_path, {}).run(stage(tmp_path, code))
    again = Runner(tmp_path, {}).run(stage(tmp_path, code))
    assert (tmp_path / "a.txt").read_text() == "x" and again == first
    assert first.peak_gib > 0.001 and first.seconds > 0
    Runner(tmp_path, {}).run(stage(tmp_path, code + "  # changed"))
    assert (tmp_path / "a.txt").read_text() == "xx"
    (tmp_path / "a.txt").unlink()
    Runner(tmp_path, {}).run(stage(tmp_path, code + "  # changed"))
    assert (tmp_path / "a.txt").read_text() == "x"
    assert "done before" in capfd.readouterr().out


def test_a_changed_stage_reruns_those_after_it(tmp_path):
    """Results that were made from other inputs are not reused."""

    def run(comment):
        runner = Runner(tmp_path, {})
        runner.run(stage(tmp_path, f"open({str(tmp_path / 'a.txt')!r}, 'a').write('x')  # {comment}"))
        runner.run(stage(tmp_path, f"open({str(tmp_path / 'b.txt')!r}, 'a').write('y')", "b", ("a",)))

    run("one")
    run("one")
    run("two")
    assert (tmp_path / "b.txt").read_text() == "yy"


@pytest.mark.parametrize(("code", "words"), [("import sys; sys.exit(3)", "exit status 3"), ("pass", "did not write")])
def test_a_failing_stage_ends_the_run_and_is_not_remembered(tmp_path, capfd, code, words):
    """The error names the stage; nothing is recorded as done."""
    runner = Runner(tmp_path, {})
    with pytest.raises(SystemExit):
        runner.run(stage(tmp_path, code))
    assert words in capfd.readouterr().err
    assert not list((tmp_path / "stages").iterdir())


def test_a_stopped_run_takes_its_stage_with_it(tmp_path, capfd):
    """SIGTERM to the program reaches the stage, which is not remembered; the program's own handler comes back after it."""
    before = signal.signal(signal.SIGTERM, own := lambda *_: None)
    try:
        code = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
        with pytest.raises(SystemExit):
            Runner(tmp_path, {}).run(stage(tmp_path, code))
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert f"exit status {-signal.SIGTERM}" in capfd.readouterr().err and not any(tmp_path.glob("stages/*"))


def test_stages_depend_on_what_they_read():
    """Every prerequisite names an earlier stage, and every command is a program of this project."""
    seen = set()
    stages = prepare(Path("out"))
    for run in RUNS:
        stages += train_and_sample(Path("out"), run, gpu=False, samples=100, early=True)
    for s in stages:
        assert set(s.after) <= seen, s
        seen.add(s.name)
        programs = [part for part in s.command if part.endswith(".py")]
        assert all((ROOT / program).is_file() for program in programs), programs
    assert {"train-reg", "sample-reg-sde-guided", "evaluate-sit-ode-unguided", "sample-repa-ode-early"} <= seen


def test_the_early_checkpoint_is_kept():
    """The recipe saves at the step that --compare judges, and rotation leaves that checkpoint alone."""
    recipe = parse(TrainConfig, "", ["--config", str(ROOT / "recipes/digits.yaml")])
    assert EARLY % recipe.checkpointing_steps == 0 and EARLY % recipe.keep_every == 0 < EARLY < recipe.max_train_steps


def test_table_has_a_row_for_everything():
    """Floors of real digits first, then a row a setting with its own numbers."""
    results = {
        "real": {"held-out": {"accuracy": 0.99, "fd": 0.0, "n": 364}, "train": {"accuracy": 1.0, "fd": 0.2, "n": 1433}},
        "settings": [
            {
                "name": "reg-sde-guided",
                "run": "reg",
                "sampler": "sde",
                "guidance": "guided",
                "nfe": 50,
                "forwards": 92,
                "seconds": 12.3,
                "accuracy": 0.955,
                "fd": 1.25,
                "n": 500,
            }
        ],
    }
    table = rows(json.loads(json.dumps(results)))
    assert [len(row) for row in table] == [9] * 4
    assert table[2][3:6] == ["100.0%", "0.200", "1433"]
    assert table[3] == ["SiT + REG", "SDE", "guided", "95.5%", "1.250", "500", "50", "92", "12"]
