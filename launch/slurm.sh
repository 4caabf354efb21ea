#!/usr/bin/env bash
# Train on a Slurm cluster, one process a node with all of its GPUs.
#
#   launch/slurm.sh [--dry-run] [SBATCH OPTION ...] -- --config=FILE.py --workdir=DIR [--config.KEY=VALUE ...]
#   launch/slurm.sh --nodes=2 --gpus-per-node=8 --time=24:00:00 -- --config=configs/bge_gpt2.py --workdir=/shared/run
#
# submits itself with sbatch, to run in the folder where it is typed; inside an allocation (salloc) it runs at once. The
# workdir, this repository, its environment and the rows must be on a file system that all nodes share.
#
# Two minutes before the time limit all processes save and the job is queued again; preempted by Slurm or after a
# node's failure it is queued again, too, and goes on from the newest checkpoint. The same command typed twice waits for
# the first (one job a workdir at a time). To end it for good: scancel JOB. PYTHON names another interpreter.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=rag_jax-%j.log
#SBATCH --signal=B:USR1@120
# (USR1 and not TERM, which also comes from scancel, after which the job must not be queued again.)
set -euo pipefail
SELF=launch/slurm.sh
# Slurm runs a copy of this file from a folder of its own.
ROOT=${RAG_JAX_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
[[ -f $ROOT/launch/common.sh ]] || ROOT=${SLURM_SUBMIT_DIR:-.}
[[ -f $ROOT/launch/common.sh ]] || {
  echo "$SELF: error: launch/common.sh is not in $ROOT; submit from the repository's root, or with $SELF" >&2
  exit 2
}
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

options=()
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --help) help ;;
    --config* | --workdir*) fail "$1: flags of the training stand after --, see $SELF --help" ;;
    -*) options+=("$1") ;;
    *) fail "$1: write options of sbatch as --OPTION=VALUE, and flags of the training after --, see $SELF --help" ;;
  esac
  shift
done
[[ ${1:-} == -- && $# -gt 1 ]] || fail "nothing to run; give -- --config=FILE.py --workdir=DIR, see $SELF --help"
shift

if [[ ! ${SLURM_JOB_ID:-} ]]; then
  workdir=''
  for ((i = 1; i <= $#; i++)); do
    case ${!i} in
      --workdir=*) workdir=${!i#*=} ;;
      --workdir) next=$((i + 1)) && workdir=${!next:-} ;;
    esac
  done
  [[ $workdir ]] || fail "no --workdir=DIR after --; see $SELF --help"
  # Two jobs of one name never run at once, so a workdir never has two writers.
  run env "RAG_JAX_ROOT=$ROOT" sbatch --job-name="rag_jax:$workdir" --dependency=singleton "${options[@]}" \
    "$ROOT/launch/slurm.sh" -- "$@"
  exit 0
fi
[[ ${#options[@]} == 0 ]] || fail "${options[*]}: inside a job the allocation is made already; give these to sbatch"

# In Slurm, jax takes one GPU a process; alone on its node a process must be told of all.
# shellcheck disable=SC2016 # to be expanded on each node
task='if [[ ${SLURM_NTASKS_PER_NODE:-1} == 1 && ${SLURM_GPUS_ON_NODE:-} ]]; then
  export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
fi
exec "$@"'
step=(env RAG_JAX_DISTRIBUTED=1 srun --kill-on-bad-exit=1)
[[ ! ${SLURM_CPUS_PER_TASK:-} ]] || step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not take it over
step+=(bash -c "$task" task "$(find_python "$ROOT")" -m rag_jax.main "$@")
if [[ $DRY_RUN ]]; then
  run "${step[@]}"
  exit 0
fi

again=''
trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # to the processes, not to this script
trap : TERM                                                # Slurm sends it to the processes itself; wait for them
"${step[@]}" &
code=0
# A trapped signal ends `wait`, not srun.
while true; do
  code=0
  wait $! || code=$?
  kill -0 $! 2>/dev/null || break
done
if [[ $again && $code != 0 ]]; then
  # Said first: a job that is queued again ends at once.
  echo "$SELF: saved before the time limit; queuing job $SLURM_JOB_ID again"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
