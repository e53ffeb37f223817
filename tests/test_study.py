"""The study: its plan, its raw results, and a whole level at tiny size."""

import pytest

from config import UserError, parse
from study.ledger import Ledger
from study.plan import NO_TEACHER, Spec, runs
from study.run import EMA, RAW, Study, selected
from study.settings import StudyConfig

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
