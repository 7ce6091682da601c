#!/usr/bin/env bash
# Everything a GPU has to say, in one call under nine minutes: tests, kernel benches, step benches,
# a profile, the report.
#
#   bash bench/on_gpu.sh OUT            on a machine with a CUDA device
#   bash bench/on_gpu.sh OUT --dry      every line on the CPU, with small sizes
#
# Each part has a time limit of its own and writes its log to OUT; one that fails or runs over does
# not keep the next from running. OUT gets the JSON results and summary.txt with the exit statuses.
set -u
OUT=${1:?usage: bench/on_gpu.sh OUT [--dry]}
DRY=${2:-}
cd "$(dirname "$0")/.."
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
PYTHON=${PYTHON:-python3}
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1 BENCH_RESULTS="$OUT/results"
mkdir -p "$OUT/results"
: >"$OUT/summary.txt"
touch "$OUT/started"

part() {  # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    echo "$name: exit $status after $((SECONDS - start)) s (limit $limit)" | tee -a "$OUT/summary.txt"
}

if [ "$DRY" = --dry ]; then
    export OMP_NUM_THREADS=1 BENCH_ROUNDS=2
    # "gpu" tests are collected but not run: there is nothing to run them on
    part tests 300 "$PYTHON" -m pytest -q -m gpu --collect-only tests
    part kernels 300 "$PYTHON" -m pytest -q -s bench/bench_prediction_loss.py
    BENCH_SIZES=demo part step 600 "$PYTHON" -m pytest -q -s bench/bench_step.py
    part profile 200 "$PYTHON" bench/profile_step.py --size demo --out "$OUT/profile.json"
    part curves 300 "$PYTHON" bench/precision_curves.py --steps 3 --out "$OUT/results"
else
    part doctor 15 "$PYTHON" -m ijepa.cli doctor
    part tests 120 "$PYTHON" -m pytest -q -m gpu tests
    # compiling takes most of it: larger models one at a time, BENCH_SIZES=H/14
    part step 200 env BENCH_SIZES="${BENCH_SIZES:-B/16}" "$PYTHON" -m pytest -q -s bench/bench_step.py
    part kernels 80 "$PYTHON" -m pytest -q -s bench --ignore bench/bench_step.py \
        --ignore bench/bench_decode.py --ignore bench/bench_masks.py -m "gpu or not gpu"
    part profile 60 "$PYTHON" bench/profile_step.py --size "${PROFILE_SIZE:-B/16}" --out "$OUT/profile.json"
    part curves 30 "$PYTHON" bench/precision_curves.py --steps 500 --out "$OUT/results"
fi
find bench/results -name '*.json' -newer "$OUT/started" -exec cp -t "$OUT/results" {} + 2>/dev/null
part report 20 "$PYTHON" bench/report.py --results "$OUT/results" --out "$OUT/RESULTS.md"
cat "$OUT/summary.txt"
! grep -qv "exit 0 " "$OUT/summary.txt"
