"""The bar of a sampling job moves with the solver's steps and ends at 100 %; the estimate after the first batch."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import reporting
from models.choices import SOLVERS
from models.interpolant import Interpolant
from models.samplers import Solver
from models.solvers import Diffusion
from models.state import State
from sampling import run
from sampling.messages import how_long
from sampling.parts import Parts
from tests import toy_model
from tests.toy_model import ROOT, flags, generate, loaded

place = toy_model.place  # a fixture


def solve(solver):
    """The fractions that a solver reports on the velocity field of a normal distribution, and its result."""
    fractions = []
    start = State(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    velocity = lambda state, t: state.map(lambda x: x * (2 * t - 1) / (t**2 + (1 - t) ** 2))  # noqa: E731
    noise = lambda step: State(torch.randn(3, 2, generator=torch.Generator().manual_seed(step + 1)))  # noqa: E731
    end = solver(velocity, start, Interpolant(), noise, fractions.append)
    return fractions, end.latent, solver(velocity, start, Interpolant(), noise).latent


@pytest.mark.parametrize(("mode", "name"), [(m, name) for m in SOLVERS for name in SOLVERS[m] if name != "dopri5"])
def test_solvers_report_each_step(mode, name):
    """The finished fraction, a number of the host; the result is the same with and without listening."""
    fractions, heard, unheard = solve(Solver(mode, name, 5, diffusion=Diffusion("sigma")))
    assert fractions == [0.2, 0.4, 0.6, 0.8, 1.0] and torch.equal(heard, unheard)


def test_the_adaptive_solver_reports_how_far_it_is():
    """Its number of steps is not known: the time that it has reached, never less than before, 1 at the end."""
    fractions, heard, unheard = solve(Solver("ode", "dopri5", rtol=1e-6, atol=1e-6))
    assert len(fractions) > 10 and fractions == sorted(set(fractions)) and fractions[-1] == 1.0
    assert all(type(fraction) is float for fraction in fractions) and torch.equal(heard, unheard)


def test_best_of_is_one_progress(place):
    """Three candidates of four steps are twelve parts of one batch."""
    fractions = []
    loaded(place, "--best-of", "3").sample(range(0, 2), fractions.append)
    assert fractions == pytest.approx([(i + 1) / 12 for i in range(12)])


@pytest.mark.parametrize("size", ["32", "4"])
def test_the_bar_moves_within_a_batch(place, tmp_path, monkeypatch, size):
    """With each step of the solver, never backwards, and to exactly all images when they are on disk."""
    seen = []

    class Bar(reporting.tqdm):
        def update(self, n=1):
            seen.append(self.n)
            return super().update(n)

    monkeypatch.setattr(run, "progress", lambda total, **_: Bar(total=total, file=io.StringIO()))
    generate(place, tmp_path / "s", "--per-proc-batch-size", size)
    assert seen == sorted(seen) and seen[-1] == 11 and type(seen[-1]) is int
    assert len({n for n in seen if 0 < n < 11}) >= 4 * -(-11 // int(size))
    if size == "32":
        assert seen[:4] == pytest.approx([0.95 * 11 * i / 4 for i in (1, 2, 3, 4)], abs=0.05)


def test_the_bar_counts_the_images_of_all_processes(tmp_path):
    """Parts of other processes and of an earlier run count whole, this process's own by their steps, none twice."""
    parts = Parts(tmp_path / "parts")
    parts.begin({})
    bar = reporting.tqdm(total=12, file=io.StringIO())
    images = run.Images(bar, parts, [range(0, 3), range(6, 9)])
    parts.write(range(3, 6), {"label": np.zeros(3)})
    images.show(3, 0.5)
    assert bar.n == pytest.approx(3 + 0.95 * 1.5, abs=0.05)
    images.solved = 3
    parts.write(range(0, 3), {"label": np.zeros(3)})
    images.show(3, 0.5)
    assert bar.n == pytest.approx(3 + 0.95 * 4.5, abs=0.05)
    images.written, images.solved = 3, 0
    parts.write(range(9, 12), {"label": np.zeros(3)})
    images._looked = float("-inf")  # as if a second had passed
    images.show(3, 1.0)
    assert bar.n == pytest.approx(9 + 0.95 * 3, abs=0.05)
    images.written = 6
    images.show()
    assert bar.n == 12


def test_a_log_file_gets_whole_lines(place, tmp_path):
    """From the command line, where stderr is no terminal: one line at the end of a short job, at 100 %."""
    done = subprocess.run(
        [sys.executable, "generate.py", *flags(place, tmp_path / "s", "--per-proc-batch-size", "2")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    bars = [line for line in done.stderr.splitlines() if "image" in line]
    assert len(bars) == 1 and "\r" not in done.stderr and bars[0].startswith("sampling: 100%") and "11/11" in bars[0]
    said = done.stdout.splitlines()
    assert said[1].startswith("11 images of 8 x 8, SDE euler 4 steps, unguided, random labels of 5 classes, fp32 on")
    assert said[2].startswith("disk: ") and "for all 11 images, judged by the first batch" in said[3] and len(said) == 5


def test_a_resumed_job_speaks_of_what_remains(place, tmp_path, capsys):
    generate(place, tmp_path / "s", "--num-fid-samples", "5", "--keep-parts")
    capsys.readouterr()
    generate(place, tmp_path / "s", "--per-proc-batch-size", "2")
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith("6 of them are still to be made; disk: ")
    assert "for the remaining 6 images" in said[3]
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["n"] == 11


def line(count=50_000, seconds=15.0, preset=None, world=1, batch=32, missing=None, forwards=250):
    work = [range(start, min(start + batch, count)) for start in range(count - (missing or count), count, batch)]
    job = SimpleNamespace(
        settings=SimpleNamespace(num_fid_samples=count, preset=preset), process=SimpleNamespace(world=world)
    )
    return how_long(job, work, seconds, forwards)


def test_how_long():
    """From the first batch of all processes; long jobs that did not ask for it hear of the quick preset."""
    assert line() == (
        "about 6 h 31 min for all 50,000 images, judged by the first batch (2.1 images/s, start-up included); "
        "--preset preview makes 16 in about 3 s"  # 1600 network passes; 32 x 250 of them took 15 s
    )
    assert line(preset="preview").endswith("included)") and "--preset preview" in line(preset="paper")
    assert line(world=8).startswith("about 49 min for all 50,000 images, judged by the first batch (17 images/s")
    assert line(count=1000, seconds=10.0).endswith("(3.2 images/s, start-up included)"), "5 minutes are not long"
    assert "for the remaining 40,000 images" in line(missing=40_000)
    assert line(count=32) is None and line(count=64, world=2) is None, "one batch per rank: nothing to estimate"
