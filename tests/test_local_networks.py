"""A VAE in a local folder: model files hold its name and digest; it is found beside them, by the run, or by the cache."""

import json
import shutil
from pathlib import Path

import pytest

import train
from config import MissingFile
from models.autoencoder import load_autoencoder
from models.local_networks import open_network, portable, remember
from models.model_file import find_model, read_header, read_info
from packed.format import read_manifest, write_manifest
from tests.tiny import train_flags, write_dataset, write_vae


@pytest.fixture
def run(tmp_path, caches):
    """A run on latents of a VAE in a folder, and the folder."""
    from common.provenance import weights_sha256

    vae = write_vae(tmp_path / "networks" / "small-vae")
    data = write_dataset(tmp_path / "data", vae=vae)
    manifest = read_manifest(data)
    manifest.vae["weights"] = weights_sha256(load_autoencoder(str(vae)), by_name=True)
    write_manifest(data, manifest)
    train.main(train_flags(data, tmp_path / "runs", steps=1))
    return tmp_path / "runs" / "run", vae


def opened(file: Path):
    info = read_info(file)
    return open_network(info.vae, info.vae_weights, file, load_autoencoder, "--vae", shared="vae").name


def test_a_model_file_holds_no_path(run, tmp_path):
    file = find_model(run[0])
    assert read_info(file).vae == "./small-vae" and len(read_info(file).vae_weights) == 64
    assert str(tmp_path) not in read_header(file)["reg"]
    assert portable("ema") == "ema" and portable("owner/name") == "owner/name" and portable("/x/y") == "./y"
    assert portable("runs/networks/vae") == "./vae" and portable("hf-hub:owner/name") == "hf-hub:owner/name"
    assert portable(f"vit_small=/x/{'w.pt'}") == "vit_small=./w.pt" and portable("~/vae") == "./vae"


def test_it_is_found_by_its_run_and_beside_the_file(run, tmp_path):
    """The run's config.json knows the folder; a copy of the model finds it in its own folder, under its name or as vae."""
    folder, vae = run
    assert opened(find_model(folder)) == str(vae)
    for name in ("small-vae", "vae"):
        place = tmp_path / name / "moved"
        shutil.copytree(vae, place / name)
        shutil.copy(find_model(folder), place / "m.safetensors")
        assert opened(place / "m.safetensors") == str(place / name)


def test_it_is_found_by_the_cache_and_never_mistaken(run, tmp_path):
    """Known by digest, where it was last packed with; another VAE beside the file is no match and is named."""
    folder, vae = run
    alone = tmp_path / "alone" / "m.safetensors"
    alone.parent.mkdir()
    shutil.copy(find_model(folder), alone)
    write_vae(alone.parent / "vae", seed=7)
    with pytest.raises(
        MissingFile, match=r"needs \./small-vae, .*alone/vae: other weights\): give its folder with --vae"
    ):
        opened(alone)
    remember(str(vae), read_info(alone).vae_weights)
    assert opened(alone) == str(vae)


def test_it_is_fetched_from_the_repository_of_the_model(run, tmp_path, monkeypatch):
    """A model file in the hub's cache: the VAE of the same revision is downloaded beside it."""
    import huggingface_hub

    folder, vae = run
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copy(find_model(folder), snapshot / "model.safetensors")
    asked = []

    def download(repo, *, revision, cache_dir, allow_patterns):
        asked.append((repo, revision, cache_dir, allow_patterns))
        shutil.copytree(vae, snapshot / "vae")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for _ in range(2):  # once is enough
        assert opened(snapshot / "model.safetensors") == str(snapshot / "vae")
    assert asked == [("owner/name", "abc", tmp_path / "hub", ["vae/*"])]


def test_a_folder_that_cannot_be_loaded_is_passed_over(run, tmp_path):
    """The next place has it; where none has, the message says why not. A shared model's vae is no place for an encoder."""
    folder, vae = run
    alone = tmp_path / "alone" / "m.safetensors"
    shutil.copytree(vae, alone.parent / "vae")
    shutil.copy(find_model(folder), alone)
    (alone.parent / "small-vae").mkdir()
    (alone.parent / "small-vae" / "config.json").write_text("{}")
    assert opened(alone) == str(alone.parent / "vae")
    shutil.rmtree(alone.parent / "vae")
    with pytest.raises(MissingFile, match=r"needs \./small-vae, .*alone/small-vae: .*\): give its folder with --vae"):
        opened(alone)
    shutil.copytree(vae, alone.parent / "vae")
    with pytest.raises(
        MissingFile, match=r"needs \./encoder, which is neither beside it nor known on this machine: give"
    ):
        open_network("./encoder", "", alone, lambda name: pytest.fail(name), "--like")


def test_a_damaged_record_of_the_run_is_no_error(run, tmp_path):
    folder, _ = run
    (folder / "config.json").write_text(json.dumps({"settings": None}))
    with pytest.raises(MissingFile, match="neither beside it nor known"):
        opened(find_model(folder))
