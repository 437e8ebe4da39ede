"""The procedural world: geometry against references, determinism, image statistics, ranges."""

import hashlib
import json
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from nvs_common import cameras as camera_math
from nvs_common.data import (
    builder,
    lighting,
    procedural,
    raycast,
    rigs,
    scenery,
    shading,
    shapes,
    textures,
)
from nvs_common.data.raycast import Solids, Surround
from nvs_common.errors import InputError

CENTRE = np.zeros((1, 2))
COUNT = 16


@pytest.fixture(scope="module")
def scenes():
    world = procedural.World(seed=5, height=48, width=80, num_views=8)
    return [world[i] for i in range(COUNT)]


def solids_of(kind, half, axes=None, center=(0.0, 0.0, 0.0), bitmap=0) -> Solids:
    axes = np.eye(3) if axes is None else axes
    columns = ([kind], [axes], [center], [half], [0], [bitmap])
    return Solids(*(np.array(column) for column in columns))


def view(eye, target, height=40, width=56, focal=60.0):
    pose = rigs.look_at(np.array(eye, float), np.array(target, float), 0.2)
    # An off-centre principal point shows any mistake in its use.
    k = np.array([[focal, 1.1 * focal, width / 2 + 1.7, height / 2 - 2.3]])
    return raycast.pinhole_rays(pose[None], k, height, width), pose, k[0]


def directions(pose, k, height, width):
    """Ray directions of unit z through pixel centres [h, w, 3], in float64."""
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    local = np.stack([(u - k[2]) / k[0], (v - k[3]) / k[1], np.ones_like(u)], axis=-1)
    return local @ pose[:3, :3].T


def test_depth_of_a_sphere_before_a_wall_is_analytic_at_pixel_centres():
    rays, pose, k = view([0.3, -4.0, 0.5], [0.0, 0.0, 0.0])
    room = Surround("room", np.full(3, -9.0), np.full(3, 9.0), np.zeros(6, int))
    hits = raycast.trace(solids_of(shapes.ELLIPSOID, (1.0, 1.0, 1.0)), room, rays, CENTRE)
    d, o = directions(pose, k, rays.height, rays.width), pose[:3, 3]
    a, b, c = (d * d).sum(-1), d @ o, o @ o - 1
    disc = b * b - a * c
    sphere = np.where(disc > 0, (-b - np.sqrt(np.maximum(disc, 0))) / a, np.inf)
    walls = np.where(d > 0, (9 - o) / d, (-9 - o) / d).min(axis=-1)
    clear_of_rim = np.abs(disc) > 1e-3
    expected = np.minimum(sphere, walls)[clear_of_rim]
    found = hits.depth.reshape(d.shape[:2])[clear_of_rim]
    assert (sphere < np.inf).mean() > 0.1
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("kind", [shapes.BOX, shapes.ELLIPSOID, shapes.CYLINDER])
def test_solid_shapes_are_entered_where_their_implicit_functions_say(kind):
    axes, half = builder.turn(np.random.default_rng(kind)), np.array([0.7, 0.4, 1.1])
    rays, pose, k = view([2.0, -2.5, 1.0], [0.0, 0.0, 0.0], 28, 40, 45.0)
    hits = raycast.trace(solids_of(kind, half, axes), raycast.NOTHING, rays, CENTRE)
    d = directions(pose, k, rays.height, rays.width).reshape(-1, 1, 3)
    steps = np.linspace(1.0, 6.0, 1501)[:, None]
    local = np.abs((pose[:3, 3] + steps * d) @ axes / half)
    ball = (local**2).sum(-1) < 1
    tube = ((local[..., :2] ** 2).sum(-1) < 1) & (local[..., 2] < 1)
    inside = {shapes.BOX: local.max(-1) < 1, shapes.ELLIPSOID: ball, shapes.CYLINDER: tube}[kind]
    # Rays that graze the shape may fall between two steps.
    sure = inside.sum(axis=1) > 10
    never = ~inside.any(axis=1)
    found = hits.depth[0, :, 0]
    assert sure.mean() > 0.03
    np.testing.assert_allclose(found[sure], steps[inside.argmax(axis=1)[sure], 0], atol=0.005)
    assert np.isinf(found[never]).mean() > 0.995


@pytest.mark.parametrize("kind", [shapes.QUAD, shapes.DISC, shapes.LEAF, shapes.CUTOUT])
def test_flat_shapes_are_hit_in_their_plane_inside_their_outline(kind):
    axes, half = builder.turn(np.random.default_rng(9)), np.array([0.9, 0.6, 1e-3])
    rays, pose, k = view([1.0, -3.0, 1.0], [0.0, 0.0, 0.0])
    bitmap = shapes.cutout_count() - 1
    hits = raycast.trace(solids_of(kind, half, axes, bitmap=bitmap), raycast.NOTHING, rays, CENTRE)
    d = directions(pose, k, rays.height, rays.width).reshape(-1, 3)
    depth = -(pose[:3, 3] @ axes[:, 2]) / (d @ axes[:, 2])
    x, y = ((pose[:3, 3] + depth[:, None] * d) @ axes / half)[:, :2].T
    quad = np.maximum(np.abs(x), np.abs(y)) < 1
    outline = {shapes.QUAD: quad, shapes.DISC: x * x + y * y < 1, shapes.LEAF: abs(x) < 1 - y * y}
    found = hits.depth[0, :, 0]
    seen = np.isfinite(found)
    np.testing.assert_allclose(found[seen], depth[seen], rtol=1e-4)
    if kind == shapes.CUTOUT:
        assert not (seen & ~quad).any()
        assert 0.2 < seen[quad].mean() < 0.9
    else:
        assert (seen != outline[kind]).mean() < 0.002


def test_a_solid_behind_the_camera_plane_does_not_wrap_around():
    rays, _, _ = view([0.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    hits = raycast.trace(
        solids_of(shapes.BOX, (1, 1, 1), center=(0, -4, 0)), raycast.NOTHING, rays, CENTRE
    )
    assert np.isinf(hits.depth).all()
    beside = solids_of(shapes.BOX, (0.5, 9.0, 0.5), center=(1.2, 0, 0))
    hits = raycast.trace(beside, raycast.NOTHING, rays, CENTRE)
    assert 0.1 < np.isfinite(hits.depth).mean() < 0.9


def test_points_unprojected_by_the_camera_library_lie_on_the_walls():
    scene = procedural.World(seed=1, kinds=("room",), num_views=2)[3]
    rays = procedural._rays(scene.cameras)
    hits = raycast.trace(scene.stage.solids, scene.stage.surround, rays, CENTRE)
    side = hits.surface[..., 0] - len(scene.stage.solids.kind) * raycast.SIDES
    uv = np.asarray(camera_math.pixel_grid(rays.height, rays.width)).reshape(1, -1, 2)
    uv = np.repeat(uv, 2, axis=0)
    depth = scene.depths([0, 1]).reshape(2, -1)
    points = np.asarray(camera_math.unproject(scene.cameras, uv, depth))
    low, high = scene.stage.surround.low, scene.stage.surround.high
    walls = np.stack([low, high], axis=-1).reshape(-1)
    assert (side >= 0).mean() > 0.2
    on = points[side >= 0][np.arange((side >= 0).sum()), side[side >= 0] // 2]
    np.testing.assert_allclose(on, walls[side[side >= 0]], atol=1e-4)


def test_colours_agree_where_two_views_see_the_same_point(scenes):
    errors, control = [], []
    for scene in scenes:
        images, depths = scene.images([3, 4]), scene.depths([3, 4])
        a, b = scene.cameras[3], scene.cameras[4]
        uv = np.asarray(camera_math.pixel_grid(a.height, a.width))
        points = camera_math.unproject(a, uv, depths[0])
        where, z = (np.asarray(x) for x in camera_math.project(b, points))
        cell = np.floor(where).astype(int)
        inside = (z > 0) & (cell >= 4).all(-1) & (cell < [b.width - 4, b.height - 4]).all(-1)
        x, y = cell[inside].T
        same = np.abs(depths[1][y, x] / z[inside] - 1) < 0.02
        x, y = x[same], y[same]
        mine = images[0][inside][same]
        errors.append(np.abs(images[1][y, x] - mine).mean())
        control.append(np.abs(images[1][y, x - 4] - mine).mean())
    errors, control = np.array(errors), np.array(control)
    assert np.median(errors) < 0.025
    assert (errors < 0.75 * control).mean() > 0.85


def test_range_of_depth_is_kept_and_realistic(scenes):
    for scene in scenes:
        depths = scene.depths(range(8)).reshape(8, -1)
        near, far = scene.cameras.near[:, None], scene.cameras.far[:, None]
        assert (near > 0).all()
        assert ((depths < near) | (depths > far)).mean() < 0.01
        assert 1.3 < np.median(far / near) < 1000


def test_cameras_keep_clear_of_solids_and_walls(scenes):
    for scene in scenes:
        centres = scene.cameras.world_from_cam[:, :3, 3]
        distance = builder.distances(scene.stage.solids, centres)
        assert (distance > 0.2 * scene.cameras.near).all()
        surround = scene.stage.surround
        low = np.where(surround.kind == "open", [-np.inf, -np.inf, 0], surround.low)
        assert (centres > low).all() and (centres < surround.high).all()


def test_neighbours_shift_by_the_chosen_part_of_the_image():
    shifts = []
    for index in range(12):
        world = procedural.World(seed=2, rigs=(rigs.ARC,), baseline=(0.05, 0.07), num_views=8)
        cameras = world[index].cameras
        step = np.linalg.norm(np.diff(cameras.world_from_cam[:, :3, 3], axis=0), axis=-1)
        shift = cameras.intrinsics[1:, 0] * step / cameras.near[1:] / cameras.width
        shifts.append(np.median(shift))
    assert 0.04 < np.median(shifts) < 0.1
    assert max(shifts) < 0.3


@pytest.mark.parametrize("kind", rigs.RIGS)
def test_rigs_give_rigid_upright_poses_that_see_the_target(kind):
    box = np.full(3, 9.0)
    stand = rigs.Stand(np.array([0.0, -3.0, 1.5]), np.array([0.0, 1.0, 1.0]), -box, box)
    poses = rigs.poses(np.random.default_rng(4), kind, stand, 12, 0.08, 1.0)
    rotation = poses[:, :3, :3]
    np.testing.assert_allclose(
        np.swapaxes(rotation, 1, 2) @ rotation, np.tile(np.eye(3), (12, 1, 1)), atol=1e-9
    )
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-9)
    assert (rotation[:, 2, 1] < -0.8).all()  # image down is world down
    to_target = stand.target - poses[:, :3, 3]
    cosine = (rotation[:, :, 2] * to_target).sum(-1) / np.linalg.norm(to_target, axis=-1)
    assert (cosine > 0.85).all()


def test_images_look_like_photographs_in_number(scenes):
    images = np.concatenate([scene.images([0, 7]) for scene in scenes])
    assert images.dtype == np.float32 and np.isfinite(images).all()
    assert images.min() >= 0 and images.max() <= 1
    spread = images.std(axis=(1, 2)).mean(axis=-1)
    assert (spread > 0.02).all() and 0.08 < np.median(spread) < 0.3
    slope = np.abs(np.diff(images, axis=2)).mean(axis=(1, 2, 3))
    assert 0.01 < np.median(slope) < 0.09
    assert 0.25 < np.median(images.mean(axis=(1, 2, 3))) < 0.65
    # Amplitude falls about as 1 / frequency: each octave holds a similar amount of contrast.
    spectrum = (np.abs(np.fft.fft2(images.mean(-1)))[:, 0, 1:24] ** 2).mean(axis=0)
    low, high = spectrum[1:4].mean(), spectrum[12:23].mean()
    assert 15 < low / high < 1000


def test_every_view_asked_for_is_the_same_alone_or_in_company(scenes):
    scene = scenes[1]
    together = scene.images([5, 2])
    np.testing.assert_array_equal(scene.images([2])[0], together[1])
    np.testing.assert_array_equal(scene.depths([2])[0], scene.depths([5, 2])[1])


def digest(world) -> str:
    images = [world[i].images([1, 0]) for i in (2, 0)]
    return hashlib.sha256(np.concatenate(images).tobytes()).hexdigest()


def test_another_process_makes_the_same_scenes_without_starting_jax():
    program = """
import hashlib, json, sys
import numpy as np
from nvs_common.data import procedural
world = procedural.World(seed=7, num_views=3, noise=0.01, exposure_jitter=0.1)
images = [world[i].images([1, 0]) for i in (0, 2)][::-1]
from jax._src import xla_bridge
print(json.dumps([hashlib.sha256(np.concatenate(images).tobytes()).hexdigest(),
                  len(xla_bridge._backends)]))
"""
    out = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(procedural.__file__).parents[2],
    )
    found, backends = json.loads(out.stdout)
    world = procedural.World(seed=7, num_views=3, noise=0.01, exposure_jitter=0.1)
    assert found == digest(world)
    assert backends == 0


def test_seed_and_index_both_matter():
    one = procedural.World(seed=1, num_views=1)
    images = [
        one[0].images([0]),
        one[1].images([0]),
        procedural.World(2, num_views=1)[0].images([0]),
    ]
    for a in range(3):
        for b in range(a):
            assert np.abs(images[a] - images[b]).mean() > 0.01


def test_world_and_scene_survive_pickling(scenes):
    scene = pickle.loads(pickle.dumps(scenes[0]))
    np.testing.assert_array_equal(scene.images([1]), scenes[0].images([1]))
    world = procedural.World(seed=5)
    assert pickle.loads(pickle.dumps(world)) == world
    assert len(pickle.dumps(world)) < 2000


def test_a_scene_rendered_larger_is_the_same_picture(scenes):
    for scene in scenes[:4]:
        large = scene.resized(96, 160)
        np.testing.assert_allclose(large.cameras.intrinsics, 2 * scene.cameras.intrinsics)
        image = large.images([2])[0].reshape(48, 2, 80, 2, 3).mean(axis=(1, 3))
        assert np.abs(image - scene.images([2])[0]).mean() < 0.03
        # Three times the size has a pixel centre at every old pixel centre. Cut-outs become
        # finer; everything else stays where it is.
        both = (scene.cameras, scene.resized(144, 240).cameras)
        small, big = (procedural._rays(c[[2]]) for c in both)
        solid = scene.stage.solids, scene.stage.surround
        a, b = (raycast.trace(*solid, rays, CENTRE) for rays in (small, big))
        index = np.arange(144 * 240).reshape(144, 240)[1::3, 1::3].ravel()
        same = a.surface[0, :, 0] == b.surface[0, index, 0]
        assert same.mean() > 0.9
        np.testing.assert_allclose(a.depth[0, same, 0], b.depth[0, index[same], 0], rtol=1e-3)


def test_resizing_to_another_aspect_crops_the_centre(scenes):
    square = scenes[0].resized(48, 48)
    np.testing.assert_allclose(square.depths([1])[0], scenes[0].depths([1])[0, :, 16:64], rtol=1e-4)
    assert square.images([1]).shape == (1, 48, 48, 3)


def test_something_between_lamp_and_floor_casts_a_shadow():
    room = Surround("room", np.array([-3.0, -3, 0]), np.array([3.0, 3, 3]), np.zeros(6, int))
    box = solids_of(shapes.BOX, (0.4, 0.4, 0.05), center=(0.0, 0.0, 1.0))
    lamp = lighting.Lamp(np.array([0, 0.01, 2.9]), np.zeros(3), 1.5, np.ones(3))
    lights = lighting.cast([lamp], box, room)
    place = np.array([[0.0, 0.3, 2.0], [0.0, 0.2, 0.0], [0.0, 0.0, 0.0]], np.float32)
    up = np.repeat(np.array([[0.0], [0], [1]], np.float32), 3, axis=1)
    way, strength = lighting.arriving(lights, 0, place, up)
    assert (strength[:2] < 0.05).all() and strength[2] > 0.95
    np.testing.assert_allclose(np.linalg.norm(way, axis=0), 1, rtol=1e-5)


def test_noise_and_exposure_jitter_do_what_they_say():
    options = dict(seed=3, num_views=4)
    clean = procedural.World(**options)[0]
    noisy = procedural.World(**options, noise=0.02)[0]
    difference = noisy.images([1]) - clean.images([1])
    assert 0.015 < difference.std() < 0.021
    jittered = procedural.World(**options, exposure_jitter=0.3)[0]
    ratio = jittered.images(range(4)).mean(axis=(1, 2, 3)) / clean.images(range(4)).mean(
        axis=(1, 2, 3)
    )
    assert ratio.std() > 0.02


def test_texture_look_up_meets_texels_and_their_mean():
    source = textures.atlas()
    texture = np.array([3])
    uv = np.array([[10.5], [20.5]], np.float32) / textures.SIZE
    texel = source.texels[3 * source.stride + 20 * textures.SIZE + 10].view(np.uint8)[:3] / 255
    fine = textures.lookup(texture, uv, np.zeros(1, np.float32))
    np.testing.assert_allclose(fine[0], texel, atol=1e-5)
    mean = source.texels[4 * source.stride - 1].view(np.uint8)[:3] / 255
    coarse = textures.lookup(texture, uv, np.full(1, 99.0, np.float32))
    np.testing.assert_allclose(coarse[0], mean, atol=0.01)
    wrapped = textures.lookup(texture, uv - 3, np.zeros(1, np.float32))
    np.testing.assert_allclose(wrapped, fine, atol=1e-4)


def test_sky_is_brighter_than_hills_and_finite():
    scene = procedural.World(seed=0, kinds=("field",), num_views=1)[0]
    rays = procedural._rays(scene.cameras)
    hits = raycast.trace(scene.stage.solids, scene.stage.surround, rays, CENTRE)
    code = len(scene.stage.solids.kind) * raycast.SIDES + raycast.DOME
    pixel = np.flatnonzero(hits.surface[0, :, 0] == code)
    assert len(pixel)
    uv = np.stack([pixel % rays.width, pixel // rays.width]).astype(np.float32) + 0.5
    light = shading.shade(scene.stage, rays, uv, hits.depth[0, pixel, 0], np.full(len(pixel), code))
    assert np.isfinite(light).all() and light.max() > 3 * scene.stage.sky.hill.max()


def test_a_lamp_above_a_low_dome_lights_the_scene():
    # Its corner rays pass beside the dome.
    world = procedural.World(num_views=18, baseline=(0.008, 0.3))
    assert np.isfinite(world[59217].images(np.array([0]))).all()


def test_bad_options_are_refused_by_name():
    for message, fields in {
        "kinds.*moon": dict(kinds=("moon",)),
        "height is 0": dict(height=0),
        r"baseline is \(0.1,\); give \(low, high\)": dict(baseline=(0.1,)),
        "fov is": dict(fov=(90.0, 40.0)),
    }.items():
        with pytest.raises(InputError, match=message):
            procedural.World(**fields)
    with pytest.raises(IndexError):
        procedural.World(num_scenes=3)[3]


@pytest.mark.parametrize("height, width, views", [(31, 20, 1), (16, 40, 3)])
def test_small_tall_and_single_view_scenes_work(height, width, views):
    scene = procedural.World(seed=9, height=height, width=width, num_views=views)[4]
    assert scene.images(range(views)).shape == (views, height, width, 3)
    assert scene.cameras.world_from_cam.shape == (views, 4, 4)


def test_a_view_does_not_change_where_its_bands_meet():
    scene = procedural.World(seed=6, num_views=2)[1].resized(128, 224)
    rays = procedural._rays(scene.cameras[[0]])
    whole = procedural.lit(scene.stage, rays).color
    bands = [rays.band(top, top + 30) for top in range(0, 128, 30)]
    parts = [procedural.lit(scene.stage, band).color for band in bands]
    different = np.abs(np.concatenate(parts) - whole).max(axis=-1) > 1e-3 * whole.max()
    assert different.mean() < 0.002


def test_crates_stand_on_the_ground_and_on_each_other():
    for seed in range(6):
        content = builder.Builder(np.random.default_rng(seed))
        scenery.crate(content, [1.0, 2.0, 0.5], 1.0)
        solids, group = content.solids()
        low = solids.center[:, 2] - solids.half[:, 2]
        high = solids.center[:, 2] + solids.half[:, 2]
        np.testing.assert_allclose(np.sort(low), np.append(0.5, np.sort(high)[:-1]), atol=1e-9)
        assert (group == group[0]).all()
