#!/usr/bin/env bash
# Creates .venv, installs requirements.txt, and trains a GPT-2 on every GPU of this machine, or on the CPU.
#
#   ./train.sh                               on edu_fineweb10B/ if it holds shards, else on Shakespeare
#   ./train.sh --preset gpt2-350M --dry-run  all arguments go to train_gpt2.py (--help lists them)
#   PYTHON=python3.12 ./train.sh             the interpreter for .venv
#   ENV=active ./train.sh                    in the active environment (conda, a container); nothing is installed
#
# edu_fineweb10B/, log/ and relative paths are those of the folder from which it is called; .venv is beside this file.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"      # sh, which is dash on Debian
[ ! -L "$0" ] || exec bash "$(readlink -f "$0")" "$@"  # a symbolic link to this file
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/setup_venv.sh" requirements.txt

one_device='--device[= ](cpu|mps|cuda:[0-9]+)'  # not "cuda" or "auto", which are every GPU here
if [[ "$*" =~ $one_device ]]; then
  echo "train.sh: training on one device, ${BASH_REMATCH[1]}"
  exec "$python" "$here/train_gpt2.py" "$@"
fi
# a build of PyTorch without CUDA would train on the CPU, unnoticed
if nvidia-smi -L 2>/dev/null | grep -q GPU; then
  "$python" -c 'import sys, torch; sys.exit(None if torch.version.cuda else "error: this machine has an NVIDIA GPU, but"
    f" PyTorch {torch.__version__} has no CUDA: install another build (pytorch.org/get-started), or use --device cpu")' || exit 2
fi
gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" -gt 1 ]; then
  echo "train.sh: training on $gpus GPUs"
  exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" "$here/train_gpt2.py" "$@"
fi
echo "train.sh: training on one $([ "$gpus" -eq 1 ] && echo GPU || echo "process, no CUDA GPU found")"
exec "$python" "$here/train_gpt2.py" "$@"
