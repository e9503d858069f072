# shellcheck shell=bash
# Sourced by the scripts of this directory: the Python to use and the number of processes per machine.
#
#   root=PROJECT_DIRECTORY
#   source "$root/launch/python.sh"     # sets python and NPROC, defines refuse
#
# BIN and NPROC are taken from the environment if they are set; a wrong value ends the script with exit code 2.

refuse() {
  echo "error: $*; correct it, or leave it out" >&2
  exit 2
}

if [ -z "${BIN:-}" ]; then
  # NVIDIA's container brings torch and everything built against it, so a mounted .venv is ignored there.
  if [ -z "${NVIDIA_PYTORCH_VERSION:-}" ] && [ -x "${root:?}/.venv/bin/python" ]; then
    BIN=$root/.venv/bin
  elif ! BIN=$(command -v python3); then
    echo "error: PATH has no python3; install one, or set BIN to the directory of another Python" >&2
    exit 2
  else
    BIN=$(dirname "$BIN")
  fi
fi
python=$BIN/python3
if [ ! -x "$python" ]; then python=$BIN/python; fi
[ -x "$python" ] || refuse "BIN=$BIN: has no python3 or python"

if [ -z "${NPROC:-}" ]; then
  NPROC=$({ nvidia-smi -L 2>/dev/null || :; } | grep -c '^GPU ' || :)
  if [ "$NPROC" = 0 ]; then NPROC=1; fi
fi
[[ $NPROC =~ ^[1-9][0-9]{0,4}$ ]] || refuse "NPROC=$NPROC: is not a number of processes"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun would choose the same, but print a banner
