import json

import numpy as np
import pytest
import torch


def pytest_collection_modifyitems(items):
    """GPU tests skip where there is no CUDA device, unless `-m gpu` asks for them (then their failure tells so)."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available() and item.config.option.markexpr != "gpu":
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing is read from, or left in, the caches of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("REG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    """A VAE, an encoder, and datasets with tokens of one encoder, of two, and with pixels; nobody changes them."""
    from tests.tiny import write_dataset, write_encoder, write_vae

    folder = tmp_path_factory.mktemp("tools")
    vae = write_vae(folder / "vae")
    return {
        "vae": vae,
        "encoder": write_encoder(folder / "encoder"),
        "data": write_dataset(folder / "data", vae=vae),
        "two": write_dataset(folder / "two", dims=(16, 8), vae=vae),
        "pixels": write_dataset(folder / "pixels", dims=(), pixels=True, vae=vae),
    }


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of this project and of the hub, and no network."""
    from huggingface_hub import constants

    from models import hub

    monkeypatch.setenv("REG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "go_offline_if_unreachable", lambda: None)
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """The folder of a small timm network with five classes."""
    from tests.toy_images import save_vit

    return save_vit(tmp_path_factory.mktemp("networks") / "judge")


@pytest.fixture
def measurement(judge, tmp_path):
    """A function giving the settings of a small measurement, with changes."""
    from evaluations.features import load_timm
    from evaluations.settings import EvaluateConfig
    from tests.toy_images import pixels

    images = pixels(40, seed=1)
    labels = load_timm(str(judge))(torch.from_numpy(images).permute(0, 3, 1, 2)).logits.argmax(1).numpy()
    np.savez(tmp_path / "r.npz", pixels(60))
    np.savez(tmp_path / "s.npz", images, labels)
    (tmp_path / "s.json").write_text(json.dumps({"schema": 1, "mode": "sde", "steps": 250, "cfg_scale": 2.3}))

    def make(**changes) -> EvaluateConfig:
        given = {
            "samples": (tmp_path / "s.npz",),
            "reference": (tmp_path / "r.npz",),
            "features": (f"timm:{judge}",),
            "device": "cpu",
            "cache_dir": tmp_path / "cache",
            "out": tmp_path / "results.json",
        }
        return EvaluateConfig(**(given | changes))

    return make


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder with images, a VAE and an encoder, and one finished packing of them."""
    from preprocessing import pack
    from tests.packs import IMAGES, flags, write_folder
    from tests.tiny import write_encoder, write_vae

    folder = tmp_path_factory.mktemp("toys")
    write_folder(folder / "images", IMAGES)
    write_vae(folder / "vae")
    write_encoder(folder / "encoder")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pack.main(flags(folder, folder / "packed"))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """The last bit of a convolution depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
