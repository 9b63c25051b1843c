#!/usr/bin/env bash
# Profiles of one round on a GPU: a timeline (Nsight Systems) and the step kernel's counters (Nsight Compute).
#
#   benchmarks/profile.sh [nsys|ncu|all] [OPTIONS OF python -m benchmarks.one_round, for the timeline]
#
# OUT (default: benchmarks/results/profile) takes the files; PYTHON (default: python3) is the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/profile}
PYTHON=${PYTHON:-python3}
export OPD_FAST_NVTX=1 # the ranges round, student.forward, teacher.forward, step, backward, optimizer

what=all
case "${1:-}" in
nsys | ncu | all)
    what=$1
    shift
    ;;
-h | --help)
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac

need() { # TOOL WHERE-FROM
    command -v "$1" >/dev/null && return
    echo "profile.sh: $1 is not on the PATH; it comes with $2" >&2
    return 1
}

timeline() {
    need nsys "Nsight Systems (https://developer.nvidia.com/nsight-systems)" || return 1
    nsys profile --force-overwrite true --output "$OUT/round" --trace nvtx,cuda --cuda-graph-trace node \
        --capture-range cudaProfilerApi --capture-range-end stop \
        "$PYTHON" -m benchmarks.one_round "$@"
    nsys stats --force-export true --report nvtx_sum --report cuda_gpu_kern_sum "$OUT/round.nsys-rep" \
        >"$OUT/round.txt"
    cat <<EOF
$OUT/round.nsys-rep (open it with nsys-ui) and $OUT/round.txt. What to look at:
  - the row of kernels under the range "round": gaps are time the GPU waits for Python; with graphs there are none
    within a step. Time between the ranges "student.forward", "teacher.forward", "step" and "backward" counts too.
  - cuda_gpu_kern_sum: matrix products and attention should take over 80 % of the time; step_kernel below 1 %.
  - many small elementwise kernels: blocks are not compiled, or adapters not merged.
  - replayed graphs run no Python: within them kernels show, ranges do not. --graphs off brings them back.
EOF
}

counters() {
    need ncu "Nsight Compute (https://developer.nvidia.com/nsight-compute)" || return 1
    # The kernel alone: under ncu a round takes minutes. The clocks stay as they are, for they may not be ours to lock.
    ncu --force-overwrite --export "$OUT/step" --clock-control none --profile-from-start off \
        --kernel-name regex:step_kernel \
        --section SpeedOfLight --section Occupancy --section MemoryWorkloadAnalysis --section LaunchStats \
        --metrics "$METRICS" \
        "$PYTHON" -m benchmarks.step_launches
    ncu --import "$OUT/step.ncu-rep" --page details --print-details all >"$OUT/step.txt"
    cat <<EOF
$OUT/step.ncu-rep (open it with ncu-ui) and $OUT/step.txt: two launches each at the published batch, at 1 GB with given
and at 1 GB with drawn noise. What to look at, for a kernel that only moves memory:
  - dram__throughput: close to 90 % at 1 GB. At the published batch (9 x 16 x 64 x 64) the tensors fit into L2 and the
    launch dominates: low values are right there.
  - sm__warps_active: achieved occupancy. Below 30 %: too many registers or too few programs.
  - sectors per request: 16 for loads and stores of 16 bytes a thread; 4 means 4 bytes a thread, 32 means scattered.
EOF
}

METRICS=dram__throughput.avg.pct_of_peak_sustained_elapsed
METRICS+=,dram__bytes_read.sum,dram__bytes_write.sum
METRICS+=,sm__warps_active.avg.pct_of_peak_sustained_active
METRICS+=,l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio
METRICS+=,l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "profile.sh: $PYTHON sees no CUDA device; a CPU's round: python -m opd_fast.train ... --profile" >&2
    exit 1
}
mkdir -p "$OUT"
status=0
if [ "$what" != ncu ]; then timeline "$@" || status=1; fi
if [ "$what" != nsys ]; then counters || status=1; fi
exit $status
