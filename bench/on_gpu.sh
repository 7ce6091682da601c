#!/usr/bin/env bash
# Everything a GPU has to say, in one call under nine minutes: tests, kernel benches, step benches,
# a profile, the report.
#
#   bash bench/on_gpu.sh OUT            on a machine with a CUDA device
#   bash bench/on_gpu.sh OUT --dry      every line on the CPU, with small sizes
#   ONLY="step report" BENCH_SIZES=H/14 STEP_SECONDS=450 bash bench/on_gpu.sh OUT     one part alone
#
# The most valuable figures come first. Each part has a time limit of its own; one that fails or runs
# over does not keep the next from running, and what it has filed stays. BENCH_SECONDS is the time of
# the whole call: later parts get what is left of it.
#
# OUT gets few files: summary.txt, log.txt, RESULTS.md (the goals first), profile.json, results/*.json.
set -u
OUT=${1:?usage: bench/on_gpu.sh OUT [--dry]}
DRY=${2:-}
cd "$(dirname "$0")/.."
mkdir -p "$OUT/results"
OUT=$(cd "$OUT" && pwd)
PYTHON=${PYTHON:-python3}
BENCH_SECONDS=${BENCH_SECONDS:-520}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 BENCH_RESULTS="$OUT/results"
: >"$OUT/summary.txt"
: >"$OUT/log.txt"

if [ "$DRY" = --dry ]; then
    export OMP_NUM_THREADS=1 BENCH_THREADS=1 BENCH_ROUNDS=1 BENCH_SIZES=demo
    SIZE=demo STEPS=3
    GPU_TESTS=(-m gpu --collect-only)  # there is nothing to run them on
    OPTIMIZER=(-k foreach)             # nor the optimiser's GPU benches: one of the CPU stands in
else
    export BENCH_SIZES=${BENCH_SIZES:-B/16}  # compiling takes most of a step bench
    SIZE=${BENCH_SIZES%%,*} STEPS=300
    GPU_TESTS=(-m gpu -v --timeout 60 --timeout-method thread)
    "$PYTHON" -c 'import xdist' 2>/dev/null && GPU_TESTS+=(-n 8)
    OPTIMIZER=(-m gpu)
    # what the goals compare; BENCH_PROVIDERS= takes every provider
    export BENCH_PROVIDERS=${BENCH_PROVIDERS-"bf16 weights|released|best stock, compiled"}
fi

part() {  # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS left=$((BENCH_SECONDS - SECONDS)) status
    shift 2
    [[ " ${ONLY:-$name} " == *" $name "* ]] || return 0
    [ "$name" = report ] || left=$((left - 15))
    if ((left < 5)); then
        echo "$name: not started, the call's $BENCH_SECONDS s are over" | tee -a "$OUT/summary.txt"
        return 0
    fi
    ((limit < left)) || limit=$left
    printf '\n======== %s: %s\n' "$name" "$*" >>"$OUT/log.txt"
    # an interrupt lets pytest write its summary
    timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$OUT/log.txt" 2>&1
    status=$?
    echo "$name: exit $status after $((SECONDS - start)) s (limit $limit)" | tee -a "$OUT/summary.txt"
}

bench() {  # bench NAME SECONDS ARGUMENTS...: a part that is a pytest run, on whatever device is there
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" -m pytest -q -s -rfE --tb=short -m "gpu or not gpu" "$@"
}

part packages 30 "$PYTHON" bench/packages.py
part doctor 20 "$PYTHON" -m ijepa.cli doctor
bench ceilings 25 bench/bench_ceilings.py
# The step's compiled code gets into its caches while the tests run: nothing is timed meanwhile.
SCRATCH=$(mktemp -d)
if [ -z "${ONLY:-}" ]; then
    BENCH_RESULTS=$SCRATCH BENCH_ROUNDS=1 timeout --kill-after=10 110 "$PYTHON" -m pytest -q -s \
        bench/bench_step.py -k truncate >"$SCRATCH/log" 2>&1 &
fi
OMP_NUM_THREADS=1 part tests 120 "$PYTHON" -m pytest -q -rfE --tb=short "${GPU_TESTS[@]}" tests
wait
rm -r "$SCRATCH"
bench attention 100 bench/bench_attention.py -k "not flex"
bench optimizer 40 bench/bench_adamw_ema.py "${OPTIMIZER[@]}"
bench step "${STEP_SECONDS:-100}" bench/bench_step.py -k truncate
bench tokens 60 bench/bench_gather.py bench/bench_prediction_loss.py \
    bench/bench_predictor_tokens.py bench/bench_patch_embed.py
bench packed 60 bench/bench_step.py -k packed
bench flex 60 bench/bench_attention.py -k flex
part profile 60 "$PYTHON" bench/profile_step.py --size "$SIZE" --out "$OUT/profile.json"
part curves 60 "$PYTHON" bench/precision_curves.py --steps "$STEPS" --out "$OUT/results"
part report 15 "$PYTHON" bench/report.py --results "$OUT/results" --out "$OUT/RESULTS.md"
"$PYTHON" bench/goals.py --results "$OUT/results"
! grep -qv "exit 0 " "$OUT/summary.txt"
