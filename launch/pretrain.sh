#!/usr/bin/env bash
# Trains the example GPT on this machine: launch/pretrain.sh [options of launch/pretrain_gpt.py]
#   STAGES=4 launch/pretrain.sh --num-stages 4 --steps 1000 --data /my/text --save checkpoints
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec deepspeed --num_accelerators "${STAGES:-2}" --module launch.pretrain_gpt \
  --deepspeed_config "${CONFIG:-launch/ds_config.json}" "$@"
