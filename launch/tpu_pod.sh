#!/usr/bin/env bash
# Train on a TPU pod (TPU VMs of one slice), with gcloud.
#
#   launch/tpu_pod.sh create [--dry-run]    ask for the pod and wait for it; what is there stays
#   launch/tpu_pod.sh setup  [--dry-run]    copy this repository to all workers and install it
#   launch/tpu_pod.sh run    [--dry-run] -- --config=FILE.py --workdir=DIR [--config.KEY=VALUE ...]
#   launch/tpu_pod.sh resume [--dry-run] -- ...    create, setup and run; all again whenever the pod is preempted
#   launch/tpu_pod.sh stop|status|delete [--dry-run]
#
# Variables:
#   TPU_NAME, ZONE       of the pod
#   ACCELERATOR_TYPE     v5litepod-16, v6e-16, v4-32 ...        (create, resume)
#   RUNTIME_VERSION      v2-alpha-tpuv5-lite, v2-alpha-tpuv6e ...   (create, resume)
#   SPOT                 1: spot, as a queued resource; the queue may take hours
#   PROJECT              gcloud's own when not given
#   PREPARE              a command that `setup` runs on every worker, for example one that mounts the file system on
#                        which workdir and rows lie: they must be the same on all workers
#   POLL_S               30: seconds between two looks at the pod
#
# The training does not end with the connection: `run` again follows what runs. `stop` lets it save and end. Relative
# paths after -- start at the repository's copy. A dry run prints what happens when there is no pod yet.
set -euo pipefail
SELF=launch/tpu_pod.sh
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

action=${1:-}
case $action in
  create | setup | run | resume | stop | status | delete) shift ;;
  --help) help ;;
  *) fail "${action:-no command}: must be one of create, setup, run, resume, stop, status, delete; see $SELF --help" ;;
esac
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --help) help ;;
    *) fail "$1: unknown flag; flags of the training stand after --, see $SELF --help" ;;
  esac
  shift
done
[[ $# == 0 ]] || shift
case $action in
  create | resume) need TPU_NAME ZONE ACCELERATOR_TYPE RUNTIME_VERSION ;;
  *) need TPU_NAME ZONE ;;
esac
[[ $action != r* || $# -gt 0 ]] || fail "nothing to run; give -- --config=FILE.py --workdir=DIR, see $SELF --help"

POLL_S=${POLL_S:-30} SPOT=${SPOT:-}
where=(--zone="$ZONE" --quiet)
[[ ! ${PROJECT:-} ]] || where+=(--project="$PROJECT")
vm=(gcloud compute tpus tpu-vm)
queued=(gcloud compute tpus queued-resources)
if [[ $SPOT ]]; then
  describe=("${queued[@]}" describe "$TPU_NAME" "${where[@]}" --format='value(state.state)')
else
  describe=("${vm[@]}" describe "$TPU_NAME" "${where[@]}" --format='value(state)')
fi

# Sets `state`; ABSENT for what gcloud does not find. Any other error of gcloud ends the script with its message.
look() {
  local said
  if said=$("${describe[@]}" 2>&1); then
    state=${said##*$'\n'}
  elif [[ $said == *NOT_FOUND* || $said == *"not found"* ]]; then
    state=ABSENT
  else
    echo "$said" >&2
    fail "gcloud cannot tell the state of $TPU_NAME (above)"
  fi
}

make_pod() {
  local what=(--accelerator-type="$ACCELERATOR_TYPE")
  if [[ $SPOT ]]; then
    what+=(--runtime-version="$RUNTIME_VERSION" --node-id="$TPU_NAME" --spot)
    run "${queued[@]}" create "$TPU_NAME" "${where[@]}" "${what[@]}"
  else
    run "${vm[@]}" create "$TPU_NAME" "${where[@]}" "${what[@]}" --version="$RUNTIME_VERSION"
  fi
}

delete_pod() {
  if [[ $SPOT ]]; then
    run "${queued[@]}" delete "$TPU_NAME" "${where[@]}" --force # with its VMs
  else
    run "${vm[@]}" delete "$TPU_NAME" "${where[@]}"
  fi
}

# Until the pod is there: created if it is missing, anew if it was taken away.
create() {
  local before=''
  if [[ $DRY_RUN ]]; then
    run "${describe[@]}"
    make_pod
    return
  fi
  while look; do
    [[ $state == "$before" ]] || echo "$SELF: $TPU_NAME is $state"
    before=$state
    case $state in
      READY | ACTIVE) return ;;
      ABSENT) make_pod ;;
      SUSPENDED | PREEMPTED | TERMINATED) delete_pod ;;
      FAILED) fail "$TPU_NAME could not be had (ACCELERATOR_TYPE, RUNTIME_VERSION, ZONE, quota?); see $SELF status" ;;
      *) sleep "$POLL_S" ;;
    esac
  done
}

on_all() {
  run "${vm[@]}" ssh "$TPU_NAME" "${where[@]}" --worker=all --command="$1"
}

# Files that git knows or could know, so neither environments nor runs; configs not committed yet are among them.
setup() {
  local archive="${TMPDIR:-/tmp}/rag_jax-$TPU_NAME.tgz"
  # shellcheck disable=SC2016 # to be expanded by the inner bash
  run bash -c 'set -o pipefail; cd "$1" && git ls-files -z --cached --others --exclude-standard | tar -czf "$2" --null -T -' \
    pack "$ROOT" "$archive"
  run "${vm[@]}" scp "$archive" "$TPU_NAME:rag_jax.tgz" "${where[@]}" --worker=all
  on_all "mkdir -p rag_jax && tar -xzf rag_jax.tgz -C rag_jax && rag_jax/launch/tpu_worker.sh setup"
  [[ ! ${PREPARE:-} ]] || on_all "$PREPARE"
}

start() {
  local words
  words=$(printf ' %q' "$@")
  on_all "rag_jax/launch/tpu_worker.sh run$words"
}

case $action in
  create) create ;;
  setup) setup ;;
  run) start "$@" ;;
  stop) on_all "rag_jax/launch/tpu_worker.sh stop" ;;
  status) run "${describe[@]/#--format=*/--format=yaml}" ;;
  resume)
    while true; do
      create
      setup
      code=0
      start "$@" || code=$?
      ((code)) || break
      # Gone with the pod, or failed by itself? It takes the pod a moment to say.
      for _ in 1 2 3 4; do
        sleep "$POLL_S"
        look
        [[ $state == READY || $state == ACTIVE ]] || break
      done
      [[ $state != READY && $state != ACTIVE ]] || exit "$code"
      echo "$SELF: $TPU_NAME was taken away ($state); making it anew"
    done
    ;;
  delete)
    if [[ ! $DRY_RUN ]]; then
      look
      [[ $state != ABSENT ]] || exit 0
    fi
    delete_pod
    ;;
esac
