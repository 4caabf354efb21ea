#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster, as a JobSet (launch/gke-jobset.yaml).
#
#   launch/gke.sh apply  [--dry-run] -- --config=FILE.py --workdir=/data/DIR [--config.KEY=VALUE ...]
#   launch/gke.sh render            -- ...     print the manifest
#   launch/gke.sh status|logs|delete [--dry-run]
#
# Variables:
#   NAME              of the JobSet
#   IMAGE             with this repository and its dependencies (launch/Dockerfile)
#   ACCELERATOR       as the node pool's label has it: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   TOPOLOGY          of one slice: 4x4, 2x2x4
#   BUCKET            Cloud Storage bucket, seen as /data by every process: workdir, rows and models lie there
#   SLICES            1; with several give --config.mesh.replica=SLICES, so that only gradients cross between slices
#   CHIPS_PER_HOST    4
#   SPOT              1 for spot nodes
#   MAX_RESTARTS      100: after a preemption or a failure the JobSet starts again, from the newest checkpoint
#   NAMESPACE, SERVICE_ACCOUNT    default, default; the account must be allowed to write to the bucket
#
# The cluster needs JobSet and the Cloud Storage FUSE driver. `apply` of what runs changes nothing; of what has ended,
# it starts again. `delete` ends the processes with SIGTERM: they save first.
set -euo pipefail
SELF=launch/gke.sh
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

action=${1:-}
case $action in
  apply | render | status | logs | delete) shift ;;
  --help) help ;;
  *) fail "${action:-no command}: must be one of apply, render, status, logs, delete; see $SELF --help" ;;
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

NAMESPACE=${NAMESPACE:-default} SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default} SPOT=${SPOT:-}
SLICES=${SLICES:-1} CHIPS_PER_HOST=${CHIPS_PER_HOST:-4} MAX_RESTARTS=${MAX_RESTARTS:-100}
kubectl=(kubectl --namespace "$NAMESPACE")

check() {
  [[ $# -gt 0 ]] || fail "nothing to run; give -- --config=FILE.py --workdir=/data/DIR, see $SELF --help"
  need NAME IMAGE ACCELERATOR TOPOLOGY BUCKET
  # shellcheck disable=SC2153 # not a misspelt `name`
  [[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "NAME=$NAME: must be lower-case letters, digits and hyphens"
  [[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "TOPOLOGY=$TOPOLOGY: must be like 4x4 or 2x2x4"
  [[ $BUCKET != gs://* ]] || fail "BUCKET=$BUCKET: give the bucket's name alone, ${BUCKET#gs://}"
  for name in SLICES CHIPS_PER_HOST MAX_RESTARTS; do whole_number "$name" "${!name}"; done
  CHIPS=$((${TOPOLOGY//x/*}))
  if ((CHIPS < CHIPS_PER_HOST)); then CHIPS_PER_HOST=$CHIPS; fi
  ((CHIPS % CHIPS_PER_HOST == 0)) ||
    fail "TOPOLOGY=$TOPOLOGY has $CHIPS chips, which CHIPS_PER_HOST=$CHIPS_PER_HOST does not divide"
  # shellcheck disable=SC2034 # `render` reads it by its name
  HOSTS=$((CHIPS / CHIPS_PER_HOST))
}

# A JSON string is a YAML string, whatever the words hold.
quoted() {
  local word=$1
  [[ $word != *[[:cntrl:]]* ]] || fail "a line break or control character in ${word@Q}"
  word=${word//\\/\\\\}
  # shellcheck disable=SC2016 # literally: Kubernetes would expand it
  word=${word//'$('/'$$('}
  printf '"%s"' "${word//\"/\\\"}"
}

# The manifest, with {{VARIABLE}} replaced and the lines marked `# spot` only where they are wanted.
render() {
  local args='' text name value
  for word in "$@"; do args+="${args:+, }$(quoted "$word")"; done
  text=$(sed '/^# template:/d' "$ROOT/launch/gke-jobset.yaml")
  [[ $SPOT ]] || text=$(sed '/# spot$/d' <<<"$text")
  for name in NAME NAMESPACE IMAGE ACCELERATOR TOPOLOGY BUCKET SERVICE_ACCOUNT SLICES HOSTS CHIPS_PER_HOST MAX_RESTARTS; do
    value=${!name}
    # Quotes on both sides: from 5.2 on, bash replaces an unquoted & by what was matched.
    text=${text//"{{$name}}"/"$value"}
  done
  text=${text//"{{ARGS}}"/"$args"}
  printf '%s\n' "$text"
}

case $action in
  render)
    check "$@"
    render "$@"
    ;;
  apply)
    check "$@"
    if [[ $DRY_RUN ]]; then
      run "${kubectl[@]}" get jobset "$NAME" --ignore-not-found --output 'jsonpath={.status.terminalState}'
      echo "$(run "${kubectl[@]}" apply --filename -) <<'END'"
      render "$@"
      echo END
      exit 0
    fi
    # What a JobSet runs cannot be changed, and one that has ended stays so: it makes room for the next.
    ended=$("${kubectl[@]}" get jobset "$NAME" --ignore-not-found --output 'jsonpath={.status.terminalState}')
    [[ ! $ended ]] || "${kubectl[@]}" delete jobset "$NAME" --ignore-not-found
    render "$@" | "${kubectl[@]}" apply --filename -
    ;;
  status)
    need NAME
    run "${kubectl[@]}" get jobset "$NAME" --ignore-not-found
    run "${kubectl[@]}" get pods --selector "jobset.sigs.k8s.io/jobset-name=$NAME"
    ;;
  logs) # of process 0, the one that prints
    need NAME
    first="jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0"
    first+=",batch.kubernetes.io/job-completion-index=0"
    run "${kubectl[@]}" logs --follow --tail=-1 --container train --selector "$first"
    ;;
  delete)
    need NAME
    run "${kubectl[@]}" delete jobset "$NAME" --ignore-not-found
    ;;
esac
