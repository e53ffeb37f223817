"""The step does no needless work: operations, synchronisation, attention kernels."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness
from benchmarks.train_variants import OurStep, encoded_ahead
from dataset import Batch, PackedDataset, StepSampler, read_ahead
from models import acceleration
from models.cost import GAP, GPUS, HOST, cost, counted_seconds, encoder_macs, step_cost, training_memory
from models.sit import SiTConfig, preset
from packed.format import MOMENTS_STD_SCALE
from tests.tiny import write_dataset
from training.tracking import Window

SIX_BLOCKS = SiTConfig(
    depth=6,
    hidden_size=64,
    num_heads=2,
    patch_size=2,
    input_size=4,
    num_classes=10,
    class_token_dim=32,
    align_dims=(32,),
    align_depth=4,
    projector_dim=32,
)


class Watch(TorchDispatchMode):
    """Notes every operation that Python hands to torch, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket._qualified_op_name)
        return function(*args, **(kwargs or {}))


def test_operations_of_a_step_do_not_grow_with_the_batch():
    """At most 6,000 ATen operations for six blocks at batch 256, and at batch 8 hardly fewer: small tensors are zeroed
    without a call of their own (published: 68 a sample)."""
    counts = []
    for n in (8, 256):
        step = OurStep(SIX_BLOCKS, n, "cpu")
        step()  # the first step creates the optimiser's state
        counts.append(harness.count_operations(step))
    assert 1000 < counts[1] <= 6000
    assert counts[1] - counts[0] < 0.02 * counts[1]  # with several threads torch splits a few more


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_quiet_step_reads_nothing_back(precision):
    """No value travels from the device to the host in a step or into the log window: no item(), no nonzero, no
    comparison in Python."""
    ours = OurStep(SIX_BLOCKS, 8, "cpu", precision=precision)
    window = Window(torch.device("cpu"))
    ours()
    with Watch() as watch:
        result = ours.step(1, [(ours.batch, ours.positions)])
        window.add(1, result, ours.positions)
    assert window.values.abs().sum() > 0
    reading = {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::nonzero",
        "aten::masked_select",
        "aten::equal",
        "aten::is_nonzero",
        "aten::unique",
        "aten::_unique2",
    }
    assert len(watch.names) > 300 and "aten::_fused_adamw_" in watch.names
    assert not reading & set(watch.names)


def test_the_watch_sees_a_value_that_is_read():
    """The test above can fail."""
    with Watch() as watch:
        float(torch.ones(3).sum())
    assert "aten::_local_scalar_dense" in watch.names


def test_attention_is_fused():
    """Each block calls one fused attention kernel, and nothing materialises the attention matrix."""
    step = OurStep(SIX_BLOCKS, 4, "cpu")
    with Watch() as watch:
        step()
    forward = [name for name in watch.names if "flash_attention" in name and "backward" not in name]
    assert len(forward) == SIX_BLOCKS.depth
    assert "aten::_softmax" not in watch.names and "aten::bmm" not in watch.names


def test_bf16_loss_follows_fp32():
    """On the same data and noise, 40 steps in bf16 and fp32 end at the same loss within 1 %."""
    final = []
    for precision in ("fp32", "bf16"):
        ours = OurStep(SIX_BLOCKS, 16, "cpu", precision=precision)
        ours.step.optimizer.param_groups[0]["lr"] = 3e-3
        totals = []
        for number in range(40):
            terms = ours.step(number, [(ours.batch, ours.positions)]).terms
            totals.append(float(ours.step.objective.total(terms)))
        assert sum(totals[-5:]) < 0.95 * sum(totals[:5])
        final.append(sum(totals[-5:]))
    assert abs(final[0] - final[1]) < 0.01 * abs(final[0])


@pytest.mark.slow
def test_bf16_loss_follows_fp32_on_digits():
    """On scikit-learn's digits as latents, with fixed random tokens as teacher, the loss curves of 200 steps in bf16 and in
    fp32 stay within 2 % of each other, 25 steps averaged, while the loss falls by more than a third."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float() / 8 - 1  # (1797, 8, 8) in [-1, 1]
    labels = torch.from_numpy(load_digits().target)
    g = torch.Generator().manual_seed(0)
    patches = images.view(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4) @ torch.randn(4, 32, generator=g)
    tokens = torch.cat(
        [images.flatten(1)[:, None] @ torch.randn(64, 32, generator=g) / 8, patches], dim=1
    )  # (N, 17, 32)
    std = torch.full((len(images), 4, 8, 8), 0.1 * MOMENTS_STD_SCALE)
    moments = torch.cat([images[:, None].expand(-1, 4, -1, -1), std], dim=1).half()
    curves = []
    for precision in ("fp32", "bf16"):
        ours = OurStep(replace(SIX_BLOCKS, input_size=8), 32, "cpu", precision=precision)
        ours.step.optimizer.param_groups[0]["lr"] = 2e-3
        totals = []
        for number in range(200):
            rows = torch.randint(0, len(images), (32,), generator=torch.Generator().manual_seed(number))
            token = tokens[rows].half()
            batch = Batch(moments[rows], labels[rows], rows, None, (token[:, 0],), (token[:, 1:],))
            terms = ours.step(number, [(batch, ours.positions)]).terms
            totals.append(ours.step.objective.total(terms))
        curves.append(torch.stack(totals).view(8, 25).mean(1))
    assert curves[0][-1] < 0.67 * curves[0][0]
    assert ((curves[0] - curves[1]).abs() < 0.02 * curves[0][0].abs()).all(), curves


def test_training_flops_of_the_largest_network():
    """XL/2: about 712 GFLOP per image and 15 for its projectors; DINOv2-B about 46."""
    assert cost(preset("SiT-XL/2")).train_flops == pytest.approx(727e9, rel=0.01)
    assert 2 * encoder_macs("dinov2-vit-b", 16) == pytest.approx(46.3e9, rel=0.01)


def test_step_cost_is_a_roofline():
    """Compute grows with the batch, weights' traffic and launching do not; no step is faster than its slower half, or than
    the host."""
    config, gpu = preset("SiT-B/2"), GPUS["H200"]
    one, two = (step_cost(config, n, gpu) for n in (32, 64))
    assert two.network_flops == 2 * one.network_flops and one.traffic < two.traffic < 2 * one.traffic
    for step in (one, two):
        assert step.floor == max(step.compute, step.memory) < step.expected
    encoder = encoder_macs("vit_tiny_patch16_224", 14)
    assert step_cost(config, 32, gpu, encoder_macs=encoder).encoder_flops == 32 * 2 * encoder
    again = step_cost(config, 32, gpu, recompute=True)
    assert again.compute > one.compute and again.host > one.host == two.host
    whole = step_cost(config, 256, gpu)
    assert one.expected == one.host > one.device and whole.expected == whole.device > one.host
    counted = partial(counted_seconds, config, 256, gpu, traffic=whole.traffic, launches=whole.gaps / GAP)
    assert counted(host=0.0) == pytest.approx(whole.device) and counted(host=1.0) == HOST


@pytest.mark.parametrize("half", [False, True])
def test_counted_memory_is_what_autograd_keeps(half):
    """The count on fake tensors equals the bytes that a real forward pass saves, and recomputation keeps less."""
    from models.sit import SiT

    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    sizes = []
    for n in (2, 3):
        kept.clear()
        network = SiT(SIX_BLOCKS).train()
        own = {p.untyped_storage().data_ptr() for p in [*network.parameters(), *network.buffers()]}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                inputs = torch.randn(n, 4, 4, 4), torch.rand(n), torch.zeros(n).long(), torch.randn(n, 32)
                output = network(*inputs, project=True)
        sizes.append(sum(size for pointer, (size, _) in kept.items() if pointer not in own))
        del output
    counted = training_memory(SIX_BLOCKS, half=half)
    assert counted.activations == pytest.approx(sizes[1] - sizes[0], rel=1e-3)
    assert counted.copies == pytest.approx(max(0, 3 * sizes[0] - 2 * sizes[1]), rel=1e-3)
    assert training_memory(SIX_BLOCKS, half=half, recompute=True).activations < counted.activations
    c = cost(SIX_BLOCKS)
    assert counted.state == 20 * (c.parameters + c.projector_parameters)


def test_best_precision_and_autocast():
    """The CPU keeps float32 unless asked; an unknown precision is named."""
    assert acceleration.best_precision("cpu") == "fp32"
    with acceleration.autocast("cpu", "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with acceleration.autocast("cpu", "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(ValueError, match="fp8"):
        acceleration.autocast("cpu", "fp8")


# ---------------------------------------------------------------------------------------------------------------- GPU

XL_BLOCKS = replace(preset("SiT-XL/2"), depth=2, align_depth=1)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_quiet_step_does_not_wait_for_the_gpu(precision, compiled):
    """set_sync_debug_mode("error") raises at any synchronisation; a step passes under it."""
    ours = OurStep(XL_BLOCKS, 8, "cuda", precision=precision, compiled=compiled)
    window = Window(torch.device("cuda"))
    ours()
    ours()
    torch.cuda.set_sync_debug_mode("error")
    try:
        window.add(2, ours.step(2, [(ours.batch, ours.positions)]), ours.positions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_flash_attention_is_taken_on_the_gpu(precision):
    """With the network's head width (72) and 257 tokens SDPA takes a flash kernel, forward and backward."""
    step = OurStep(XL_BLOCKS, 8, "cuda", precision=precision)
    with Watch() as watch:
        step()
    taken = [n for n in watch.names if "flash_attention" in n or "cudnn_attention" in n]
    assert len(taken) == 2 * XL_BLOCKS.depth
    assert "aten::_softmax" not in watch.names


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [0, 2])
def test_batches_copied_ahead_equal_those_copied_on_demand(threads, tmp_path):
    """Over 20 steps the losses are bit for bit those of plain copies, and when a step has ended its batch still holds its
    records, though the device is behind with its work, and the host has let go of the batch."""
    dataset = PackedDataset(write_dataset(tmp_path / "data", dims=(32,), count=4096))
    order = [StepSampler(len(dataset), 1024, seed=0).indices(step, 0) for step in range(20)]
    ours = OurStep(replace(SIX_BLOCKS, num_classes=3), 1024, "cuda")

    def losses(batch: Batch) -> torch.Tensor:
        return torch.stack(ours.step.loss(batch, ours.positions)[0][:3]).detach()

    found, held = [], []
    for batch in read_ahead(dataset, order, threads=threads, device="cuda"):
        torch.cuda._sleep(20_000_000)  # cycles
        found.append(losses(batch))
        held.append(batch.patch_tokens[0].clone())
    for indices, one, tokens in zip(order, found, held, strict=True):
        read = dataset.read(indices)
        assert torch.equal(tokens.cpu(), read.patch_tokens[0])
        tensors = [x.cuda() for x in (read.moments, read.label, read.index, read.class_token[0], read.patch_tokens[0])]
        assert torch.equal(one, losses(Batch(*tensors[:3], None, (tensors[3],), (tensors[4],))))


@pytest.mark.gpu
def test_the_encoder_may_run_ahead():
    """Encoding the next batch on a side stream changes no loss."""
    losses = []
    for make in (lambda step: step, encoded_ahead):
        step = make(OurStep(XL_BLOCKS, 8, "cuda", encoder="dinov2-vit-b", precision="bf16"))
        losses.append(torch.stack([torch.stack(step().terms[:3]) for _ in range(3)]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_gpu_step_equals_cpu_step():
    """Three steps in float32 without TF32 see the same losses on both, each sample's."""
    acceleration.allow_tf32(False)
    losses, state = [], None
    for device in ("cpu", "cuda"):
        ours = OurStep(SIX_BLOCKS, 8, device)
        state = ours.step.network.state_dict() if state is None else state
        ours.step.network.load_state_dict(state)
        state = {name: weight.clone() for name, weight in state.items()}
        losses.append(torch.stack([torch.stack(ours().terms[:3]).cpu() for _ in range(3)]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)
