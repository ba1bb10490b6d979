#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests, tables of kernels and networks, training, accuracy.
#
#   OUT=DIR bash benchmarks/cuda.sh                        # all parts, the quick and telling first
#   OUT=DIR bash benchmarks/cuda.sh tests networks         # these, in this order
#   LIMIT=500 LIMIT_tests=60 NETWORKS="--networks bert" OUT=DIR bash benchmarks/cuda.sh
#
# OUT           gets PART.log and tables in cuda.tar.gz, which is packed anew after each part
# LIMIT         seconds of the whole (580); LIMIT_PART those of a part
# SITE          a folder of packages that this Python lacks, if any
# TWOFOUR_DATA  the folder of real data; without CIFAR-10 in it nothing is trained or judged
# WORKERS       processes of the tests (6)
# TESTS, KERNELS, ROWS, NETWORKS, TRAIN, ACCURACY   further words for the command of a part
# FILES         networks whose files are written meanwhile, if the part networks is asked for
# CACHE         folder for what a later call can use again: what torch.compile found
# KEEP          folder for files of networks, their engines, and what was trained; else they go
#
# On a machine with several GPUs, one call each at the same time, with CUDA_VISIBLE_DEVICES and OUT
# of its own; `python -m benchmarks.cuda_networks --output DIR --add FILE...` joins their tables.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?name the folder for results: OUT=DIR bash benchmarks/cuda.sh}"
export PYTHONPATH="$PWD${SITE:+:$SITE}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TWOFOUR_DATA="${TWOFOUR_DATA:-../shared/data}"
PYTHON=${PYTHON:-python3}
END=$((SECONDS + ${LIMIT:-580}))
WORK=$(mktemp -d)
CACHE=${CACHE:-$WORK/cache}
KEEP=${KEEP:-$WORK}
mkdir -p "$OUT" "$CACHE" "$KEEP" "$WORK/tables"
trap 'kill "${MAKERS[@]}" 2>/dev/null; rm -rf "$WORK"' EXIT
MAKERS=()

# seconds of each part, where it is not told otherwise
declare -A LIMITS=([machine]=30 [tests]=150 [convolutions]=60 [kernels]=120 [rows]=90 [networks]=400 [train]=240 [accuracy]=150)

machine() {
    "$PYTHON" -m twofour doctor || true
    nvidia-smi || true
    "$PYTHON" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__)'
}
tests() { # shellcheck disable=SC2086
    local more=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && more+=(-n "${WORKERS:-6}")
    "$PYTHON" -c 'import pytest_timeout' 2>/dev/null && more+=(--timeout 100)
    "$PYTHON" -m pytest tests/gpu -m gpu -q --tb=short -p no:cacheprovider --durations 8 \
        "${more[@]}" ${TESTS:-}
}
convolutions() {
    "$PYTHON" -m pytest tests/gpu/test_conv_sparse_speed.py -m gpu -q -s -p no:cacheprovider
}
kernels() { # shellcheck disable=SC2086
    "$PYTHON" -m benchmarks.cuda_kernels --output "$WORK/tables" ${KERNELS:-}
}
rows() { # shellcheck disable=SC2086
    "$PYTHON" -m benchmarks.cuda_rows --output "$WORK/tables" ${ROWS:-}
}
networks() { # shellcheck disable=SC2086
    "$PYTHON" -m benchmarks.cuda_networks --output "$WORK/tables" --files "$KEEP/networks" \
        --compile-cache "$CACHE/inductor.tar.gz" --seconds "$(($1 - 10))" ${NETWORKS:-}
}
train() { # shellcheck disable=SC2086
    "$PYTHON" examples/cifar10_gpu.py --device cuda --amp --out "$KEEP/trained" \
        --table "$WORK/tables/cifar10_gpu.md" ${TRAIN:-}
}
accuracy() { # shellcheck disable=SC2086
    "$PYTHON" -m benchmarks.cuda_accuracy --output "$WORK/tables" --trained "$KEEP/trained" \
        --seconds "$(($1 - 10))" ${ACCURACY:-}
}

PARTS=("$@")
[ ${#PARTS[@]} -gt 0 ] || PARTS=(machine tests kernels rows train accuracy networks)
STATUS=0
if [[ " ${PARTS[*]} " == *" networks "* ]]; then # these need no GPU
    for network in ${FILES:-bert resnet50 llama_mlp resnet34}; do
        OMP_NUM_THREADS=3 nice "$PYTHON" -m benchmarks.cuda.cases "$KEEP/networks" "$network" \
            >>"$WORK/files.log" 2>&1 &
        MAKERS+=($!)
    done
fi
for part in "${PARTS[@]}"; do
    [ -n "${LIMITS[$part]:-}" ] || { echo "no part $part; there are ${!LIMITS[*]}"; exit 2; }
    [ "$part" != networks ] || wait "${MAKERS[@]}"
    own=LIMIT_$part left=$((END - SECONDS))
    limit=${!own:-${LIMITS[$part]}}
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 15 ]; then
        echo "== $part: no time was left" | tee -a "$OUT/cuda.txt"
        continue
    fi
    begin=$SECONDS
    # A part is a process group of its own: what is left of it at its limit ends with it.
    export -f "$part"
    export WORK CACHE KEEP PYTHON
    timeout -k 5 "$limit" bash -c "$part $limit" >"$WORK/$part.log" 2>&1
    code=$?
    [ $code -eq 0 ] || STATUS=1
    echo "== $part: exit code $code, $((SECONDS - begin)) of $limit s" | tee -a "$OUT/cuda.txt"
    tail -n 25 "$WORK/$part.log" | cut -c 1-300
    (cd "$WORK" && tar czf "$OUT/cuda.tar.gz.part" ./*.log tables && mv "$OUT/cuda.tar.gz.part" "$OUT/cuda.tar.gz")
    cp "$CACHE/inductor.tar.gz" "$OUT/" 2>/dev/null || true
done
exit $STATUS
