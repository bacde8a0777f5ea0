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
# a build of PyTorch without CUDA would train on the CPU, unnoticed
if nvidia-smi -L 2>/dev/null | grep -q GPU; then
  if ! "$python" -c "import sys, torch; sys.exit(torch.version.cuda is None)"; then
    echo "error: this machine has an NVIDIA GPU, but PyTorch was built without CUDA: install another" \
         "build (pytorch.org/get-started), or use --device cpu" >&2
    exit 2
  fi
fi
gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" -gt 1 ]; then
  echo "train.sh: training on $gpus GPUs"
  exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" "$here/train_gpt2.py" "$@"
fi
if [ "$gpus" -eq 1 ]; then
  echo "train.sh: training on one GPU"
else
  echo "train.sh: training in one process; no CUDA GPU was found"
fi
exec "$python" "$here/train_gpt2.py" "$@"
