"""The plan of a run: by --dry-run, without a dataset, compared with a GPU, at the start; and the launcher's settings."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from config import UserError, parse
from dataset import PackedDataset
from models.cost import USABLE, _by_depth, _count, training_memory
from models.sit import preset
from tests.tiny import log_lines as lines
from tests.tiny import train_flags as flags
from tests.tiny import write_dataset, write_encoder
from train import TrainConfig
from training.assumed import ASSUMED, assumed_manifest, record_bytes
from training.dry_run import Forecast, start_text
from training.launch import asked_precision, check_launcher
from training.plan import make_plan
from training.step import TrainStep

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------------------ what is printed


def test_dry_run_prints_the_plan_and_leaves_nothing(tools, tmp_path, capsys):
    """Parameters, operations, memory, steps, epochs and dataset, from the real network and data."""
    train.main(flags(tools["data"], tmp_path, "--dry-run", steps=50))
    text = capsys.readouterr().out
    for words in (
        "20 images of 8 px, 3 classes",
        "2 blocks of width 32",
        "toy-16: cached",
        "multiply-adds per image",
        "50 of 8 images: 400 images, 20.0 epochs",
        "KiB per image",
        "KiB per checkpoint",
    ):
        assert words in text, words
    assert not list(tmp_path.iterdir())


def test_a_run_prints_the_plan_before_its_first_step(tools, tmp_path, capsys, monkeypatch):
    """The rows of the dry run, device and folder; on resume the step; other processes print nothing."""
    train.main(flags(tools["data"], tmp_path, "--dry-run"))
    plan = capsys.readouterr().out.splitlines()
    original, printed = TrainStep.__call__, []

    def call(self, *args):
        printed.append(capsys.readouterr().out)
        return original(self, *args)

    monkeypatch.setattr(TrainStep, "__call__", call)
    train.main(flags(tools["data"], tmp_path))
    first = printed[0].splitlines()
    machine = ("device", "folder", "time", "GPU", "compile")  # rows that depend on it
    assert [row for row in first if not row.startswith(machine)] == [row for row in plan if not row.startswith(machine)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    assert f"device       {device}" in first and f"folder       {tmp_path / 'run'}" in first
    printed.clear()
    train.main(flags(tools["data"], tmp_path, steps=6))
    assert f"resuming from {tmp_path / 'run/checkpoints/0000004'} at step 4 of 6" in printed[0]
    train.main(flags(tools["data"], tmp_path, "--compile", "--dry-run"))
    assert "compiling, the first step takes a minute or two" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    train.main(flags(tools["data"], tmp_path, "--dry-run"))
    assert capsys.readouterr().out == ""


def test_a_plan_without_a_dataset(capsys):
    """--assume: ImageNet's numbers, tokens on the patch grid of the network; names of GPUs as people write them."""
    flags = ("--assume", "imagenet512", "--model", "SiT-B/4", "--enc-type", "dinov2-vit-s", "--gpu", "rtx 4090")
    train.main(["--dry-run", *flags])
    text = capsys.readouterr().out
    for words in (
        "imagenet512 (assumed): 1,281,167 images of 512 px, 1000 classes, latents 4 x 64 x 64 of ema",
        "class token of width 384",
        "79.9 epochs",
        "RTX4090, 24.0 GiB",
        "on 1 RTX4090",
        "precision    bf16",
    ):
        assert words in text, words
    # moments, label, class token and 256 patch tokens
    assert f"{1_281_167 * (2 * 8 * 64 * 64 + 8 + 2 * 384 + 2 * 256 * 384) / 2**30:.1f} GiB of records" in text
    train.main(
        ["--dry-run", "--assume", "imagenet256", "--model", "SiT-S/8", "--gpu", "V100", "--mixed-precision", "fp32"]
    )
    assert "not predicted for this precision without TF32" in capsys.readouterr().out


def test_an_assumed_dataset_is_what_packing_writes(tools):
    """The fields of a manifest that was written, with the same types, and a plan that reads the same of them."""
    settings = parse(TrainConfig, "", ["--assume", "imagenet256", "--enc-type", "dinov2-vit-s"])
    assumed, written = assumed_manifest(settings), PackedDataset(tools["data"]).manifest
    assert {n: f["dtype"] for n, f in assumed.fields.items()} == {n: f["dtype"] for n, f in written.fields.items()}
    assert make_plan(settings, assumed).cached == (0,) and make_plan(settings, assumed).network.align_dims == (384,)
    assert record_bytes(written) == sum(
        (PackedDataset(tools["data"]).records(0, name)[:1]).nbytes for name in written.fields
    )
    choices = next(f for f in fields(TrainConfig) if f.name == "assume").metadata["choices"]
    assert set(choices) == set(ASSUMED)


@pytest.mark.parametrize(
    ("gpu", "depth", "words"),
    [
        ("H200", 28, "GiB fit"),
        ("RTX4090", 28, "do not fit: use "),
        ("T4", 48, "do not fit at any batch size"),
    ],
)
def test_a_plan_says_whether_it_fits(capsys, gpu, depth, words):
    """256 images per step of XL/2: the smallest accumulation that fits, with and without checkpointing; a T4 has no place
    for weights, gradients, AdamW and EMA of a deeper one."""
    train.main(["--dry-run", "--assume", "imagenet256", "--gpu", gpu, "--depth", str(depth)])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("GPU"))
    assert words in row
    if gpu != "RTX4090":
        return
    network, usable = preset("SiT-XL/2"), USABLE * 24 * 2**30
    for recompute in (False, True):
        memory = training_memory(network, recompute=recompute)
        smallest = next(n for n in range(1, 257) if 256 % n == 0 and memory.total(256 // n) <= usable)
        assert smallest > 1
        flag = "--gradient-checkpointing " if recompute else ""
        assert (
            f"{flag}--gradient-accumulation-steps {smallest} ({memory.total(256 // smallest) / 2**30:.1f} GiB)" in row
        )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--micro-batch", "64"), "1, with micro-batches of 64 images, 4 per step"),
        (("--micro-batch", "auto"), "1, with micro-batches of 256 images, 1 per step"),  # of an H200
        (("--micro-batch", "auto", "--gpu", "A6000"), "1, with micro-batches of 64 images, 4 per step"),
    ],
)
def test_the_micro_batch_is_given_or_found(capsys, flags, words):
    """As many images as the memory of the GPU holds, counted as in the row that compares them."""
    train.main(["--dry-run", "--assume", "imagenet256", "--gpu", "H200", *flags])
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--micro-batch", "7"), "--micro-batch 7 does not divide the 256 images"),
        (("--micro-batch", "big"), "--micro-batch big is neither a whole number of images nor auto"),
        (("--micro-batch", "8", "--gradient-accumulation-steps", "2"), "say the same thing"),
        (
            ("--micro-batch", "auto", "--gpu", "T4"),
            "one image needs 1[0-9.]+ GiB of the 1[0-9.]+ GiB .* use --gradient-ch",
        ),
    ],
)
def test_impossible_micro_batches_are_one_sentence(flags, words):
    with pytest.raises(UserError, match=words):
        train.main(["--dry-run", "--assume", "imagenet256", "--gpu", "H200", *flags])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--batch-size", "4"), "batch size 4 must be divisible by 8 processes$"),
        (("--batch-size", "4", "--micro-batch", "auto"), "batch size 4 must be divisible by 8 processes$"),
        (("--batch-size", "12", "--micro-batch", "2"), "batch size 12 must be divisible by 8 processes$"),
        (
            ("--eval-every", "2", "--eval-samples", "7", "--eval-reference", "x"),
            "--eval-samples 7: fewer images than the 8",
        ),
    ],
)
def test_what_processes_cannot_share_is_one_sentence(flags, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match=words):
        train.main(["--dry-run", "--assume", "imagenet256", "--gpu", "H200", *flags])


def test_a_run_is_compared_with_the_gpu_it_found(tools, monkeypatch):
    """By its own name and memory, of which the data sheet's name is a part; an unknown GPU gets no prediction of time."""
    settings = parse(TrainConfig, "", flags(tools["data"], Path("runs"), "--mixed-precision", "auto"))
    plan = make_plan(settings, PackedDataset(tools["data"]).manifest)
    processes = SimpleNamespace(device=torch.device("cuda"), world=8, precision="bf16")
    texts = {}
    for device, memory in (("NVIDIA H100 80GB HBM3", 79.1 * 2**30), ("Voodoo 2", 12 * 2**20), ("Voodoo 1", 2**10)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, device=device: device)
        properties = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        texts[device] = start_text(settings, plan, processes, Path("runs/run"))
    text = texts["NVIDIA H100 80GB HBM3"]
    assert (
        "NVIDIA H100 80GB HBM3, 79.1 GiB, of which 73.6 GiB are for tensors: " in text
        and "on 8 H100, by counted operations" in text
    )
    assert "MiB fit" in text
    assert "time         not predicted for Voodoo 2" in texts["Voodoo 2"] and "do not fit at any" in texts["Voodoo 1"]


def test_encoders_count(tmp_path, capsys):
    """The weights of an encoder that runs in the step, in float32."""
    data = write_dataset(tmp_path / "data", dims=(), pixels=True)
    command = [
        *flags(data, tmp_path, "--enc-type", str(write_encoder(tmp_path / "encoder"))),
        "--dry-run",
        "--gpu",
        "h100",
    ]
    settings = parse(TrainConfig, "", command)
    plan = make_plan(settings, PackedDataset(data).manifest)
    weights = 4 * sum(p.numel() for p in plan.online[0].parameters())

    def needed(world):
        return Forecast(settings, plan, world, "fp32").needed_memory(1, recompute=False)

    counted = training_memory(plan.network, half=False)
    assert needed(2) == counted.total(4) + weights
    train.main(command)
    assert f"{weights / 2**10:.1f} KiB of encoders" in capsys.readouterr().out


def test_counts_by_depth_are_exact():
    """Parameters and operations from one and two blocks are those of the whole network."""
    config = preset("SiT-S/8", depth=5, align_depth=3, align_dims=(8, 16), qk_norm=True)
    assert _by_depth(_count, config) == _count(config)


@pytest.mark.parametrize("example", train.EXAMPLES)
def test_examples_are_commands(example, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = parse(TrainConfig, "", example.split("train.py")[1].split())
    train.check_values(settings)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--exp-name", "x"), "--data-dir is required: packed dataset"),
        (("--data-dir", "d"), "--exp-name is required: name of the run"),
        (("--dry-run", "--data-dir", "d"), "--exp-name is required"),
        (("--assume", "imagenet256"), "--assume imagenet256 plans a run: give --dry-run with it"),
        (("--gpu", "H100", "--data-dir", "d", "--exp-name", "x"), "--gpu H100 plans a run: give --dry-run with it"),
        (("--dry-run", "--assume", "imagenet256", "--data-dir", "d"), "--assume takes the place of --data-dir"),
        (
            ("--dry-run", "--assume", "imagenet256", "--gpu", "Voodoo2"),
            "--gpu Voodoo2 is not in the table, choose from",
        ),
        (
            ("--dry-run", "--assume", "imagenet256", "--enc-type", "./mine"),
            "encoder folder ./mine does not exist",
        ),
        (
            ("--dry-run", "--assume", "imagenet256", "--resolution", "512"),
            "dataset imagenet256 was packed at 256 pixels",
        ),
    ],
)
def test_flags_that_need_or_exclude_each_other(given, words):
    with pytest.raises(UserError, match=words):
        train.main(list(given))


def test_the_precision_of_the_launcher_is_obeyed(tools, tmp_path, monkeypatch, capsys):
    """What `accelerate launch` asks for is what auto means, and "no" is its silence; contradictions and fp8 are refused."""
    assert asked_precision("auto", {}) == asked_precision("auto", {"ACCELERATE_MIXED_PRECISION": "no"}) == "auto"
    assert asked_precision("fp16", {"ACCELERATE_MIXED_PRECISION": "no"}) == "fp16"
    for value in ("bf16", "fp16"):
        assert {asked_precision(own, {"ACCELERATE_MIXED_PRECISION": value}) for own in ("auto", value)} == {value}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train.main(flags(tools["data"], tmp_path, "--mixed-precision", "auto", name="bf16"))
    assert "precision    bf16, as accelerate's launcher asks" in capsys.readouterr().out
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    train.main(flags(tools["data"], tmp_path, "--mixed-precision", "auto", name="float32"))
    assert [line["loss"] for line in lines(tmp_path, "bf16")] != [line["loss"] for line in lines(tmp_path, "float32")]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MIXED_PRECISION", "bf16", "--mixed-precision fp32 contradicts accelerate's mixed precision bf16"),
        ("MIXED_PRECISION", "fp8", "accelerate's mixed precision fp8 is not supported: choose bf16, fp16 or no"),
        ("DYNAMO_BACKEND", "INDUCTOR", "accelerate's dynamo_backend inductor is not followed: .* --compile"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "give train.py --gradient-accumulation-steps 4"),
        ("USE_DEEPSPEED", "true", "accelerate's DeepSpeed settings are not supported"),
        ("USE_MEGATRON_LM", "true", "accelerate's Megatron-LM settings are not supported"),
    ],
)
def test_settings_of_the_launcher_without_effect_are_refused(tools, tmp_path, monkeypatch, name, value, words):
    """By a start, before anything is read, and by the dry run."""
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=words):
        train.main(flags(tmp_path / "nowhere", tmp_path))
    with pytest.raises(UserError, match=words):
        train.main(flags(tools["data"], tmp_path, "--dry-run"))
    for harmless in ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}):
        check_launcher(2, harmless)
