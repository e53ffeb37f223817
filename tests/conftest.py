import pytest
import torch


def pytest_collection_modifyitems(items):
    """GPU tests skip where there is no CUDA device, unless `-m gpu` asks for them (then their failure tells so)."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available() and item.config.option.markexpr != "gpu":
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


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
