"""Results: files, rankings, protocols that differ."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from config import UserError
from evaluations import compare
from evaluations.registry import Metric
from evaluations.results import Results, as_markdown, load, markdown
from evaluations.seeds import mean_of, sign

ROOT = Path(__file__).parents[1]


def result(name: str, fid: float, **protocol) -> Results:
    sampling = {"mode": "sde", "steps": protocol.pop("steps", 250), "cfg_scale": 2.3, "seed": protocol.pop("seed", 0)}
    settled = {"n_samples": 50_000, "reference_sha256": "r", "networks": {"inception": "i"}, "sampling": sampling}
    return Results({"fid": Metric(fid), "recall": Metric(1 / fid)}, settled | protocol, [], name)


def test_results_survive_the_file(tmp_path):
    before = result("a", 2.0)
    before.save(tmp_path / "a.json")
    assert load(tmp_path / "a.json") == before
    assert json.loads((tmp_path / "a.json").read_text())["metrics"]["fid"] == 2.0
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.json was not written by"):
        load(tmp_path / "a.json")


def test_equal_protocols_are_ranked():
    """Sorted by FID, best values bold: small for FID, large for recall; the seed may differ."""
    rows = [result("worse", 3.0), result("better", 2.0, seed=1)]
    assert compare.differences(rows) == {}
    lines = as_markdown(compare.ranked(rows)).splitlines()
    assert lines[2].startswith("1 | better") and "**2.00**" in lines[2] and "**0.500**" in lines[2]
    assert lines[3].startswith("2 | worse") and "**" not in lines[3]


def test_different_protocols_are_not_ranked_unless_told():
    """Other numbers of images, references or steps are named; --across admits them one by one."""
    rows = [result("a", 3.0), result("b", 2.0, n_samples=10_000, steps=50)]
    assert set(compare.differences(rows)) == {"n_samples", "sampling.steps"}
    assert set(compare.differences(rows, ("steps",))) == {"n_samples"}
    assert compare.differences(rows, ("steps", "n_samples")) == compare.differences(rows, ("all",)) == {}
    assert compare.differences([result("a", 3.0), result("b", 2.0, sampling={"vae": "x"})]).keys() >= {"sampling.vae"}
    assert "Rank" not in markdown(rows)
    with pytest.raises(UserError, match="no protocol key has that name"):
        compare.differences(rows, ("stepps",))


def test_former_words_mean_the_present_ones():
    """Results from before fp32 was the one word for it rank beside new ones; what was removed counts by its meaning."""
    old = result("old", 3.0, dtype="float32", pr_dtype="float32")
    new = result("new", 2.0, dtype="fp32", pr_dtype="fp32")
    old.protocol["sampling"] |= {"dtype": "float32", "guidance_schedule": "constant"}
    new.protocol["sampling"] |= {"dtype": "fp32"}
    assert compare.differences([old, new]) == compare.differences([new, old]) == {}
    new.protocol["dtype"] = "fp64"
    assert compare.differences([new, old]) == {"dtype": ['"fp64"', '"float32"']}
    old.protocol["sampling"]["guidance_schedule"] = "linear"
    assert set(compare.differences([old, new], ("dtype",))) == {"sampling.guidance_schedule"}


def test_seeds_of_a_method_are_compared_in_pairs():
    """The mean difference and its sign, by numpy; what lies in the spread of the seeds shares a rank."""
    sit, repa, reg = [9.0, 8.0, 8.6], [7.5, 8.1, 7.9], [6.3, 6.5, 6.4]
    methods = [
        [result(n, v, seed=i) for i, v in enumerate(vs)] for n, vs in (("sit", sit), ("repa", repa), ("reg", reg))
    ]
    lines = compare.over_seeds(methods).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:5]] == [["1", "reg", "3"], ["2", "repa", "3"], ["2", "sit", "3"]]
    assert lines[8].startswith("repa - sit | -1.50, 0.10, -0.70: within the spread | ")
    assert lines[9].startswith("reg - sit | -2.70, -1.50, -2.20: lower | ") and lines[9].endswith(": higher")


def test_intervals_need_five_seeds():
    """A bootstrap interval holds the mean, shrinks with the spread, and decides from five pairs on; one run ranks none."""
    noise = np.random.default_rng(1).normal(size=8)
    wide, narrow = mean_of(3 + noise), mean_of(3 + noise / 10)
    assert wide.interval[0] < wide.mean < wide.interval[1]
    width = np.subtract(*wide.interval[::-1])
    assert width == pytest.approx(2 * 1.96 * noise.std() / 8**0.5, rel=0.1)
    assert np.subtract(*narrow.interval[::-1]) == pytest.approx(width / 10)
    assert mean_of([1, 2, 3]).interval is None and mean_of([1, 2, 3]).text(1) == "1.0, 2.0, 3.0"
    base = np.array([5.0, 9, 6, 8, 7])
    assert (
        sign(base - 0.5 + noise[:5] / 10, base) == -1 and sign(base + noise[:5] / 10 - noise[:5].mean() / 10, base) == 0
    )
    assert (
        sign([1.0], [2.0]) == 0
        and sign([2, 3], [0.0, 1]) == 0
        and sign([2, 3, 4], [0.0, 1, 1]) == 1
        and sign([2, 3, 4], [1.0, 2.5, 3]) == 0
    )


def test_ratios_to_held_out_images():
    """FDr is FD over the FD of held-out images; another reference is refused."""
    rows, floor = [result("a", 3.0)], result("held-out", 1.5)
    rows[0].metrics["fd_judge"], floor.metrics["fd_judge"] = Metric(8.0, 0.4), Metric(4.0)
    compare.add_ratios(rows, floor)
    assert rows[0].metrics["fdr"] == Metric(2.0) and rows[0].metrics["fdr_judge"] == Metric(2.0, 0.1)
    assert "FDr judge" in markdown(rows)
    with pytest.raises(UserError, match="another reference than a"):
        compare.add_ratios(rows, result("held-out", 1.0, reference_sha256="x"))


def test_compare_program(tmp_path):
    """Prints the table either way; status 2 and the differing keys when it will not rank."""
    result("a", 3.0).save(tmp_path / "a.json")
    result("b", 2.0, reference_sha256="q").save(tmp_path / "b.json")
    command = [sys.executable, "-m", "evaluations.compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "3.00" in done.stdout and "Rank" not in done.stdout
    assert "protocols differ in reference_sha256" in done.stderr and done.stderr.count("\n") == 1
    done = subprocess.run([*command, "--across", "reference_sha256"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 | b" in done.stdout
    done = subprocess.run([*command, "--across", "all", "--seeds", "2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 | a | 2 | 3.00, 2.00" in done.stdout
