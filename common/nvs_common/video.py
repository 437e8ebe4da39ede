"""Writes frames to .mp4 or .gif: one at a time, even sizes, and never half a file."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

import imageio.v2 as imageio
import numpy as np
from PIL import Image

from nvs_common import outputs
from nvs_common.errors import InputError

FORMATS = (".mp4", ".gif")


def check_path(path: str | os.PathLike[str], fps: float) -> pathlib.Path:
    """The path of a video that can be written; called before anything is rendered.

    Raises:
      InputError: another ending than .mp4 or .gif, a folder of that name, no rate, or a place that
        cannot be written to.
    """
    path = outputs.check_file(path, FORMATS)
    if not 0 < fps <= 240:
        raise InputError(f"fps={fps}: expected a rate above 0 and at most 240.")
    return path


def write(path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float) -> int:
    """Writes frames [h, w, 3] uint8 of one size to .mp4 (H.264, plays everywhere) or .gif.

    An odd height or width is padded by repeating the last row or column, which H.264 with
    4:2:0 colours needs. The file appears under its name when it is complete.

    Args:
      path: ends in .mp4 or .gif; missing folders are made.
      frames: any iterable, consumed once; frames are not kept for .mp4.
      fps: frames a second.

    Returns:
      How many frames were written.

    Raises:
      InputError: a bad path or rate, or no frame.
    """
    path = check_path(path, fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix.lower()}")
    padded = (_even(frame) for frame in frames)
    try:
        write_frames = _write_mp4 if path.suffix.lower() == ".mp4" else _write_gif
        count = write_frames(temporary, padded, fps)
        if count == 0:
            raise InputError(f"{path}: there is no frame to write; ask for 1 frame or more.")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write_mp4(path: pathlib.Path, frames: Iterable[np.ndarray], fps: float) -> int:
    # imageio would start ffmpeg through os.fork, which may hang beside JAX's threads.
    os.environ.setdefault("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")
    writer, count = None, 0
    try:
        for frame in frames:
            if writer is None:
                # macro_block_size 2: the default of 16 would resize the frames.
                writer = imageio.get_writer(
                    path, fps=fps, codec="libx264", quality=8, macro_block_size=2
                )
            writer.append_data(frame)
            count += 1
    finally:
        if writer is not None:
            writer.close()
    return count


def _write_gif(path: pathlib.Path, frames: Iterable[np.ndarray], fps: float) -> int:
    images = [Image.fromarray(frame) for frame in frames]
    if images:
        # Pillow merges equal frames into one that is shown as long as they together.
        images[0].save(
            path,
            save_all=True,
            append_images=images[1:],
            duration=max(20, round(1000 / fps)),
            loop=0,
        )
    return len(images)


def _even(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
