"""The Hugging Face hub: files found in its cache, and one sentence for each reason why a file cannot be had."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluations.features import load as load_features
from models.autoencoder import load_autoencoder
from models.encoder import load_encoder
from models.hub import snapshot
from models.obtain import locate, obtain
from tests.tiny import PUBLISHED_ARGS, published_weights, sit_weights

pytestmark = pytest.mark.usefixtures("caches")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two published files."""
    folder = tmp_path_factory.mktemp("published")
    torch.save({"ema": published_weights(), "args": PUBLISHED_ARGS, "steps": 400_000}, folder / "REG.pt")
    torch.save(sit_weights(), folder / "SiT.pt")
    return folder


def cached(tmp_path, *files, repo="Martinser/REG"):
    """A repository in the hub's cache, laid out as huggingface_hub does."""
    folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    for sub in ("blobs", "refs", "snapshots/abc"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text("abc")
    for file in files:
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (folder / "snapshots/abc" / file.name).symlink_to(blob)
    return folder


def test_found_in_the_cache_offline(place, tmp_path, capsys):
    """By repository where it has one weights file, or by file; the same model as from disk."""
    cached(tmp_path, place / "REG.pt")
    (tmp_path / "hub/models--Martinser--REG/snapshots/abc/README.md").write_text("")
    assert obtain(Path("Martinser/REG")) == obtain("Martinser/REG/REG.pt") == obtain(place / "REG.pt")
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith("Martinser/REG/REG.pt: SiT (depth 3") for line in said[:2])


def test_several_files_must_be_named(place, tmp_path, monkeypatch):
    cached(tmp_path, place / "REG.pt", place / "SiT.pt")
    with pytest.raises(
        ValueError, match=r"several weights files, name one: Martinser/REG/REG.pt, Martinser/REG/SiT.pt$"
    ):
        locate("Martinser/REG")
    assert locate("Martinser/REG/SiT.pt").path.read_bytes() == (place / "SiT.pt").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"weights that are there: REG.pt, SiT.pt$"):
        locate("Martinser/REG/last.pt")


def test_a_damaged_download(place, tmp_path):
    """Large files of the cache are named by their SHA-256: one that has another is not used."""
    folder = cached(tmp_path, place / "REG.pt")
    blob = next((folder / "blobs").iterdir())
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ValueError, match=r"REG.pt is damaged \(its SHA-256 differs\): delete .*blobs"):
        obtain("Martinser/REG")


def test_a_local_path_comes_first(place, tmp_path, monkeypatch):
    """A file or folder of that name wins; below an existing folder a name is a path and never asked for on the hub."""
    monkeypatch.chdir(tmp_path)
    cached(tmp_path, place / "SiT.pt")
    assert locate("Martinser/REG").name == "Martinser/REG/SiT.pt"
    (tmp_path / "Martinser").mkdir()
    with pytest.raises(FileNotFoundError, match="no model file at Martinser/REG: give"):
        locate("Martinser/REG")
    shutil.copy(place / "REG.pt", tmp_path / "Martinser/REG")
    assert locate("Martinser/REG").path == Path("Martinser/REG")
    for name in ("nowhere.pt", "./a/b", "../a/b", "/a/b", "~/no/such", "a b/c"):
        with pytest.raises(FileNotFoundError, match="no model file at"):
            locate(name)


def answer(kind):
    """The error of huggingface_hub for an answer of the hub, as it raises it."""
    from huggingface_hub import errors

    if kind == "offline":
        return errors.OfflineModeIsEnabled("offline mode is enabled")
    if kind == "connection":
        error = errors.LocalEntryNotFoundError("An error happened while trying to locate the file")
        error.__cause__ = ConnectionError("[Errno 111] Connection refused")
        return error
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    if kind == "busy":
        error = errors.LocalEntryNotFoundError("An error happened while trying to locate the file")
        error.__cause__ = errors.HfHubHTTPError("503 Server Error: busy", response=response)
        return error
    entry = getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError)  # older versions have one kind
    kinds = {"gated": errors.GatedRepoError, "unknown": errors.RepositoryNotFoundError, "file": entry}
    return kinds[kind]("404 Client Error. (Request ID: x)", response=response)


SENTENCES = [
    ("offline", r"the cache .*hub has no such file of {} and huggingface.co cannot be reached: .*hf download {}"),
    ("connection", r"has no such file of {} and huggingface.co cannot be reached.*: .*hf download {}"),
    ("busy", r"huggingface.co answered for {}: 503 Server Error: busy$"),
    ("gated", r"{} on huggingface.co is gated: accept its terms at https://huggingface.co/{} and log in with `hf auth"),
    ("unknown", r"huggingface.co has no repository {}: check the spelling, or log in"),
]


@pytest.mark.parametrize(("kind", "words"), [*SENTENCES, ("file", r"Martinser/REG on huggingface.co has no such file")])
def test_causes_are_distinguished(monkeypatch, kind, words):
    """No network, a busy server, a gated or unknown repository and an unknown file: one sentence each, with what to do."""
    import huggingface_hub

    def fail(*_, **__):
        raise answer(kind)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    with pytest.raises(FileNotFoundError, match=words.replace("{}", "Martinser/REG")) as caught:
        obtain("Martinser/REG/last.pt")
    assert str(caught.value).startswith("Martinser/REG/last.pt is not a local file or folder, and ")
    if kind == "file":
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: ["a.pt", "README.md", "b.safetensors"])
        with pytest.raises(FileNotFoundError, match=r"weights that are there: a.pt, b.safetensors$"):
            obtain("Martinser/REG/last.pt")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=words.replace("{}", "Martinser/REG")) as caught:
        snapshot("Martinser/REG", ["*.pt"], token="x")
    assert str(caught.value).startswith("Martinser/REG cannot be downloaded: ")


def test_a_repository_without_weights(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: ["README.md"])
    with pytest.raises(
        FileNotFoundError, match=r"Martinser/REG on huggingface.co holds no weights \(.safetensors, .pt"
    ):
        obtain("Martinser/REG")


@pytest.mark.parametrize(("kind", "words"), SENTENCES)
def test_causes_for_vaes_encoders_and_features(monkeypatch, kind, words):
    """The same sentences where diffusers or timm ask the hub."""
    import diffusers.configuration_utils
    import timm.models._hub

    def fail(*_, **__):
        raise answer(kind)

    monkeypatch.setattr(diffusers.configuration_utils, "hf_hub_download", fail)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match=f"^VAE 'ema'.*{words.replace('{}', 'stabilityai/sd-vae-ft-ema')}"):
        load_autoencoder("ema")
    small = "timm/vit_small_patch14_dinov2.lvd142m"
    for name, repo in (("dinov2-vit-s", small), ("vit_small_patch14_dinov2", small), ("hf-hub:some/vit", "some/vit")):
        with pytest.raises(FileNotFoundError, match=f"encoder '{name}'.*{words.replace('{}', repo)}"):
            load_encoder(name, 2)
    for name, repo in (("timm:test_vit", "timm/test_vit.r160_in1k"), ("timm:hf-hub:some/vit", "some/vit")):
        with pytest.raises(FileNotFoundError, match=f"the weights of .* are missing: .*{words.replace('{}', repo)}"):
            load_features(name)
