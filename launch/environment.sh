# Makes or updates .venv of this checkout; sourced by the other scripts of launch/.
#
# Sets ROOT (the checkout) and PYTHON (the environment's interpreter). Installs again only when
# setup.py, the interpreter, the place of the checkout or EXTRAS have changed. Environment
# variables that are read:
#   BASE_PYTHON   the interpreter to make .venv from; otherwise the first python >= 3.11 on PATH
#   EXTRAS        further extras of setup.py, for example EXTRAS=gpu
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
PYTHON="$ROOT/.venv/bin/python"

_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

_find_python() {
  local name
  for name in "${BASE_PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
    if [[ -n "$name" ]] && command -v "$name" >/dev/null && _new_enough "$name"; then
      command -v "$name"
      return
    fi
  done
  echo "No Python 3.11 or newer was found: install one, or name it with BASE_PYTHON=/path/to/python." >&2
  return 2
}

_wanted_stamp() {
  EXTRAS="${EXTRAS:-}" "$PYTHON" - "$ROOT" <<'PY'
import hashlib, os, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [(root / "setup.py").read_bytes(), sys.version.encode(), os.fsencode(root)]
parts.append(os.environ["EXTRAS"].encode())
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}

_make_environment() {
  local stamp="$ROOT/.venv/installed.sha256" base wanted
  if ! { [[ -x "$PYTHON" ]] && _new_enough "$PYTHON" && "$PYTHON" -m pip --version >/dev/null 2>&1; }; then
    base="$(_find_python)"
    echo "Making .venv with $("$base" --version) ..."
    if ! "$base" -m venv --clear "$ROOT/.venv"; then
      echo "$base cannot make virtual environments: install its venv module (on Debian and Ubuntu: apt install python3-venv)." >&2
      return 2
    fi
  fi
  wanted="$(_wanted_stamp)"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
    return
  fi
  echo "Installing into .venv (once for each change of setup.py) ..."
  "$PYTHON" -m pip install --quiet --disable-pip-version-check \
    --editable "$ROOT[test,dev${EXTRAS:+,$EXTRAS}]"
  # Written last and renamed, so that an interrupted installation is done again.
  printf '%s\n' "$wanted" >"$stamp.$$"
  mv -f "$stamp.$$" "$stamp"
}

# Two scripts started at once must not install at once; where flock is missing they are trusted.
if command -v flock >/dev/null; then
  exec 9<"$ROOT"
  flock 9
  _make_environment
  exec 9>&-
else
  _make_environment
fi
