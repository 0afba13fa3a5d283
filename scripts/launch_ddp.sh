#!/usr/bin/env bash
# Train under DDP on this machine, with sharded asynchronous checkpoints.
#
#   bash scripts/launch_ddp.sh                          the demonstration, with checkpoints on the local disk
#   bash scripts/launch_ddp.sh --storage s3             the same, with checkpoints on an S3 server on 127.0.0.1
#   bash scripts/launch_ddp.sh my_train.py --my args    your own script on NPROC processes, under torchrun
#
# The demonstration trains examples/train_digits.py on NPROC processes, kills it with SIGKILL in mid-run, resumes it on
# 3 processes and then on 1, and shows: the loss across the restarts, the files on disk, how long each save blocked
# training, and whether the state that came back is, bit for bit, the state that was saved. It exits non-zero if not.
#
# Your own script finds RANK, LOCAL_RANK, WORLD_SIZE and the rest in its environment, as under any torchrun.
#
# Environment:
#   NPROC          processes to start with                            (2)
#   RESUME_ON      processes of each resumption, in order             ("3 1")
#   MAX_STEPS      training steps over all restarts                   (600)
#   WIDTH          channels of the network: 128 saves 5 MB at a time  (128)
#   STORAGE        local or s3, as --storage                          (local)
#   RUN_DIR        checkpoints, logs and loss.png; emptied first      (runs/demo)
#   VENV           virtual environment; made when missing             (.venv)
#   PYTHON         interpreter that it is made from                   (python3)
#   OMP_NUM_THREADS  threads of each process                          (1)
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

STORAGE=${STORAGE:-local}
while [[ $# -gt 0 ]]; do
  case $1 in
    --storage) STORAGE=${2:-}; shift $(($# > 1 ? 2 : 1)) ;;
    --storage=*) STORAGE=${1#*=}; shift ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "unknown option $1; options of your own script go after its name" >&2; usage >&2; exit 2 ;;
    *) break ;;
  esac
done
if [[ $STORAGE != local && $STORAGE != s3 ]]; then
  echo "the storage is local or s3, not '$STORAGE'" >&2
  exit 2
fi
if [[ $# -gt 0 && $STORAGE != local ]]; then
  echo "--storage (or STORAGE) is for the demonstration: your own script names the place of its checkpoints itself" >&2
  exit 2
fi
if [[ $# -gt 0 && ! -f $1 ]]; then
  echo "there is no script $1" >&2
  exit 2
fi

# shellcheck source=scripts/_venv.sh
source "$REPO/scripts/_venv.sh"
ensure_venv examples

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
NPROC=${NPROC:-2}

# exec, so that a signal to this script reaches the job itself, which cleans up after itself.
if [[ $# -gt 0 ]]; then
  exec torchrun --standalone --nproc-per-node "$NPROC" "$@"
fi
# shellcheck disable=SC2086  # RESUME_ON is a list of numbers
exec python "$REPO/scripts/demo/drive.py" \
  --storage "$STORAGE" \
  --max-steps "${MAX_STEPS:-600}" \
  --width "${WIDTH:-128}" \
  --run-dir "${RUN_DIR:-$REPO/runs/demo}" \
  --processes "$NPROC" ${RESUME_ON:-3 1}
