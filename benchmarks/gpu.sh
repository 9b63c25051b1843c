#!/usr/bin/env bash
# Everything that wants a GPU, in under nine minutes: tests, suite, ladder, ddp's cost, the step kernel's counters.
#
#   benchmarks/gpu.sh          on a machine with a GPU
#   benchmarks/gpu.sh --cpu    the same parts on small shapes without one, to try this script
#
# Needs no network. Wheels in .whl/ are used where Python lacks a package. A part that fails or takes too long does not
# stop the others. OUT (default: benchmarks/results) takes results and logs/; PYTHON (default: python) is the
# interpreter; SECONDS_IN_ALL (default: 530) is what all parts may take together.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-530}
mode=gpu
case "${1:-}" in
--cpu) mode=cpu ;;
"") ;;
*)
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac

mkdir -p "$OUT/logs" || exit 1
OUT=$(cd "$OUT" && pwd)
LOGS=$OUT/logs
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
export OUT PYTHON

if compgen -G ".whl/*.whl" >/dev/null; then
    if "$PYTHON" -m pip install -q --no-deps --no-index --target "$work/site" .whl/*.whl >"$LOGS/wheels.log" 2>&1; then
        export PYTHONPATH=$work/site:$PYTHONPATH
    else
        echo "gpu.sh: the wheels in .whl/ cannot be installed, see $LOGS/wheels.log" >&2
    fi
fi
missing=$("$PYTHON" - <<'EOF'
import importlib.util
names = ("torch", "triton", "diffusers", "transformers", "peft", "safetensors", "nvtx", "rich", "pytest", "pytest_benchmark")
print(*(name for name in names if importlib.util.find_spec(name) is None))
EOF
)
[ -z "$missing" ] || echo "gpu.sh: $PYTHON lacks $missing; put their wheels into .whl/" >&2
if [ $mode = gpu ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: $PYTHON sees no CUDA device; try the script without one by benchmarks/gpu.sh --cpu" >&2
    exit 1
fi

# One file holds the rows of suite and ladder, unless local changes make each overwrite the other's.
suite=$OUT ladder=$OUT
if [ -n "$(git status --porcelain -- . ':!benchmarks/results' ':!benchmarks/README.md' 2>/dev/null)" ]; then
    suite=$OUT/suite ladder=$OUT/ladder
fi

SECONDS=0
summary=()
failed=0
part() { # NAME SECONDS COMMAND...: SIGINT at the end of its time lets Python write what it has
    local name=$1 most=$2 begun=$SECONDS left status verdict
    shift 2
    left=$((SECONDS_IN_ALL - SECONDS))
    ((most > left)) && most=$left
    if ((most < 15)); then
        summary+=("$(printf '%-8s %-22s' "$name" "FAIL: no time left")")
        failed=1
        return
    fi
    echo "gpu.sh: $name, at most $most s ..."
    timeout -s INT -k 10 "$most" "$@" </dev/null >"$LOGS/$name.log" 2>&1
    status=$?
    verdict=pass
    case $status in
    0) ;;
    124 | 137) verdict="FAIL: out of time" ;;
    *) verdict="FAIL: status $status" ;;
    esac
    [ "$verdict" = pass ] || failed=1
    summary+=("$(printf '%-8s %-22s %4d s  %s' "$name" "$verdict" $((SECONDS - begun)) "$(told "$name")")")
}

told() { # NAME: the line of its log that says most
    grep -hE '^(=+ )?[0-9]+ (passed|failed|skipped|error)|^No kernels|^==ERROR==|^profile.sh:|^ddp at|^interrupted' \
        "$LOGS/$1.log" | tail -1 | tr -d = | cut -c1-70
}

pytest=("$PYTHON" -m pytest -p no:cacheprovider -q)
if [ $mode = gpu ]; then
    # Not all of tests/: what else they import may be missing on such a machine.
    part tests 95 "${pytest[@]}" -m gpu --continue-on-collection-errors tests/gpu tests/test_embeddings.py
    part ddp 60 "$PYTHON" -m benchmarks.world_of_one --pairs 60 --engine.compile off --out "$LOGS/world-of-one.json"
    part ladder 190 "$PYTHON" -m benchmarks.ladder --seconds 8 --save-results "$ladder"
    part suite 165 "${pytest[@]}" benchmarks --benchmark-only --within 110 --save-results "$suite"
    part ncu 60 env OUT="$OUT/profile" benchmarks/profile.sh ncu
else
    part tests 100 "${pytest[@]}" -m gpu tests/gpu
    part ladder 120 "$PYTHON" -m benchmarks.ladder --shape nano --pairs 1 --save-results "$ladder" \
        --rungs one-pass,teachers-grouped,teachers-merged,student-merged,graphs,fp8
    part suite 200 "${pytest[@]}" benchmarks --benchmark-only -k "tiny and flow_sde" --pairs 1 \
        --save-results "$suite"
    part ddp 100 "$PYTHON" -m benchmarks.world_of_one --pairs 6 --out "$LOGS/world-of-one.json"
    summary+=("ncu      skipped                       needs a GPU")
fi

{
    echo
    echo "part     outcome                 time   (logs in $LOGS)"
    printf '%s\n' "${summary[@]}"
    echo
    "$PYTHON" -m benchmarks.report --show "$suite" $([ "$suite" = "$ladder" ] || echo "$ladder") | head -48
} 2>&1 | tee "$LOGS/summary.txt"
exit $failed
