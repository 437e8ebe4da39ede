#!/usr/bin/env bash
# From a fresh machine to a trained model, a report and a video, with nothing to download but
# Python packages. Run it again to go on from the last checkpoint.
#   bash launch/quickstart.sh                              arguments go to launch/train.py
#   bash launch/quickstart.sh --config.num_steps=2000
#   EXTRAS=gpu bash launch/quickstart.sh                   with JAX for NVIDIA GPUs
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

cd "$ROOT"
run=runs/quickstart
if command -v nvidia-smi >/dev/null && ! "$PYTHON" -m pip show --quiet jax-cuda13-plugin 2>/dev/null; then
  echo "There is an NVIDIA GPU here; to use it: EXTRAS=gpu bash launch/quickstart.sh"
fi

echo "1/3 Training a tiny Quark on procedural rooms ..."
"$PYTHON" launch/train.py --config=configs/quark.py:tiny --workdir="$run" \
  --config.stop_after_minutes=8 "$@"
echo "2/3 Evaluating on rooms it has not seen ..."
"$PYTHON" launch/evaluate.py --workdir="$run"
echo "3/3 Rendering a camera path through another room ..."
"$PYTHON" launch/render.py --workdir="$run" --scene=procedural:7 --path=spiral --out="$run/video.mp4"

if [[ -f weights/quark_small.npz ]]; then
  echo "And the same path, larger, with the weights that come with the checkout ..."
  # A procedural room's cameras are those of the config: here those of `tiny`, not of the weights.
  "$PYTHON" launch/render.py --weights=default --scene=procedural:7 --path=spiral --size=144x256 \
    --set=eval.baseline=[0.06,0.2] --set=data.views_per_scene=12 \
    --frames=60 --out="$run/video_default_weights.mp4"
fi

report="$(find "$run" -name report.html -print | sort | tail -n 1)"
cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s.
  report  $ROOT/${report:-$run}
  video   $ROOT/$run/video.mp4

Your own photographs: any folder with COLMAP, nerfstudio (transforms.json), LLFF or RealEstate10K
cameras. Render them with this model, or train on them:
  .venv/bin/python launch/render.py --weights=default --scene=/path/to/photos --path=spiral --out=mine.mp4
  .venv/bin/python launch/train.py --config=configs/quark.py:tiny,photos --workdir=runs/mine \\
    --config.data.source=/path/to/photos
END
