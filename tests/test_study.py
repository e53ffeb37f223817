"""The study: its plan, its raw results, and a whole level at tiny size."""

import os
import signal
import subprocess
import sys
import threading
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

import study.derive
import study.images
from common.lock import FolderLock
from config import UserError, parse
from dataset import PackedDataset
from models.guidance import Guidance
from packed.format import read_class_means
from study import judge as judging
from study import lite
from study import run as running
from study.judge import Judge
from study.ledger import Ledger
from study.plan import EMA, NO_TEACHER, RAW, ROWS, TOKENS, Spec, runs
from study.run import Study, guidance_of, selected
from study.settings import LEVELS, recipe
from tests import tiny, toy_images
from tests.toy_study import Toy, settings, toy_settings
from training.assumed import assumed_manifest
from training.plan import make_plan
from training.settings import TrainConfig

ROOT = Path(__file__).parents[1]


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
    with pytest.raises(UserError, match="out holds no pixels, which --encoder reads: pack it with --pixels"):
        study.derive.derive(tmp_path / "out", tmp_path / "none", encoder=folder)
    assert not (tmp_path / "none").exists()


def test_the_mean_is_that_of_the_encoder_that_reads(tmp_path):
    """--encoder with --token mean: the mean of the patch tokens that this encoder gives."""
    source = tiny.write_dataset(tmp_path / "source", pixels=True)
    encoder = tiny.write_encoder(tmp_path / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.derive, "GRID", 2)
        study.derive.derive(source, tmp_path / "out", encoder=encoder, token="mean")
    found = PackedDataset(tmp_path / "out")[range(20)]
    means = found.patch_tokens[0].float().mean(1)
    torch.testing.assert_close(found.class_token[0].float(), means, rtol=1e-3, atol=1e-3)


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
    images = tmp_path / "images.npz"
    np.savez(images, arr_0=toy_images.pixels(4, 8))
    packed = tiny.write_dataset(tmp_path / "packed")
    for flags in (
        ("--resolution", "16"),
        ("--vae-steps", "7"),
        ("--spaces", "timm:resnet18"),
        ("--train-images", str(images)),
        ("--packed", str(packed)),
    ):
        others.append(Study(settings(tmp_path, *flags)).key(spec, 2))
    assert len({key, *others}) == 1 + len(others)
    assert key == Study(settings(tmp_path, "--held-out", str(images))).key(spec, 2)  # samples are not judged by them


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Settings of the toy level."""
    monkeypatch.setattr(running, "Level", Toy)
    return lambda *extra: toy_settings(tmp_path, *extra)


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
    costs = [x["cpu_seconds"]["training"] for x in lines if x["row"] == "reg"]
    assert costs[0] > 0 and costs[1:] == [None] * 3  # resumed where they are judged
    assert guidance_of(lines[-1]["weights"]) == Guidance(2, 1, high=0.8) and guidance_of(RAW).off
    before = ledger.path.read_text()
    running.study(toy())
    assert ledger.path.read_text() == before
    ledger.path.unlink()
    running.study(toy())
    again = {x["key"]: x["metrics"] for x in ledger.lines() if "step" in x}
    assert {x["key"]: x["metrics"] for x in lines} == again


def test_nothing_is_judged_in_tf32(toy, monkeypatch):
    """Whoever makes a study: the features of the training images are kept, for all later judgements."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Study(toy())
    assert not torch.backends.cudnn.allow_tf32


def test_a_level_is_prepared_by_one_program_at_a_time(toy, capsys):
    """Another one that starts waits until the stages are finished, and does not run them, too."""
    works, inside = [Study(toy()) for _ in range(2)], []

    def stages(spec, runner):
        inside.append(len(inside))
        assert len(inside) == 1
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        inside.clear()

    for work in works:
        object.__setattr__(work.level, "prepare", stages)
    object.__setattr__(works[1].level, "prepare", lambda spec, runner: inside.append("second"))
    waiting = threading.Thread(target=works[1].prepare, args=(None,))
    works[0].prepare(None)
    waiting.join(10)
    assert inside == ["second"] and capsys.readouterr().out.count("waiting for it") == 1


def test_a_run_that_another_program_has_is_left_out(toy, tmp_path, capsys):
    """One that it trains now, and one that it finished between the look at the results and the lock."""
    work = Study(toy())
    spec = runs(work.settings)[0]
    with closing(FolderLock(work.out / "locks", f"{spec.name}.lock", "")):
        work.run(spec)
    assert f"in use by process {os.getpid()}" in (said := capsys.readouterr().out)
    assert f"{spec.name} is left out here" in said
    for key in work.wanted(spec).values():
        work.ledger.append({"key": key})
    work.run(spec)
    assert not (work.out / "runs").exists()


@pytest.mark.parametrize(("classes", "named"), [(3, True), (5, False), (0, False)])
def test_classes_are_named_by_a_network_that_has_them(tmp_path, monkeypatch, classes, named):
    """By none of ImageNet's, and by none without a head."""
    np.savez(tmp_path / "train.npz", arr_0=toy_images.pixels(20, 8), arr_1=np.arange(20) % 3)
    network = toy_images.save_vit(tmp_path / "network", classes=classes)
    given = (tmp_path / "train.npz", (f"timm:{network}",), torch.device("cpu"), 10)
    judge = Judge(*given, tmp_path / "features")
    pixels = torch.from_numpy(toy_images.pixels(12, 8, seed=1)).permute(0, 3, 1, 2)
    metrics = judge.images(pixels, torch.arange(12) % 3)
    assert ("class_accuracy" in metrics) == named and "fd_network" in metrics
    monkeypatch.setattr(judging, "collect", None)  # the features of the training images are kept
    assert Judge(*given, tmp_path / "features").images(pixels, torch.arange(12) % 3) == metrics


@pytest.mark.slow
def test_two_ranks_give_the_lines_of_one(tmp_path, monkeypatch):
    """torchrun with two gloo processes: the same keys and, but for the arithmetic, numbers; both leave a held run out."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(running, "Level", Toy)
    running.study(one := toy_settings(tmp_path / "one", "--only", "reg"))
    work = Study(toy_settings(tmp_path / "two"))
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "tests.toy_study", str(tmp_path / "two")]
    with closing(FolderLock(work.out / "locks", f"{runs(work.settings)[0].name}.lock", "")):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sit-seed0 is left out here" in done.stdout
    expected, found = ({x["key"]: x["metrics"] for x in w.ledger.lines()} for w in (Study(one), work))
    assert expected.keys() == found.keys()
    assert len(found) == len(work.ledger.lines())
    for key, metrics in found.items():
        distances = {name: value for name, value in metrics.items() if name.startswith("fd_")}
        assert distances == pytest.approx({name: expected[key][name] for name in distances}, rel=0.02)


def test_rows_are_the_recipes_of_the_paper():
    """On ImageNet the flags of a row turn REG's recipe into that of SiT, REPA and the token alone; all of them plan."""
    level = recipe("imagenet")

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
    level = recipe(name, "--out", str(tmp_path), "--results", str(ROOT / "study" / "results"))
    work, specs = Study(level), runs(level)
    assert level.headline in level.steps and list(level.steps) == sorted(level.steps)
    keys = [key for spec in specs for key in work.wanted(spec).values()]
    assert {line["key"] for line in work.ledger.lines() if "step" in line} <= set(keys)
    assert len(set(keys)) == len(keys) and len({(spec.name, spec.guided) for spec in specs}) == len(specs)
    train = work.train_settings(specs[0])
    assert train.max_train_steps == level.steps[-1]
    assert train.compile == level.compile and not train.allow_tf32  # a GPU's rows differ from a CPU's by rounding


def test_images_of_a_zip(tmp_path):
    """Classes are numbered by name; every image is there at the size that was asked for, or the first ones of each class."""
    (tmp_path / "zips").mkdir()
    for part, names in (("train", ("b/1", "a/2", "a/1")), ("test", ("b/9",))):
        with zipfile.ZipFile(tmp_path / "zips" / f"mnist-{part}.zip", "w") as archive:
            for number, name in enumerate(names):
                toy_images.write_mixed(tmp_path / f"{part}{number}", sizes=((14, 14),))
                archive.write(tmp_path / f"{part}{number}" / "0.png", f"{name}.png")
    assert study.images.write("mnist", tmp_path / "out", 16, tmp_path / "zips") == {"train": 3, "test": 1}
    with np.load(tmp_path / "out" / "train.npz") as found:
        assert found["arr_0"].shape == (3, 16, 16, 3) and found["arr_1"].tolist() == [0, 0, 1]
        few = study.images.write("mnist", tmp_path / "few", 16, tmp_path / "zips", per_class=4)
        assert few == {"train": 3, "test": 1}
        labels = [label for label, _ in study.images.first([(c, None) for c in "abaabb"], 2)]
        assert labels == ["a", "b", "a", "b"]
    with pytest.raises(UserError, match=r"mnist-train\.zip does not exist"):
        study.images.write("mnist", tmp_path / "none", 16, tmp_path)
