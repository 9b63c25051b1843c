"""The kernels compiled for GPUs that need not be here: width of the memory accesses, bytes a pass moves, spills.

`triton.compile` and the assembler that ships with Triton need no device.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from opd_kernels import logprob_triton, philox_triton, quantize, quantize_triton, step_triton  # noqa: E402
from opd_kernels.tuning import CANDIDATES, Launch, rule  # noqa: E402


def version(text: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(part) for part in text.split(".")[:2])


pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets and cannot compile")

ARCHITECTURES = (80, 90, 100)
CONVERTS_FLOAT8 = (90,) if version(triton.__version__) < (3, 7) else (89, 90)
"""Triton 3.6 emulates the conversion to float8 on compute capability 8.9, and spills there."""
USUAL = rule(1, 1)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# A state is float32; v stands for the velocities' type.
STEP_POINTERS = {
    "x_ptr": "fp32",
    "cond_s_ptr": "v",
    "uncond_s_ptr": "v",
    "cond_t_ptr": "v",
    "uncond_t_ptr": "v",
    "noise_ptr": "fp32",
    "history_ptr": "fp32",
    "x_next_ptr": "fp32",
    "grad_cond_ptr": "v",
    "grad_uncond_ptr": "v",
    "x0_ptr": "fp32",
    "mean_s_ptr": "fp32",
    "mean_t_ptr": "fp32",
}
READ = ("x_ptr", "cond_s_ptr", "uncond_s_ptr", "cond_t_ptr", "uncond_t_ptr", "noise_ptr", "history_ptr")
SMALL_POINTERS = {
    "keys_ptr": "i64",
    "guidance_s_ptr": "fp32",
    "guidance_t_ptr": "fp32",
    "scale_ptr": "fp32",
    "table_ptr": "fp32",
    "step_ptr": "i64",
    "loss_ptr": "fp32",
    "partial_ptr": "fp32",
    "arrived_ptr": "i32",
}
PUBLISHED = ("uncond_s_ptr", "uncond_t_ptr", "grad_uncond_ptr", "keys_ptr")
UNGUIDED = ("keys_ptr",)
GIVEN_NOISE = ("uncond_s_ptr", "uncond_t_ptr", "grad_uncond_ptr", "noise_ptr")
EVERYTHING = (*PUBLISHED, "history_ptr", "x0_ptr", "mean_s_ptr", "mean_t_ptr")
OPTIONAL = {*EVERYTHING, "noise_ptr"}


def compile_kernel(
    kernel: Any, types: dict[str, Any], aligned: set[str], constants: dict[str, Any], cc: int, warps: int
) -> Any:
    """The kernel for compute capability `cc`; `types` of all its arguments (None: the argument is None), `aligned`
    those that are multiples of 16, as the launcher would find for contiguous operands."""
    names = kernel.arg_names
    none = {name: None for name in names if name in types and types[name] is None}
    signature = {n: "constexpr" if n in constants or n in none else types[n] for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned and n not in none}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants | none, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options={"num_warps": warps})


@cache
def compiled_step(
    cc: int,
    velocity: str,
    present: tuple[str, ...],
    launch: Launch = USUAL,
    aligned: bool = True,
    one_block: bool = False,
) -> Any:
    types: dict[str, Any] = {}
    for name, kind in (STEP_POINTERS | SMALL_POINTERS).items():
        absent = (name in OPTIONAL and name not in present) or (one_block and name in ("partial_ptr", "arrived_ptr"))
        types[name] = None if absent else "*" + (velocity if kind == "v" else kind)
    strides = [f"{name.removesuffix('_ptr')}_stride" for name in READ]
    types |= dict.fromkeys((*strides, "elements", "blocks", "rows", "step"), "i32") | {"share": "fp32"}
    multiples = {*STEP_POINTERS, *SMALL_POINTERS, *strides, "elements"} if aligned else set()
    constants = {"TILES": launch.tiles, "PASSES": 1, "BLOCK": launch.block} | ({"blocks": 1} if one_block else {})
    return compile_kernel(step_triton.step_kernel, types, multiples, constants, cc, launch.warps)


@cache
def compiled_normal(cc: int) -> Any:
    types = {"keys_ptr": "*i64", "out_ptr": "*fp32", "counter": "i64", "counter_ptr": None}
    types |= {"elements": "i32", "blocks": "i32"}
    constants = {"BLOCK": philox_triton.BLOCK}
    return compile_kernel(philox_triton.normal_kernel, types, {"keys_ptr", "out_ptr", "elements"}, constants, cc, 4)


def accesses(ptx: str) -> tuple[Counter[int], Counter[int]]:
    """How many global loads and stores of each width in bytes a thread's code holds.

    The partial sums are loaded past the first cache level (`.cg`), the tensors are not; so they are left out here."""
    counts: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    for kind, modifiers in re.findall(r"\b(ld|st)\.global((?:[.:]\w+)+)", ptx):
        if ".cg" in modifiers:
            continue
        vector = re.search(r"\.v(\d)", modifiers)
        bits = re.search(r"\.[bfsu](\d+)$", modifiers)
        assert bits is not None, modifiers
        counts[kind == "st"][int(vector[1] if vector else 1) * int(bits[1]) // 8] += 1
    return counts


def resources(compiled: Any, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of the assembled kernel, as `cuobjdump` lists them."""
    tool = BIN / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton ships no cuobjdump")
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    listing = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    assert found.keys() == {"REG", "STACK", "LOCAL"}, listing
    return found


def most_registers(launch: Launch) -> int:
    """A third of the threads that a multiprocessor can hold, or a quarter where each has more to do."""
    return 96 if launch.tiles * launch.block // (32 * launch.warps) == 8 else 128


CASES = [
    *((cc, "bf16", PUBLISHED, launch) for cc in ARCHITECTURES for launch in CANDIDATES),
    *((cc, "fp32", GIVEN_NOISE, launch) for cc in ARCHITECTURES for launch in CANDIDATES),
    *((90, "bf16", EVERYTHING, launch) for launch in CANDIDATES),
    (90, "fp16", EVERYTHING, USUAL),
    (90, "bf16", UNGUIDED, USUAL),
]


@pytest.mark.parametrize(("cc", "velocity", "present", "launch"), CASES, ids=str)
def test_step_moves_each_tensor_once_in_16_bytes(
    cc: int, velocity: str, present: tuple[str, ...], launch: Launch, tmp_path: Path
) -> None:
    compiled = compiled_step(cc, velocity, present, launch)
    ptx = compiled.asm["ptx"]
    per_thread = launch.block // (32 * launch.warps)  # of a tile: the loop over tiles is code once
    wanted = [0, 0]  # bytes a thread
    for name, kind in STEP_POINTERS.items():
        if name not in OPTIONAL or name in present:
            wanted[name not in READ] += BYTES[velocity if kind == "v" else kind] * per_thread
    for found, total in zip(accesses(ptx), wanted, strict=True):
        assert found[16] * 16 == total
        # What is left are the scalars: the row, the guidance, the key, the partial sums and the loss.
        rest = {width: count for width, count in found.items() if width != 16}
        assert rest.keys() <= {4, 8}
        assert sum(rest.values()) <= 12
    assert not re.search(r"\b(ld|st)\.local|\.local\b", ptx)
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= most_registers(launch)


@pytest.mark.parametrize("cc", ARCHITECTURES)
def test_odd_shapes_do_not_spill(cc: int, tmp_path: Path) -> None:
    """Nothing is known to be a multiple of 16: narrow accesses, each tensor still once."""
    compiled = compiled_step(cc, "bf16", PUBLISHED, aligned=False)
    loads, stores = accesses(compiled.asm["ptx"])
    elements = USUAL.block // (32 * USUAL.warps)
    assert loads[2] == 4 * elements
    assert stores[2] == 2 * elements
    assert elements <= loads[4] <= elements + 10
    assert elements <= stores[4] <= elements + 6
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0


def test_a_sample_in_one_block_needs_no_counter() -> None:
    """Small latents: the launcher passes no buffers, and the code has neither atomics nor barriers between programs."""
    ptx = compiled_step(90, "bf16", PUBLISHED, one_block=True).asm["ptx"]
    assert "atom." not in ptx
    assert "atom." in compiled_step(90, "bf16", PUBLISHED).asm["ptx"]


@pytest.mark.parametrize("cc", ARCHITECTURES)
def test_noise_kernel(cc: int, tmp_path: Path) -> None:
    compiled = compiled_normal(cc)
    loads, stores = accesses(compiled.asm["ptx"])
    assert loads == {8: 1}  # the key
    assert stores == {16: philox_triton.BLOCK // (4 * 32 * 4)}
    assert ".local" not in compiled.asm["ptx"]
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0


# --- log-probability and ratio ----------------------------------------------------------------------------------------

LOGPROB_POINTERS = {
    "x_ptr": "fp32",
    "sample_ptr": "fp32",
    "cond_ptr": "v",
    "uncond_ptr": "v",
    "mean_old_ptr": "fp32",
    "mean_ptr": "fp32",
    "grad_cond_ptr": "v",
    "grad_uncond_ptr": "v",
}
LOGPROB_SCALARS = (
    *("guidance_ptr", "table_ptr", "logp_ptr", "log_ratio_ptr", "drift_ptr", "partial_ptr"),
    *("grad_logp_ptr", "grad_drift_ptr", "share", "constant", "counted"),
)


@cache
def compiled_log_prob(kernel: str, cc: int, velocity: str, absent: tuple[str, ...] = (), launch: Launch = USUAL) -> Any:
    function = getattr(logprob_triton, kernel)
    types: dict[str, Any] = {}
    for name in function.arg_names:
        if name.endswith("_ptr"):
            kind = LOGPROB_POINTERS.get(name, "i64" if name == "step_ptr" else "i32" if "arrived" in name else "fp32")
            types[name] = None if name in absent else "*" + (velocity if kind == "v" else kind)
        elif name not in ("TILES", "PASSES", "BLOCK"):
            types[name] = "fp32" if name in LOGPROB_SCALARS else "i32"
    constants = {"TILES": launch.tiles, "PASSES": 1, "BLOCK": launch.block}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    strides = {name for name in types if name.endswith("_stride")}
    aligned = {name for name in types if name.endswith("_ptr")} | strides | {"elements"}
    return compile_kernel(function, types, aligned, constants, cc, launch.warps)


NO_COMPARISON = ("mean_old_ptr", "log_ratio_ptr", "drift_ptr")
NO_REFERENCE = ("uncond_ptr", "grad_uncond_ptr", "mean_old_ptr", "grad_drift_ptr")
LOGPROB_CASES = [
    *(("log_prob_kernel", cc, "bf16", (), launch) for cc in ARCHITECTURES for launch in CANDIDATES),
    *(("log_prob_kernel", 90, "fp32", ("uncond_ptr", "mean_ptr"), launch) for launch in CANDIDATES),
    ("log_prob_kernel", 90, "fp16", NO_COMPARISON, USUAL),
    *(
        ("log_prob_backward_kernel", cc, "bf16", (), launch)
        for cc in ARCHITECTURES
        for launch in CANDIDATES
        if launch.tiles == 1
    ),
    ("log_prob_backward_kernel", 90, "fp32", NO_REFERENCE, USUAL),
]


@pytest.mark.parametrize(("kernel", "cc", "velocity", "absent", "launch"), LOGPROB_CASES, ids=str)
def test_log_prob_moves_each_tensor_once_in_16_bytes(
    kernel: str, cc: int, velocity: str, absent: tuple[str, ...], launch: Launch, tmp_path: Path
) -> None:
    compiled = compiled_log_prob(kernel, cc, velocity, absent, launch)
    per_thread = launch.block // (32 * launch.warps)  # of a tile: the loop over tiles is code once
    wanted = [0, 0]  # bytes a thread
    for name, kind in LOGPROB_POINTERS.items():
        if name in getattr(logprob_triton, kernel).arg_names and name not in absent:
            written = name == "mean_ptr" or name.startswith("grad_")
            wanted[written] += BYTES[velocity if kind == "v" else kind] * per_thread
    for found, total in zip(accesses(compiled.asm["ptx"]), wanted, strict=True):
        assert found[16] * 16 == total
        rest = {width: count for width, count in found.items() if width != 16}
        assert rest.keys() <= {4, 8}
        assert sum(rest.values()) <= 14
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= most_registers(launch)


# --- row-wise float8 --------------------------------------------------------------------------------------------------


@cache
def compiled_quantize(cc: int, kind: str, columns: int, aligned: bool = True) -> Any:
    rows, block, warps = quantize_triton.tiling(columns)
    types = {"x_ptr": f"*{kind}", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    types |= dict.fromkeys(("x_stride", "rows", "columns"), "i32")
    multiples = {"x_ptr", "q_ptr", "scale_ptr", *(("x_stride", "columns") if aligned else ())}
    constants = {"ROWS": rows, "BLOCK": block}
    return compile_kernel(quantize_triton.quantize_rows_kernel, types, multiples, constants, cc, warps)


@pytest.mark.parametrize("cc", [*CONVERTS_FLOAT8, 100])
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("columns", [64, 1536, 6144, 15360, quantize.LONGEST_ROW])
def test_quantize_moves_each_row_once_in_16_bytes(cc: int, kind: str, columns: int, tmp_path: Path) -> None:
    compiled = compiled_quantize(cc, kind, columns)
    ptx = compiled.asm["ptx"]
    rows, block, warps = quantize_triton.tiling(columns)
    per_thread = rows * block // (32 * warps)
    loads, stores = accesses(ptx)
    assert loads == {16: per_thread * BYTES[kind] // 16}
    assert stores == {16: per_thread // 16, 4: 1}  # the scale
    # Two a conversion; nothing between the row's largest and its rounding goes back to memory.
    assert len(re.findall(r"cvt\.rn\.satfinite\.e4m3x2\.f32", ptx)) == per_thread // 2
    assert not re.search(r"\b(ld|st)\.local|\.local\b", ptx)
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= 64 if columns <= 16384 else used["REG"] <= 96


@pytest.mark.parametrize("cc", CONVERTS_FLOAT8)
def test_quantize_of_odd_rows_does_not_spill(cc: int, tmp_path: Path) -> None:
    used = resources(compiled_quantize(cc, "bf16", 8191, aligned=False), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0


def test_quantize_needs_8_9() -> None:
    """Compute capability 8.0 has no conversion to float8, so that `quantize_rows` runs its twin there."""
    with pytest.raises(triton.compiler.errors.CompilationError, match="fp8e4nv not supported"):
        compiled_quantize(80, "bf16", 1536)
