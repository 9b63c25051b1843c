#!/usr/bin/env bash
# What wants a GPU, in three commands of under nine and a half minutes each, the most valuable first.
#
#   benchmarks/gpu.sh 1             smoke test, GPU tests, step rows, the SD3.5-Medium round, the step kernel's counters
#   benchmarks/gpu.sh 2             the ladder: what each technique gives
#   benchmarks/gpu.sh 3             the round against the compiled loop, in float8, all rows at once, at 1024 pixels
#   benchmarks/gpu.sh --rehearse N  the same order on small shapes without a GPU; its rows are named rehearsal/...
#
# Needs no network. Wheels in .whl/ are used where Python lacks a package. A part that fails or takes too long stops no
# other, and every row is written as soon as it is measured. What is compiled stays in /tmp/opd_fast_cache for the next
# command. OUT (default: runs/gpu) takes the results, summary.txt and logs.tar.gz, at most eight files;
# `python -m benchmarks.report --take OUT` brings the results into benchmarks/results. PYTHON (default: python3) is the
# interpreter; OPD_COMMIT names the commit where .git is not there.
set -uo pipefail
cd "$(dirname "$0")/.."
rehearse=
if [ "${1:-}" = --rehearse ]; then
    rehearse=1
    shift
fi
command=${1:-}
case $command in
1 | 2 | 3) ;;
*)
    sed -n '2,15s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python3}
slower=${rehearse:+4} # a small or busy machine takes longer
slower=${slower:-1}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-$((560 * slower))}

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
cache=${OPD_GPU_CACHE:-/tmp/opd_fast_cache}
logs=$cache/logs-$command
rm -rf "$logs"
mkdir -p "$logs"
export TORCHINDUCTOR_CACHE_DIR=$cache/inductor TRITON_CACHE_DIR=$cache/triton OPD_FAST_CACHE=$cache/opd_fast
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
export OUT PYTHON

if compgen -G ".whl/*.whl" >/dev/null; then
    if "$PYTHON" -m pip install -q --no-deps --no-index --no-compile --upgrade --target "$cache/site" .whl/*.whl \
        >"$logs/wheels.log" 2>&1; then
        export PYTHONPATH=$cache/site:$PYTHONPATH
    else
        echo "gpu.sh: the wheels in .whl/ cannot be installed: $(tail -1 "$logs/wheels.log")" >&2
    fi
fi
missing=$("$PYTHON" - <<'PY'
import importlib.util
names = ("torch", "triton", "diffusers", "transformers", "peft", "safetensors", "nvtx", "rich", "jsonargparse", "pytest", "pytest_benchmark")
print(*(name for name in names if importlib.util.find_spec(name) is None))
PY
)
[ -z "$missing" ] || echo "gpu.sh: $PYTHON lacks $missing; put their wheels into .whl/" >&2
if [ -z "$rehearse" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: $PYTHON sees no CUDA device; rehearse without one by benchmarks/gpu.sh --rehearse $command" >&2
    exit 1
fi
has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

SECONDS=0
summary=()
failed=0
part() { # NAME SECONDS COMMAND...: SIGINT at the end of its time lets Python tell what it has
    local name=$1 most=$(($2 * slower)) begun=$SECONDS left status verdict
    shift 2
    left=$((SECONDS_IN_ALL - SECONDS))
    ((most > left)) && most=$left
    if ((most < 10)); then
        summary+=("$(printf '%-10s %-22s' "$name" "FAIL: no time left")")
        failed=1
        return
    fi
    echo "gpu.sh: $name, at most $most s ..."
    timeout -s INT -k 30 "$most" "$@" </dev/null >"$logs/$name.log" 2>&1
    status=$?
    verdict=pass
    case $status in
    0) ;;
    124 | 137) verdict="FAIL: out of time" ;;
    *) verdict="FAIL: status $status" ;;
    esac
    [ "$verdict" = pass ] || failed=1
    summary+=("$(printf '%-10s %-22s %4d s  %s' "$name" "$verdict" $((SECONDS - begun)) "$(told "$name")")")
    report >"$OUT/summary.txt" # now: this command may be killed before its end
}

told() { # NAME: the line of its log that says most
    grep -hE '^(=+ )?[0-9]+ (passed|failed|skipped|error|deselected)|^all passed|^No kernels|^==ERROR==|^profile.sh:|^interrupted' \
        "$logs/$1.log" | tail -1 | tr -d = | cut -c1-70
}

report() {
    echo "part       outcome                 time"
    printf '%s\n' "${summary[@]}"
    echo
    "$PYTHON" -m benchmarks.report --show "$OUT" | head -40
}

tests=(env TORCHINDUCTOR_COMPILE_THREADS=2 "$PYTHON" -m pytest -p no:cacheprovider -q -m gpu)
suite=("$PYTHON" -m pytest -p no:cacheprovider -q --benchmark-only)
workers=()
if has xdist; then workers=(-n 8); fi
limit() { # SECONDS: a training test may take the first SIGINT for itself, so pytest ends its session before that
    if has pytest_timeout; then echo "--session-timeout=$(($1 * slower))"; fi
}
small=() tiny=() step="(1GB or sd35m-512) and not unguided"
if [ -n "$rehearse" ]; then
    workers=(-n 2) tiny=(--shape nano --pairs 1) small=(--rehearse --pairs 1) step="step/tiny and not compiled"
fi

case $command in
1)
    part smoke 40 "$PYTHON" -m benchmarks.smoke
    part tests 100 "${tests[@]}" "${workers[@]}" $(limit 88) tests/gpu/test_{step,tuning,fp8,graphs,round,shared_base}_gpu.py
    # Rows of one process lie in one file; files of local changes do not mix.
    part step 80 "${suite[@]}" benchmarks/test_step.py -k "$step" --save-results "$OUT/step"
    part round 230 "${suite[@]}" benchmarks/test_round.py -k "512-exact and not 512-exact-" "${small[@]}" \
        --save-results "$OUT/round"
    if [ -z "$rehearse" ]; then
        part ncu 45 env OUT="$OUT/profile" benchmarks/profile.sh ncu
        mv "$OUT/profile/step.txt" "$logs/" 2>/dev/null
    else
        summary+=("ncu        left out: needs a GPU")
    fi
    part attention 60 "${tests[@]}" "${workers[@]}" $(limit 50) tests/gpu/test_attention_gpu.py -k "not True-True"
    part refusal 30 "${tests[@]}" tests/gpu/test_refused_capture_gpu.py
    ;;
2)
    part ladder 530 "$PYTHON" -m benchmarks.ladder "${tiny[@]}" --seconds 8 --save-results "$OUT/ladder" \
        --rungs one-pass,student-merged,blocks,graphs,fp8
    ;;
3)
    part fp8 100 "${suite[@]}" benchmarks/test_round.py -k 512-fp8 "${small[@]}" --save-results "$OUT/fp8"
    part at-once 90 "${suite[@]}" benchmarks/test_round.py -k at-once "${small[@]}" --save-results "$OUT/at-once"
    part compiled 300 "${suite[@]}" benchmarks/test_round.py -k 512-exact-compiled "${small[@]}" \
        --save-results "$OUT/compiled"
    part 1024 90 "${suite[@]}" benchmarks/test_round.py -k 1024 "${small[@]}" --save-results "$OUT/1024"
    ;;
esac

tar -C "$logs" -czf "$OUT/logs.tar.gz" .
echo
report | tee "$OUT/summary.txt"
exit $failed
