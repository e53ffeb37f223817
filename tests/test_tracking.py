"""Training metrics: metrics.jsonl, previews, the Frechet distance, and no synchronisation between log lines."""

import re

import numpy as np
import pytest
import torch

import train
from loss import LossTerms, Objective
from models.class_token import nearest_class
from models.cost import GPUS, named_gpu
from tests.tiny import log_lines as lines
from tests.tiny import train_flags as flags
from training.launch import Processes
from training.previews import preview_labels
from training.step import StepResult
from training.tracking import TERMS, Tracker, Window, averages, first_fault, merge_windows


def result(n, seed, parameters=3):
    g = torch.Generator().manual_seed(seed)
    terms = LossTerms(*(torch.randn(n, generator=g) for _ in range(3)), torch.rand(n, generator=g))
    norms = torch.rand(parameters, generator=g)
    return StepResult(terms, torch.linalg.vector_norm(norms), norms)


def test_window_averages_are_those_of_all_samples():
    """Terms over steps and processes, split by quartile of t; the total is weighted; the gradient norm is averaged."""
    rows, everything, norms = [], [], []
    for rank in range(2):
        window = Window(torch.device("cpu"))
        for step in range(3):
            r = result(16, 10 * rank + step)
            everything.append(r.terms)
            norms += [r.grad_norm.item()] if rank == 0 else []
            window.add(step, r, torch.arange(16) + 16 * rank)
        rows.append(window.values)
    rows = torch.stack(rows)
    values = averages(rows, Objective(class_coeff=0.1, proj_coeff=2.0))
    v, c, a, t = (torch.cat(term).double() for term in zip(*everything))
    assert values["velocity"] == pytest.approx(v.mean().item())
    assert values["loss"] == pytest.approx((v.mean() + 0.1 * c.mean() + 2 * a.mean()).item())
    for q in range(4):
        chosen = (t >= q / 4) & (t < (q + 1) / 4)
        assert values[f"class_velocity_t{q + 1}"] == pytest.approx(c[chosen].mean().item())
    assert values["grad_norm"] == pytest.approx(np.mean(norms)) and values["skipped_steps"] == 0
    one = averages(merge_windows(rows)[None], Objective(class_coeff=0.1, proj_coeff=2.0))
    assert one == pytest.approx(values)
    assert first_fault(rows) is None


def test_window_remembers_the_first_fault():
    """Of two bad steps the first; of two processes the one that saw the sample; the sample's position and term."""
    good, bad = Window(torch.device("cpu")), Window(torch.device("cpu"))
    for step in range(4):
        r, s = result(4, step), result(4, 50 + step)
        if step in (1, 2):
            s.terms.alignment[2 + step - 1] = float("nan")
            r.gradient_norms[:] = s.gradient_norms[:] = float("nan")
            r, s = (x._replace(grad_norm=torch.tensor(float("nan"))) for x in (r, s))
        good.add(step, r, torch.arange(4))
        bad.add(step, s, torch.arange(4) + 4)
    fault = first_fault(torch.stack([good.values, bad.values]))
    assert fault == (1, 1, 6, TERMS.index("alignment"), 0)
    values = averages(torch.stack([good.values, bad.values]), Objective())
    assert values["skipped_steps"] == 2 and np.isfinite(values["loss"])


def test_a_quiet_step_says_nothing(tools, tmp_path, monkeypatch):
    """Between log lines no tensor is brought to the host: no item(), no cpu(), no gather, no write."""
    waits: list[str] = []
    inside = {"quiet": False}

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            if inside["quiet"]:
                waits.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__"):
        watch(torch.Tensor, name)
    watch(Tracker, "log")
    from training.run import Run

    original = Run.advance

    def advance(self):
        batches = self.batches
        prepared = [next(batches) for _ in self.positions]  # the loader works on the CPU
        self.batches = iter(prepared)
        inside["quiet"] = True
        original(self)
        self.interrupt.requested()
        inside["quiet"] = False
        self.batches = batches

    monkeypatch.setattr(Run, "advance", advance)
    train.main(flags(tools["data"], tmp_path, "--log-every", "100", steps=5))
    assert waits == []
    assert [line["step"] for line in lines(tmp_path)] == [5]


def test_metrics_are_complete_and_never_go_backwards(tools, tmp_path):
    """Every line has the promised values. After a crash behind the last checkpoint the lines beyond it, and a torn one, are
    replaced by the run's own."""
    train.main(flags(tools["data"], tmp_path, "--checkpointing-steps", "2", steps=6))
    before = lines(tmp_path)
    for line in before:
        for key in (
            "loss",
            "velocity",
            "class_velocity",
            "alignment",
            "grad_norm",
            "lr",
            "images_per_second",
            "data_wait",
            "ema_distance",
            "peak_memory_gib",
            "hours_left",
            "mfu",
            "velocity_t1",
            "alignment_t4",
        ):
            assert key in line, key
        assert 0 <= line["data_wait"] <= 1 and line["images_per_second"] > 0 and line["ema_distance"] > 0
    assert before[-1]["hours_left"] == 0
    file = tmp_path / "run/metrics.jsonl"
    with file.open("a") as stream:
        stream.write('{"step": 7, "loss": 0.1}\n{"step": 8, "lo')
    train.main(flags(tools["data"], tmp_path, "--checkpointing-steps", "2", steps=8))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))
    assert lines(tmp_path)[:6] == before and lines(tmp_path)[6]["loss"] != 0.1


def test_previews_and_frechet_distance(tools, tmp_path, monkeypatch, capsys):
    """A grid after every interval, from fixed noise and labels; the distance in the same curves; both by the EMA's VAE; in a
    log file a line at the end of each."""
    from PIL import Image

    from evaluations.features import Extractor
    from training import previews

    seen, allowed = [], set()
    original = previews.sample

    def sample(network, interpolant, labels, index, **rest):
        state = original(network, interpolant, labels, index, **rest)
        seen.append((labels.tolist(), index.tolist(), rest["seed"], state.latent))
        allowed.add(("samples", torch.backends.cuda.matmul.allow_tf32))
        return state

    def extract(self, pixels):
        allowed.add(("features", torch.backends.cuda.matmul.allow_tf32))
        return read(self, pixels)

    read = Extractor.__call__
    monkeypatch.setattr(previews, "sample", sample)
    monkeypatch.setattr(Extractor, "__call__", extract)
    reference = tmp_path / "reference.npz"
    np.savez(reference, arr_0=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    train.main(
        flags(
            tools["data"],
            tmp_path,
            "--sampling-steps",
            "3",
            "--preview-steps",
            "4",
            "--eval-every",
            "2",
            "--eval-samples",
            "40",
            "--eval-reference",
            str(reference),
            "--eval-training",  # the held-out images themselves: no sample is nearer to it
            str(reference),
            "--eval-features",
            f"timm:{tools['encoder']}",
            "--learning-rate",
            "0.01",
            "--ema-decay",
            "0.5",
        )
    )
    assert sorted(p.name for p in (tmp_path / "run/previews").iterdir()) == ["step_0000003.png", "step_0000004.png"]
    image = Image.open(tmp_path / "run/previews/step_0000003.png")
    assert image.width == 8 * (64 + 4) and image.height == 2 * (64 + 28)
    assert allowed == {("samples", True), ("features", False)}  # TF32, where it is an NVIDIA GPU
    grids = [entry for entry in seen if len(entry[0]) == 16]
    assert grids[0][:3] == grids[1][:3] and not torch.equal(grids[0][3], grids[1][3])  # the network has moved
    measured = {line["step"]: line.get("fd") for line in lines(tmp_path)}
    assert measured[1] is None and measured[3] is None and measured[2] > 0 and measured[4] > 0
    assert measured[2] != measured[4] and lines(tmp_path)[3]["nearer_to_training"] == 0
    said = capsys.readouterr().err.splitlines()
    for words, times in (
        ("preview of step 3: 100%", 1),
        ("preview of step 4: 100%", 1),
        ("training: 100%", 1),
        ("| 4/4 ", 3),
        (f"reference {reference}: 100%", 1),
        (f"training images {reference}: 100%", 1),
        ("| 40/40 ", 2),
        ("| 8/8 ", 2),
        ("sampling 40 images for the Frechet distance: 100%", 2),
    ):
        assert sum(words in line for line in said) == times, (words, said)


def test_preview_labels_and_nearest_classes():
    """Few classes repeat, many are spread; the nearest class is the one of the largest cosine, whatever the length."""
    assert preview_labels(3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert preview_labels(1000, 4).tolist() == [0, 250, 500, 750]
    means = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert nearest_class(torch.tensor([[3.0, 2.9], [0.1, 0.2]]), means).tolist() == [0, 1]


def test_a_full_disk_does_not_end_the_log(tools, tmp_path, capsys, monkeypatch):
    """A line that cannot be written is reported once; training goes on."""
    failing = {"count": 0}

    def write(self, line):
        failing["count"] += 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tracker, "_write", write)
    train.main(flags(tools["data"], tmp_path))
    assert failing["count"] == 4
    assert len(re.findall("could not be written", capsys.readouterr().out)) == 1
    assert (tmp_path / "run/checkpoints/0000004/ema.safetensors").is_file()


def test_utilization_is_the_share_of_the_peak(monkeypatch):
    """An H200's dense bf16 peak is 989.5 TFLOP/s: two of them at 500 do a good half of it; float32 runs at the TF32 rate."""
    processes = Processes.__new__(Processes)
    processes.device, processes.precision = torch.device("cuda"), "bf16"
    monkeypatch.setattr(Processes, "world", 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert processes.utilization(1e15) == pytest.approx(1000 / (2 * GPUS["H200"].tflops))
    assert GPUS["H200"].tflops == pytest.approx(989, abs=1)
    names = {
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA A10": "A10",
        "NVIDIA A10G": None,
        "NVIDIA L4": "L4",
        "NVIDIA L40": None,
        "NVIDIA L40S": "L40S",
        "NVIDIA H100 80GB HBM3": "H100",
        "Tesla V100-SXM2-32GB": "V100",
        "Tesla T4": "T4",
        "NVIDIA GeForce RTX 3090": "RTX3090",
        "NVIDIA RTX A6000": "A6000",
        "rtx-5090": "RTX5090",
    }
    assert {name: named_gpu(name) for name in names} == names
    processes.precision = "fp32"
    assert processes.utilization(1e15) == pytest.approx(2 * 1000 / (2 * GPUS["H200"].tflops))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Other GPU")
    assert processes.utilization(1e15) is None
    processes.device = torch.device("cpu")
    assert processes.utilization(1e15) is None
