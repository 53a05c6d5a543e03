"""What a step takes, counted on the meta device, against the same step really computed."""

from __future__ import annotations

import pytest
import torch
from small_base import make_family

from bolid.backends.diffusion import load_base
from bolid.method.body_condition import initial_state, install
from bolid.models.families import get_family
from bolid.train_adapter.precision import store_frozen
from bolid.train_adapter.step_cost import LiveBytes, adapted_network, step_cost

SHAPE, LENGTH, BATCH, BODY_DIM = (4, 16, 12), 24, 3, 8


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return get_family(make_family(tmp_path_factory.mktemp("cost")))


def real_network(family, precision, kv_rank):
    """As `train_adapter` makes it."""
    unet = load_base(family).unet
    states = [initial_state(unet, "face", 512, tokens=2, kv_rank=kv_rank)]
    states.append(initial_state(unet, "body", BODY_DIM, kv_rank=kv_rank))
    for branch in install(unet, states):
        for parameter in branch.values():
            parameter.requires_grad_(True)
    store_frozen(unet, precision)
    return unet


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("precision", "kv_rank", "checkpointing"), [("fp32", 0, False), ("bf16", 0, True), ("bf16", 3, False)]
)
def test_what_is_counted_without_data_is_what_a_real_step_takes(family, precision, kv_rank, checkpointing, device):
    real = real_network(family, precision, kv_rank)
    if checkpointing:
        real.enable_gradient_checkpointing()
    empty, trained = adapted_network(
        dict(real.config) | {"encoder_hid_dim_type": None}, BODY_DIM, face_tokens=2, kv_rank=kv_rank,
        precision=precision, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    assert all(p.is_meta for p in empty.parameters())
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in real.named_parameters()
    }
    counted, took = (step_cost(unet, SHAPE, LENGTH, BATCH, precision, device, flops=True) for unet in (empty, real))
    assert all(p.is_meta for p in empty.parameters())
    assert counted.kept == pytest.approx(took.kept, rel=0.01)
    assert counted.peak == pytest.approx(took.peak, rel=0.01)
    assert counted.flops == took.flops
    assert counted.peak > counted.kept and counted.peak > sum(p.numel() * 4 for p in trained)


def test_what_the_forward_pass_leaves_is_what_autograd_saves(family):
    """By another way of counting: the tensors that autograd saves, each storage once, the weights left out."""
    unet = real_network(family, "fp32", 0)
    mine = {p.untyped_storage()._cdata for p in unet.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in mine:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = step_cost(unet, SHAPE, LENGTH, BATCH, "fp32", "cuda").kept
    assert kept == pytest.approx(sum(storage.nbytes() for storage in saved.values()), rel=0.05)


@pytest.mark.slow
def test_checkpointing_and_low_rank_each_save(family):
    config = dict(load_base(family).unet.config)

    def cost(batch=8, **settings):
        return step_cost(
            adapted_network(config, BODY_DIM, face_tokens=2, precision="bf16", **settings)[0],
            SHAPE, LENGTH, batch, "bf16", flops=True,
        )  # fmt: skip

    plain, lean, thin, single = cost(), cost(gradient_checkpointing=True), cost(kv_rank=2), cost(batch=4)
    assert lean.kept < 0.5 * plain.kept and lean.peak < plain.peak and lean.flops > 1.2 * plain.flops
    assert thin.peak < plain.peak
    assert plain.flops == pytest.approx(2 * single.flops, rel=1e-6)


def test_memory_is_followed_to_its_end():
    before = torch.zeros(1000)
    with LiveBytes([before]) as live:
        view = before.view(10, 100)
        assert live.now == 0
        doubled = view * 2
        part = doubled[0]
        del doubled
        assert live.now == 4000, "a view keeps the whole"
        del part
        assert live.now == 0 and live.peak == 4000
