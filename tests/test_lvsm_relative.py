"""Relative camera encodings: what attention sees depends on how two cameras stand to each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvsm_jax import blocks, decoding, relative
from nvs_common import attention
from tests import small_lvsm

PATCH, HEADS, SIZE = 4, 2, 16


def moved(cams, seed=9):
    """The same cameras after the world was turned and shifted."""
    rigid = small_lvsm.cameras((), seed=seed).world_from_cam
    return dataclasses.replace(cams, world_from_cam=rigid @ cams.world_from_cam)


def attended(cams, kind, q, k, v):
    """Attention of all tokens [1, n, a, f] of cameras [1, v] with a relative encoding."""
    frames = relative.frames(cams, PATCH, SIZE, kind)
    at = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[3:]), frames)
    q = relative.encode_query(q, at)
    k, v = (relative.encode_key_value(x, at) for x in (k, v))
    return relative.decode_attended(attention.attention(q, k, v), at)


def tokens(count):
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.normal(size=(1, count, HEADS, SIZE)), jnp.float32) for _ in range(3)]


def plain(cams, kind, q, k, v):
    """Each pair's relative transform as one matrix, in float64."""
    rows, columns = cams.height // PATCH, cams.width // PATCH
    transforms = []
    for pose, intrinsics in zip(cams.world_from_cam[0], cams.intrinsics[0], strict=True):
        sides = np.array([cams.width, cams.height] * 2)
        fx, fy, cx, cy = np.float64(intrinsics) / sides
        lifted = np.eye(4)
        if kind == "prope":
            lifted[:2, :3] = [[fx, 0, cx - 0.5], [0, fy, cy - 0.5]]
        view = lifted @ np.linalg.inv(np.float64(pose))
        for y in range(rows):
            for x in range(columns):
                whole = np.zeros((SIZE, SIZE))
                for i in range(0, SIZE // 2, 4):
                    whole[i : i + 4, i : i + 4] = view
                for start, place in ((SIZE // 2, x), (3 * SIZE // 4, y)):
                    pairs = SIZE // 8
                    for j in range(pairs):
                        angle = place * 100.0 ** (-j / pairs)
                        a, b = start + j, start + j + pairs
                        whole[a, a] = whole[b, b] = np.cos(angle)
                        # The query's frame from the world's.
                        whole[a, b], whole[b, a] = -np.sin(angle), np.sin(angle)
                transforms.append(whole)
    transforms = np.stack(transforms)
    pair = np.einsum("nij,mjk->nmik", transforms, np.linalg.inv(transforms))
    q, k, v = (np.float64(x[0]) for x in (q, k, v))
    logits = np.einsum("naf,nmfg,mag->anm", q, pair, k) / np.sqrt(SIZE)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("anm,nmfg,mag->naf", weights, pair, v)


@pytest.mark.parametrize("kind", ["prope", "gta"])
@pytest.mark.thorough
def test_each_pair_meets_through_one_relative_matrix(kind):
    cams = small_lvsm.cameras((1, 2))
    q, k, v = tokens(2 * 2 * 3)
    got = attended(cams, kind, q, k, v)[0]
    np.testing.assert_allclose(got, plain(cams, kind, q, k, v), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["prope", "gta"])
def test_the_frame_of_the_world_does_not_matter(kind):
    cams = small_lvsm.cameras((1, 2))
    parts = tokens(2 * 2 * 3)
    there, here = (attended(c, kind, *parts) for c in (moved(cams), cams))
    np.testing.assert_allclose(there, here, rtol=0, atol=5e-5)
    other = dataclasses.replace(cams, world_from_cam=cams.world_from_cam[:, ::-1])
    assert np.abs(attended(other, kind, *parts) - here).max() > 1e-2


def test_only_prope_sees_the_focal_length():
    cams = small_lvsm.cameras((1, 2))
    zoomed = dataclasses.replace(cams, intrinsics=cams.intrinsics * np.float32([[2, 2, 1, 1]]))
    parts = tokens(2 * 2 * 3)
    change = {
        kind: np.abs(attended(zoomed, kind, *parts) - attended(cams, kind, *parts)).max()
        for kind in ("prope", "gta")
    }
    assert change["gta"] == 0 and change["prope"] > 1e-2


@pytest.mark.parametrize("kind", ["decoder_only", "cached", "cross_attention"])
@pytest.mark.thorough
def test_a_model_with_encodings_renders_each_target_as_alone_and_differs(kind):
    module = small_lvsm.KINDS[kind](relative="prope", target_chunk=2)
    variables, context = small_lvsm.variables(module), small_lvsm.views()
    targets = small_lvsm.cameras((2, 3), height=8, width=8)
    render = jax.jit(module.apply)
    got = render(variables, context, targets)
    np.testing.assert_allclose(
        got[:, 1:2], render(variables, context, targets[:, 1:2]), rtol=0, atol=5e-6
    )
    plain_module = small_lvsm.KINDS[kind]()
    assert np.abs(got - jax.jit(plain_module.apply)(variables, context, targets)).max() > 1e-3


def test_the_fast_form_with_encodings_equals_blocks_over_whole_sequences():
    module = small_lvsm.decoder_only(relative="prope")
    params = small_lvsm.variables(module)["params"]["blocks"]
    rng = np.random.default_rng(5)
    shared = jnp.asarray(rng.normal(size=(2, 12, 16)), jnp.float32)
    own = jnp.asarray(rng.normal(size=(2, 3, 4, 16)), jnp.float32)
    above = relative.frames(small_lvsm.cameras((2, 2)), PATCH, 8, "prope")
    above = jax.tree.map(lambda x: x.reshape(2, 12, *x.shape[3:]), above)
    at = relative.frames(small_lvsm.cameras((2, 3), 8, 8, seed=4), PATCH, 8, "prope")
    setting = blocks.Setting()

    @jax.jit
    def fast(params):
        return decoding.run(
            params, decoding.share(params, shared, setting, above), own, setting, at
        )

    @jax.jit
    def whole(params, i):
        x = jnp.concatenate([shared, own[:, i]], axis=1)
        every = relative.concatenate([above, jax.tree.map(lambda x: x[:, i], at)])
        return blocks.run(params, x, setting, every)[:, 12:]

    got = fast(params)
    for i in range(3):
        np.testing.assert_allclose(got[:, i], whole(params, i), rtol=2e-4, atol=2e-4)
