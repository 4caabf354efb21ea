# shellcheck shell=bash
# What the launch scripts share; sourced by them after they have set SELF, never run.

DRY_RUN=${DRY_RUN:-}

# One line and exit 2, as the commands themselves answer what the user can fix.
fail() {
  printf '%s: error: %s\n' "$SELF" "$*" >&2
  exit 2
}

# The script's own head is its help, so the two cannot differ.
help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[1]}"
  exit 0
}

# Run a command, or with --dry-run only print it, quoted so that it can be pasted.
run() {
  if [[ ! $DRY_RUN ]]; then
    "$@"
    return
  fi
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

# All variables that are missing, in one answer.
need() {
  local name missing=()
  for name in "$@"; do
    [[ ${!name:-} ]] || missing+=("$name")
  done
  [[ ${#missing[@]} == 0 ]] || fail "set ${missing[*]}; see $SELF --help"
}

whole_number() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2: must be a whole number of at least 1"
}

# An activated environment is the user's choice; without one, that which `make` made.
find_python() {
  if [[ ${PYTHON:-} ]]; then
    echo "$PYTHON"
  elif [[ ! ${VIRTUAL_ENV:-} && -x $1/.venv/bin/python ]]; then
    echo "$1/.venv/bin/python"
  else
    echo python
  fi
}
