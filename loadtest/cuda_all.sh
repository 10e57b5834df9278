#!/bin/sh
# Everything that is to be known about a CUDA GPU, in one go of bounded time:
#
#   sh loadtest/cuda_all.sh OUT [SECONDS]        (450 seconds when left out; PYTHON names another)
#
# What is compiled is compiled first, side by side, beside the tests of this GPU and the
# writing of a checkpoint; then the stages are measured alone, then the service. Each part has
# a time limit and a log in OUT, and a part that fails stops no other. OUT/cache.tgz, where
# there is one at the start, is taken as what was compiled before.
set -u
out=$1
limit=${2:-450}
python=${PYTHON:-python3}
begun=$(date +%s)
work=$(mktemp -d)
mkdir -p "$out"
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR="$work/compiled"
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
mkdir "$work/compiled"
[ -f "$out/cache.tgz" ] && tar xzf "$out/cache.tgz" -C "$work/compiled"

spent() { echo $(($(date +%s) - begun)); }
left() { # seconds until a share (percent) of the limit, at least 5
    seconds=$((limit * $1 / 100 - $(spent)))
    [ "$seconds" -gt 5 ] && echo "$seconds" || echo 5
}
say() { echo "--- $(spent) s: $*"; }
shown() { grep -v '^{"' "$1" | cut -c1-400 | tail -"$2"; }

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
df -h "$work" | tail -1
shallow="$python loadtest/cuda_stages.py --shallow --runs 1 --only"
timeout "$(left 35)" $shallow compiled >"$out/warm-compiled.log" 2>&1 &
compiled=$!
timeout "$(left 35)" $shallow fp8 >"$out/warm-fp8.log" 2>&1 &
fp8=$!
timeout "$(left 35)" $shallow static_blocks >"$out/warm-static.log" 2>&1 &
static=$!
timeout "$(left 35)" $shallow decoders >"$out/warm-decoders.log" 2>&1 &
decoders=$!
timeout "$(left 35)" "$python" -m pytest -c /dev/null --rootdir=. --import-mode=importlib \
    -p no:cacheprovider -q -W ignore tests/device >"$out/tests.log" 2>&1 &
tests=$!
timeout "$(left 90)" "$python" -c "
from fluxcore.weights.random_checkpoint import write_random_checkpoint
write_random_checkpoint('$work/4b', '4b')" >"$out/checkpoint.log" 2>&1 &
checkpoint=$!
wait $compiled $fp8 $static $decoders $tests
say "compiled, and tests of this GPU"
for log in compiled fp8 static decoders; do
    echo "$log:"
    shown "$out/warm-$log.log" 6
done
shown "$out/tests.log" 25

wait $checkpoint
say "checkpoint written"
timeout "$(left 75)" "$python" loadtest/cuda_stages.py --out "$out" >"$out/stages.log" 2>&1
say "stages"
shown "$out/stages.log" 70

# The service: with what a start left behind, in fp8, and with nothing compiled yet.
ready() { # name, directory, percent of the time, more settings
    TORCHINDUCTOR_CACHE_DIR=$2 timeout "$(left "$3")" "$python" loadtest/time_to_ready.py \
        "$work/4b" --data "$work/data" --sizes 256x256 512x512 1024x1024 --set compile=on \
        --set cuda_graphs=24 --set attention=fused --set log_level=warning \
        --set "$4" >"$out/ready-$1.log" 2>&1
    say "ready, $1"
    shown "$out/ready-$1.log" 8
}
ready warm "$work/compiled" 84 precision=bf16
ready fp8 "$work/compiled" 90 precision=fp8
ready cold "$work/none" 97 precision=bf16
tar czf "$out/cache.tgz" -C "$work/compiled" . && ls -l "$out/cache.tgz"
rm -rf "$work"
say "end"
