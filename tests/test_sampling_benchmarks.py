"""The benchmarks of sampling compare what they say: equal cost, equal weights, equal noise."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.repa import RepaBenchmark, compare
from benchmarks.sample import Bench, SampleBenchmark
from benchmarks.solvers import Measured, cheapest, solver_of, steps_of
from config import MissingFile, UserError
from models.choices import SOLVERS
from models.guidance import Meter
from models.interpolant import Interpolant
from models.state import State

CLONE, REPA = os.environ.get("REG_PUBLISHED"), os.environ.get("REPA_CLONE")
TINY = {"model": "SiT-S/2", "depth": 1, "input_size": 4, "batch_size": 3, "steps": 4}


@pytest.mark.parametrize("budget", [6, 11, 25])
def test_solvers_are_compared_at_equal_cost(budget):
    """Every fixed-step solver spends the budget of evaluations, Heun one less where it is even."""
    for mode, names in SOLVERS.items():
        for name in names:
            if name == "dopri5":
                continue
            meter = Meter()

            def velocity(state, t, meter=meter):
                meter.evaluations += 1
                return state

            solver = solver_of(f"{mode}-{name}", steps_of(f"{mode}-{name}", budget))
            noise = lambda step=0: State(torch.ones(1, 1, 1, 1))  # noqa: E731
            solver(velocity, noise(), Interpolant(), noise)
            assert meter.evaluations == budget - (name == "heun" and budget % 2 == 0), name


def test_solvers_by_name():
    assert solver_of("ode-euler-shifted", 7).shift == 3.0
    with pytest.raises(UserError, match="--solvers heun: expected MODE-SOLVER"):
        solver_of("heun", 7)


def test_the_cheapest_within_two_percent():
    mark = Measured("sde", 250, 460, (1.0, 1.2))
    good, costly, bad = Measured("a", 20, 37, (1.12,)), Measured("b", 40, 70, (0.9,)), Measured("c", 5, 9, (1.13,))
    assert cheapest([mark, costly, bad, good]) == good
    assert cheapest([mark, bad]) == mark
    lucky = Measured("c", 3, 5, (1.0,))  # the same solver is worse with more evaluations
    assert cheapest([mark, costly, bad, good, lucky]) == good


def test_our_variants_share_weights_and_noise():
    """float32 and bfloat16 sample the same latents, to the precision of bfloat16; fewer rows are the same rows."""
    bench = Bench(SampleBenchmark(**TINY), "cpu")
    exact, reduced = (bench.ours(dtype, compiled=False) for dtype in ("fp32", "bf16"))
    assert torch.allclose(exact(2), exact()[:2], atol=1e-5)
    agreement, found = bench.deviations({"ours, float32": exact, "ours, bfloat16": reduced})
    assert agreement == 0 and found["ours, float32"][0] < 1e-5 < found["ours, bfloat16"][0] < 0.1


@pytest.mark.skipif(CLONE is None, reason="REG_PUBLISHED names no clone of the published code")
def test_the_published_sampler_agrees():
    """Its latents and ours, on the same weights and noise, in float32."""
    bench = Bench(SampleBenchmark(published=Path(CLONE), **TINY), "cpu")
    variants = {"published": bench.theirs(fused=False), "published, fused attention": bench.theirs(fused=True)}
    agreement, found = bench.deviations(variants)
    assert agreement < 1e-5 and found["published"][0] == 0 and found["published, fused attention"][0] < 1e-5


@pytest.mark.skipif(REPA is None, reason="REPA_CLONE names no clone of REPA's code")
def test_repas_own_samplers_agree():
    """Euler, Heun and the SDE on shared noise; but for Heun where a guidance interval ends inside of a step."""
    for row in compare(RepaBenchmark(repa=Path(REPA), depth=1, input_size=4, batch_size=2, steps=6)):
        differs = row["sampler"] == "heun" and row["guided on"] == "[0, 0.85]"
        assert (row["max deviation"] > 1e-4) if differs else (row["max deviation"] < 1e-5), row


def test_a_folder_that_is_no_clone_of_repa(tmp_path):
    with pytest.raises(MissingFile, match=r"no samplers.py; give a clone of github.com/sihyun-yu/REPA"):
        compare(RepaBenchmark(repa=tmp_path))
