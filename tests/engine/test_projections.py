"""Fused projections compute what the separate ones do, in the same memory; what must not be fused is not."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from peft import LoraConfig
from torch import Tensor, nn

from opd_fast.engine.attention import route
from opd_fast.engine.fused_qkv import fuse_projections
from opd_fast.models.joint_attention import JointAttention
from tests.engine.test_attention import FAMILIES, call_flux, call_sd3, noise
from tests.techniques import sites
from tests.tiny import tiny_transformer
from tests.tiny_flux import tiny_flux_transformer


def frozen(network: nn.Module) -> nn.Module:
    return network.requires_grad_(False)


def output(network: nn.Module, call: Any = call_sd3) -> Tensor:
    with torch.no_grad():
        out: Tensor = call(network, noise(2, 4, 8, 8, seed=2))
    return out


def size(network: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in network.parameters())


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(
    ("build", "call", "count"),
    [
        (tiny_transformer, call_sd3, 3),
        (lambda: tiny_transformer(qk_norm=None, dual_attention_layers=()), call_sd3, 2),
        (tiny_flux_transformer, call_flux, 3),
    ],
    ids=["sd3.5", "sd3", "flux"],
)
def test_equals_separate(build: Any, call: Any, count: int) -> None:
    network = frozen(build())
    wanted, before = output(network, call), size(network)
    weights = [weakref.ref(p) for name, p in network.named_parameters() if ".to_q." in name or ".add_k_proj." in name]
    assert fuse_projections(network, sites(network)) == count
    assert_same(output(network, call), wanted)
    assert size(network) == before
    assert len(weights) >= count
    assert all(weight() is None for weight in weights)  # freed, not only unused
    separate = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    assert not [name for name, _ in network.named_modules() if name.split(".")[-1] in separate]
    assert not any(p.requires_grad for p in network.parameters())
    assert fuse_projections(network, sites(network)) == 0  # done already
    assert_same(output(network, call), wanted)


def test_the_weights_are_the_separate_ones() -> None:
    network = frozen(tiny_transformer())
    block = network.transformer_blocks[0]
    q, k, v = (getattr(block.attn, f"add_{x}_proj") for x in "qkv")
    fuse_projections(network, sites(network))
    assert torch.equal(block.attn.to_added_qkv.weight, torch.cat([q.weight, k.weight, v.weight]))
    assert torch.equal(block.attn.to_added_qkv.bias, torch.cat([q.bias, k.bias, v.bias]))
    assert block.attn2.to_qkv.weight.shape == (96, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_without_bias_in_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8, bias=False, out_bias=True, processor=JointAttnProcessor2_0())
    network = frozen(nn.ModuleDict({"attn": attn})).to(dtype)
    x = noise(2, 5, 16).to(dtype)
    wanted = attn(x)
    assert fuse_projections(network, sites(network)) == 1
    assert attn.to_qkv.bias is None
    assert attn.to_qkv.weight.dtype == dtype
    torch.testing.assert_close(attn(x), wanted)


@pytest.mark.parametrize("family", ["qwen", "z_image"])
def test_families_that_ask_for_separate_ones(family: str) -> None:
    build, call, _ = FAMILIES[family]
    network = frozen(build())
    wanted, names = output(network, call), list(network.state_dict())
    assert fuse_projections(network, sites(network)) == 0
    assert list(network.state_dict()) == names
    assert torch.equal(output(network, call), wanted)


class Quantized(nn.Linear):
    """What another technique has put in a linear layer's place."""


def test_layers_of_another_kind_are_left_alone() -> None:
    network = frozen(tiny_transformer())
    wanted = output(network)
    attn = network.transformer_blocks[1].attn
    own = Quantized(32, 32)
    own.load_state_dict(attn.add_k_proj.state_dict())
    attn.add_k_proj = own.requires_grad_(False)
    assert fuse_projections(network, sites(network)) == 2
    assert hasattr(attn, "to_q")
    assert_same(output(network), wanted)


def test_the_backend_stays() -> None:
    network = frozen(tiny_transformer())
    wanted = output(network)
    route(sites(network), "math")
    fuse_projections(network, sites(network))
    processors = [m.processor for m in network.modules() if hasattr(m, "processor")]
    assert len(processors) == 3
    assert all(isinstance(p, JointAttention) and p.backend == "math" for p in processors)
    assert_same(output(network), wanted)


@pytest.mark.parametrize(
    ("build", "call"), [(tiny_transformer, call_sd3), (tiny_flux_transformer, call_flux)], ids=["sd3", "flux"]
)
def test_compiled_blocks(build: Any, call: Any) -> None:
    torch.compiler.reset()
    network = frozen(build())
    wanted = output(network, call)
    fuse_projections(network, sites(network))
    for block in [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", ())]:
        block.compile(backend="aot_eager", fullgraph=True)
    assert_same(output(network, call), wanted)


def adapted() -> nn.Module:
    network = tiny_transformer()
    network.add_adapter(LoraConfig(r=2, target_modules=["transformer_blocks.1.attn.to_v"], init_lora_weights=False))
    return frozen(network)


def partly_trained() -> nn.Module:
    network = frozen(tiny_transformer())
    network.transformer_blocks[1].attn.to_k.weight.requires_grad_()
    return network


def offloaded() -> nn.Module:
    network = frozen(tiny_transformer())
    cpu = torch.device("cpu")
    network.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    return network


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (adapted, r"transformer_blocks\.1\.attn\.to_v carries PEFT adapters; merge them"),
        (partly_trained, r"transformer_blocks\.1\.attn\.to_k\.weight is trainable; freeze"),
        (offloaded, "is offloaded"),
    ],
)
def test_refusals_change_nothing(build: Any, said: str) -> None:
    network = build()
    names = list(network.state_dict())
    with pytest.raises(ValueError, match=said):
        fuse_projections(network, sites(network))
    assert list(network.state_dict()) == names
