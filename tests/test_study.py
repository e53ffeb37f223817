"""The study: its plan, its raw results, and a whole level at tiny size."""

import os
import signal
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import study.derive
import study.images
from config import UserError, parse
from dataset import PackedDataset
from models.guidance import Guidance
from packed.format import read_class_means, read_manifest, write_manifest
from study import lite
from study import run as running
from study.curves import HIGHER, LOWER, SPREAD, UNKNOWN, Curves, first_pass
from study.ledger import Ledger
from study.levels import Level
from study.plan import NO_TEACHER, ROWS, TOKENS, Spec, runs
from study.report import report
from study.run import EMA, RAW, Study, guidance_of, selected
from study.settings import LEVELS, ReportConfig, StudyConfig
from tests import tiny, toy_images
from training.assumed import assumed_manifest
from training.plan import make_plan
from training.settings import TrainConfig

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--resolution",
    "8",
    "--level",
    "digits",
    "--train",
    "recipes/digits.yaml",
    "--ema-decay",
    "0.9",
    "--samples",
    "40",
    "--headline",
    "2",
)


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


WRONG = (
    "unlabelled supervised sit",
    "dark supervised sit 0",
    "labelled supervised vit 0",
    "labelled:x supervised sit 0",
)


@pytest.mark.parametrize("line", WRONG)
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


def test_derived_datasets_hold_what_their_words_say(tmp_path):
    """One label, and the class token as the mean of the patches, as zeros, or times a factor; all else stays."""
    source = PackedDataset(tiny.write_dataset(tmp_path / "source", count=20))
    every = range(20)
    tokens, patches = source[every].class_token[0].float(), source[every].patch_tokens[0].float()
    expected = {
        "token-mean": patches.mean(1),
        "token-empty": 0 * tokens,
        "token-x0.5": tokens / 2,
        "token-x2": 2 * tokens,
    }
    for word, flags in TOKENS.items():
        folder = tmp_path / word
        command = ["-m", "study.derive", str(source.directory), str(folder), *flags]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [command[1], *command[2:]])
            study.derive.main()
        found = PackedDataset(folder)[every]
        if word == "token-rms":
            assert found.class_token[0].float().square().mean() == pytest.approx(1, rel=1e-3)
        else:
            torch.testing.assert_close(found.class_token[0].float(), expected[word], rtol=1e-3, atol=1e-3)
        assert torch.equal(found.moments, source[every].moments) and torch.equal(found.label, source[every].label)
    study.derive.derive(source.directory, tmp_path / "one", one_class=True)
    one = PackedDataset(tmp_path / "one")
    assert one.manifest.classes == ["image"] and not one.labels().any()
    assert torch.equal(one[every].class_token[0], source[every].class_token[0])
    means = read_class_means(one.directory, one.manifest)
    np.testing.assert_allclose(means[0], tokens.mean(0), atol=1e-3)


def test_a_convolutional_teacher(tmp_path):
    """Tokens of unit variance on leading directions, read back from its folder, and derived from the stored pixels."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    network, folder = timm.create_model("tf_efficientnet_lite0"), tmp_path / "efficientnet-lite0"
    save_for_hf(network, folder)
    source = PackedDataset(tiny.write_dataset(tmp_path / "source", count=20, pixels=True))
    pixels = source[range(20)].pixels.permute(0, 3, 1, 2)
    lite.save_directions(folder, lite.fit(network, pixels))
    tokens = lite.load_teacher(str(folder), 4)(pixels)
    assert tokens.patch_tokens.shape[:2] == (20, 16) and tokens.class_token.shape == tokens.patch_tokens.shape[::2]
    torch.testing.assert_close(tokens.class_token, tokens.patch_tokens.mean(1))
    assert tokens.class_token.mean(0).abs().max() < 1e-3
    spread = tokens.class_token.var(0)
    assert spread[0] == spread.max() and spread.sum().item() == pytest.approx(lite.DIRECTIONS, rel=1e-3)
    study.derive.derive(source.directory, tmp_path / "out", encoder=folder)
    found = PackedDataset(tmp_path / "out")
    assert found.manifest.encoders[0].name == str(folder) and "pixels" not in found.manifest.fields
    for ours, direct in zip((found[range(20)].class_token[0], found[range(20)].patch_tokens[0]), tokens):
        torch.testing.assert_close(ours.float(), direct, rtol=2e-3, atol=2e-2)


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
        if self.train_images.exists():
            return
        self.train_images.parent.mkdir(parents=True)
        for file, count in ((self.train_images, 30), (self.held_out, 12)):
            np.savez(file, arr_0=toy_images.pixels(count, 8), arr_1=np.arange(count) % 3)
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
        lines = ("labelled supervised sit,reg 0", "labelled supervised reg 0 guided")
        return settings(tmp_path, *flags, "--guidance", "2 1 0.8", lines=lines, **changes)

    return made


def test_a_level_from_end_to_end(toy, monkeypatch, capsys):
    """A line for each row and checkpoint; a study that was told to stop, then cut off, goes on where it was, to the numbers
    of one that was not."""
    ledger = running.Study(toy()).ledger
    judged, cut = Study.judged, []

    def once(self, spec, run, *rest):
        if spec.row == "reg" and len(cut) < 2:
            cut.append(run.step)
            if len(cut) == 2:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        judged(self, spec, run, *rest)

    monkeypatch.setattr(Study, "judged", once)
    with pytest.raises(SystemExit) as stopped:
        running.study(toy())
    assert stopped.value.code == 143 and cut == [2]
    with pytest.raises(KeyboardInterrupt):
        running.study(toy())
    assert cut == [2, 4]
    running.study(toy())
    assert "resuming from" in capsys.readouterr().out
    lines = [line for line in ledger.lines() if "step" in line]
    assert [(x["row"], x["step"], x["weights"]) for x in lines] == [
        *((row, *one) for row in ("sit", "reg") for one in ((2, EMA), (4, EMA), (4, RAW))),
        ("reg", 4, "ema guided 2 1 0.8"),
    ]
    assert {x["row"] for x in ledger.lines()} >= {"held-out", "reconstructions", "oracle token", "teacher"}
    reg = lines[-1]["metrics"]
    assert reg.keys() >= {"fd_judge", "mind_judge", "class_accuracy", "token_cosine", "token_fd", "cknna"}
    assert "token_fd" not in lines[0]["metrics"] and lines[0]["teacher"] == NO_TEACHER
    assert guidance_of(lines[-1]["weights"]) == Guidance(2, 1, high=0.8) and guidance_of(RAW).off
    before = ledger.path.read_text()
    running.study(toy())
    assert ledger.path.read_text() == before
    ledger.path.unlink()
    running.study(toy())
    again = {x["key"]: x["metrics"] for x in ledger.lines() if "step" in x}
    assert {x["key"]: x["metrics"] for x in lines} == again


def test_the_page_is_what_the_raw_results_give(tmp_path):
    """docs/reproduction.md holds no number that its own command does not write."""
    page = tmp_path / "reproduction.md"
    report(ReportConfig(page=page))
    assert page.read_text() == (ROOT / "docs" / "reproduction.md").read_text(), "run `python -m study report`"
    for picture in tmp_path.glob("images/*"):
        assert (ROOT / "docs" / "images" / picture.name).is_file()


def lines_of(values, row="reg", data="unlabelled", teacher="supervised", steps=(100, 200, 400)):
    """Raw results: one list of FDs over the steps for each seed."""
    head = {"data": data, "teacher": teacher, "row": row, "weights": EMA, "train_flops_per_image": 10}
    return [
        {**head, "seed": seed, "step": step, "metrics": {"fd_judge": value}}
        for seed, curve in enumerate(values)
        for step, value in zip(steps, curve)
    ]


def test_when_a_value_is_reached():
    """EP@k on a curve that is linear in log(step) is exact between checkpoints; rising curves are the same upside down."""
    steps, curve = [100, 300, 900], lambda step: 20 - 3 * np.log(step)
    values = [curve(step) for step in steps]
    for step in (150, 300, 899):
        assert first_pass(steps, values, curve(step)) == pytest.approx(step)
        assert first_pass(steps, [-v for v in values], -curve(step), larger=True) == pytest.approx(step)
    assert first_pass(steps, values, curve(950)) is None and first_pass(steps, values, curve(50)) == 100


def test_curves_compare_the_seeds_that_both_have():
    """A row without a teacher stands beside each; a difference counts if no value of one reaches those of the other."""
    sit = lines_of([[9, 8, 5], [9.5, 7, 4], [8.8, 7.5, 5]], "sit", teacher=NO_TEACHER)
    curves = Curves(
        [*sit, *lines_of([[9, 6, 4.5], [9.2, 6.5, 4.4], [9, 6.2, 4.2]]), {"row": "held-out", "metrics": {}}], EMA
    )
    plain, reg = curves.row("unlabelled", "supervised", "sit"), curves.row("unlabelled", "supervised", "reg")
    assert plain.teacher == NO_TEACHER and curves.steps(reg) == [100, 200, 400]
    verdicts = [curves.verdict(reg, plain, step, "fd_judge") for step in (100, 200, 400, 800)]
    assert verdicts == [SPREAD, LOWER, SPREAD, UNKNOWN] and curves.verdict(plain, reg, 200, "fd_judge") == HIGHER
    assert curves.at(plain, 200, "fd_judge") == {0: 8, 1: 7, 2: 7.5}
    passed = curves.passes(reg, "fd_judge", 6.5)
    assert passed[1] == pytest.approx(200) and 100 < passed[0] < 200


def test_rows_are_the_recipes_of_the_paper():
    """On ImageNet the flags of a row turn REG's recipe into that of SiT, REPA and the token alone; all of them plan."""
    level = parse(StudyConfig, "", ["--config", str(ROOT / "recipes/study/imagenet.yaml")])

    def planned(*flags):
        settings = parse(TrainConfig, "", [*flags, "--dry-run", "--assume", "imagenet256"])
        plan = make_plan(settings, assumed_manifest(settings))
        return plan.network, plan.objective, plan.fields

    named = {"sit": "sit-b2", "token": "token-only-b2", "repa": "repa-b2", "reg": "reg-b2"}
    for row in dict.fromkeys(spec.row for spec in runs(level)):
        ours = planned("--config", str(ROOT / level.train), *ROWS[row])
        if row in named:
            assert ours == planned("--config", str(ROOT / "recipes" / f"{named[row]}.yaml")), row


@pytest.mark.parametrize("name", LEVELS)
def test_recipes_can_be_read(name, tmp_path):
    """Every run of every level has settings of train.py, a folder of its own, and one key for each judgement."""
    level = parse(
        StudyConfig, "", ["--config", str(ROOT / "recipes" / "study" / f"{name}.yaml"), "--out", str(tmp_path)]
    )
    work, specs = Study(level), runs(level)
    assert level.headline in level.steps and list(level.steps) == sorted(level.steps)
    keys = [key for spec in specs for key in work.wanted(spec).values()]
    assert len(set(keys)) == len(keys) and len({(spec.name, spec.guided) for spec in specs}) == len(specs)
    assert work.train_settings(specs[0]).max_train_steps == level.steps[-1]


def test_images_of_a_zip(tmp_path):
    """Classes are numbered by name; every image is there at the size that was asked for."""
    (tmp_path / "zips").mkdir()
    for part, names in (("train", ("b/1", "a/2", "a/1")), ("test", ("b/9",))):
        with zipfile.ZipFile(tmp_path / "zips" / f"mnist-{part}.zip", "w") as archive:
            for number, name in enumerate(names):
                toy_images.write_mixed(tmp_path / f"{part}{number}", sizes=((14, 14),))
                archive.write(tmp_path / f"{part}{number}" / "0.png", f"{name}.png")
    assert study.images.write("mnist", tmp_path / "out", 16, tmp_path / "zips") == {"train": 3, "test": 1}
    with np.load(tmp_path / "out" / "train.npz") as found:
        assert found["arr_0"].shape == (3, 16, 16, 3) and found["arr_1"].tolist() == [0, 0, 1]
    with pytest.raises(UserError, match=r"mnist-train\.zip does not exist"):
        study.images.write("mnist", tmp_path / "none", 16, tmp_path)
