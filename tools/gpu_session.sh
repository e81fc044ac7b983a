#!/bin/bash
# gpu_session.sh [STEP...]: everything that needs the GPU, in one go; without arguments all steps in this order.
#
#   smoke        three products; if they hang, who waits, and an end
#   correctness  libzqfp against float64                            table     the GEMM table, gemm.json
#   hosts        ONNX Runtime's CUDA provider against its CPU        check     decoders on the GPU against the CPU
#   variants     every kernel, tiles whole and cut, overlap          decode    tokens per second, decode.json
#   sanitizer    compute-sanitizer over a few shapes                 products  layers apart and as one
#   quantizer    the activation quantizer                           turns     tokens per second at batch 1, in turns
#
# Each step has its own time limit and a failing one stops no other; then the exit code is 1. Results and the whole log (session.log) go to
# $OUT (build/gpu); the summary at the end fits in 12,000 characters. Build first, on any machine with nvcc:
#   make kernels hosts && make -f tools/cutlass/contender.mk
#   make -C zqfp_compile/kernels/cuda OUT=$PWD/build/variants VARIANTS=1
#   make -C zqfp_compile/kernels/cuda OUT=$PWD/build/debug DEBUG_WAIT=1
# ORT_WHEEL names an onnxruntime-gpu wheel to install into $OUT/../gpu-site first (tools/slim_wheel.py makes small
# ones). Without it the installed onnxruntime is used; steps say what they lack.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
site=$PWD/build/gpu-site
steps=" ${*:-smoke correctness hosts variants table quantizer products check decode turns sanitizer} "
summary="" failed=0 status=0
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export ZQFP_KERNELS=${ZQFP_KERNELS:-$PWD/build/kernels}  # what was built elsewhere is taken as it is

# step NAME SECONDS CHARACTERS COMMAND...: run it when asked for; the summary gets the last CHARACTERS it prints.
step() {
    local name=$1 limit=$2 shown=$3 log said start=$SECONDS
    shift 3
    [[ $steps == *" ${name%-*} "* || $steps == *" $name "* ]] || return 0
    log=$(mktemp)
    timeout --kill-after=10 "$limit" "$@" > "$log" 2>&1
    status=$?
    { echo "==== $name: $*"; cat "$log"; } >> "$OUT/session.log"
    ((status == 0)) || failed=1
    case $status in 0) said=ok ;; 124 | 137) said="stopped after $limit s" ;; *) said="exit $status" ;; esac
    summary+="==== $name: $said, $((SECONDS - start)) s"$'\n'"$(tail -c "$shown" "$log")"$'\n'
    echo "$name: $said, $((SECONDS - start)) s"
    rm -f "$log"
}

if [[ -n ${ORT_WHEEL:-} ]]; then
    [[ -d $site ]] || "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$ORT_WHEEL"
    export PYTHONPATH="$site:$PYTHONPATH"
fi
# The CUDA libraries that come with torch serve ONNX Runtime as well.
nvidia=$("$PYTHON" -c 'import glob, os, torch
print(":".join(glob.glob(os.path.dirname(os.path.dirname(torch.__file__)) + "/nvidia/*/lib")))')
export LD_LIBRARY_PATH="${nvidia}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

: > "$OUT/session.log"
tests="$PYTHON -m pytest -q -p no:cacheprovider --maxfail=20 --tb=short"
rows=tests/gpu/test_w4a8_gemm.py::test_rows
step smoke 60 600 $tests "$rows[64-1]" "$rows[64-33]" "$rows[64-1024]"
if ((status == 124 || status == 137)); then  # every later step would hang as well
    steps=" smoke "
    step smoke-debug 60 3000 env ZQFP_KERNELS="$PWD/build/debug" $tests -s "$rows[64-1]"
fi
step correctness 240 1200 $tests tests/gpu/test_w4a8_gemm.py tests/gpu/test_quantize_fused.py \
    tests/gpu/test_quantized_linear.py
step hosts 120 800 $tests tests/gpu/test_custom_ops_cuda.py
step variants-decode 120 1400 env ZQFP_KERNELS="$PWD/build/variants" "$PYTHON" tools/bench_gemm.py --variants \
    --shapes 28672x8192,4096x4096 --tokens 1,16
step variants-prefill 120 1400 env ZQFP_KERNELS="$PWD/build/variants" "$PYTHON" tools/bench_gemm.py --variants \
    --shapes 28672x8192,14336x4096 --tokens 256,1024,4096
step table 240 3600 "$PYTHON" tools/bench_gemm.py --output "$OUT/gemm.json"
step quantizer 60 2000 "$PYTHON" tools/bench_quantizer.py
step products 60 1200 "$PYTHON" tools/bench_gemm.py --shapes 4096x4096,12288x4096,1024x4096,6144x4096,28672x4096 \
    --tokens 1,16,2048 --contenders '' --no-extras --output "$OUT/products.json"
step check 90 600 "$PYTHON" tools/bench_decode.py --check
# The float16 weights have 13.5 GB: in memory where there is room.
work=$PWD/build/gpu-work room=$(df --output=avail --block-size=1G /dev/shm 2>/dev/null | tail -n 1)
((${room:-0} >= 32)) && work=/dev/shm/zqfp-gpu-work
for contender in zqfp fp16 ort_int4 zqfp_lorc16 zqfp_lorc16_token; do
    step "decode-$contender" 120 350 "$PYTHON" tools/bench_decode.py --contenders "$contender" \
        --publish "$OUT/decode.json" --work "$work"
    rm -rf "$work"  # still full where the time was up
done
step turns 240 600 "$PYTHON" tools/bench_decode.py --contenders zqfp zqfp_lorc16 ort_int4 fp16 --batches 1 --prefill 0 \
    --turns 4 --work "$work"
rm -rf "$work"
sanitized="tests/gpu/test_w4a8_gemm.py tests/gpu/test_quantized_linear.py"
step sanitizer-memcheck 120 300 compute-sanitizer --tool memcheck $tests $sanitized \
    -k 'odd_shapes and 520 or multiplies_by_v and 72-1040'
step sanitizer-racecheck 120 300 compute-sanitizer --tool racecheck $tests $sanitized \
    -k 'odd_shapes and 520 and (16 or 48) or multiplies_by_v and 72-1040'

printf '%s' "$summary"
exit $failed
