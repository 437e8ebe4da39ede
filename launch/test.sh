#!/usr/bin/env bash
# Makes the environment where needed and runs the test suite; arguments go to pytest.
#   bash launch/test.sh                     the default suite: no thorough, slow, GPU, TPU, aot tests
#   bash launch/test.sh -m "not slow and not gpu and not tpu and not aot"   with the thorough ones
#   bash launch/test.sh -m slow             the slow ones
#   EXTRAS=aot bash launch/test.sh -m aot   kernels compiled for TPUs and GPUs that are not here
#   bash launch/test.sh tests/test_views.py -k nearest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

cd "$ROOT"
# Compiled programs are kept in .jax_cache (tests/conftest.py), so a second run is much shorter.
status=0
# Compilation keeps one core busy at most: as many processes as cores, up to four (each needs 4 GB).
"$PYTHON" -m pytest -q -m "not thorough and not slow and not gpu and not tpu and not aot" -n auto --maxprocesses=4 "$@" || status=$?
printf 'Tests took %d min %02d s.\n' $((SECONDS / 60)) $((SECONDS % 60))
exit "$status"
