"""The study: its plan, its raw results, and a whole level at tiny size."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from config import UserError, parse
from packed.format import read_manifest, write_manifest
from study import run as running
from study.ledger import Ledger
from study.levels import Level
from study.plan import NO_TEACHER, Spec, runs
from study.run import EMA, RAW, Study, selected
from study.settings import StudyConfig
from tests import tiny, toy_images

FLAGS = ("--level", "digits", "--train", "recipes/digits.yaml", "--ema-decay", "0.9", "--samples", "40")


def settings(tmp_path, *extra, steps=("2", "4"), lines=("unlabelled supervised sit,reg 0",)):
    places = ("--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"))
    return parse(StudyConfig, "", [*FLAGS, *places, "--steps", *steps, "--runs", *lines, *extra])


def test_runs_are_in_order_and_once(tmp_path):
    """Seed after seed, so that a cut study has whole comparisons; SiT reads no teacher and is run once for all of them."""
    lines = ("unlabelled supervised sit,reg 0,1", "unlabelled random sit,reg+class-coeff=0.1 0")
    found = runs(settings(tmp_path, lines=lines))
    both = [(NO_TEACHER, "sit", 0), ("supervised", "reg", 0), (NO_TEACHER, "sit", 1), ("supervised", "reg", 1)]
    assert [(s.teacher, s.row, s.seed) for s in found] == [*both, ("random", "reg+class-coeff=0.1", 0)]
    assert found[-1].flags == ("--class-coeff", "0.1", "--seed", "0")
    assert [s.seed for s in selected(settings(tmp_path, "--only", "sit", "seed1", lines=lines))] == [1]


@pytest.mark.parametrize("line", ["unlabelled supervised sit", "dark supervised sit 0", "labelled supervised vit 0"])
def test_a_line_that_cannot_be_read_is_named(tmp_path, line):
    with pytest.raises(UserError, match=f"runs: '{line}'"):
        runs(settings(tmp_path, lines=(line,)))


def test_a_line_that_was_cut_off_is_left_out(tmp_path, capsys):
    """A crash in the middle of a line loses that line alone, before and after the next one is appended."""
    ledger = Ledger(tmp_path / "new" / "a.jsonl")
    assert ledger.lines() == []
    ledger.append({"key": "a"})
    with ledger.path.open("a") as stream:
        stream.write('{"key": "b", "metr')
    ledger.append({"key": "c"})
    assert ledger.keys() == {"a", "c"} and "line 2: cut off" in capsys.readouterr().out


def test_the_key_is_of_what_was_run_alone(tmp_path):
    """Each setting that changes numbers changes it; places and settings of the machine do not."""
    spec = Spec("unlabelled", "supervised", "reg", 0)
    key = Study(settings(tmp_path)).key(spec, 2)
    assert key == Study(settings(tmp_path / "moved", "--batch-size", "7")).key(spec, 2)
    others = [Study(settings(tmp_path)).key(spec, *one) for one in ((4, EMA), (2, RAW))]
    for changed in (("labelled", "supervised", "reg", 0), ("unlabelled", "random", "reg", 0)):
        others.append(Study(settings(tmp_path)).key(Spec(*changed), 2))
    for row, seed in (("repa", 0), ("reg+class-coeff=0.1", 0), ("reg", 1)):
        others.append(Study(settings(tmp_path)).key(Spec("unlabelled", "supervised", row, seed), 2))
    for flags in (("--samples", "41"), ("--solver-steps", "2"), ("--ema-decay", "0.5")):
        others.append(Study(settings(tmp_path, *flags)).key(spec, 2))
    assert len({key, *others}) == 1 + len(others)


@dataclass(frozen=True)
class Toy(Level):
    """Random images and networks in the place of the digits."""

    @property
    def spaces(self):
        return (f"timm:{self.network('judge')}",)

    def accuracy(self, teacher):
        return {"linear_accuracy": 0.5}

    def prepare(self, spec, runner):
        if self.images.exists():
            return
        self.images.mkdir(parents=True)
        for part, count in (("train", 30), ("test", 12)):
            images = {"arr_0": toy_images.pixels(count, 8), "arr_1": np.arange(count) % 3}
            np.savez(self.images / f"{part}.npz", **images)
        toy_images.save_vit(self.network("judge"))
        vae, encoder = tiny.write_vae(self.network("vae")), tiny.write_encoder(self.network("supervised"))
        for data in ("labelled", "unlabelled"):
            folder = tiny.write_dataset(self.out / "packed" / f"{data}-supervised", vae=vae)
            manifest = read_manifest(folder)
            write_manifest(folder, replace(manifest, encoders=[replace(manifest.encoders[0], name=str(encoder))]))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A recipe of a tiny network, and the toy level."""
    (tmp_path / "train.yaml").write_text(
        "\n".join(f"{flag[2:]}: {value}" for flag, value in zip(tiny.FLAGS[::2], tiny.FLAGS[1::2]))
    )
    monkeypatch.setattr(running, "Level", Toy)

    def made(*extra, **changes):
        flags = ("--train", str(tmp_path / "train.yaml"), "--solver-steps", "1", "--samples", "20", *extra)
        return settings(tmp_path, *flags, lines=("labelled supervised sit,reg 0",), **changes)

    return made


def test_a_level_from_end_to_end(toy, monkeypatch, capsys):
    """A line for each row and checkpoint; a cut study goes on where it was, to the numbers of one that was not cut."""
    ledger = running.Study(toy()).ledger
    judged, cut = Study.judged, []

    def once(self, spec, *rest):
        if spec.row == "reg" and self.ledger.path.read_text().count('"reg"') == 1 and not cut:
            cut.append(spec)
            raise KeyboardInterrupt
        judged(self, spec, *rest)

    monkeypatch.setattr(Study, "judged", once)
    with pytest.raises(KeyboardInterrupt):
        running.study(toy())
    running.study(toy())
    assert cut and "resuming from" in capsys.readouterr().out
    lines = [line for line in ledger.lines() if "step" in line]
    assert [(x["row"], x["step"], x["weights"]) for x in lines] == [
        (row, *one) for row in ("sit", "reg") for one in ((2, EMA), (4, EMA), (4, RAW))
    ]
    assert {x["row"] for x in ledger.lines()} >= {"held-out", "reconstructions", "oracle token", "teacher"}
    reg = lines[-1]["metrics"]
    assert reg.keys() >= {"fd_judge", "mind_judge", "class_accuracy", "token_cosine", "token_fd", "cknna"}
    assert "token_fd" not in lines[0]["metrics"] and lines[0]["teacher"] == NO_TEACHER
    before = ledger.path.read_text()
    running.study(toy())
    assert ledger.path.read_text() == before
    ledger.path.unlink()
    running.study(toy())
    again = {x["key"]: x["metrics"] for x in ledger.lines() if "step" in x}
    assert {x["key"]: x["metrics"] for x in lines} == again
