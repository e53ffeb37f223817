"""Reports: curves as logged, everything inside one file, pictures that hold what they should."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluations.registry import Metric
from evaluations.report import Report, Table, read_curves, write_html, write_png
from evaluations.results import Results

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with 50 logged steps, a broken last line, and one preview."""

    def make(name: str, offset: float = 0.0) -> Path:
        folder = tmp_path / name
        (folder / "previews").mkdir(parents=True)
        entries = [{"step": s, "loss": 1 / s + offset, "lr": 1e-4, "note": "x", "ok": True} for s in range(1, 51)]
        lines = [json.dumps(entry) for entry in entries]
        (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5']))
        Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(folder / "previews" / "step_0000050.png")
        return folder

    return make


def content(run_folder) -> Report:
    a, b = run_folder("a"), run_folder("b", 0.5)
    return Report(
        title="Two <runs>",
        summary=["All & everything."],
        tables=[Table("Numbers", ["x", "y"], [["1", "2"]])],
        runs={"first": a, "second": b},
        images=[("a grid", a / "previews" / "step_0000050.png")],
        commands=["python train.py --a < b"],
    )


def test_curves_are_read_as_logged(run_folder):
    """Numbers by name and step; texts, flags and an unfinished last line are left out, a repeated step counts once."""
    folder = run_folder("a")
    curves = read_curves(folder)
    assert set(curves) == {"loss", "lr"}
    assert curves["loss"].steps == list(range(1, 51)) and curves["loss"].values[1] == 0.5
    file = folder / "metrics.jsonl"
    lines = [
        '{"step": 2, "loss": 1.0}',
        '{"step": 1, "loss": 2.0}',
        '{"step": 2, "loss": 3.0}',
        '{"step": 3, "loss": NaN}',
    ]
    file.write_text("\n".join(lines))
    assert read_curves(folder)["loss"] == ([1, 2], [2.0, 3.0])
    file.write_text('{"loss": 1}\n{"step": 2, "loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1, is not a JSON object with a step"):
        read_curves(folder)
    with pytest.raises(FileNotFoundError, match=r"is .* the folder of a training run"):
        read_curves(folder / "previews")


def test_html_needs_no_other_file(run_folder, tmp_path):
    """Images and curves are data URIs, nothing is loaded from elsewhere, text is escaped."""
    write_html(content(run_folder), tmp_path / "out" / "report.html")
    page = (tmp_path / "out" / "report.html").read_text()
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page and "<link" not in page and "<script" not in page
    for text in ("Two &lt;runs&gt;", "All &amp; everything.", "<td>1</td><td>2</td>", "--a &lt; b", "a grid"):
        assert text in page, text


def test_png_shows_the_same(run_folder, tmp_path):
    """One picture: a grid, curves of both runs in their colours, and more height with more content."""
    everything = content(run_folder)
    write_png(everything, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
        height = picture.height
    for colour in ((31, 119, 180), (214, 39, 40), (200, 200, 200)):
        assert (np.abs(pixels - colour).sum(1) < 12).sum() > 50, colour
    write_png(everything._replace(images=[], commands=[]), tmp_path / "short.png")
    with Image.open(tmp_path / "short.png") as picture:
        assert picture.height < height - 300


def test_broken_content_is_named(run_folder, tmp_path):
    everything = content(run_folder)
    for write in (write_html, write_png):
        with pytest.raises(ValueError, match="table 'Numbers': a row has 1 cells, the header 2"):
            write(everything._replace(tables=[Table("Numbers", ["x", "y"], [["1"]])]), tmp_path / "r")
        with pytest.raises(FileNotFoundError, match=r"image .*absent\.png does not exist"):
            write(everything._replace(images=[("absent", tmp_path / "absent.png")]), tmp_path / "r")


def test_report_of_run_folders(run_folder, tmp_path):
    """The program finds previews and results of several runs and writes HTML and PNG."""
    a, b = run_folder("a"), run_folder("b", 0.5)
    Results({"fid": Metric(12.34, 0.5)}, {"n_samples": 100}, [], "samples.npz").save(a / "samples" / "results.json")
    command = [sys.executable, "-m", "evaluations.report", "--runs", str(a), str(b), "--out", str(tmp_path / "r.html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "r.html").read_text()
    assert "12.34 ± 0.50" in page and "a, step 0000050" in page and "b, step 0000050" in page
    assert (tmp_path / "r.png").is_file()
