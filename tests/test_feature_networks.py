"""Feature networks: Inception against independent forwards, timm networks, their files."""

import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations import features
from evaluations.collect import collect
from evaluations.image_sets import open_images
from evaluations.metrics import frechet_distance
from evaluations.results import load
from tests.toy_images import Trap, pixels, save_vit

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """Random weights in the published file's layout, scaled so that every layer passes its signal on."""
    from unittest import mock

    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Untrained(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            assert state == {}

    with mock.patch.object(module, "load_state_dict_from_url", return_value={}):
        network = Untrained("untrained", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.data.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=generator)
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.bias.data.normal_(0, 0.1, generator=generator)
    network.fc.weight.data.normal_(0, 0.3, generator=generator)
    network.fc.bias.data.normal_(0, 3, generator=generator)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_features_and_their_order(inception_file):
    """2048, 2023 and 1008 numbers. mixed_6/conv equals an independent forward, rows then columns then channels, and the
    logits leave the bias out."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    x = torch.from_numpy(pixels(2, size=64)).permute(0, 3, 1, 2)
    extractor = features.load_inception(inception_file, sha256="any")
    found = extractor(x)
    assert (found.pooled.shape, found.spatial.shape, found.logits.shape) == ((2, 2048), (2, 2023), (2, 1008))
    network = FeatureExtractorInceptionV3("plain", ["2048"], feature_extractor_weights_path=str(inception_file))
    y = (resize(x.float(), size=(299, 299), align_corners=False) - 128) / 128
    for name in (
        "Conv2d_1a_3x3",
        "Conv2d_2a_3x3",
        "Conv2d_2b_3x3",
        "MaxPool_1",
        "Conv2d_3b_1x1",
        "Conv2d_4a_3x3",
        "MaxPool_2",
        "Mixed_5b",
        "Mixed_5c",
        "Mixed_5d",
        "Mixed_6a",
        "Mixed_6b",
        "Mixed_6c",
    ):
        y = getattr(network, name)(y)
    branch = network.Mixed_6d.branch1x1
    maps = torch.relu(branch.bn(branch.conv(y)))[:, :7]  # (2, 7, 17, 17)
    for row, column, channel in ((0, 0, 0), (0, 1, 3), (5, 0, 6), (16, 16, 6)):
        ours = found.spatial[:, (row * 17 + column) * 7 + channel]
        torch.testing.assert_close(ours, maps[:, channel, row, column], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, found.pooled @ network.fc.weight.T)


@pytest.mark.slow
def test_fid_equals_torch_fidelity(inception_file, tmp_path):
    """The whole way from PNG files to FID, on both sides, in one network."""
    from torch_fidelity import calculate_metrics

    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / str(seed))
        folders[-1].mkdir()
        for number, image in enumerate(pixels(5, size=32, seed=seed)):
            Image.fromarray(image).save(folders[-1] / f"{number}.png")
    theirs = calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        cuda=False,
        verbose=False,
        save_cpu_ram=True,
        batch_size=5,
        feature_extractor_weights_path=str(inception_file),
        cache=False,
    )["frechet_inception_distance"]
    extractor = features.load_inception(inception_file, sha256="any")
    ours = [collect(open_images([folder]), extractor, batch_size=5).statistics("pooled") for folder in folders]
    assert frechet_distance(*ours) == pytest.approx(theirs, rel=1e-5)


def test_inception_weights_are_checked_before_they_are_read(tmp_path):
    """Another file is refused by its checksum, a pickle with code is refused unread, a missing file is named."""
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match=r"SHA-256 .* damaged or another network"):
        features.load_inception(path)
    with pytest.raises(ValueError, match=r"weights\.pth is not a file of weights"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wonders about the pickle protocol
        features.load_inception(path, sha256="any")
    assert not (tmp_path / "sprung").exists()
    torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="does not hold the weights of the 2015 Inception"):
        features.load_inception(path, sha256="any")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth do not exist"):
        features.load_inception(tmp_path / "absent.pth")


def test_absent_inception_weights_are_one_sentence(tmp_path, monkeypatch):
    """An empty cache and no network: where to get the file and how to name it."""

    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(FileNotFoundError, match=r"no route.*get https://.*--inception-weights FILE"):
        features.load_inception()


@pytest.mark.slow
def test_inception_metrics_do_not_feel_batch_size_or_processes(inception_file, tmp_path):
    """FID, sFID, IS, precision and recall of 24 images for batches of 1, 16 and 64 and for 2 processes."""
    np.savez(tmp_path / "r.npz", pixels(24, size=32))
    np.savez(tmp_path / "s.npz", pixels(24, size=32, seed=1))
    arguments = [
        "--reference",
        tmp_path / "r.npz",
        "--samples",
        tmp_path / "s.npz",
        "--inception-weights",
        inception_file,
    ]
    arguments += [
        "--inception-sha256",
        "any",
        "--device",
        "cpu",
        "--cache-dir",
        tmp_path / "cache",
        "--error-groups",
        0,
    ]
    expected = None
    for batch, launcher in (
        (1, ["-m", "evaluations.evaluate"]),
        (16, ["-m", "evaluations.evaluate"]),
        (64, ["-m", "evaluations.evaluate"]),
        (16, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "evaluations/evaluate.py"]),
    ):
        out = tmp_path / f"{batch}-{len(launcher)}.json"
        command = [sys.executable, *launcher, *arguments, "--batch-size", batch, "--out", out]
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = load(out).metrics
        expected = expected or found
        for key, metric in expected.items():
            assert found[key].value == pytest.approx(metric.value, rel=1e-4), (key, batch, launcher)


def test_local_timm_folder(judge, tmp_path):
    """Pooled features and logits of the folder's network; grey networks get grey images; a headless one is no judge."""
    x = torch.from_numpy(pixels(3)).permute(0, 3, 1, 2)
    extractor = features.load_timm(str(judge))
    found = extractor(x)
    assert extractor.space == "judge" and found.pooled.shape == (3, 32) and found.logits.shape == (3, 5)
    grey = features.load_timm(str(save_vit(tmp_path / "grey", channels=1)))
    assert grey(x).pooled.shape == (3, 32)
    headless = save_vit(tmp_path / "headless", classes=0)
    assert features.load_timm(str(headless))(x).logits is None
    with pytest.raises(ValueError, match="has no classification head"):
        features.load_timm(str(headless), classifier=True)
    with pytest.raises(FileNotFoundError, match="absent"):
        features.load_timm(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        features.load_timm("no_such_network")
    with pytest.raises(ValueError, match="unknown features 'dino'"):
        features.load("dino")


def test_dinov2_positions_follow_its_own_code():
    """The grid is resampled by the factor (16 + 0.1) / 37 (timm: 16 / 37) and without antialias (timm: with)."""
    import timm

    network = timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=False, depth=1)
    column = torch.arange(37)
    network.pos_embed.data[0, 1:, 0] = column.repeat(37) / 36
    network.pos_embed.data[0, 1:, 1] = (column % 2 * 2.0 - 1).repeat(37)
    features._position_like_dinov2(network, 224)
    assert network.patch_embed.img_size == (224, 224)
    grid = network.pos_embed[0, 1:].reshape(16, 16, -1).detach()
    centres = ((torch.arange(16) + 0.5) * 37 / 16.1 - 0.5) / 36
    torch.testing.assert_close(grid[8, 2:14, 0], centres[2:14], rtol=0, atol=2e-3)  # the other factor: 5e-3 off
    assert grid[8, 2:14, 1].abs().mean() > 0.4  # antialias would blur alternating columns away
