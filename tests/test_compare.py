"""Results: files, rankings, protocols that differ."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from config import UserError
from evaluations import compare
from evaluations.registry import Metric
from evaluations.results import Results, as_markdown, load, markdown

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
