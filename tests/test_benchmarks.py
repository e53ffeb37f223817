"""The benchmarks: timing in turns, results that are replaced, and each one runs on tiny networks."""

import json
import os
import re
import time

import pytest
import torch

from benchmarks import ceilings, epoch, harness, kernels, overhead, published, roofline, train_step
from config import UserError
from models.cost import GPUS, cost, step_cost
from models.sit import preset
from tests.tiny import write_dataset


def test_alternate_takes_turns():
    """Every round runs each variant once, the order reversed in odd rounds, after the warm-up."""
    calls = []
    timings = harness.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert all(len(t.values) == 3 for t in timings.values())


def test_a_turn_lasts(monkeypatch):
    """A variant is called until its turn has lasted; what counts is the time of one call."""
    now = [0.0]
    monkeypatch.setitem(harness.CLOCKS, "wall", lambda: now[0])
    calls = []

    def slow() -> None:
        calls.append(1)
        now[0] += 2

    timings = harness.alternate({"slow": slow}, rounds=2, warmup=0, turn=5)
    assert len(calls) == 6 and timings["slow"].values == (2.0, 2.0)


def test_ratio_of_two_timings():
    """A function that sleeps four times as long takes about four times as long."""
    timings = harness.alternate({"a": lambda: time.sleep(0.01), "b": lambda: time.sleep(0.04)}, rounds=5)
    assert 2.5 < harness.ratio(timings["b"], timings["a"]).median < 4.5


def test_spread_is_median_and_quartiles():
    assert harness.spread([4.0, 1.0, 2.0, 3.0, 5.0])[:3] == (3.0, 2.0, 4.0)
    assert harness.spread([7.0])[:3] == (7.0, 7.0, 7.0)


def test_results_are_written_and_replaced(tmp_path, monkeypatch):
    """JSON with hardware, versions and the commit that is named; one Markdown table for each label; the same label replaces
    its rows."""
    monkeypatch.setenv("COMMIT", "0123456789abcdef")
    for value in (1.0, 2.5):
        path = harness.write("demo", "a", {"rounds": 3}, [{"ms": harness.spread([value]), "batch": 8}], folder=tmp_path)
    harness.write("demo", "b", {}, [{"ms": 7.0}], folder=tmp_path)
    record = json.loads(path.read_text())
    assert record["rows"][0]["ms"]["median"] == 2.5
    assert record["environment"]["commit"] == "0123456789"
    assert record["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    text = (tmp_path / "demo.md").read_text()
    assert "| 2.5 (2.5 to 2.5) | 8 |" in text and "## b" in text and "| 1 (" not in text


def test_single_functions_are_taken_from_a_clone(tmp_path):
    """A function comes out of a file whose other lines cannot run; what is missing is named."""
    (tmp_path / "train.py").write_text("import absent_package\ndef double(x):\n    return FACTOR * x\n")
    taken = published.functions(tmp_path, "train.py", ["double"], {"FACTOR": 2})
    assert taken["double"](21) == 42
    with pytest.raises(ValueError, match="no triple"):
        published.functions(tmp_path, "train.py", ["triple"], {})
    with pytest.raises(FileNotFoundError, match="021ea2e"):
        published.check(tmp_path)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder the benchmarks write to in a test."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "keep_memory", lambda: None)  # for the whole process it would be
    return tmp_path


TOY = ("--model", "SiT-S/2", "--depth", "2", "--input-size", "4", "--rounds", "2", "--warmup", "1", "--device", "cpu")


def test_a_profile_adds_up_kernels_and_gaps():
    """Kernels that overlap leave no gap; the longest come first."""
    runs = [("nvjet_tst_128x256", 0.0, 2.0), ("_norm_forward_0", 3.0, 4.0), ("triton_red_fused_3", 3.5, 5.0)]
    found = kernels.summary([*runs, ("nvjet_tst_128x256", 5.0, 6.0), ("cudnn::fusion::compute_dot_do_o", 6.5, 7.0)])
    shares = {kind: ms for kind, ms in found.kinds.items() if ms}
    expected = {"matrix products": 3.0, "normalisation kernel": 1.0, "elementwise": 1.5, "attention": 0.5, "gaps": 1.5}
    assert shares == expected
    assert found.kernels[0] == {"name": "nvjet_tst_128x256", "calls": 2, "ms": 3.0}
    assert len(kernels.lines(found, most=2)) == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_step_benchmark_runs(results, capsys, precision):
    """A row for ours, its parts printed; with a clone of the published code named by REG_PUBLISHED also theirs."""
    clone = os.environ.get("REG_PUBLISHED")
    flags = ("--published", clone) if clone else ()
    train_step.main(
        [*TOY, "--batch-size", "4", "--label", "toy", "--precision", precision, "--parts", "--profile", *flags]
    )
    record = json.loads((results / "train_step-toy.json").read_text())
    rows, longest = record["rows"], record["details"]["kernels"]["4"]["longest"]
    assert sum(row["calls"] for row in longest if "fused_adamw" in row["name"]) == 1
    theirs = ["published", "published, best case"] if precision == "bf16" else ["published"]
    assert [row["variant"] for row in rows] == [*(theirs if clone else []), "ours"]
    assert "our step at batch 4, ms: draws" in capsys.readouterr().out
    assert all(row["images/s"]["median"] > 0 and row["ATen operations"] > 1000 for row in rows)


def test_overhead_benchmark_runs(results):
    """The slot's overhead is counted and measured."""
    overhead.main([*TOY, "--batch-size", "4", "--label", "toy", "--no-train"])
    rows = json.loads((results / "overhead-toy.json").read_text())["rows"]
    assert rows[1]["parameters"] > rows[0]["parameters"] and rows[2]["parameters"] > 0


def test_ceilings_are_measured_and_shown(results):
    """Rates of a copy, products and attention; a kernel that the machine lacks is a row without a rate. The table
    of a folder tells of all of it, and of variants that failed."""
    small = ("--batch-size", "1", "--input-size", "4", "--square", "64", "--copied", "4096", "--rounds", "2")
    ceilings.main([*small, "--device", "cpu", "--label", "toy"])
    rows = {row["what"]: row for row in json.loads((results / "ceilings-toy.json").read_text())["rows"]}
    assert rows["64^3"]["rate"]["median"] > 0 and rows["SiT-B/2 attention, flash"]["rate"]["median"] > 0
    assert "rate" not in rows["SiT-B/2 attention, cudnn"]
    lines = ceilings.table(results)
    assert len(lines) == 3 and lines[1].startswith("copy | ") and lines[1].endswith(" TB/s")
    record = json.loads((results / "ceilings-toy.json").read_text())
    record["rows"][0] = {"what": "copy", "unit": "CUDA out of memory"}
    (results / "ceilings-toy.json").write_text(json.dumps(record))
    assert ceilings.table(results)[1] == "copy | CUDA out of memory"
    harness.write("train_step", "gpu-toy", {}, [{"model": "S", "variant": "ours", "batch": 4, "failed": "Error: no"}])
    assert ceilings.table(results)[-1] == "toy | S | ours | 4 | Error: no"
    with pytest.raises(UserError, match="no results; run benchmarks"):
        ceilings.main(["--table", str(results / "nothing")])


def test_epoch_benchmark_runs(results, tmp_path):
    """Every record once, in equal steps; waiting is a share."""
    data = write_dataset(tmp_path / "data", count=20)
    epoch.main(
        [
            "--data-dir",
            str(data),
            "--depth",
            "2",
            "--hidden-size",
            "32",
            "--num-heads",
            "2",
            "--batch-size",
            "4",
            "--intervals",
            "3",
            "--label",
            "toy",
        ]
    )
    (row,) = json.loads((results / "epoch-toy.json").read_text())["rows"]
    assert row["steps"] == 5 and row["ms per step"]["median"] > 0 and 0 <= row["waiting for data %"]["median"] < 100


def test_roofline_reads_recipes(results):
    """A recipe of train.py becomes a row with its network, steps and price."""
    (results / "small.yaml").write_text("model: SiT-S/2\ndepth: 4\nmax-train-steps: 3600\nclass-token: false\n")
    flags = ("--gpu", "A100", "--gpus", "2", "--rent", "10", "--encoder", "cached", "--label", "toy")
    roofline.main(["--recipes", str(results / "small.yaml"), *flags])
    (row,) = json.loads((results / "roofline-toy.json").read_text())["rows"]
    network = preset("SiT-S/2", depth=4, class_token_dim=0)
    assert row["recipe"] == "small" and row["M parameters"] == round(cost(network).parameters / 1e6, 1)
    assert row["predicted ms"] == pytest.approx(1e3 * step_cost(network, 128, GPUS["A100"]).expected)
    assert row["hours"] == pytest.approx(row["predicted ms"] / 1e3) and row["dollars"] == round(row["hours"] * 20)


def test_wrong_flags_are_one_sentence(results):
    """An indivisible batch, or a folder that is not a clone of the published code, is named."""
    with pytest.raises(UserError, match="--gpus 3"):
        roofline.main(["--gpus", "3"])
    with pytest.raises(FileNotFoundError, match="--published"):
        train_step.main([*TOY, "--published", str(results)])


def test_records_hold_no_path_of_a_machine():
    """Neither an absolute path nor one that leaves the project: nobody else has these folders."""
    for record in (*harness.RESULTS.iterdir(), *harness.RESULTS.parents[1].glob("study/results/*.jsonl")):
        if record.suffix in (".json", ".jsonl", ".md"):
            text = record.read_text(encoding="utf-8")
            assert not re.search(r"""(?:^|[\s"'=(])(?:\.\./|~/|/[A-Za-z_]\w*/)""", text), record.name
