"""The reference: its size, its cache, statistics that come with a file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from config import UserError
from evaluations import measure
from evaluations.features import Extractor, Features
from evaluations.image_folder import SeveralSizes
from evaluations.metrics import frechet_distance
from evaluations.settings import EvaluateConfig
from evaluations.statistics import compute_statistics
from tests.toy_images import averages, pixels, write_mixed


def test_each_side_gives_the_other_its_size(measurement, tmp_path):
    """A mixed reference is cropped to the samples' size and the other way round; results.json and the cache know of it."""
    write_mixed(tmp_path / "mixed", ((16, 16), (40, 24), (30, 50)) * 3)
    measure.measure(measurement(reference=(tmp_path / "mixed",)))
    content = json.loads((tmp_path / "results.json").read_text())["protocol"]
    assert (content["reference_cropped"], content["samples_cropped"], content["image_size"]) == (6, 0, "16 x 16")
    measure.measure(measurement(reference=(tmp_path / "mixed",), resolution=8))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    measure.measure(measurement(samples=(tmp_path / "mixed",)))
    content = json.loads((tmp_path / "results.json").read_text())["protocol"]
    assert (content["reference_cropped"], content["samples_cropped"], content["image_size"]) == (0, 6, "16 x 16")
    write_mixed(tmp_path / "other")
    for more in ({"reference": (tmp_path / "other",)}, {"reference": ()}):
        with pytest.raises(SeveralSizes, match=r"(mixed|other) holds images of several sizes"):
            measure.measure(measurement(samples=(tmp_path / "mixed",), **more))


def test_reference_statistics_are_cached_by_content(measurement, tmp_path, monkeypatch):
    """The second run does not read the reference's images; another content, network or setting makes a new entry."""
    first = measure.measure(measurement())
    assert len(list((tmp_path / "cache").iterdir())) == 1
    passes = []
    monkeypatch.setattr("evaluations.reference.collect", lambda *args, **kwargs: passes.append(1))
    assert measure.measure(measurement()).metrics == first.metrics
    assert not passes
    monkeypatch.undo()
    np.savez(tmp_path / "r.npz", pixels(60, seed=5))
    other = measure.measure(measurement())
    assert other.metrics["fd_judge"] != first.metrics["fd_judge"]
    measure.measure(measurement(pr_reference=30))
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("keep", [0, 100, -40])
def test_a_damaged_cache_is_reported_and_written_again(measurement, tmp_path, capsys, keep):
    first = measure.measure(measurement())
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:keep])
    assert measure.measure(measurement()).metrics == first.metrics
    assert f"{entry} cannot be read" in capsys.readouterr().out
    assert len(entry.read_bytes()) == len(whole)


def test_where_results_cannot_be_written(measurement, tmp_path, monkeypatch, capsys):
    """An --out that cannot be written ends it before the work; a cache that cannot be written does not."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file cannot be made \(.*\); give another --out"):
        measure.measure(measurement(out=tmp_path / "file" / "results.json"))
    with pytest.raises(ValueError, match=r"--out .* is a folder; give a file"):
        measure.measure(measurement(out=tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        with pytest.raises(ValueError, match=r"results cannot be written to .* give another --out"):
            measure.measure(measurement())
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "cache").exists()
    measure.measure(measurement(cache_dir=tmp_path / "file" / "cache"))
    assert (
        "warning: the statistics of the reference are not kept (" in capsys.readouterr().out
        and (tmp_path / "results.json").is_file()
    )


def test_statistics_in_a_reference_file_are_used(tmp_path, monkeypatch, capsys):
    """mu, sigma, mu_s and sigma_s of an ADM file give FID and sFID; its images serve the neighbours only."""
    colours = averages()
    fake = Extractor(
        "inception",
        "0",
        lambda x: (f := colours(x).pooled.double()) is not None and Features(f, 2 * f, f),
        torch.device("cpu"),
    )
    monkeypatch.setattr("evaluations.features.load", lambda *_, **__: fake)
    stats = compute_statistics(torch.randn(99, 12, generator=torch.Generator().manual_seed(0)) * 60 + 128)
    np.savez(
        tmp_path / "r.npz",
        arr_0=pixels(20),
        mu=stats.mean,
        sigma=stats.covariance,
        mu_s=stats.mean * 2,
        sigma_s=stats.covariance * 4,
    )
    np.savez(tmp_path / "s.npz", pixels(30, seed=1))
    paths = {"samples": (tmp_path / "s.npz",), "reference": (tmp_path / "r.npz",), "cache_dir": tmp_path / "cache"}
    asked = EvaluateConfig(**paths, device="cpu")
    found = measure.measure(asked)
    samples = compute_statistics(fake(torch.from_numpy(pixels(30, seed=1)).permute(0, 3, 1, 2)).pooled)
    assert found.metrics["fid"].value == pytest.approx(frechet_distance(stats, samples), rel=1e-10)
    assert found.metrics["sfid"].value == pytest.approx(4 * found.metrics["fid"].value, rel=1e-9)
    assert found.metrics["recall"].n_reference == 20
    # statistics alone, as pytorch-fid writes them: the distances are the same, neighbours are left out
    np.savez(tmp_path / "only.npz", mu=stats.mean, sigma=stats.covariance)
    capsys.readouterr()
    alone = measure.measure(replace(asked, reference=(tmp_path / "only.npz",), memorization=1))
    assert alone.metrics["fid"] == found.metrics["fid"] and not {"sfid", "recall", "authenticity"} & set(alone.metrics)
    said = "only.npz holds Inception statistics and no images: in inception metrics of single reference images are left"
    assert said in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"only.npz holds statistics \(mu, sigma\) and no images: it can be --reference"
    ):
        measure.measure(replace(asked, samples=(tmp_path / "only.npz",)))
    np.savez(tmp_path / "only.npz", mu=stats.mean[:5], sigma=stats.covariance[:5, :5])
    with pytest.raises(UserError, match="feature dimensions differ: 5 and 12"):
        measure.measure(replace(asked, reference=(tmp_path / "only.npz",)))
    assert (tmp_path / "results.json").is_file()
