"""The class token in generate.py: the best of k, a given one, the way between two."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import toy_model
from tests.toy_model import CONFIG, generate, loaded, write_model

place = toy_model.place  # a fixture


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
    from tests.packs import write_zip
    from tests.tiny import write_encoder

    encoder = write_encoder(tmp_path / "encoder", dim=16)
    write_model(place, "wider", replace(CONFIG, class_token_dim=16), encoders=(str(encoder),))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    job = loaded(place, "--checkpoint", str(place / "wider"), "--like", str(tmp_path / "a.png"))
    pixels = torch.from_numpy(np.array(center_crop(picture, 8))).permute(2, 0, 1)[None]
    assert torch.equal(job.tokens, load_encoder(str(encoder), 2)(pixels).class_token.float())
    many = write_zip(tmp_path / "many.zip", {f"x/{i}.png": (tmp_path / "a.png").read_bytes() for i in range(2)})
    for source in (str(many), str(many / "x")):  # a folder or an archive: all of its images
        assert torch.equal(
            loaded(place, "--checkpoint", str(place / "wider"), "--like", source).tokens, job.tokens.expand(2, -1)
        )
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
