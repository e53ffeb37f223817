"""The model that comes with the code: examples/eurosat."""

from pathlib import Path

from common.files import sha256
from sharing.pretrained import PretrainedSiT

FOLDER = Path(__file__).parents[1] / "examples" / "eurosat"


def test_the_example_is_small_and_is_what_its_card_says():
    """At most 12 MB in all; the card lists every file with its digest."""
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.name != "README.md"]
    card = (FOLDER / "README.md").read_text()
    assert sum(path.stat().st_size for path in files) < 12_000_000
    for path in files:
        assert f"{path.relative_to(FOLDER).as_posix()} | {path.stat().st_size:,} | {sha256(path)}" in card


def test_the_example_draws_places():
    """Without a network, in seconds: lakes are blue and forests darker than fields, in the guided samples of a few steps."""
    model = PretrainedSiT.from_pretrained(FOLDER)
    labels = [name for name in ("SeaLake", "Forest", "AnnualCrop") for _ in range(3)]
    state = model.sample(labels, mode="ode", solver="heun", num_steps=8, cfg_scale=1.5)
    pixels = model.autoencoder.decode(state.latent).float()
    assert pixels.shape == (9, 3, 64, 64)
    lake, forest, field = pixels.view(3, 3, 3, -1).mean((1, 3))  # (3,) mean red, green and blue of each
    assert lake[2] > lake[0] + 10 and forest.mean() + 20 < field.mean()
