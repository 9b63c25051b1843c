"""Triton kernels for on-policy distillation, each with a twin in plain torch. Needs torch (and triton on CUDA) only."""

from .logprob import LogProb, log_prob
from .logprob_ref import log_prob_reference
from .philox import philox_normal
from .step import ROW, StepOutput, fused_step
from .step_ref import fused_step_reference

__all__ = [
    "ROW",
    "LogProb",
    "StepOutput",
    "fused_step",
    "fused_step_reference",
    "log_prob",
    "log_prob_reference",
    "philox_normal",
]
