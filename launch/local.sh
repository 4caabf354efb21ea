#!/usr/bin/env bash
# Train in N processes on this machine, which find each other over loopback.
#
#   launch/local.sh [--processes=N] [--devices-per-process=D] [--logs=DIR] [--grace=SECONDS] [--dry-run] \
#       -- --config=FILE.py --workdir=DIR [--config.KEY=VALUE ...]
#
#   --processes            1 when not given: then nothing differs from python -m rag_jax.main
#   --devices-per-process  process i takes GPUs i*D to i*D+D-1, or makes D devices of the CPU
#   --logs                 folder for the output of all processes but the first, whose output is printed;
#                          when not given, a temporary one that stays only if the run fails
#   --grace                seconds between SIGTERM and SIGKILL for the others when one process fails; 30
#
# Ctrl-C and SIGTERM reach every process: all save and end, and the same command goes on from there; a second one ends
# them at once. Exit code: that of the first process that failed. PYTHON names another interpreter.
set -euo pipefail
SELF=launch/local.sh
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

processes=1 devices='' logs='' grace=30
while [[ $# -gt 0 ]]; do
  case $1 in
    --processes=*) processes=${1#*=} && whole_number --processes "$processes" ;;
    --devices-per-process=*) devices=${1#*=} && whole_number --devices-per-process "$devices" ;;
    --logs=?*) logs=${1#*=} ;;
    --grace=*) grace=${1#*=} && whole_number --grace "$grace" ;;
    --dry-run) DRY_RUN=1 ;;
    --help) help ;;
    --) break ;;
    *) fail "$1: unknown flag; flags of the training stand after --, see $SELF --help" ;;
  esac
  shift
done
[[ ${1:-} == -- && $# -gt 1 ]] || fail "nothing to run; give -- --config=FILE.py --workdir=DIR, see $SELF --help"
shift
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || fail "bash $BASH_VERSION: 5.1 or newer is needed"

# Below the range from which the kernel gives ports to outgoing connections, so that none of those takes it meanwhile.
free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

command=("$(find_python "$ROOT")" -m rag_jax.main "$@")
port=$(free_port)

# Sets `words` to process i's whole command.
words_of() {
  words=()
  if ((processes > 1)); then
    # Bound to loopback: by itself the coordinator listens on every interface.
    words+=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port"
      "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$1")
  fi
  if [[ $devices ]]; then
    words+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
    words+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, $(($1 * devices)) $(($1 * devices + devices - 1)))")
  fi
  [[ ${#words[@]} == 0 ]] || words=(env "${words[@]}")
  words+=("${command[@]}")
}

if [[ $DRY_RUN ]]; then
  for ((i = 0; i < processes; i++)); do
    words_of "$i"
    run "${words[@]}"
  done
  exit 0
fi

made_logs=''
if ((processes > 1)) && [[ ! $logs ]]; then
  logs=$(mktemp -d "${TMPDIR:-/tmp}/rag_jax-logs.XXXXXX")
  made_logs=1
elif [[ $logs ]]; then
  mkdir -p "$logs"
fi

pids=() codes=() first='' signalled='' timer=''

# shellcheck disable=SC2329 # called by the traps
forward() {
  signalled=$((128 + $2))
  for i in "${!pids[@]}"; do kill "-$1" "${pids[i]}" 2>/dev/null || true; done
}

kill_groups() {
  for i in "${!pids[@]}"; do kill -KILL -- "-${pids[i]}" 2>/dev/null || true; done
}

trap 'forward TERM 15' TERM HUP # a closed terminal saves, too
trap 'forward INT 2' INT
trap 'kill_groups; [[ ! $timer ]] || kill -- "-$timer" 2>/dev/null || true' EXIT

# Job control gives every process a group of its own: Ctrl-C then reaches it once, from here, and not also from the
# terminal (a second signal ends at once, without saving).
set -m
for ((i = 0; i < processes; i++)); do
  words_of "$i"
  if ((i == 0)); then
    "${words[@]}" </dev/null &
  else
    "${words[@]}" </dev/null >"$logs/process-$i.log" 2>&1 &
  fi
  pids[i]=$!
done

while ((${#pids[@]})); do
  code=0 ended=''
  wait -n -p ended "${pids[@]}" || code=$?
  [[ ${ended:-} ]] || continue # a trapped signal came, no process ended
  for i in "${!pids[@]}"; do [[ ${pids[i]} != "$ended" ]] || break; done
  unset "pids[$i]"
  codes[i]=$code
  ((code)) || continue
  first=${first:-$i}
  # After a signal all end on their own, and to save takes the time it takes. Otherwise the others wait for the one
  # that is gone, for ever.
  [[ $code != "$signalled" && ! $timer ]] || continue
  [[ $signalled ]] || for j in "${!pids[@]}"; do kill -TERM "${pids[j]}" 2>/dev/null || true; done
  (sleep "$grace" && kill_groups) >/dev/null 2>&1 &
  timer=$!
done

[[ $first ]] || {
  [[ ! $made_logs ]] || rm -r "$logs"
  exit 0
}
code=${codes[first]}
if [[ ${codes[0]} != "$code" ]]; then
  echo "$SELF: process $first of $processes ended with exit code $code; the end of $logs/process-$first.log:" >&2
  tail -n 20 "$logs/process-$first.log" >&2
elif ((processes > 1)) && [[ $code != "$signalled" ]]; then
  echo "$SELF: process $first of $processes ended with exit code $code; output of the others: $logs" >&2
elif [[ $made_logs ]]; then
  rm -r "$logs"
fi
exit "$code"
