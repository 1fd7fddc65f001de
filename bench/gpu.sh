#!/usr/bin/env bash
# Everything edgemed can say about one NVIDIA GPU, in one call of at most nine minutes:
#
#   bench/gpu.sh                                 (or: WHEELS=dir OFFLINE=1 bench/gpu.sh where nothing can be downloaded)
#
# Sets up a virtual environment over the system's packages, builds llama.cpp with CUDA for this GPU, and measures ONNX Runtime, llama.cpp,
# torch and, where it is installed, TensorRT. Each stage has a time limit; one that fails is written down and the next goes on.
# Records: bench/results/<gpu>.jsonl; logs: $WORK/*.log. Exit code 0 means that at least one engine was measured.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.wheels}          # wheels carried along; llama-cpp-python may lie there as sdist, or built for CUDA
WORK=${WORK:-runs/gpu}
BUDGET=${BUDGET:-540}              # seconds for everything
OUT=${RECORDS:-}                   # where records go instead of bench/results/<gpu>.jsonl
VENV=${VENV:-$WORK/venv}           # an environment that is there already is used as it is
LLAMA=llama-cpp-python==0.3.36

mkdir -p "$WORK"
: > "$WORK/stages.txt"
left() { echo $((BUDGET - SECONDS)); }

# stage NAME LIMIT COMMAND...: run with a limit, keep the log, write down how it ended; never ends the script.
stage() {
  local name=$1 limit=$2 begun=$SECONDS code=0
  shift 2
  if [ "$(left)" -lt 10 ]; then echo "$name: not run, the budget is used up" | tee -a "$WORK/stages.txt"; return 0; fi
  if [ "$limit" -gt "$(left)" ]; then limit=$(left); fi
  timeout --kill-after=5 "$limit" "$@" > "$WORK/$name.log" 2>&1 || code=$?
  if [ "$code" -eq 0 ]; then echo "$name: ok, $((SECONDS - begun)) s" | tee -a "$WORK/stages.txt"
  else echo "$name: failed ($code) after $((SECONDS - begun)) s: $(tail -n 1 "$WORK/$name.log" | cut -c1-200)" | tee -a "$WORK/stages.txt"; fi
  return 0
}

command -v nvidia-smi > /dev/null || { echo "error: no nvidia-smi, so no NVIDIA GPU to measure (python bench/gpu.py --dry-run takes every step on the CPU)" >&2; exit 1; }
nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap,power.limit,clocks.max.sm --format=csv | tee "$WORK/nvidia-smi.txt"
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv --system-site-packages "$VENV"
py="$VENV/bin/python"
pip=("$py" -m pip install --disable-pip-version-check --quiet)
[ -d "$WHEELS" ] && pip+=(--find-links "$WHEELS")
[ -n "${OFFLINE:-}" ] && pip+=(--no-index)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

stage core 60 "${pip[@]}" tokenizers typer rich jinja2 pyyaml psutil numpy
# torch is the machine's own: nothing here may replace its CUDA build.
stage build-extra 60 "${pip[@]}" --no-deps transformers safetensors huggingface_hub onnx gguf ml_dtypes
stage onnxruntime-gpu 60 "${pip[@]}" --no-deps --force-reinstall onnxruntime-gpu
stage bitsandbytes 30 "${pip[@]}" --no-deps bitsandbytes

# llama.cpp takes minutes, so it is built beside the making of the large checkpoint; without AMX, which gcc 12 miscompiles.
amx=""
[ "$(uname -m)" = x86_64 ] && amx="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
(
  export CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=$arch -DCMAKE_C_FLAGS='$amx' -DCMAKE_CXX_FLAGS='$amx'"
  export CMAKE_BUILD_PARALLEL_LEVEL
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc)
  if compgen -G "$WHEELS/llama_cpp_python-*cuda*.whl" > /dev/null; then
    stage llama.cpp 60 "${pip[@]}" --no-deps --force-reinstall "$(compgen -G "$WHEELS/llama_cpp_python-*cuda*.whl" | head -n 1)"
  else
    stage llama.cpp 330 "${pip[@]}" --no-deps --no-cache-dir --force-reinstall --no-binary llama-cpp-python "$LLAMA"
  fi
) &
building=$!
stage true-dimensions 120 "$py" bench/gpu.py --prepare --work "$WORK" --budget 120
wait "$building" || true
stage diskcache 20 "${pip[@]}" --no-deps diskcache

measured=0
seconds=$(left)
if [ "$seconds" -gt 20 ]; then
  "$py" bench/gpu.py --work "$WORK" --budget $((seconds - 10)) ${OUT:+--out "$OUT"} 2>&1 | tee "$WORK/gpu.log" | grep -E '"(stage|ok|error)"' || true
  if grep -q '"by_prompt"' "$WORK/gpu.log"; then measured=1; fi
fi
echo "--- stages"; cat "$WORK/stages.txt"
[ "$measured" -eq 1 ] || { echo "error: no engine was measured; see $WORK/gpu.log" >&2; exit 1; }
