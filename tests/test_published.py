"""Published weights from a file: converted once into the cache, the same images, wrong files in one sentence."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
from generate import read
from models import obtain as obtaining
from models.model_file import read_info
from models.obtain import describe, obtain
from models.published import imagenet_classes, read_published, to_published
from models.sit import SiT, SiTConfig, preset
from sampling import run
from tests.tiny import PUBLISHED_ARGS, published_weights, sit_weights, write_vae

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("caches")


def legacy(state):
    """The names of REPA's first checkpoints: the blocks after the aligned one are decoder_blocks, counted anew."""
    return {
        re.sub(r"^blocks\.([12])", lambda match: f"decoder_blocks.{int(match[1]) - 1}", name): tensor
        for name, tensor in state.items()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Published files of the three kinds, and a VAE that enlarges 2 times (SiT's file says no resolution: 8 times)."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("published")
    reg = {"model": sit_weights(), "ema": published_weights(), "opt": {}, "args": PUBLISHED_ARGS, "steps": 400_000}
    torch.save(reg, folder / "REG.pt")
    repa = legacy(published_weights(class_token_dim=0))
    torch.save({"ema": repa, "args": PUBLISHED_ARGS, "steps": 7}, folder / "REPA.pt")
    torch.save(sit_weights(), folder / "SiT.pt")
    write_vae(folder / "vae2")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).save_pretrained(folder / "vae8")
    return folder


def generate(out, checkpoint, *more):
    arguments = [
        "--out",
        str(out),
        "--checkpoint",
        str(checkpoint),
        "--num-fid-samples",
        "5",
        "--num-steps",
        "3",
        *more,
    ]
    run.generate(read(arguments))
    return (out / "samples.npz").read_bytes()


def no_conversion(*_):
    raise AssertionError("it is converted again")


@pytest.mark.parametrize(
    ("kind", "vae", "said"),
    [
        (
            "REG",
            "vae2",
            "width 384, 6 heads, patch 2) + REG, step 400,000, 5 classes, 8 px, VAE ema (sd-vae-ft-ema); conv",
        ),
        (
            "REPA",
            "vae2",
            "width 384, 6 heads, patch 2) + REPA, step 7, 5 classes, 8 px, VAE ema (sd-vae-ft-ema); converted",
        ),
        ("SiT", "vae8", "width 384, 6 heads, patch 2), 5 classes, 32 px, VAE ema (sd-vae-ft-ema); converted to "),
    ],
)
def test_the_same_images_as_by_convert(place, tmp_path, caches, capsys, monkeypatch, kind, vae, said):
    """generate.py --checkpoint FILE.pt is convert.py and then generate.py, bit for bit; a second start converts nothing."""
    source, flags = place / f"{kind}.pt", ["--vae", str(place / vae)]
    convert.main(["--source", str(source), "--out", str(tmp_path / "ours")])
    expected = generate(tmp_path / "a", tmp_path / "ours", *flags)
    capsys.readouterr()
    assert generate(tmp_path / "b", source, *flags) == expected
    assert f"{source}: SiT (depth 3, {said}" in capsys.readouterr().out
    file = next(caches.glob("*.safetensors"))
    assert file.read_bytes() == (tmp_path / "ours").read_bytes() and len(list(caches.iterdir())) == 2, (
        "nothing is left over"
    )
    monkeypatch.setattr(obtaining, "convert_published", no_conversion)
    monkeypatch.setattr(obtaining, "sha256", no_conversion)
    assert generate(tmp_path / "c", source, *flags) == expected
    assert json.loads((tmp_path / "c/samples.json").read_text())["checkpoint"] == str(file)


def test_a_model_file_is_shown_for_what_it_is(place, tmp_path, caches, capsys):
    """Our own files are recognised by their content, not their name, and are used where they are."""
    convert.main(["--source", str(place / "REG.pt"), "--out", str(tmp_path / "ours.pt")])
    assert "ours.pt: SiT (depth 3" in capsys.readouterr().out
    assert obtain(tmp_path / "ours.pt") == tmp_path / "ours.pt" and not caches.exists()
    assert capsys.readouterr().out.strip().endswith("+ REG, step 400,000, 5 classes, 8 px, VAE ema (sd-vae-ft-ema)")
    with pytest.raises(ValueError, match=r"ours.pt is a model file of this project already"):
        convert.main(["--source", str(tmp_path / "ours.pt"), "--out", str(tmp_path / "again")])
    convert.main(["--to", "published", "--source", str(place / "REG.pt"), "--out", str(tmp_path / "back.pt")])
    assert torch.equal(read_published(tmp_path / "back.pt").state_dict["pos_embed"], published_weights()["pos_embed"])


def test_names_of_models(place, tmp_path):
    """A published size is named as in the papers."""
    info = read_info(obtain(place / "REG.pt"))
    for changes, name in (
        ({}, "SiT-XL/2 + REG"),
        ({"class_token_dim": 0}, "SiT-XL/2 + REPA"),
        ({"patch_size": 4}, "SiT-XL/4 + REG"),
        ({"align_dims": ()}, "SiT-XL/2 + class token"),
        ({"class_token_dim": 0, "align_dims": ()}, "SiT-XL/2"),
    ):
        assert describe(replace(info, network=SiTConfig(**changes))).startswith(
            f"{name}, step 400,000, 1000 classes, 8 px"
        )


def test_imagenet_names():
    """Weights of 1000 classes know ImageNet's, each by one name."""
    names = imagenet_classes()
    assert len(set(names)) == 1000
    assert (names[0], names[207], names[134], names[517]) == ("tench", "golden retriever", "crane (134)", "crane (517)")


def test_class_names_reach_the_sampler(place, tmp_path):
    """--classes "golden retriever" draws label 207 of a converted ImageNet model."""
    torch.save({"ema": published_weights(num_classes=1000), "args": PUBLISHED_ARGS, "steps": 1}, tmp_path / "last.pt")
    generate(tmp_path / "s", tmp_path / "last.pt", "--vae", str(place / "vae2"), "--classes", "golden retriever")
    with np.load(tmp_path / "s/samples.npz") as stream:
        assert stream["arr_1"].tolist() == [207] * 5


def test_bare_safetensors(place, tmp_path):
    """A state dict in published names is converted from safetensors as from a .pt."""
    from safetensors.torch import save_file

    save_file(sit_weights(), tmp_path / "model.safetensors")
    assert read_info(obtain(tmp_path / "model.safetensors")).network == read_info(obtain(place / "SiT.pt")).network


def test_a_changed_file_is_converted_anew(place, tmp_path, caches):
    """The digest is remembered by path, size and times; another content at the same path has another cache entry."""
    shutil.copy(place / "REPA.pt", tmp_path / "last.pt")
    first = obtain(tmp_path / "last.pt")
    shutil.copy(place / "REG.pt", tmp_path / "last.pt")
    assert obtain(tmp_path / "last.pt") != first
    shutil.copy(place / "REPA.pt", tmp_path / "copy.pt")
    assert obtain(tmp_path / "copy.pt") == first, "the same content elsewhere is the same entry"


def test_a_broken_cache_entry_is_made_again(place, caches):
    """What a full disk or a killed copy left behind is replaced."""
    file = obtain(place / "REG.pt")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert obtain(place / "REG.pt") == file and file.read_bytes() == whole


@pytest.mark.parametrize("how", ["not a folder", "no home", "full disk"])
def test_a_cache_that_cannot_be_written(place, tmp_path, monkeypatch, capsys, how):
    """It is no reason to fail: the copy is made elsewhere, with one warning."""
    if how == "not a folder":
        (tmp_path / "cache").write_text("")
    elif how == "no home":
        monkeypatch.delenv("REG_CACHE")
        monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home directory")))
        monkeypatch.setattr(obtaining, "locate", lambda name: obtaining.Source(name, str(name)))
    else:
        original = obtaining.save_model

        def save(path, *rest):
            if "converting-" in str(path):
                raise OSError(28, "No space left on device")
            original(path, *rest)

        monkeypatch.setattr(obtaining, "save_model", save)
    file = obtain(place / "REG.pt")
    assert read_info(file).step == 400_000 and tmp_path / "cache" not in file.parents
    assert capsys.readouterr().out.count("the cache of converted weights cannot be written (") == 1


@pytest.mark.slow
def test_processes_of_one_job_and_of_two(place, tmp_path, caches):
    """torchrun with two ranks: one of them converts. Two jobs at once: both end, one entry, nothing half-written."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node=2", "generate.py"]
    jobs = [
        subprocess.Popen(
            [
                *start,
                "--checkpoint",
                str(place / "REG.pt"),
                "--vae",
                str(place / "vae2"),
                "--out",
                str(tmp_path / out),
                "--num-fid-samples",
                "5",
                "--num-steps",
                "2",
                "--per-proc-batch-size",
                "2",
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "REG_CACHE": str(tmp_path / "cache")},
        )
        for start, out in ((torchrun, "a"), ([sys.executable, "generate.py"], "b"))
    ]
    for process in jobs:
        said, errors = process.communicate()
        assert process.returncode == 0, errors
        assert said.count("+ REG, step 400,000") == 1 and "cannot be written" not in said
    assert len(list(caches.glob("*.safetensors"))) == 1 and not list(caches.glob("converting-*"))
    arrays = [np.load(tmp_path / out / "samples.npz")["arr_0"].astype(int) for out in ("a", "b")]
    assert np.abs(arrays[0] - arrays[1]).max() <= 1


def broken(folder, kind):
    """A file that is not a published checkpoint."""
    file, whole = folder / f"{kind}.pt", sit_weights()
    if kind in ("text", "page", "pointer", "empty"):
        file.write_text(
            {
                "text": "hello",
                "page": "\n<!DOCTYPE html>",
                "empty": "",
                "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0",
            }[kind]
        )
        return file
    if kind == "module":
        whole = torch.nn.Linear(2, 2)
    elif kind == "lacks":
        del whole["final_layer.linear.weight"]
    elif kind == "extra":
        whole["extra.weight"] = torch.ones(1)
    elif kind == "flat":
        whole["x_embedder.proj.weight"] = torch.ones(3)
    elif kind == "width":
        whole = published_weights(hidden_size=32, num_heads=2)
    elif kind == "raw":
        whole = {"model": whole}
    torch.save(whole, file)
    if kind == "bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif kind == "half":
        file.write_bytes(file.read_bytes()[:100_000])
    return file


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text", "text.pt is not a checkpoint: neither"),
        ("page", "page.pt is a web page"),
        ("pointer", "pointer.pt is a Git LFS pointer"),
        ("empty", "empty.pt is empty"),
        ("half", "half.pt is damaged: its end is missing"),
        ("bit", "bit.pt is damaged: the checksum of bit/data"),
        ("module", "module.pt is refused: it holds more than tensors.*Linear"),
        ("lacks", "lacks.pt: these are not the weights of a SiT: 'final_layer.linear.weight' is missing"),
        ("extra", "extra.pt: these are not the weights of a SiT: Unexpected key.*extra.weight"),
        ("flat", r"flat.pt: these are not the weights of a SiT: x_embedder.proj.weight is \(3,\)"),
        ("width", "width.pt: it does not say how many attention heads a width of 32 has.*convert.py.*--num-heads"),
        ("raw", "raw.pt has no 'ema' weights, only model; convert.py --weights model"),
    ],
)
def test_wrong_files(tmp_path, caches, kind, words):
    """One sentence with the file and the cause, and nothing half-written."""
    file = broken(tmp_path, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        obtain(file)
    assert "\n" not in str(caught.value) and not list(caches.glob("*.safetensors")) + list(caches.glob("converting-*"))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        convert.main(["--source", str(file), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_a_published_file_of_real_size(place, tmp_path):
    """SiT-XL/2 with REG: 2.7 GB of random weights make one picture of 256 px in two steps on the CPU."""
    config = preset("SiT-XL/2")
    state = to_published(SiT(config).state_dict())
    args = argparse.Namespace(model="SiT-XL/2", resolution=256)
    torch.save({"ema": state, "args": args, "steps": 1}, tmp_path / "last.pt")
    del state
    flags = [
        "--vae",
        str(place / "vae8"),
        "--num-fid-samples",
        "1",
        "--mode",
        "ode",
        "--num-steps",
        "2",
        "--device",
        "cpu",
    ]
    generate(tmp_path / "s", tmp_path / "last.pt", *flags)
    assert read_info(obtain(tmp_path / "last.pt")).network == config
    with np.load(tmp_path / "s/samples.npz") as stream:
        assert stream["arr_0"].shape == (1, 256, 256, 3)
    shutil.rmtree(tmp_path)  # five gigabytes
