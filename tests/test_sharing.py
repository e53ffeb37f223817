"""Models to hand on: folders of huggingface_hub and diffusers, that load and sample as generate.py does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from config import UserError
from models.model_file import read_header
from sharing import export
from sharing.pretrained import PretrainedSiT
from tests.toy_model import CONFIG, generate, place, write_model  # noqa: F401 (a fixture)

LABELS = ["ant", "emu", "bee", "cat", "ant"]
NAMES = ("ant", "bee", "cat", "dog", "emu")


@pytest.fixture(scope="module")
def model(place):  # noqa: F811
    """A model file with class names, and the samples of generate.py for LABELS."""
    write_model(place, "m", CONFIG, classes=NAMES)
    out = place / "samples"
    flags = ("--labels", *LABELS, "--cfg-scale", "2.3", "--num-fid-samples", "5")
    return place, generate(place, out, *flags)[0]


@pytest.fixture(scope="module")
def pipeline(model, tmp_path_factory):
    """A diffusers folder far from the project."""
    folder = tmp_path_factory.mktemp("elsewhere") / "pipe"
    export.main(["--checkpoint", str(model[0] / "m"), "--out", str(folder), "--format", "diffusers"])
    return folder


def seven_lines(name):
    model = PretrainedSiT.from_pretrained(name)
    state = model.sample(LABELS, num_steps=4, cfg_scale=2.3)
    return model.autoencoder.decode(state.latent).permute(0, 2, 3, 1).numpy()


def test_the_library_samples_as_the_program(model, tmp_path):
    """Load, sample, decode: generate.py's pictures; also after save_pretrained, from a folder without the VAE of before."""
    folder, pictures = model
    assert np.array_equal(seven_lines(folder / "m"), pictures)
    PretrainedSiT.from_pretrained(folder / "m").save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "vae",
    ]
    for text in (
        read_header(tmp_path / "saved/model.safetensors")["reg"],
        (tmp_path / "saved/config.json").read_text(),
        (tmp_path / "saved/vae/config.json").read_text(),
    ):
        assert str(folder) not in text
    moved = shutil.move(tmp_path / "saved", tmp_path / "moved")
    assert np.array_equal(seven_lines(moved), pictures)


def test_what_the_library_refuses(model):
    loaded = PretrainedSiT.from_pretrained(model[0] / "m")
    with pytest.raises(UserError, match=r"labels eagle: neither a class number below 5 nor one of .*: ant, bee"):
        loaded.sample(["eagle"])
    with pytest.raises(UserError, match="no setting 'steps', it takes mode, solver"):
        loaded.sample(["ant"], steps=3)
    with pytest.raises(UserError, match="num-steps"):
        loaded.sample(["ant"], num_steps=0)
    with pytest.raises(UserError, match="mode"):
        loaded.sample(["ant"], mode="dde")
    loaded.network.requires_grad_(True)
    loaded.sample(["ant"], num_steps=2)
    assert all(parameter.requires_grad for parameter in loaded.network.parameters())
    for name in (str(model[0] / "m"), "OWNER/NAME/model.safetensors", "nowhere"):
        with pytest.raises(
            UserError, match=rf"^revision: only for a repository on \S+, OWNER/NAME, which {name} is not"
        ):
            PretrainedSiT.from_pretrained(name, revision="v1")
    with pytest.raises(UserError, match="nowhere"):
        PretrainedSiT.from_pretrained(model[0] / "nowhere")


def test_pushing_uploads_the_folder(model, monkeypatch):
    """push_to_hub hands model, VAE and card to the hub's client in one commit."""
    from huggingface_hub import HfApi

    uploaded = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, folder_path, **_: uploaded.extend(Path(folder_path).rglob("*.*")) or "url"
    )
    assert PretrainedSiT.from_pretrained(model[0] / "m").push_to_hub("owner/name") == "url"
    names = {path.name for path in uploaded}
    assert names == {"model.safetensors", "config.json", "README.md", "diffusion_pytorch_model.safetensors"}


WAYS = """
import sys
sys.path[0] = {folder!r}
import numpy as np
import torch
from diffusers import DiffusionPipeline
from pipeline import REGPipeline

torch.set_num_threads({threads})
pipes = REGPipeline.from_pretrained({folder!r}), DiffusionPipeline.from_pretrained(
    {folder!r}, custom_pipeline="pipeline", trust_remote_code=True
)
for number, pipe in enumerate(pipes):
    pipe.set_progress_bar_config(disable=True)
    given = dict(num_inference_steps=4, guidance_scale=2.3)
    made = pipe(class_labels={labels}, seed=0, output_type="np", **given).images
    np.save(f"{{number}}.npy", made)
    drawn = [pipe(class_labels=["ant", 4], generator=torch.Generator().manual_seed(5), **given) for _ in range(2)]
    assert drawn[0].images[0].size == (8, 8) and drawn[0].class_tokens.equal(drawn[1].class_tokens)
    try:
        pipe(class_labels=["eagle"])
    except ValueError as error:
        print(error)
print([name for name in sys.modules if name.split(".")[0] in ("models", "sampling", "sharing", "config", "common")])
"""


def test_a_process_without_the_project_samples_the_same(model, pipeline, tmp_path):
    """Both ways of diffusers, in an interpreter that has neither the project's folder nor its modules; bit for bit."""
    threads = torch.get_num_threads()
    code = WAYS.format(folder=str(pipeline), labels=LABELS, threads=threads)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], check=False, **arguments)
    assert done.returncode == 0, done.stderr
    *refused, modules = done.stdout.strip().splitlines()
    assert len([line for line in refused if "class_labels eagle: neither a class number below 5" in line]) == 2
    assert modules == "[]"
    for number in (0, 1):
        assert np.array_equal(np.load(tmp_path / f"{number}.npy"), model[1])


def test_the_code_of_a_folder_is_that_of_the_project(pipeline):
    """Every line of its files but imports stands in a module of the project; nothing refers to one."""
    from tests.test_architecture import LIBRARY

    known = {line.strip() for path in LIBRARY for line in path.read_text().splitlines()}
    files = [pipeline / "pipeline.py", *pipeline.glob("*/reg_*.py")]
    assert len(files) == 3
    for file in files:
        text = file.read_text()
        body = text.split('"""', 2)[2]
        own = {line.strip() for line in body.splitlines()} - known
        assert all("import" in line or line.endswith("= sys.modules[__name__]") for line in own), own
        assert "from models" not in body and "from sampling" not in body
        compile(text, file, "exec")


def test_the_card(model, tmp_path):
    """Table of results with what repeats them, checksums of the files, licence, how to sample; no path of the machine."""
    from common.files import sha256
    from evaluations.registry import Metric
    from evaluations.results import Results

    sampling = {"mode": "sde", "solver": "euler", "steps": 250, "nfe": 250, "labels": "random", "seed": 3}
    sampling |= {"cfg_scale": 2.3, "cls_cfg_scale": 2.3, "guidance_low": 0.0, "guidance_high": 0.85}
    protocol = {"sampling": sampling, "n_samples": 50_000, "samples_sha256": "abc", "reference": "in256.npz"}
    Results({"fid": Metric(1.864, 0.01, "inception", 50_000, 10_000)}, protocol, [], "guided").save(tmp_path / "r.json")
    flags = (
        "--results",
        str(tmp_path / "r.json"),
        "--files",
        str(model[0] / "samples/samples.npz"),
        "--licence",
        "mit",
    )
    flags += ("--name", "My REG", "--data", "Five animals, own photographs, CC0.", "--dtype", "bf16")
    out = tmp_path / "shared"
    export.main(["--checkpoint", str(model[0] / "m"), "--out", str(out), *flags])
    text = (out / "README.md").read_text()
    row = "guided | 50000 | sde euler 250 | 2.3 / 2.3 in [0.0, 0.85] | 1.86 ± 0.01 | 250 | random | 3 | in256.npz | abc"
    assert row in text and "license: mit" in text and "# My REG" in text and "CC0" in text
    assert sha256(out / "model.safetensors") in text and sha256(model[0] / "samples/samples.npz") in text
    assert str(tmp_path) not in text and str(model[0]) not in text
    assert (out / "model.safetensors").stat().st_size < 0.6 * (model[0] / "m").stat().st_size
    assert np.abs(seven_lines(out).astype(int) - model[1].astype(int)).mean() < 3  # bf16 weights


def test_an_export_is_whole_or_absent(model, tmp_path):
    """A folder that exists, a results file that is none: one sentence, nothing written."""
    for name, words in (("there", "exists already"), ("new", "was not written by evaluations")):
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "r.json").write_text(json.dumps({"schema": 1}))
        with pytest.raises(UserError, match=words):
            flags = ["--out", str(tmp_path / name), "--results", str(tmp_path / "r.json")]
            export.main(["--checkpoint", str(model[0] / "m"), *flags])
    (tmp_path / "new.tmp" / "vae").mkdir(parents=True)  # a kill has left it
    export.main(["--checkpoint", str(model[0] / "m"), "--out", str(tmp_path / "new")])
    shutil.rmtree(tmp_path / "new")
    write_model(tmp_path, "lost", CONFIG, vae="/nowhere/old-vae")
    with pytest.raises(UserError, match=r"^\S+lost needs \./old-vae, which is neither beside it nor known"):
        export.main(["--checkpoint", str(tmp_path / "lost"), "--out", str(tmp_path / "new")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lost", "r.json", "there"]
