# Sourced by the other scripts: makes a virtual environment once and puts it on the PATH.
#
#   VENV     where it lies                         (default: .venv beside this repository's setup.py)
#   PYTHON   the interpreter it is made with       (default: python3, which must be 3.10 to 3.13)
#   EXTRAS   extras of the package to install      (default: wandb; launch/demo.sh takes tune too, launch/test.sh test)
#   LOCK     the versions                          (default: launch/requirements.lock)

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
PYTHON="${PYTHON:-python3}"
LOCK="${LOCK:-$ROOT/launch/requirements.lock}"

"$PYTHON" - <<'PY'
import sys

if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"unlearn-ds needs Python 3.10 to 3.13, this is {sys.version.split()[0]}: set PYTHON to another interpreter")
PY

install() {
    local stamp="$VENV/.installed-$1"
    if [ -f "$stamp" ] && cmp -s "$LOCK" "$stamp"; then
        return
    fi
    echo "installing into $VENV (once; a few minutes)" >&2
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet "$(grep '^torch==' "$LOCK")"
    "$VENV/bin/python" -m pip install --quiet --constraint "$LOCK" --editable "$ROOT[$1]"
    cp "$LOCK" "$stamp"
}

install "${EXTRAS:-wandb}"
export PATH="$VENV/bin:$PATH"
unset PYTHON # it made the environment; from here on `python` is the one in it
