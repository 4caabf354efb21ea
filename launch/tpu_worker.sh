#!/usr/bin/env bash
# What launch/tpu_pod.sh does on each worker of a pod: launch/tpu_worker.sh setup | run ARGS... | stop [--dry-run]
#
#   setup    install this copy of the repository in its .venv; a second time changes nothing
#   run      train, and print the output, until it ends; if it runs already, print that
#   stop     SIGTERM, and wait until it has saved and ended
set -euo pipefail
SELF=launch/tpu_worker.sh
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"
cd "$ROOT"
state=$ROOT/.run # pid, log and exit code of the training

alive() {
  [[ -f $state/pid ]] && kill -0 "$(<"$state/pid")" 2>/dev/null
}

setup() {
  local python=python3.12
  command -v $python >/dev/null || python=python3.11
  # The image's own python3 may be too old. A fresh VM installs updates at first, and holds the lock meanwhile.
  if ! $python -m ensurepip --version >/dev/null 2>&1; then
    python=python3.11
    run sudo apt-get -q update
    run sudo env DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=600 install python3.11-venv
  fi
  [[ -x .venv/bin/python ]] || run $python -m venv .venv
  run .venv/bin/python -m pip install --quiet -c constraints.txt -e '.[tpu]'
}

# In the background and deaf to the end of the connection; `follow` is what the connection sees of it.
start() {
  mkdir -p "$state"
  rm -f "$state/code"
  : >"$state/log" # here, so that `follow` finds it
  # shellcheck disable=SC2016 # to be expanded by the inner bash
  setsid bash -c '
    code=0
    RAG_JAX_DISTRIBUTED=1 "${@:2}" || code=$?
    echo $code >"$1/code"' train "$state" "$(find_python "$ROOT")" -m rag_jax.main "$@" \
    </dev/null >>"$state/log" 2>&1 &
  echo $! >"$state/pid"
}

follow() {
  tail -n +1 --pid="$(<"$state/pid")" -f "$state/log"
  [[ -f $state/code ]] || return 1 # killed
  return "$(<"$state/code")"
}

[[ $# -gt 0 ]] || fail "no command: must be one of setup, run, stop; see $SELF --help"
action=$1
shift
[[ $action == run || ${1:-} != --dry-run ]] || DRY_RUN=1
case $action in
  setup) setup ;;
  run)
    [[ $# -gt 0 ]] || fail "nothing to run; see $SELF --help"
    if [[ $1 == --dry-run ]]; then
      DRY_RUN=1
      run env RAG_JAX_DISTRIBUTED=1 "$(find_python "$ROOT")" -m rag_jax.main "${@:2}"
      exit 0
    fi
    if alive; then
      echo "$SELF: runs already; this is its output"
    else
      start "$@"
    fi
    follow
    ;;
  stop)
    alive || exit 0
    pid=$(<"$state/pid")
    run pkill -TERM -P "$pid" # the training, not the shell that writes down how it ended
    [[ $DRY_RUN ]] || tail --pid="$pid" -f /dev/null
    ;;
  --help) help ;;
  *) fail "$action: must be one of setup, run, stop; see $SELF --help" ;;
esac
