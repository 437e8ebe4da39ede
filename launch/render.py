"""Renders a camera path: python launch/render.py --workdir=runs/a --scene=PATH --out=video.mp4

Each frame is rendered from the views of the scene that are nearest to it. --weights=FILE takes
released weights in place of a run, --weights=default those of the checkout. Exit codes: 0 done,
2 bad input.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterable, Iterator

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import tqdm
from absl import flags

from launch import cli, trained
from nvs_common import panels, rendering, trajectories, video
from nvs_common.errors import InputError
from nvs_common.types import Cameras

_SOURCE = trained.define_source()
_SCENE = flags.DEFINE_string(
    "scene",
    None,
    "A scene folder (COLMAP, nerfstudio, LLFF, ...) or procedural:SEED.",
    required=True,
)
_PATH = flags.DEFINE_string(
    "path",
    "spiral",
    "Camera path: orbit, spiral, interpolate (a smooth path through the scene's cameras in order), "
    "transitions (from each camera straight to the next, as in LVSM's videos), or a .json file, a "
    "list of frames with world_from_cam (4x4, OpenCV axes) and optional fx fy cx cy.",
)
_LOOP = flags.DEFINE_bool(
    "loop", False, "interpolate, transitions: go on from the last camera to the first."
)
_FRAMES = flags.DEFINE_integer(
    "frames",
    90,
    "Frames of the path, of transitions those of each one with both ends (a .json file has its "
    "own).",
)
_FPS = flags.DEFINE_float("fps", 30.0, "Frames a second.")
_SIZE = flags.DEFINE_string(
    "size",
    "auto",
    "HEIGHTxWIDTH, auto (photographs: config.eval.photo_size; else the training size) or native "
    "(the size of the stored images).",
)
_NUM_INPUTS = flags.DEFINE_integer(
    "num_inputs",
    None,
    "Input views of each frame, the nearest by camera centre; as many as in training "
    "(config.data.num_context) by default.",
)
_DEPTH = flags.DEFINE_bool("depth", False, "Show the depth beside the image.")
_CHUNK = flags.DEFINE_integer("chunk", 1, "Frames rendered at once; more needs more memory.")
_OUT = flags.DEFINE_string("out", None, "Video to write, .mp4 or .gif.", required=True)


def main(_) -> int:
    """Renders; returns the exit code."""
    out = video.check_path(_OUT.value, _FPS.value)
    if _CHUNK.value < 1:
        raise InputError(f"--chunk={_CHUNK.value}: expected 1 or more.")
    model = trained.load(_SOURCE)
    photographs = not _SCENE.value.startswith(trained.PROCEDURAL)
    size = trained.size(_SIZE.value, model.config, photographs=photographs)
    scene = trained.scene(_SCENE.value, model.config, size)
    targets = _path(scene.cameras)
    asked = _NUM_INPUTS.value
    inputs = rendering.nearest_inputs(
        scene.cameras,
        targets,
        model.config.data.num_context if asked is None else asked,
        allowed=np.arange(len(scene.names)),
        name=_SCENE.value,
    )
    renders = rendering.render_targets(
        model.task.render, model.variables, scene, targets, inputs, chunk=_CHUNK.value
    )
    # disable=None: no bar where stderr is not a terminal.
    bar = tqdm.tqdm(renders, total=len(inputs), desc="rendering", unit="frame", disable=None)
    count = video.write(out, _frames(bar), _FPS.value)
    print(f"{out}: {count} frames at {_FPS.value:g} frames/s")
    return 0


def _path(cameras: Cameras) -> Cameras:
    if _PATH.value.endswith(".json"):
        return trajectories.from_json(_PATH.value, cameras)
    if _PATH.value == "interpolate":
        return trajectories.interpolate(cameras, _FRAMES.value, loop=_LOOP.value)
    if _PATH.value == "transitions":
        return trajectories.transitions(cameras, _FRAMES.value, loop=_LOOP.value)
    paths = {"orbit": trajectories.orbit, "spiral": trajectories.spiral}
    if _PATH.value not in paths:
        raise InputError(
            f"--path={_PATH.value!r}: expected orbit, spiral, interpolate, transitions or a file "
            "that ends in .json."
        )
    return paths[_PATH.value](cameras, _FRAMES.value)


def _frames(renders: Iterable[rendering.Rendered]) -> Iterator[np.ndarray]:
    """Frames of the video; the depth's colours keep the range of the first frame."""
    limits = None
    for number, rendered in enumerate(renders):
        if not np.isfinite(rendered.image).all():
            raise InputError(
                f"frame {number} of {_SCENE.value}: the model rendered values that are not "
                "finite; the training may have diverged, use an earlier --step."
            )
        frame = panels.to_uint8(rendered.image)
        if _DEPTH.value:
            if rendered.depth is None:
                raise InputError("--depth: this system renders no depth; leave the flag out.")
            limits = panels.disparity_range(rendered.depth) if limits is None else limits
            frame = panels.strip([frame, panels.depth_image(rendered.depth, limits)])
        yield frame


if __name__ == "__main__":
    cli.run(main)
