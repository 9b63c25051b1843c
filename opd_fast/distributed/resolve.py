"""The device, the dtype and the engine's switches of a run, where its settings leave the choice to auto."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opd_fast.config import Config
from opd_fast.errors import UserError


@dataclass(frozen=True)
class Resolved:
    """The engine's choices where the configuration says auto."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    graphs: bool
    tf32: bool


def pick_device() -> torch.device:
    """Return the CUDA device of this process where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(dtype: str, precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of weights and forwards: `model.dtype`, where auto stands for bfloat16 on a GPU that computes in
    it, and for float32 elsewhere and wherever `engine.precision` asks for float32 or TF32."""
    if dtype != "auto":
        chosen = getattr(torch, dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    if precision in ("auto", "fp8") and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.bfloat16
    return torch.float32


def resolve(config: Config) -> Resolved:
    """Settle device, dtype and switches of a run. Raises UserError for a setting that this machine cannot honour."""
    device = pick_device()
    on_gpu = device.type == "cuda"
    if config.engine.precision == "tf32" and not on_gpu:
        raise UserError("engine.precision", "tf32 needs a CUDA device", "use auto or float32")
    return Resolved(
        device=device,
        dtype=pick_dtype(config.model.dtype, config.engine.precision, device),
        compile=config.engine.compile == "on" or (config.engine.compile == "auto" and on_gpu),
        graphs=config.engine.graphs == "on" or (config.engine.graphs == "auto" and on_gpu),
        tf32=config.engine.precision == "tf32",
    )
