"""The implementations of softmax(Q K^T / sqrt(d)) V that there are, and how a transformer's attention gets one.

A family says where its attentions are and how each is set (`DiffusionModel.attentions`). Nothing here is set for the
whole process: another transformer beside a routed one keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_fast.errors import UserError, did_you_mean
from opd_fast.models.techniques import Attend, AttentionBackend, AttentionSite

AUTO = "auto"
PRODUCTS = "products"
# Our names, and those of diffusers' dispatcher; it has none for plain products.
_DISPATCHED = {
    "native": "native",
    "flash": "_native_flash",
    "cudnn": "_native_cudnn",
    "efficient": "_native_efficient",
    "math": "_native_math",
    "xformers": "xformers",
    "flash_2": "flash",
    "flash_3": "_flash_3",
}
BACKENDS = (*_DISPATCHED, PRODUCTS)
"""What can be named besides auto."""

# Of these two the cuDNN path of the dispatcher copies what is not heads first, and so does a batched product.
HEADS_FIRST = ("cudnn", PRODUCTS)
PACKAGES = {
    "xformers": ("xformers", "_CAN_USE_XFORMERS_ATTN", "pip install 'opd_fast[xformers]'"),
    "flash_2": ("flash-attn", "_CAN_USE_FLASH_ATTN", "pip install 'opd_fast[flash]'"),
    "flash_3": ("flash-attn 3", "_CAN_USE_FLASH_ATTN_3", "build it from the hopper folder of flash-attention"),
}
"""Backends of other packages: the package, diffusers' switch that tells whether it is there, and how to get it."""
_HALVES = (torch.bfloat16, torch.float16)


def available(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None where backend `name` can run on `device` in `dtype`; else why not, with what to do about it.

    Raises UserError for a name that is none of BACKENDS.
    """
    check_name(name)
    if name in ("native", "math", PRODUCTS) or (name == "flash" and device.type == "cpu"):
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}; take native"
    if name in PACKAGES:
        from diffusers.models import attention_dispatch

        package, switch, remedy = PACKAGES[name]
        if not getattr(attention_dispatch, switch, False):
            return f"{package} is not installed, or not for this torch; {remedy}"
    if name in ("efficient", "xformers"):
        return None
    if dtype not in _HALVES:
        given = str(dtype).removeprefix("torch.")
        return f"computes in bfloat16 or float16, not {given}; set model.dtype to bfloat16, or take efficient"
    major, minor = torch.cuda.get_device_capability(device)
    wanted = (9, 0) if name == "flash_3" else (8, 0)
    if (major, minor) < wanted:
        return f"needs compute capability {wanted[0]}.{wanted[1]}, this device has {major}.{minor}; take efficient"
    if name == "flash" and not torch.backends.cuda.is_flash_attention_available():
        return "is not in this build of torch; install the wheels of pytorch.org, or take efficient"
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "cuDNN is not in this build of torch; install the wheels of pytorch.org, or take flash"
    return None


def check_name(name: str) -> None:
    if name not in BACKENDS:
        raise UserError("engine.attention", f"is {name!r}", did_you_mean(name, (AUTO, *BACKENDS)))


def attention_fn(name: str, mask: Tensor | None = None) -> Attend:
    """Return backend `name` as a function of q, k and v, each (B, L, heads, d), that returns (B, L, heads, d).

    `mask` is (B, 1, 1, L) bool over the keys. Raises UserError for a name that is none of BACKENDS.
    """
    check_name(name)
    if name == PRODUCTS:
        return lambda q, k, v: products(q, k, v, mask)
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    backend = AttentionBackendName(_DISPATCHED[name])
    return lambda q, k, v: dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q * q.shape[-1] ** -0.5, k, v))
    scores = q @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def route(sites: Sequence[AttentionSite], name: str) -> int:
    """Let every attention of `sites` compute by backend `name`; returns how many there are.

    Call it before the blocks are compiled or captured. Raises UserError for a backend that is none of BACKENDS, and
    ValueError for `products` where an attention takes the backends of diffusers' dispatcher only.
    """
    backend = AttentionBackend(name, _DISPATCHED.get(name), attention_fn(name), name in HEADS_FIRST)
    if backend.dispatched is None and not all(site.takes_functions for site in sites):
        raise ValueError(f"{name} is not offered for this model's attention")
    for site in sites:
        site.use(backend)
    return len(sites)
