"""Labels, noise and the division of work: functions of the sample's number, complete and without overlap."""

import json

import numpy as np
import pytest
import torch

from models.class_token import agreement, between, nearest_class
from models.model_file import Model, ModelInfo
from models.noise import NoiseSource
from models.sit import SiTConfig
from sampling.labels import read_labels
from sampling.tokens import read_tokens
from sampling.work import batches

CONFIG = SiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=4, num_classes=5, class_token_dim=6, align_dims=())
NAMES = ("ant", "bee", "cat", "dog", "eel")


def labels(*source, classes=(), seed=0, n=1000):
    return read_labels(source, classes, 5, NAMES, n).at(seed, torch.arange(n))


def test_random_labels():
    """All classes about equally often (4 standard errors), by seed, and the same in any part of the row."""
    y = labels("random", n=5000)
    assert (np.bincount(y, minlength=5) - 1000).__abs__().max() < 4 * (5000 * 0.2 * 0.8) ** 0.5
    assert torch.equal(labels(n=5000), y), "random is the default"
    assert not torch.equal(labels(seed=1, n=5000), y)
    assert torch.equal(read_labels((), (), 5, (), 300).at(0, torch.arange(100, 200)), y[100:200])


def test_balanced_labels_interleave():
    """Class i mod 5: equal counts in every stretch of the file, as chunks of the Inception Score want."""
    assert labels("balanced", n=12).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_classes_by_number_and_name():
    """Upper and lower case are one, unless a class is spelled exactly so."""
    assert labels(classes=("3", "bee"), n=4).tolist() == [3, 1, 3, 1], "alone, --classes is balanced"
    assert labels(classes=("BEE", "name:Cat"), n=2).tolist() == [1, 2]
    assert read_labels((), ("crane",), 2, ("Crane", "crane"), 2).values.tolist() == [1]
    with pytest.raises(ValueError, match="2 classes have this name, those with the numbers 0, 1; give the number"):
        read_labels((), ("CRANE",), 2, ("Crane", "crane"), 2)
    assert set(labels("random", classes=("3", "bee")).tolist()) == {1, 3}


def test_lists_of_labels(tmp_path):
    """On the command line or in a file of any of four kinds, taken in turn."""
    assert labels("4", "0", "dog", n=5).tolist() == [4, 0, 3, 4, 0]
    values = np.array([2, 0, 1])
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros(3), arr_1=values)
    (tmp_path / "a.json").write_text(json.dumps(values.tolist()))
    (tmp_path / "a.txt").write_text("2 0\n1\n")
    for suffix in ("npy", "npz", "json", "txt"):
        assert labels(str(tmp_path / f"a.{suffix}"), n=4).tolist() == [2, 0, 1, 2]


def test_spread_labels():
    """Few samples go evenly over all classes or those of --classes; more than classes: the classes in turn."""
    names = tuple(f"c{i}" for i in range(1000))
    spread = read_labels(("spread",), (), 1000, names, 16).at(0, torch.arange(16)).tolist()
    assert spread == [i * 1000 // 16 for i in range(16)]
    assert labels("spread", n=7).tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert labels("spread", classes=("dog", "bee", "ant"), n=2).tolist() == [3, 1]


def test_unknown_class_names_are_answered_by_known_ones():
    """All of them where they are few, else those spelled alike, whole or in a word; without names: give numbers."""
    for flag, given in (
        ("--classes", ((), ("fox",))),
        ("--labels", (("fox",), ())),
        ("--labels", (("fox", "ant"), ())),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"^{flag} fox: .* names: ant, bee, cat, dog, eel$"):
            read_labels(*given, 5, NAMES, 8)
    many = (*(f"thing {i}" for i in range(50)), "golden_retriever", "Chesapeake Bay retriever", "tabby, tabby cat")
    with pytest.raises(ValueError, match=r"the closest of its 53 names: golden_retriever; Chesapeake Bay retriever$"):
        read_labels((), ("retriver",), 53, many, 8)
    with pytest.raises(ValueError, match=r"one of the model's class names$"):
        read_labels((), ("xyzzyx",), 53, many, 8)
    with pytest.raises(ValueError, match="this model has no class names, give numbers"):
        read_labels((), ("cat",), 5, (), 8)


def test_the_null_label():
    """Unconditional: the null class of the config, not 1000."""
    assert set(labels("null").tolist()) == {5}


@pytest.mark.parametrize(
    ("source", "classes", "words"),
    [
        (("5",), (), "--labels 5: the model has classes 0 to 4"),
        ((), ("7",), "--classes 7: the model has classes 0 to 4"),
        ((), ("fox",), "--classes fox: neither a class number below 5 nor one of the model's class names"),
        (("random", "3"), (), "--labels random: neither a class number"),
        (("3",), ("2",), "--classes goes with --labels random, balanced or spread"),
        (("nowhere.txt",), (), "--labels nowhere.txt: neither random, .* an existing file, nor one of the model"),
    ],
)
def test_bad_labels_are_named(source, classes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_labels(source, classes, 5, NAMES, 8)


@pytest.mark.parametrize(
    ("text", "words"), [("1 x", "not a list of class numbers"), ("1 9", "label 9, but the model"), ("", "holds")]
)
def test_bad_label_files_are_named(tmp_path, text, words):
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(ValueError, match=f"l.txt: .*{words}"):
        read_labels((str(tmp_path / "l.txt"),), (), 5, (), 8)


def test_noise_is_a_function_of_seed_index_and_step():
    """Exactly the same numbers in any batch; start, steps and candidates differ."""
    index = torch.arange(6)
    together, alone = NoiseSource(CONFIG, 3, index, 10), NoiseSource(CONFIG, 3, index[4:5], 10)
    for draw in (lambda s: s.start(), lambda s: s(0), lambda s: s(9)):
        for a, b in zip(draw(together), draw(alone), strict=True):
            assert torch.equal(a[4:5], b)
    other = NoiseSource(CONFIG, 3, index, 10, candidate=1)
    assert not torch.equal(other.start().latent, together.start().latent)
    assert not torch.equal(together(1).latent, together(2).latent)
    assert together.start().latent.shape == (6, 4, 4, 4) and together.start().class_token.shape == (6, 6)


def test_noise_drawn_several_steps_at_once_is_the_same():
    """What a GPU does to save launches changes no number, up to the last step."""
    one, eight = (NoiseSource(CONFIG, 3, torch.arange(4), 11) for _ in range(2))
    eight.at_once = 8
    for step in range(10):
        assert torch.equal(one(step).latent, eight(step).latent)
        assert torch.equal(one(step).class_token, eight(step).class_token)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("size", [1, 3, 5, 64])
def test_batches_fill_exactly_what_is_missing(size, aligned):
    done = [range(10, 13), range(0, 4), range(20, 30)]
    cut = batches(done, 26, size, aligned=aligned)
    made = sorted(i for r in [*cut, *done] for i in r if i < 26)
    assert made == list(range(26))
    assert all(0 < len(r) <= size for r in cut)
    if aligned:
        assert all(len({i // size for i in r}) == 1 for r in cut)
    assert batches([range(0, 30)], 26, size, aligned=aligned) == []


MEANS = torch.eye(3, 4) * 2 + 0.1


def test_tokens_name_their_nearest_class():
    """By cosine, whatever the length; agreement is positive exactly for the named class."""
    tokens = torch.cat([MEANS * 10, MEANS[1:2] + 0.01])
    assert nearest_class(tokens, MEANS).tolist() == [0, 1, 2, 1]
    assert (agreement(tokens, torch.tensor([0, 1, 2, 1]), MEANS) > 0).all()
    assert (agreement(tokens, torch.tensor([1, 2, 0, 0]), MEANS) < 0).all()


def test_between_two_tokens():
    """Ends are the tokens, lengths go linearly, directions at an even angle; equal directions are no division by zero."""
    a, b = torch.tensor([2.0, 0, 0]), torch.tensor([0, 4.0, 0])
    path = between(a, b, torch.tensor([0, 0.5, 1]))
    assert torch.allclose(path, torch.tensor([[2.0, 0, 0], [3 / 2**0.5, 3 / 2**0.5, 0], [0, 4.0, 0]]), atol=1e-6)
    assert torch.allclose(between(a, 2 * a, torch.tensor([0.5])), torch.tensor([[3.0, 0, 0]]))


def test_reading_given_tokens(tmp_path):
    file = tmp_path / "class_tokens.npy"
    np.save(file, np.arange(12, dtype=np.float32).reshape(2, 6))
    model = Model(tmp_path, None, ModelInfo(CONFIG, "linear", 8, "ema", {}, encoders=("nowhere",)), None)
    assert read_tokens((str(file),), model).shape == (2, 6)
    assert read_tokens((f"{file}:1", f"{file}:0"), model)[0].tolist() == [6, 7, 8, 9, 10, 11]
    for source, words in ((f"{file}:2", "rows 0 to 1"), (f"{tmp_path}/no.npy", "no such file")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            read_tokens((source,), model)
    np.save(tmp_path / "narrow.npy", np.ones((2, 5), dtype=np.float32))
    with pytest.raises(ValueError, match=r"holds float32 \(2, 5\), the model's tokens have width 6"):
        read_tokens((str(tmp_path / "narrow.npy"),), model)
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"a.jpg: neither an image nor an .npy file"):
        read_tokens((str(tmp_path / "a.jpg"),), model)
