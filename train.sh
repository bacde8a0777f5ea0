#!/usr/bin/env bash
# Creates .venv, installs requirements.txt, and trains a GPT-2 on every GPU of this machine, or on the CPU.
#
#   ./train.sh                               on edu_fineweb10B/ if it holds shards, else on Shakespeare
#   ./train.sh --preset gpt2-350M --dry-run  all arguments go to train_gpt2.py (--help lists them)
#   PYTHON=python3.12 ./train.sh             the interpreter for .venv
#   ENV=active ./train.sh                    in the active environment (conda, a container); nothing is installed
#
# edu_fineweb10B/, log/ and relative paths are in the current directory; .venv is beside this file.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh, which is dash on Debian
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/setup_venv.sh" requirements.txt

# --device cpu, mps or cuda:3 is one process; --device cuda and auto are every GPU here
one_device='--device[= ](cpu|mps|cuda:[0-9]+)'
if [[ "$*" =~ $one_device ]]; then
  echo "train.sh: training on one device, ${BASH_REMATCH[1]}"
  exec "$python" "$here/train_gpt2.py" "$@"
fi
# a build of PyTorch for another device would train on the CPU, unnoticed
require_build() {  # name in torch.version, device, name of the build
  if ! "$python" -c "import sys, torch; sys.exit(torch.version.$1 is None)"; then
    echo "error: this machine has $2, but PyTorch was built without $3: use the pip command for $3 of" \
         "pytorch.org/get-started with $python -m pip, or --device cpu" >&2
    exit 2
  fi
}
if nvidia-smi -L 2>/dev/null | grep -q GPU; then require_build cuda "an NVIDIA GPU" CUDA; fi
if command -v rocm-smi >/dev/null; then require_build hip "AMD's ROCm" ROCm; fi
gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" -gt 1 ]; then
  echo "train.sh: training on $gpus GPUs"
  # without an address torchrun takes the host's name, and hangs where that does not resolve
  options=(--standalone --nproc_per_node="$gpus" --local_addr=127.0.0.1)
  # torchrun would handle SIGHUP although nohup ignores it, and stop when the terminal is closed
  if [ -n "$(trap -p HUP)" ]; then options+=(--signals-to-handle=SIGTERM,SIGINT,SIGQUIT); fi
  # torchrun kills its ranks 30 s after a signal; a step and a save of a large model take longer (torch 2.13)
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
  exec "$python" -m torch.distributed.run "${options[@]}" "$here/train_gpt2.py" "$@"
fi
if [ "$gpus" -eq 1 ]; then
  echo "train.sh: training on one GPU"
else
  echo "train.sh: training in one process; no CUDA GPU was found"
fi
exec "$python" "$here/train_gpt2.py" "$@"
