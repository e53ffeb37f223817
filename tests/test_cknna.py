"""CKNNA: the definition, cases with known answers, and a whole measurement on a small network."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dataset import encode_moments
from evaluations.cknna import main
from evaluations.kernel_alignment import cknna
from models.model_file import ModelInfo, save_model
from models.sit import SiT, SiTConfig
from packed.format import EncoderInfo, Manifest, write_manifest
from packed.writer import write_shard

ROOT = Path(__file__).parents[1]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def dense_cknna(a: torch.Tensor, b: torch.Tensor, k: int) -> float:
    """The definition with whole N x N matrices and centring written out (Song et al. 2012, equation 3)."""
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    n = len(a)

    def masked(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kernel = x @ x.T
        order = (kernel - torch.eye(n) * 1e9).argsort(1, descending=True)[:, :k]
        return kernel, torch.zeros(n, n).double().scatter_(1, order, 1.0)

    def hsic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(n).double()
        trace = (x @ y).trace()
        return trace + ones @ x @ ones * (ones @ y @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (ones @ x @ y @ ones)

    (ka, ma), (kb, mb) = masked(a), masked(b)
    both = hsic(ka * ma * mb, kb * ma * mb)
    return (both / (hsic(ka * ma, ka * ma) * hsic(kb * mb, kb * mb)).sqrt()).item()


@pytest.mark.parametrize("k", [2, 5, 20])
def test_sparse_form_equals_the_definition(k):
    """Kept entries alone give what whole matrices give."""
    a = normal(60, 12)
    b = torch.cat([a[:, :6] + 0.5 * normal(60, 6, seed=1), normal(60, 3, seed=2)], dim=1)
    assert cknna(a, b, k) == pytest.approx(dense_cknna(a, b, k), rel=1e-9)


def test_known_answers():
    """1 for the same neighbourhoods whatever rotation and length, near 0 for independent features, between for noise."""
    a = normal(200, 16)
    rotation = torch.linalg.qr(normal(16, 16, seed=1)).Q
    lengths = normal(200, 1, seed=2).exp()
    assert cknna(a, a @ rotation * lengths) == pytest.approx(1, abs=1e-9)
    assert abs(cknna(a, normal(200, 16, seed=3))) < 0.05
    noise = normal(200, 16, seed=4)
    scores = [cknna(a, a + level * noise) for level in (0.1, 0.4, 1.0, 3.0)]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0.6 > 0.2 > scores[-1]


def test_clusters_are_neighbourhoods():
    """Two sets that share clusters and nothing else score high with k below the cluster size: the score is local."""
    clusters = torch.arange(200) % 10
    a = 10 * torch.eye(10, 16).double()[clusters] + normal(200, 16) * 0.1
    b = 10 * torch.eye(10, 24).double().roll(3, 1)[clusters] + normal(200, 24, seed=1) * 0.1
    assert cknna(a, b, 19) > 0.95  # every other member of the cluster is a neighbour in both
    shuffled = b[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert abs(cknna(a, shuffled, 19)) < 0.2


def test_impossible_comparisons_are_refused():
    with pytest.raises(ValueError, match="same images: got 20 and 19 rows"):
        cknna(normal(20, 3), normal(19, 3))
    with pytest.raises(ValueError, match="2 <= k <= images - 2, got 10 images and k = 9"):
        cknna(normal(10, 3), normal(10, 3), 9)


@pytest.fixture
def small(tmp_path):
    """A dataset of 30 records with cached tokens of width 12 and a random two-block network for it."""
    rng = np.random.default_rng(0)
    arrays = {
        "moments": encode_moments(
            np.concatenate([rng.standard_normal((30, 4, 4, 4)), np.full((30, 4, 4, 4), 0.1)], axis=1)
        ),
        "label": np.arange(30) % 3,
        "class_token.0": rng.standard_normal((30, 12)).astype(np.float16),
        "patch_tokens.0": rng.standard_normal((30, 4, 12)).astype(np.float16),
    }
    data = tmp_path / "data"
    data.mkdir()
    shard = write_shard(data, 0, arrays)
    fields = {name: {"dtype": str(a.dtype), "shape": list(a.shape[1:])} for name, a in arrays.items()}
    encoder = EncoderInfo("tiny", 12, 2)
    write_manifest(data, Manifest(30, 30, 32, fields, ["a", "b", "c"], {"name": "none"}, [encoder], [shard]))

    def model(name: str, **changes) -> Path:
        config = SiTConfig(
            **(
                {
                    "depth": 2,
                    "hidden_size": 16,
                    "num_heads": 2,
                    "input_size": 4,
                    "num_classes": 3,
                    "class_token_dim": 12,
                    "align_dims": (12,),
                    "align_depth": 1,
                    "projector_dim": 16,
                }
                | changes
            )
        )
        torch.manual_seed(0)
        network = SiT(config)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        path = tmp_path / f"{name}.safetensors"
        save_model(
            path, network.state_dict(), ModelInfo(config, "linear", 32, "none", {"scale": [1.0]}, ("tiny",), step=7)
        )
        return path

    return data, model


def test_measurement_of_a_network(small, tmp_path, monkeypatch):
    """Every time and block gets a score; near t = 0 the denoised class token is the clean one; numbers repeat."""
    data, model = small
    arguments = ("cknna", "--checkpoint", model("reg"), "--dataset", data, "--neighbours", 5, "--device", "cpu")
    arguments += ("--times", 1e-4, 0.5)
    monkeypatch.setattr(sys, "argv", [*map(str, (*arguments, "--out", tmp_path / "a.json"))])
    main()
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["n"], found["step"], found["layers"]) == (30, 7, [1, 2])
    for key in ("patch_tokens", "class_token"):
        assert np.array(found[key]).shape == (2, 2) and np.abs(found[key]).max() <= 1
    assert found["denoised_cosine"][0] > 0.999 and found["denoised_cknna"][0] > 0.95
    assert found["denoised_cosine"][1] < 0.99
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 3 * picture.size[1]  # three panels side by side
    monkeypatch.setattr(sys, "argv", [*map(str, (*arguments, "--batch-size", 7, "--out", tmp_path / "b.json"))])
    main()
    again = json.loads((tmp_path / "b.json").read_text())
    np.testing.assert_allclose(again["patch_tokens"], found["patch_tokens"], atol=1e-6)


def test_network_without_class_token(small, tmp_path):
    """Plain SiT: patch tokens alone."""
    from dataset import PackedDataset
    from evaluations.layers import measure, plot, read_targets
    from evaluations.settings import CknnaConfig
    from models.model_file import load_model

    data, model = small
    path = model("sit", class_token_dim=0, align_dims=())
    dataset, rows = PackedDataset(data), torch.arange(30)
    targets = read_targets(dataset, rows, None, 8, torch.device("cpu"))
    settings = CknnaConfig(path, data, times=(0.5,), neighbours=5, layers=(2,))
    found = measure(load_model(path), dataset, rows, targets, settings)
    assert found.class_token is None and found.denoised_cosine is None and len(found.patch_tokens[0]) == 1
    plot(tmp_path / "plot.png", found)
    assert (tmp_path / "plot.png").is_file()


def test_mistakes_are_one_line(small, tmp_path):
    """A layer the network lacks, another token width, other latents, a time outside (0, 1)."""
    data, model = small
    from config import UserError
    from dataset import PackedDataset
    from evaluations.layers import measure, read_targets
    from evaluations.settings import CknnaConfig
    from models.model_file import load_model

    dataset, rows = PackedDataset(data), torch.arange(30)
    targets = read_targets(dataset, rows, None, 8, torch.device("cpu"))
    for name, changes, settings, sentence in (
        ("a", {}, {"layers": (3,)}, "--layers must be in 1 ... 2"),
        ("b", {"class_token_dim": 8}, {}, "takes class tokens of width 8, the encoder"),
        ("c", {"input_size": 8}, {}, "holds latents of 4 x 4 x 4, the network was trained on 4 x 8 x 8"),
    ):
        path = model(name, **changes)
        with pytest.raises(UserError, match=sentence):
            measure(load_model(path), dataset, rows, targets, CknnaConfig(path, data, neighbours=5, **settings))
    command = [sys.executable, "evaluations/cknna.py", "--checkpoint", "x", "--dataset", str(data), "--times", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --times must be above 0, got 0.0\n"
