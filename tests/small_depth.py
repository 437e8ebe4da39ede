"""Rings of cameras around surfaces, and attention to other views as it is defined: one sample
after the other, first sampled and then projected, in float64."""

import jax
import numpy as np

from depth_decoder_jax import cross_view, epipolar
from nvs_common.types import Cameras


def look_at(center, target=(0.0, 0.0, 0.0)):
    center, target = np.array(center, float), np.array(target, float)
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross([0.0, 1.0, 0.1], forward)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :4] = np.stack([right, np.cross(forward, right), forward, center], axis=-1)
    return pose


def ring(count=3, size=8, away=False):
    """Cameras [1, count] on a circle around the origin, or looking away from it."""
    angles = 0.5 * np.arange(count)
    centers = np.stack([1.5 * np.sin(angles), 0 * angles, -1.5 * np.cos(angles)], axis=-1)
    poses = np.stack([look_at(c, 2 * c if away else 0 * c) for c in centers])[None]
    intrinsics = np.broadcast_to([1.1 * size, 1.1 * size, size / 2, size / 2], (1, count, 4))
    near = np.ones((1, count))
    return Cameras(np.float32(poses), np.float32(intrinsics), near, 2 * near, size, size)


def scene(count=3, size=8, channels=32, key=0):
    """Features, and surfaces with a background, of a ring of cameras."""
    keys = jax.random.split(jax.random.key(key), 2)
    x = jax.random.normal(keys[0], (1, count, size, size, channels))
    depth = 1.3 + 0.2 * jax.random.uniform(keys[1], (1, count, size, size))
    mask = np.ones((1, count, size, size), bool)
    mask[:, :, :, 0] = False
    return x, epipolar.surfaces(ring(count, size), depth, mask)


def front_view(channels=32, size=8):
    x = jax.random.normal(jax.random.key(7), (1, size, size, channels))
    return cross_view.FrontFeatures(x, ring(1, size)[:, 0])


def reference(module, params, x, known, front=None):
    """One sample after the other, first sampled and then projected, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    norm = lambda x, name: normalized(x, p[name])  # noqa: E731
    y = norm(np.asarray(x[0], np.float64), "norm")
    views = [(y[j], known[0].cameras[0, j], j) for j in range(len(y))]
    if front is not None:
        features = norm(np.asarray(front.features, np.float64), "front_norm")[0]
        views.append((features, front.cameras[0], None))
    offsets = 2 * (np.arange(module.samples) + 0.5) / module.samples - 1
    out = np.zeros(y.shape)
    for i, row, column in np.ndindex(y.shape[:3]):
        if known[0].mask[0, i, row, column]:
            order = [*((i + r) % len(y) for r in range(len(y))), *range(len(y), len(views))]
            found = [
                [point(known, i, row, column, module.delta * t, views[j], t) for t in offsets]
                for j in order
            ]
            read = merged if module.aggregate == "concat_mlp" else attended
            out[i, row, column] = read(module, p, y[i, row, column], found)
    return out @ p["output"]["kernel"]


def normalized(x, p):
    grouped = x.reshape(len(x), -1, 32, x.shape[-1] // 32)
    grouped = grouped - grouped.mean((1, 3), keepdims=True)
    grouped = grouped / np.sqrt((grouped**2).mean((1, 3), keepdims=True) + 1e-6)
    return grouped.reshape(x.shape) * p["scale"] + p["bias"]


def point(known, i, row, column, offset, view, t):
    """Features and description of a sample in a view, or None where it is not seen."""
    maps, camera, index = view
    own = known[0].cameras[0, i]
    fx, fy, cx, cy = np.asarray(own.intrinsics, np.float64)
    depth = float(known[0].depth[0, i, row, column]) + offset
    ray = np.array([(column + 0.5 - cx) / fx, (row + 0.5 - cy) / fy, 1.0])
    pose = np.asarray(own.world_from_cam, np.float64)
    world = pose[:3, :3] @ (ray * depth) + pose[:3, 3]
    there = np.asarray(camera.world_from_cam, np.float64)
    away = world - there[:3, 3]
    local = there[:3, :3].T @ away
    fx, fy, cx, cy = np.asarray(camera.intrinsics, np.float64)
    u, v = fx * local[0] / local[2] + cx, fy * local[1] / local[2] + cy
    inside = 0 <= u <= camera.width and 0 <= v <= camera.height
    if local[2] <= 1e-4 or not inside:
        return None
    angles = t * np.pi * 2.0 ** np.arange(4)
    direction = pose[:3, :3].T @ away / np.linalg.norm(away)
    seen = 1.0
    if index is not None:
        mask = np.asarray(known[0].mask[0, index], float)[..., None]
        share = bilinear(mask, u, v)[0]
        depths = np.asarray(known[0].depth[0, index], np.float64)[..., None]
        there_depth = bilinear(depths * mask, u, v)[0] / (share or 1.0)
        seen = share * np.exp(-0.5 * ((local[2] - there_depth) / 0.1) ** 2)
    description = np.concatenate([direction, [t], np.sin(angles), np.cos(angles), [seen]])
    return bilinear(maps, u, v), description


def bilinear(image, u, v):
    padded = np.pad(image, ((1, 2), (1, 2), (0, 0)))
    x, y = u + 0.5, v + 0.5
    column, row = int(np.floor(x)), int(np.floor(y))
    fx, fy = x - column, y - row
    top = (1 - fx) * padded[row, column] + fx * padded[row, column + 1]
    bottom = (1 - fx) * padded[row + 1, column] + fx * padded[row + 1, column + 1]
    return (1 - fy) * top + fy * bottom


def softmax_heads(module, q, keys, values):
    heads = len(q) // module.head_size
    out = []
    for part in np.split(np.arange(len(q)), heads):
        logits = keys[:, part] @ q[part] / np.sqrt(len(part))
        weights = np.exp(logits - logits.max())
        out.append(weights @ values[:, part] / weights.sum())
    return np.concatenate(out)


def attended(module, p, own, found):
    keys, values = [], []
    for index, view in enumerate(found[1:], start=1):
        prefix = "front_" if index == 3 else ""
        for seen in filter(None, view):
            keys.append(seen[0] @ p[f"{prefix}key"]["kernel"] + seen[1] @ p["description"])
            values.append(seen[0] @ p[f"{prefix}value"]["kernel"])
    if not keys:
        return np.zeros(len(own))
    return softmax_heads(module, own @ p["query"]["kernel"], np.array(keys), np.array(values))


def merged(module, p, own, found):
    size = len(p["description"]) // len(found)
    kernels = [*np.split(p["first"], 3), p.get("front_first", {}).get("kernel")]
    samples = []
    for s in range(module.samples):
        total = p["first_bias"] + own @ kernels[0]
        for index, view in enumerate(found[1:], start=1):
            if view[s] is not None:
                total = total + view[s][0] @ kernels[index]
                total = total + view[s][1] @ p["description"][index * size : (index + 1) * size]
        total = np.asarray(jax.nn.gelu(total, approximate=False), np.float64)
        samples.append(total @ p["second"]["kernel"] + p["second"]["bias"])
    samples = np.array(samples)
    keys, values = (samples @ p[name]["kernel"] for name in ("key", "value"))
    return softmax_heads(module, own @ p["query"]["kernel"], keys, values)
