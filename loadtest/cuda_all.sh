#!/bin/sh
# Everything that is to be known about a CUDA GPU, in one go of bounded time:
#
#   sh loadtest/cuda_all.sh OUT [SECONDS]        (450 seconds when left out; PYTHON names another)
#
# First the tests of this GPU beside the writing of a checkpoint; then the stages are measured
# alone, then the service. Each part has a time limit and a log in OUT, and a part that fails
# stops no other.
set -u
out=$1
limit=${2:-450}
python=${PYTHON:-python3}
begun=$(date +%s)
work=$(mktemp -d)
mkdir -p "$out"
export PYTHONUNBUFFERED=1
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

spent() { echo $(($(date +%s) - begun)); }
left() { # seconds until a share (percent) of the limit, at least 5
    seconds=$((limit * $1 / 100 - $(spent)))
    [ "$seconds" -gt 5 ] && echo "$seconds" || echo 5
}
say() { echo "--- $(spent) s: $*"; }
shown() { grep -v '^{"' "$1" | cut -c1-400 | tail -"$2"; }

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
df -h "$work" | tail -1
timeout "$(left 35)" "$python" -m pytest -c /dev/null --rootdir=. --import-mode=importlib \
    -p no:cacheprovider -q -W ignore tests/device tests/unit/test_triton_kernels.py \
    tests/unit/test_triton_products.py \
    >"$out/tests.log" 2>&1 &
tests=$!
timeout "$(left 90)" "$python" -c "
from fluxcore.weights.random_checkpoint import write_random_checkpoint
write_random_checkpoint('$work/4b', '4b')" >"$out/checkpoint.log" 2>&1 &
checkpoint=$!
wait $tests
say "tests of this GPU"
shown "$out/tests.log" 25

wait $checkpoint
say "checkpoint written"
timeout "$(left 60)" "$python" loadtest/cuda_stages.py --out "$out" >"$out/stages.log" 2>&1
say "stages"
shown "$out/stages.log" 80

# The service: with no kernel compiled yet, with what that start left behind, and in fp8.
ready() { # name, percent of the time, more settings
    timeout "$(left "$2")" "$python" loadtest/time_to_ready.py \
        "$work/4b" --data "$work/data" --sizes 256x256 512x512 1024x1024 \
        --set cuda_graphs=24 --set log_level=warning --set "$3" >"$out/ready-$1.log" 2>&1
    say "ready, $1"
    shown "$out/ready-$1.log" 8
}
export TRITON_CACHE_DIR="$work/kernels"
ready cold 75 precision=bf16
ready warm 85 precision=bf16
ready fp8 95 precision=fp8
rm -rf "$work"
say "end"
