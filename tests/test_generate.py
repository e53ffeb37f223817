"""generate.py from a model file to samples.npz: the same images whatever happens on the way."""

import errno
import io
import json
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import generate as program
from config import UserError, parse
from generate import SampleConfig, check, requested
from models.model_file import ModelInfo, save_model
from models.sit import SiT, SiTConfig
from sampling import job as jobs
from sampling.assemble import is_finished
from sampling.job import Request, load
from sampling.parts import Parts, check_space, write_samples
from sampling.processes import Process

ROOT = Path(__file__).parents[1]
CONFIG = SiTConfig(
    depth=1, hidden_size=32, num_heads=2, input_size=4, num_classes=5, class_token_dim=6, align_dims=(), align_depth=1
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small VAE (8 x 8 pixels from 4 x 4 latents) and a model file `m` of random weights."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
        scaling_factor=0.5,
    ).save_pretrained(folder / "vae")
    write_model(folder, "m", CONFIG)
    return folder


def write_model(folder, name, config, seed=0, means=True, **changes):
    torch.manual_seed(seed)
    network = SiT(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    info = ModelInfo(config, "linear", 8, str(folder / "vae"), {"scale": (0.5,), "bias": (0.0,), "order": "bias_scale"})
    tokens = torch.randn(config.num_classes, max(config.class_token_dim, 1)) if means else None
    save_model(folder / name, network.state_dict(), replace(info, **changes), tokens)


def flags(place, out, *more):
    return ["--checkpoint", str(place / "m"), "--out", str(out), "--num-fid-samples", "11", "--num-steps", "4", *more]


def generate(place, out, *more):
    """Run in this process; the images and labels."""
    settings = parse(SampleConfig, "", flags(place, out, *more))
    check(settings)
    jobs.generate(Request(**requested(settings)), say=print)
    return samples(out)


def samples(out):
    with np.load(out / "samples.npz", allow_pickle=False) as stream:
        return stream["arr_0"], stream["arr_1"]


def loaded(place, *more):
    """A job ready to sample, in this process."""
    settings = parse(SampleConfig, "", flags(place, place / "unused", *more))
    return load(Request(**requested(settings)), Process(0, 1, torch.device("cpu")))


# ------------------------------------------------------------------------------------------------------------ files


def test_what_it_writes(place, tmp_path):
    """The npz in ADM's labelled form, the sidecar with every setting and what it cost, grid, gallery, tokens, PNGs."""
    from PIL import Image

    out = tmp_path / "s"
    images, labels = generate(
        place, out, "--cfg-scale", "2", "--guidance-high", "0.6", "--class-tokens", "--png", "--labels", "balanced"
    )
    assert images.shape == (11, 8, 8, 3) and images.dtype == np.uint8 and len(np.unique(images)) > 50
    assert labels.dtype == np.int64 and labels.tolist() == [i % 5 for i in range(11)]
    assert sorted(p.name for p in out.iterdir()) == [
        "class_token_labels.npy",
        "class_tokens.npy",
        "gallery.html",
        "grid.png",
        "png",
        "samples.json",
        "samples.npz",
    ]
    sidecar = json.loads((out / "samples.json").read_text())
    expected = {
        "schema": 1,
        "n": 11,
        "seed": 0,
        "mode": "sde",
        "solver": "euler",
        "steps": 4,
        "nfe": 4,
        "forwards": 6,
        "cfg_scale": 2.0,
        "cls_cfg_scale": 2.0,
        "guidance_low": 0.0,
        "guidance_high": 0.6,
        "labels": "balanced",
        "uint8_rule": "truncate",
        "dtype": "fp32",
        "vae": str(place / "vae"),
    }
    assert {key: sidecar[key] for key in expected} == expected  # times 1, .68, .36, .04: guided in two
    assert len(sidecar["checkpoint_sha256"]) == 64 and sidecar["versions"]["torch"] == torch.__version__.split("+")[0]
    tokens = np.load(out / "class_tokens.npy")
    assert tokens.shape == (11, 6) and tokens.dtype == np.float32 and np.load(out / "class_token_labels.npy").max() < 5
    for i in (0, 10):
        assert np.array_equal(np.asarray(Image.open(out / "png" / f"{i:06d}.png")), images[i])
    assert Image.open(out / "grid.png").size == (8 * (64 + 4), 2 * (64 + 28)), "8 columns, captions of two lines"
    page = (out / "gallery.html").read_text()
    assert page.count("<figure>") == 11 and "sample 10" in page and sidecar["checkpoint_sha256"] in page


def test_the_model_file_says_everything(place, tmp_path):
    """No class token slot, cosine path: known from the file, no flag for it."""
    config = replace(CONFIG, class_token_dim=0)
    write_model(place, "plain", config, means=False, path="cosine")
    images, _ = generate(place, tmp_path / "s", "--checkpoint", str(place / "plain"))
    assert images.shape == (11, 8, 8, 3)
    assert loaded(place, "--checkpoint", str(place / "plain")).sampler.interpolant.path == "cosine"


def test_published_meaning_of_class_scale_zero():
    """0: the class token is not guided; unset: as the latent."""
    base = ["--checkpoint", "c", "--out", "o", "--cfg-scale", "2.3"]
    for extra, scale in (([], 2.3), (["--cls-cfg-scale", "0"], 1.0), (["--cls-cfg-scale", "1.5"], 1.5)):
        guidance = requested(parse(SampleConfig, "", [*base, *extra]))["guidance"]
        assert guidance.scales(0.5) == (2.3, scale)


def test_every_flag_reaches_the_job():
    """Each setting changes the request that is carried out."""
    base = SampleConfig(Path("c"), Path("o"))
    different = {
        "checkpoint": Path("d"),
        "out": Path("p"),
        "labels": ("balanced",),
        "classes": ("1",),
        "mode": "ode",
        "solver": "dpmpp",
        "time_grid": "shifted",
        "diffusion": "sigma",
        "last_step": "ode",
        "cls_cfg_scale": 2.0,
        "cls_guidance_low": 0.5,
        "cls_guidance_high": 0.5,
        "guide_checkpoint": Path("g"),
        "like": ("a.png",),
        "device": "cpu",
        "dtype": "bf16",
        "vae": "v",
        "vae_dtype": "fp16",
        "t_last": 0.1,
        "guidance_low": 0.5,
        "preset": "paper",
    }
    for field in fields(SampleConfig):
        value = getattr(base, field.name)
        if field.name in ("shift", "heun"):  # valid only together with another
            start = replace(base, time_grid="shifted") if field.name == "shift" else replace(base, mode="ode")
        else:
            start = base
        new = different.get(field.name, not value if isinstance(value, bool) else None)
        if new is None:
            new = value / 2 if isinstance(value, float) else value + 1
        changed = replace(start, **{field.name: new})
        assert asdict(Request(**requested(changed))) != asdict(Request(**requested(start))), field.name


# -------------------------------------------------------------------------------------------- the same images always


@pytest.mark.parametrize("size", [1, 4, 5])
def test_batch_size_changes_no_image(place, size):
    """States of guided SDE samples agree to 1e-5 between one batch and batches of 1, 4 and 5; starts exactly."""
    job = loaded(place, "--cfg-scale", "2")
    _, whole = job.sample(range(0, 11))
    for start in range(0, 11, size):
        stop = min(start + size, 11)
        _, part = job.sample(range(start, stop))
        for a, b in zip(part.state, whole.state, strict=True):
            assert (a - b[start:stop]).abs().max() <= 1e-5


@pytest.fixture(scope="module")
def unbroken(place, tmp_path_factory):
    """The reference of the tests below: one process, one go."""
    out = tmp_path_factory.mktemp("unbroken") / "s"
    generate(place, out, "--class-tokens")
    return out


@pytest.mark.parametrize("world", [2, 3])
def test_number_of_processes_changes_no_image(place, unbroken, tmp_path, world):
    """torchrun with 2 and 3 gloo processes and another batch size: the same file, but for the last bit of arithmetic."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc_per_node={world}"]
    done = subprocess.run(
        [*torchrun, "generate.py", *flags(place, tmp_path / "s", "--per-proc-batch-size", "4", "--class-tokens")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["processes"] == world
    for a, b in zip(samples(tmp_path / "s"), samples(unbroken), strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1
    tokens = [np.load(folder / "class_tokens.npy") for folder in (tmp_path / "s", unbroken)]
    assert np.abs(tokens[0] - tokens[1]).max() <= 1e-5
    assert "11/11" in done.stderr, "the bar counts all processes' samples"


# ------------------------------------------------------------------------------------------------------- resumption


def test_what_is_missing_is_completed(place, unbroken, tmp_path):
    """Finished parts are kept and not made again, also by another batch size; the result is the same to the byte."""
    out = tmp_path / "s"
    generate(place, out, "--per-proc-batch-size", "3", "--keep-parts")
    parts = sorted((out / "parts").glob("part-*.npz"))
    assert [p.name for p in parts[:2]] == ["part-000000000-000000003.npz", "part-000000003-000000006.npz"]
    kept = parts[0].stat().st_mtime_ns
    parts[1].unlink()
    parts[3].write_bytes(parts[3].read_bytes()[:500])  # cut short
    (out / "parts" / "part-000000006-000000009.npz.tmp").write_text("half")
    for file in ("samples.npz", "samples.json"):
        (out / file).unlink()
    generate(place, out, "--per-proc-batch-size", "32", "--keep-parts")
    assert parts[0].stat().st_mtime_ns == kept
    assert (out / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()
    assert not list((out / "parts").glob("*.tmp"))


def test_a_damaged_part_is_made_again(place, unbroken, tmp_path):
    """A flipped bit is found by the checksum, the part removed, and the same command mends it."""
    out = tmp_path / "s"
    generate(place, out, "--keep-parts", "--per-proc-batch-size", "4")
    part = out / "parts" / "part-000000004-000000008.npz"
    content = bytearray(part.read_bytes())
    content[400] ^= 1
    part.write_bytes(content)
    (out / "samples.json").unlink()
    with pytest.raises(
        ValueError, match=r"part-000000004-000000008.npz was damaged and has been removed; run the same"
    ):
        generate(place, out, "--keep-parts")
    generate(place, out)
    assert (out / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()
    assert not (out / "parts").exists()


def test_more_samples_continue_from_the_parts(place, unbroken, tmp_path):
    """5 samples with parts kept, then 11: the first five are not made again."""
    out = tmp_path / "s"
    generate(place, out, "--num-fid-samples", "5", "--keep-parts")
    assert len(samples(out)[0]) == 5
    generate(place, out)
    assert (out / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()


def test_files_asked_for_later_are_written_from_the_parts(place, tmp_path):
    """With the parts kept, PNGs and tokens need no new sampling; without them there is nothing to make them from."""
    out = tmp_path / "s"
    generate(place, out, "--keep-parts")
    part = next((out / "parts").glob("part-*"))
    before = part.stat().st_mtime_ns
    generate(place, out, "--keep-parts", "--png", "--class-tokens")
    assert part.stat().st_mtime_ns == before and len(list((out / "png").glob("*.png"))) == 11
    shutil.rmtree(out / "parts")
    shutil.rmtree(out / "png")
    with pytest.raises(ValueError, match="is finished without png and its parts are gone"):
        generate(place, out, "--png")


def test_a_finished_folder_is_left_alone(place, unbroken, capsys):
    before = (unbroken / "samples.npz").stat().st_mtime_ns
    generate(place, unbroken)
    assert (unbroken / "samples.npz").stat().st_mtime_ns == before
    assert "is complete: 11 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed", "1"], "made with seed = 0, this command says 1"),
        (["--cfg-scale", "2"], "made with cfg_scale = 1.0, this command says 2.0"),
        (["--num-steps", "5"], "made with steps = 4, this command says 5"),
        (["--labels", "balanced"], "made with labels = random, this command says balanced"),
        (["--num-fid-samples", "12"], "is finished with 11 samples and its parts are gone"),
    ],
)
def test_settings_never_mix_in_one_folder(place, unbroken, tmp_path, change, words):
    """Neither in a finished folder nor in one with parts."""
    with pytest.raises(ValueError, match=words):
        generate(place, unbroken, *change)
    if change[0] != "--num-fid-samples":
        parts = Parts(tmp_path / "s" / "parts")
        parts.begin(loaded(place).identity)
        with pytest.raises(ValueError, match=words):
            generate(place, tmp_path / "s", *change)


def test_another_model_does_not_continue(place, unbroken):
    write_model(place, "other", CONFIG, seed=5)
    with pytest.raises(ValueError, match="made with checkpoint_sha256"):
        generate(place, unbroken, "--checkpoint", str(place / "other"))


@pytest.mark.slow
def test_killed_at_any_time(place, unbroken, tmp_path):
    """kill -9 after 2, 2.5, 3 ... seconds (start-up, sampling, assembly) until it is done: equal to the unbroken run."""
    out = tmp_path / "s"
    command = [sys.executable, "generate.py", *flags(place, out, "--per-proc-batch-size", "1", "--num-steps", "200")]
    reference = tmp_path / "whole"
    generate(place, reference, "--num-steps", "200", "--per-proc-batch-size", "1")
    kills, wait, between = 0, 2.0, 0
    while True:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, text = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills, wait = kills + 1, wait + 0.5
            between += 0 < sum(map(len, Parts(out / "parts").done())) < 11
            assert kills < 60
            continue
        assert process.returncode == 0, text
        break
    assert kills > 2 and between, "some were killed between the first and the last part"
    assert (out / "samples.npz").read_bytes() == (reference / "samples.npz").read_bytes()


@pytest.mark.slow
def test_killed_while_files_are_assembled(place, unbroken, tmp_path, monkeypatch):
    """Stopped before each file of the end: the next run makes the same npz."""
    from sampling import assemble

    for name in ("write_samples", "write_sheet", "write_gallery", "write_json"):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(assemble, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                generate(place, out)
        generate(place, out)
        assert (out / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()


# ------------------------------------------------------------------------------------------------------ disk, memory


def test_disk_need_is_checked_first(place, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"needs 0.0 GB of disk, 0.0 GB are free; give an --out elsewhere"):
        generate(place, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert check_space(tmp_path / "s" / "deeper", 999) == 1000


def test_a_full_disk_keeps_finished_work(place, unbroken, tmp_path, monkeypatch):
    """The disk fills up at the second part: one sentence; with space again the same command completes."""
    out, write = tmp_path / "s", np.savez
    with monkeypatch.context() as patch:
        calls = []

        def full(stream, **arrays):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(stream, **arrays)

        patch.setattr(np, "savez", full)
        with pytest.raises(ValueError, match=r"the disk is full at .*; finished samples are kept"):
            generate(place, out, "--per-proc-batch-size", "4")
    assert [r.stop for r in Parts(out / "parts").done()] == [4]
    generate(place, out, "--per-proc-batch-size", "4")
    assert (out / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()


def test_the_npz_is_streamed(tmp_path):
    """48 MB of samples in 16 parts are assembled with less than three parts in memory, and read back as they were."""
    parts = Parts(tmp_path / "parts")
    parts.begin({})
    for start in range(0, 256, 16):
        pixels = np.full((16, 256, 256, 3), start, dtype=np.uint8)
        parts.write(range(start, start + 16), {"pixels": pixels, "label": np.arange(start, start + 16)})
    del pixels
    tracemalloc.start()
    write_samples(tmp_path / "s.npz", parts, 250, (256, 256, 3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 16 * 256 * 256 * 3 + 2**20, f"{peak / 2**20:.1f} MiB"
    with np.load(tmp_path / "s.npz", allow_pickle=False) as stream:
        assert stream["arr_0"].shape == (250, 256, 256, 3) and stream["arr_1"].tolist() == list(range(250))
        assert stream["arr_0"][:, 0, 0, 0].tolist() == [i // 16 * 16 for i in range(250)]
    with zipfile.ZipFile(tmp_path / "s.npz") as archive:
        assert archive.testzip() is None and archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED


# ------------------------------------------------------------------------------------------------------- class token


def test_best_of_keeps_the_better_token(place):
    """Every kept token agrees with its label at least as well as the first candidate's; the cost counts all candidates."""
    from models.class_token import agreement

    one, three = loaded(place), loaded(place, "--best-of", "3")
    label, first = one.sample(range(0, 11))
    _, best = three.sample(range(0, 11))
    scores = [agreement(drawn.state.class_token, label, one.model.class_means) for drawn in (first, best)]
    assert (scores[1] >= scores[0]).all() and (scores[1] > scores[0]).any()
    assert (first.evaluations, best.evaluations, best.forwards) == (4, 12, 12)
    same = scores[1] == scores[0]
    assert torch.equal(best.state.latent[same], first.state.latent[same])


def test_a_given_token_stays_and_steers(place, tmp_path):
    """The token that comes out is the given one, it names the label, and another token gives other images."""
    tokens = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    np.save(tmp_path / "t.npy", tokens.numpy())
    job = loaded(place, "--like", f"{tmp_path}/t.npy")
    label, drawn = job.sample(range(0, 4))
    assert torch.equal(drawn.state.class_token.float(), tokens[[0, 1, 0, 1]])
    assert job.identity["labels"] == "token" and label[0] == label[2] and label[1] == label[3]
    other = loaded(place, "--like", f"{tmp_path}/t.npy:1", "--labels", str(int(label[0])))
    relabelled = other.sample(range(0, 4))[1]
    assert not torch.allclose(relabelled.state.latent[0], drawn.state.latent[0], atol=1e-3)


def test_more_like_an_image(place, tmp_path):
    """An image is cropped and read by the model's own encoder: the token that is fixed is the encoder's."""
    from PIL import Image

    from common.crop import center_crop
    from models.encoder import load_encoder
    from tests.tiny import write_encoder

    encoder = write_encoder(tmp_path / "encoder", dim=16)
    write_model(place, "wider", replace(CONFIG, class_token_dim=16), encoders=(str(encoder),))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    job = loaded(place, "--checkpoint", str(place / "wider"), "--like", str(tmp_path / "a.png"))
    pixels = torch.from_numpy(np.array(center_crop(picture, 8))).permute(2, 0, 1)[None]
    assert torch.equal(job.tokens, load_encoder(str(encoder), 2)(pixels).class_token.float())
    with pytest.raises(ValueError, match=r"encoder .* gives tokens of width 16, the model has 6"):
        write_model(place, "narrow", CONFIG, encoders=(str(encoder),))
        loaded(place, "--checkpoint", str(place / "narrow"), "--like", str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="the model file names no encoder"):
        loaded(place, "--like", str(tmp_path / "a.png"))


def test_interpolation_strip(place, tmp_path):
    """Rows share their noise, columns go from the first token to the second; the grid is the strip."""
    from PIL import Image

    tokens = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    np.save(tmp_path / "t.npy", tokens.numpy())
    job = loaded(place, "--like", f"{tmp_path}/t.npy", "--interpolate", "4", "--labels", "2", "--mode", "ode")
    _, drawn = job.sample(range(0, 8))
    assert torch.allclose(drawn.state.class_token[[0, 3, 4, 7]].float(), tokens[[0, 1, 0, 1]], atol=1e-5)
    assert job.noise_index(torch.arange(8)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    single = loaded(place, "--like", f"{tmp_path}/t.npy:0", "--labels", "2", "--mode", "ode")
    assert torch.allclose(single.sample(range(0, 2))[1].state.latent, drawn.state.latent[[0, 4]], atol=1e-5)
    generate(place, tmp_path / "s", "--like", f"{tmp_path}/t.npy", "--interpolate", "4", "--num-fid-samples", "8")
    assert Image.open(tmp_path / "s" / "grid.png").size == (4 * (64 + 4), 2 * (64 + 28)), "a row for each noise"


# ------------------------------------------------------------------------------------------- precision and bad input


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_reduced_precision_is_near(place, tmp_path, unbroken, dtype):
    """Network and decoder in reduced precision: a few grey levels on average, not another picture."""
    images, labels = generate(place, tmp_path / "s", "--dtype", dtype, "--vae-dtype", dtype, "--vae-batch-size", "3")
    reference, same = samples(unbroken)
    difference = np.abs(images.astype(int) - reference)
    assert np.array_equal(labels, same) and 0 < difference.mean() < 3


@pytest.mark.slow
def test_compiled_network_is_near(place, tmp_path, unbroken):
    """torch.compile moves float32 rounding only."""
    images, _ = generate(place, tmp_path / "s", "--compile", "--per-proc-batch-size", "4")
    assert np.abs(images.astype(int) - samples(unbroken)[0]).max() <= 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--num-fid-samples", "0"], "--num-fid-samples must be at least 1, got 0"),
        (["--best-of", "0"], "--best-of must be at least 1"),
        (["--heun"], "--heun is a solver of --mode ode"),
        (["--heun", "--mode", "ode", "--solver", "dpmpp"], "--heun contradicts --solver dpmpp"),
        (["--interpolate", "5"], "--interpolate needs --like with the two tokens"),
        (["--like", "a.npy", "--best-of", "2"], "--best-of chooses by the generated token"),
        (["--guidance-low", "0.9", "--guidance-high", "0.8"], r"interval \[0.9, 0.8\]"),
        (["--checkpoint", "nowhere"], "no model file at nowhere"),
        (["--vae", "nowhere/vae"], "VAE 'nowhere/vae' is not a local folder"),
        (["--guide-checkpoint", "nowhere", "--cfg-scale", "2"], "no model file at nowhere"),
        (["--like", "nowhere.npy"], "--like nowhere.npy: no such file"),
    ],
)
def test_bad_requests_are_one_sentence(place, tmp_path, more, words):
    with pytest.raises((UserError, ValueError, FileNotFoundError), match=words):
        generate(place, tmp_path / "s", *more)
    assert not (tmp_path / "s").exists()


def test_guidance_needs_label_dropout(place, tmp_path):
    """A network trained with cfg_prob 0 has no trained null class: refused, but for autoguidance."""
    write_model(place, "undropped", CONFIG, cfg_prob=0.0)
    undropped = ["--checkpoint", str(place / "undropped")]
    for more in (["--cfg-scale", "2"], ["--cls-cfg-scale", "2"], ["--labels", "null"]):
        with pytest.raises(
            ValueError, match=r"was trained without label dropout \(cfg-prob 0\) and knows no null class"
        ):
            generate(place, tmp_path / "s", *undropped, *more)
    generate(place, tmp_path / "s", *undropped, "--cfg-scale", "2", "--guide-checkpoint", str(place / "m"))
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["forwards"] == 8


def test_contradicting_models_are_refused(place, tmp_path):
    """A guide of another shape, a VAE of another scale or size, token flags without a token, means that are absent."""
    write_model(place, "wide", replace(CONFIG, class_token_dim=8))
    write_model(place, "none", replace(CONFIG, class_token_dim=0), means=False)
    write_model(place, "rescaled", CONFIG, normalization={"scale": (0.7,), "bias": (0.0,), "order": "bias_scale"})
    write_model(place, "larger", CONFIG, resolution=16)
    write_model(place, "nomeans", CONFIG, means=False)
    np.save(tmp_path / "t.npy", np.ones((1, 6), dtype=np.float32))
    for more, words in (
        (["--guide-checkpoint", str(place / "wide"), "--cfg-scale", "2"], "has class_token_dim 8, the model has 6"),
        (["--guide-checkpoint", str(place / "m")], "--guide-checkpoint does nothing at --cfg-scale 1"),
        (["--checkpoint", str(place / "none"), "--class-tokens"], "--class-tokens needs a model with a class token"),
        (["--checkpoint", str(place / "rescaled")], "normalises latents by .*0.5.*, the model was trained with .*0.7"),
        (["--checkpoint", str(place / "larger")], "enlarges 2 times: 4 latent pixels do not make 16"),
        (
            ["--checkpoint", str(place / "nomeans"), "--best-of", "2"],
            "holds no mean class tokens .*--best-of cannot choose",
        ),
        (["--checkpoint", str(place / "nomeans"), "--like", f"{tmp_path}/t.npy"], "say with --classes which label"),
        (["--best-of", "2", "--labels", "null"], "cannot choose among samples of the null class"),
        (["--like", f"{tmp_path}/t.npy", "--interpolate", "3"], "goes between two tokens, --like gives 1"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(place, tmp_path / "s", *more)


def test_an_adaptive_solver_fixes_its_batches(place, tmp_path):
    """dopri5's steps depend on the batch, so batch size and count belong to the settings that must not change."""
    assert loaded(place).identity["batches"] is None
    assert loaded(place, "--mode", "ode", "--solver", "dopri5").identity["batches"] == [32, 11]
    images, _ = generate(place, tmp_path / "s", "--mode", "ode", "--solver", "dopri5")
    sidecar = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert sidecar["nfe"] > 6 and len(images) == 11


def test_finished_means_all_that_was_asked_for(tmp_path):
    (tmp_path / "samples.npz").write_bytes(b"")
    (tmp_path / "samples.json").write_text(json.dumps({"n": 3, "seed": 0}))
    assert is_finished(tmp_path, 3, {"seed": 0}, [], have_parts=False)
    assert not is_finished(tmp_path, 3, {"seed": 0}, ["class_tokens.npy"], have_parts=True)
    with pytest.raises(ValueError, match=r"is finished without class_tokens.npy and its parts are gone"):
        is_finished(tmp_path, 3, {"seed": 0}, ["class_tokens.npy"], have_parts=False)


def test_the_program_ends_with_one_line(monkeypatch):
    """As a user sees it: exit status 2, one sentence on stderr, no traceback."""
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", "nowhere", "--out", "o", "--cfg-scal", "2"])
    text = io.StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    with pytest.raises(SystemExit) as stop:
        program.run(program.main)
    assert stop.value.code == 2
    assert text.getvalue() == "error: unknown argument '--cfg-scal' (did you mean '--cfg-scale'?); see --help\n"
