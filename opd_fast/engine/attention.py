"""The implementations of softmax(Q K^T / sqrt(d)) V that there are, and how a transformer's attention gets one.

A family says where its attentions are and how each is set (`DiffusionModel.attentions`). Nothing here is set for the
whole process: another transformer beside a routed one keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
PACKAGES = ("xformers", "flash_2", "flash_3")
_HALVES = (torch.bfloat16, torch.float16)


def available(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where backend `name` can run on `device` in `dtype`; else why not, with what to do about it.

    Raises UserError for a name that is none of BACKENDS.
    """
    check_name(name)
    if name in ("native", "math", PRODUCTS):
        return None
    if name == "flash" and device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}; take native"
    if name == "efficient":
        return None
    if name in PACKAGES:
        missing = _missing_package(name)
        if missing is not None:
            return missing
        if name == "xformers":
            return None
    if dtype not in _HALVES:
        return (
            f"computes in bfloat16 or float16, not {short_dtype(dtype)}; set model.dtype to bfloat16, or take efficient"
        )
    major, minor = torch.cuda.get_device_capability(device)
    wanted = (9, 0) if name == "flash_3" else (8, 0)
    if (major, minor) < wanted:
        return f"needs compute capability {wanted[0]}.{wanted[1]}, this device has {major}.{minor}; take efficient"
    if name == "flash" and not torch.backends.cuda.is_flash_attention_available():
        return "is not in this build of torch; install the wheels of pytorch.org, or take efficient"
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "cuDNN is not in this build of torch; install the wheels of pytorch.org, or take flash"
    return None


def _missing_package(name: str) -> str | None:
    from diffusers.models import attention_dispatch as dispatch

    switch, remedy = {
        "xformers": ("_CAN_USE_XFORMERS_ATTN", "pip install 'opd_fast[xformers]'"),
        "flash_2": ("_CAN_USE_FLASH_ATTN", "pip install 'opd_fast[flash]'"),
        "flash_3": ("_CAN_USE_FLASH_ATTN_3", "build it from the hopper folder of flash-attention"),
    }[name]
    if getattr(dispatch, switch, False):
        return None
    package = {"xformers": "xformers", "flash_2": "flash-attn", "flash_3": "flash-attn 3"}[name]
    return f"{package} is not installed, or not for this torch; {remedy}"


def check_name(name: str) -> None:
    if name not in BACKENDS:
        raise UserError("engine.attention", f"is {name!r}", did_you_mean(name, (AUTO, *BACKENDS)))


def short_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attention_fn(name: str, mask: Tensor | None = None) -> Attend:
    """Backend `name` as a function of q, k, v, each (B, L, heads, d), to (B, L, heads, d); mask (B, 1, 1, L) bool."""
    if name == PRODUCTS:
        return lambda q, k, v: products(q, k, v, mask)
    backend = _dispatched(name)
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return lambda q, k, v: dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)


def _dispatched(name: str) -> Any:
    from diffusers.models.attention_dispatch import AttentionBackendName

    check_name(name)
    return AttentionBackendName(_DISPATCHED[name])


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q * q.shape[-1] ** -0.5, k, v))
    scores = q @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def route(sites: Sequence[AttentionSite], name: str) -> int:
    """Let every attention of `sites` compute by backend `name`; returns how many there are.

    Before the blocks are compiled or captured. Raises UserError for a backend that is none of BACKENDS, and ValueError
    for `products` where an attention takes the backends of diffusers' dispatcher only.
    """
    check_name(name)
    backend = AttentionBackend(name, _DISPATCHED.get(name), attention_fn(name), name in HEADS_FIRST)
    if backend.dispatched is None and not all(site.takes_functions for site in sites):
        raise ValueError(f"{name} is not offered for this model's attention")
    for site in sites:
        site.use(backend)
    return len(sites)
