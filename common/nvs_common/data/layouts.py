"""Which layout a path holds. One folder may hold several; the order here decides.

 1. opencv_cameras.json          undistorted pinhole cameras made for this kind of library
 2. COLMAP sparse model          full lens model, and points that give near and far
 3. transforms.json              nerfstudio, instant-ngp; or transforms_{train,val,test}.json
 4. models.json                  Spaces
 5. cameras_sphere.npz           NeuS, IDR (DTU)
 6. poses_bounds.npy             LLFF: one focal length, centred principal point
 7. meta.pkl, or pose/           renders of objects: SyncDreamer, OpenLRM, LGM
 8. colmap/sparse/0              COLMAP beside `images`, as nerfstudio keeps it
 9. <clip>.txt                   RealEstate10K: beside or inside the folder of its frames

The path of a camera file (or of a COLMAP model folder) chooses that file instead.

Clips of large sets have paths of their own:

    <number>.torch/<key>         RealEstate10K in pixelSplat's chunks, see `chunks`
    metadata/<clip>.json         as LVSM's preprocessing writes them

`find` lists them: for a folder of chunks, for one chunk, for a folder of LVSM's with
full_list.txt or only `metadata`, and for a full_list.txt.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from nvs_common.data import (
    array_formats,
    chunks,
    colmap_format,
    images,
    json_formats,
    object_renders,
    scene_files,
)
from nvs_common.data.scene_formats import Loaded, Options
from nvs_common.errors import InputError

Reader = Callable[[Options], Loaded]

LVSM_LIST, LVSM_FOLDER = "full_list.txt", "metadata"


def recognise(path: pathlib.Path) -> Reader:
    """The reader of a scene folder, a COLMAP model folder or a camera file.

    Raises:
      InputError: nothing there, not readable, or no layout that is known.
    """
    try:
        if (clip := chunks.split(path)) is not None:
            return lambda options: chunks.read(*clip, options)
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; check the path.")
        reader = _folder(path) if path.is_dir() else _file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check it.") from error
    if reader is None:
        raise InputError(
            f"{path}: not a scene: expected opencv_cameras.json, a COLMAP model (sparse/0), "
            "transforms.json, models.json, cameras_sphere.npz, poses_bounds.npy, meta.pkl, a "
            "RealEstate10K text file with its frames, a clip in a chunk (x.torch/key) or "
            f"{LVSM_FOLDER}/<clip>.json."
        )
    return reader


def find(folder: pathlib.Path) -> list[pathlib.Path]:
    """Paths of the scenes directly inside a folder, sorted by name; or the path of one scene.

    Sub-folders with a known layout; RealEstate10K text files with a folder of frames of the same
    name; and clips of chunks and of LVSM's lists, which are not opened for that (see `chunks`).

    Raises:
      InputError: the path is not there, cannot be listed or holds no scene.
    """
    if folder.is_file():
        if folder.suffix == chunks.SUFFIX:
            return [folder / key for key in chunks.keys(folder)]
        return _lvsm_clips(folder.parent) if folder.name == LVSM_LIST else [folder]
    if chunks.split(folder) is not None:
        return [folder]
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; check the path.")
    if _folder(folder) is not None:
        return [folder]
    if found := list(chunks.find(folder).values()) or _lvsm_clips(folder):
        return found
    found, splits = [], []
    for entry in scene_files.entries(folder):
        try:
            if entry.is_dir():
                # A clip is named by its text file: its folder would be found a second time.
                clip = entry.with_name(entry.name + ".txt")
                known = not clip.is_file() and _folder(entry) is not None
                splits += [] if known or not _is_split(entry) else [entry.name]
            else:
                known = entry.suffix == ".txt" and entry.with_suffix("").is_dir()
        except OSError as error:
            raise InputError(f"{entry}: cannot be read ({error.strerror}); check it.") from error
        if known:
            found.append(entry)
    if not found and splits:
        raise InputError(f"{folder}: holds splits ({', '.join(splits)}); name one of them.")
    if not found:
        raise InputError(f"{folder}: holds no scene folders; check the path.")
    return found


def _lvsm_clips(folder: pathlib.Path) -> list[pathlib.Path]:
    """Clips that full_list.txt names, else all of `metadata`; none is looked at.

    The list has paths of the machine that wrote it, of which the names are taken.
    """
    listed = folder / LVSM_LIST
    if listed.is_file():
        lines = [line.strip() for line in scene_files.read_text(listed).splitlines()]
        names = {line.replace("\\", "/").rpartition("/")[2] for line in lines if line}
        if not names:
            raise InputError(f"{listed}: lists no scene; get it again.")
        if bad := next((name for name in sorted(names) if not name.endswith(".json")), None):
            raise InputError(f"{listed}: lists {bad!r:.60}; expected paths of .json files.")
    elif (folder / LVSM_FOLDER).is_dir() and (folder / "images").is_dir():
        inside = scene_files.entries(folder / LVSM_FOLDER)
        names = {file.name for file in inside if file.suffix == ".json"}
    else:
        return []
    return [folder / LVSM_FOLDER / name for name in sorted(names)]


def _is_split(folder: pathlib.Path) -> bool:
    """Whether a folder looks like one of chunks or of LVSM's clips."""
    if (folder / LVSM_LIST).is_file() or (folder / chunks.INDEX).is_file():
        return True
    return any(file.suffix == chunks.SUFFIX for file in scene_files.entries(folder))


def _folder(path: pathlib.Path) -> Reader | None:
    scene_files.entries(path)  # a folder that cannot be listed is an error, not an unknown layout
    if (file := path / "opencv_cameras.json").is_file():
        return lambda options: json_formats.read_opencv(file, options)
    if (model := colmap_format.find_model(path)) is not None:
        return lambda options: colmap_format.read(model, options)
    files = [path / "transforms.json"]
    if not files[0].is_file():
        files = [path / name for name in json_formats.TRANSFORMS_SPLITS]
        files = [file for file in files if file.is_file()]
    if files:
        return lambda options: json_formats.read_transforms(files, options)
    for name, read in (
        ("models.json", json_formats.read_spaces),
        ("cameras_sphere.npz", array_formats.read_neus),
        ("poses_bounds.npy", array_formats.read_llff),
    ):
        if (path / name).is_file():
            return _bind(read, path / name)
    if (renders := object_renders.recognise(path)) is not None:
        return renders
    # Later than transforms.json, whose world nerfstudio turns away from COLMAP's.
    if (beside := colmap_format.find_beside(path)) is not None:
        return lambda options: colmap_format.read(beside, options)
    return _clip_folder(path)


def _bind(read: Callable[[pathlib.Path, Options], Loaded], file: pathlib.Path) -> Reader:
    return lambda options: read(file, options)


def _clip_folder(path: pathlib.Path) -> Reader | None:
    """A folder of RealEstate10K frames: <clip>.txt beside it, or one camera file inside."""
    beside = path.with_name(path.name + ".txt")
    texts = [beside]
    if not beside.is_file():
        inside = scene_files.entries(path)
        # Text files without frames next to them are those of a folder of clips.
        texts = [file for file in inside if file.suffix == ".txt"]
        texts = texts if any(images.is_image(file) for file in inside) else []
    if len(texts) == 1 and _is_clip(texts[0]):
        return lambda options: array_formats.read_realestate(texts[0], path, options)
    return None


def _is_clip(file: pathlib.Path) -> bool:
    """Whether a text file looks like RealEstate10K: an address, then lines of 19 values."""
    with file.open("rb") as stream:
        lines = [stream.readline(4096).split() for _ in range(2)]
    return any(len(line) == 19 and line[0].isdigit() for line in lines)


def _file(path: pathlib.Path) -> Reader | None:
    if path.suffix == ".json":
        return _bind(json_formats.read_any, path)
    if path.suffix == ".npz":
        return _bind(array_formats.read_neus, path)
    if path.suffix == ".npy":
        return _bind(array_formats.read_llff, path)
    if path.suffix == chunks.SUFFIX:
        return lambda options: chunks.read(path, None, options)
    if path.stem in ("cameras", "images", "points3D") and path.suffix in (".txt", ".bin"):
        return _bind(colmap_format.read, path.parent)
    if path.suffix == ".txt":
        frames = path.with_suffix("")
        frames = frames if frames.is_dir() else path.parent
        return lambda options: array_formats.read_realestate(path, frames, options)
    return None
