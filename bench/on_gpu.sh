#!/usr/bin/env bash
# Everything a GPU has to say, in calls under nine minutes: the step, the kernels beside their peers,
# the tests, the report. On a machine without network, run bench/carry.sh where there is one first.
#
#   bash bench/on_gpu.sh OUT                                         B/16 and all kernels
#   ONLY="step packed report" BENCH_SIZES=L/16 bash bench/on_gpu.sh OUT       the other models,
#   ONLY="step packed report" BENCH_SIZES=H/14 bash bench/on_gpu.sh OUT       a call each
#   ONLY="tune" bash bench/on_gpu.sh OUT                             the tiles of attention alone
#   ONLY="sanitize profile" bash bench/on_gpu.sh OUT                 memory checks; where time goes
#   ONLY="lengths flex curves" bash bench/on_gpu.sh OUT              long lists, curves
#   bash bench/on_gpu.sh OUT --dry                                   every line on the CPU, small
#
# Each part has a time limit of its own; one that fails, hangs or is cut does not keep the next from
# running, and what it has filed stays: results are written table by table. BENCH_SECONDS is the time
# of the whole call: a part gets what is left of it, and at most PART_SECONDS. What compiles long (the
# step) compiles beside the tests, when nothing is timed.
#
# OUT gets few files: summary.txt, log.txt, tests.txt, RESULTS.md (the goals first), profile.json,
# results/*.json. summary.txt ends with the GPU tests that never ran, by number.
set -u
OUT=${1:?usage: bench/on_gpu.sh OUT [--dry]}
DRY=${2:-}
cd "$(dirname "$0")/.."
mkdir -p "$OUT/results"
OUT=$(cd "$OUT" && pwd)
PYTHON=${PYTHON:-python3}
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 BENCH_RESULTS="$OUT/results"
: >"$OUT/summary.txt"
: >"$OUT/log.txt"

CARRY=${CARRY:-.carry}
if compgen -G "$CARRY/*.whl" >/dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$SCRATCH/site" "$CARRY"/*.whl >>"$OUT/log.txt" 2>&1
    export PYTHONPATH=$PYTHONPATH:$SCRATCH/site
fi

if [ "$DRY" = --dry ]; then
    export OMP_NUM_THREADS=1 BENCH_THREADS=1 BENCH_ROUNDS=1 BENCH_SIZES=demo
    SIZE=demo STEPS=3 SLOWER=5  # times a GPU machine's time
    GPU_TESTS=(-m gpu --collect-only)  # there is nothing to run them on
    OPTIMIZER=(-k foreach)             # nor the optimiser's GPU benches: one of the CPU stands in
else
    export BENCH_SIZES=${BENCH_SIZES:-B/16}  # compiling takes most of a step bench
    SIZE=${BENCH_SIZES%%,*} STEPS=300 SLOWER=1
    GPU_TESTS=(-m gpu -v --timeout 90 --timeout-method thread)
    "$PYTHON" -c 'import xdist' 2>/dev/null && GPU_TESTS+=(-n "${TEST_PROCESSES:-10}")
    OPTIMIZER=(-m gpu)
    # what the goals compare; BENCH_PROVIDERS= takes every provider
    export BENCH_PROVIDERS=${BENCH_PROVIDERS-"bf16 weights.*blocks|best stock, blocks|released"}
fi

BENCH_SECONDS=${BENCH_SECONDS:-$((520 * SLOWER))}

chosen() { [[ " ${ONLY:-$1} " == *" $1 "* ]]; }

part() {  # part NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * SLOWER)) start=$SECONDS left=$((BENCH_SECONDS - SECONDS)) status
    shift 2
    chosen "$name" || return 0
    [ "$name" = report ] || left=$((left - 15))
    if ((left < 5)); then
        echo "$name: not started, the call's $BENCH_SECONDS s are over" | tee -a "$OUT/summary.txt"
        return 0
    fi
    ((limit < left)) || limit=$left
    ((limit < ${PART_SECONDS:-$limit})) || limit=${PART_SECONDS:-$limit}
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

tests() {  # tests NAME SECONDS ARGUMENTS...: GPU tests, each outcome filed as it comes
    local name=$1 limit=$2
    shift 2
    OMP_NUM_THREADS=1 TEST_REPORT="$OUT/tests.txt" part "$name" "$limit" "$PYTHON" -m pytest -q -rfE \
        --tb=short --continue-on-collection-errors "${GPU_TESTS[@]}" "$@" tests
}

compile_beside() {  # compile_beside NAME SECONDS ARGUMENTS...: fills the compilers' caches
    local name=$1 limit=$2
    shift 2
    if [ "$DRY" = --dry ] || ! chosen "$name"; then return 0; fi
    limit=${PART_SECONDS:-$limit}
    BENCH_RESULTS="$SCRATCH" BENCH_ROUNDS=1 timeout --kill-after=10 "$limit" "$PYTHON" -m pytest -q -s \
        "$@" >"$SCRATCH/$name-$RANDOM.log" 2>&1 &
}

part packages 30 "$PYTHON" -m bench.packages
part doctor 20 "$PYTHON" -m ijepa.cli doctor
bench ceilings 25 bench/ops/bench_ceilings.py
for size in ${BENCH_SIZES//,/ }; do
    BENCH_SIZES=$size compile_beside step 110 bench/step/bench_step.py -k truncate
done
compile_beside attention 110 bench/ops/bench_attention.py -k "not flex"
# The core of every op; attention's long list of lengths is a part of its own.
tests tests 110 -k "not test_lengths_against_float64"
wait
bench step "${STEP_SECONDS:-240}" bench/step/bench_step.py -k truncate
bench attention 100 bench/ops/bench_attention.py -k "not flex"
if [ "$DRY" != --dry ]; then  # there is no device to choose tiles for
    part tune 110 "$PYTHON" -m bench.ops.tune_attention --out "$SCRATCH/tiles.json" --seconds 45
    cp "$SCRATCH/tiles.json" "$OUT/results/" 2>>"$OUT/log.txt"
fi
bench optimizer 40 bench/ops/bench_adamw_ema.py "${OPTIMIZER[@]}"
bench tokens 60 bench/ops/bench_gather.py bench/ops/bench_prediction_loss.py \
    bench/ops/bench_predictor_tokens.py bench/ops/bench_patch_embed.py
bench flex 60 bench/ops/bench_attention.py -k flex
bench packed 60 bench/step/bench_step.py -k packed
part profile 60 "$PYTHON" -m bench.step.profile_step --size "$SIZE" --out "$OUT/profile.json"
tests lengths 90 -k "test_lengths_against_float64"
if [ "$DRY" != --dry ]; then
    for tool in memcheck racecheck; do
        part sanitize 120 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$PYTHON" -m masked_vit_kernels.selftest --seed 1 --rounds 1
    done
fi
part curves 60 "$PYTHON" -m bench.step.precision_curves --steps "$STEPS" --out "$OUT/results"
part report 15 "$PYTHON" -m bench.report --results "$OUT/results" --out "$OUT/RESULTS.md"
"$PYTHON" -m bench.goals --results "$OUT/results"
"$PYTHON" -m bench.never_ran "$OUT/tests.txt" | tee -a "$OUT/summary.txt"
for log in "$SCRATCH"/*.log; do
    [ -e "$log" ] && { echo "======== beside the tests: $log"; tail -n 25 "$log"; } >>"$OUT/log.txt"
done
! grep -q "exit [1-9]" "$OUT/summary.txt"
