"""Triton kernels for on-policy distillation, each with a twin in plain torch. Needs torch (and triton on CUDA) only."""

from .logprob import log_prob
from .logprob_ref import LogProb, log_prob_reference
from .operators import ROW
from .philox import philox_normal
from .quantize import quantize_rows
from .quantize_ref import FLOAT8, Quantized, quantize_rows_reference
from .step import fused_step
from .step_ref import StepOutput, fused_step_reference

__all__ = [
    "FLOAT8",
    "ROW",
    "LogProb",
    "Quantized",
    "StepOutput",
    "fused_step",
    "fused_step_reference",
    "log_prob",
    "log_prob_reference",
    "philox_normal",
    "quantize_rows",
    "quantize_rows_reference",
]
