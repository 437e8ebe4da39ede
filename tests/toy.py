"""A small task and data for the tests of training: an MLP from one image to another."""

from __future__ import annotations

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from nvs_common.types import Aux, Batch, Cameras, Render, Task, Views

PIXELS = 4 * 4 * 3
AXES = {
    "hidden/kernel": ("embed", "mlp"),
    "hidden/bias": ("mlp",),
    "image/kernel": ("mlp", "embed"),
    "image/bias": ("embed",),
}


def task(width: int = 16) -> Task:
    """Maps a context image to a target image; counts the scenes it has seen in a collection."""

    def init(key, batch):
        a, b = jax.random.split(key)
        params = {
            "hidden": {
                "kernel": jax.random.normal(a, (PIXELS, width)) * PIXELS**-0.5,
                "bias": jnp.zeros(width),
            },
            "image": {
                "kernel": jax.random.normal(b, (width, PIXELS)) * width**-0.5,
                "bias": jnp.zeros(PIXELS),
            },
        }
        return {"params": params, "counts": {"scenes": jnp.zeros((), jnp.int32)}}

    def predict(variables, images):
        p = variables["params"]
        x = images.reshape(images.shape[0], PIXELS)
        x = jnp.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"][None])
        x = x @ p["image"]["kernel"] + p["image"]["bias"][None]
        return x.reshape(images.shape)

    def loss(variables, batch, key):
        error = predict(variables, batch.context.images) - batch.target.images
        value = jnp.mean(error**2)
        seen = variables["counts"]["scenes"] + error.shape[0]
        psnr = -10 * jnp.log10(value)
        return value, Aux({"psnr": psnr}, {"counts": {"scenes": seen}})

    def render(variables, context, targets):
        return Render(predict(variables, context.images))

    return Task(init, loss, render, AXES)


class Scenes:
    """Scene i is a random image and its mirror image; scene `bad` holds a NaN."""

    def __init__(self, bad: int | None):
        self.bad = bad

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index):
        image = np.random.default_rng(int(index)).random((1, 4, 4, 3), np.float32)
        if index == self.bad:
            image[0, 0, 0, 0] = np.nan
        return {"context": image, "target": image[:, :, ::-1] - 0.5}


def views(images: np.ndarray) -> Views:
    """Views of images [b, 1, h, w, 3] with some camera."""
    lead = images.shape[:2]
    pose = np.broadcast_to(np.eye(4, dtype=np.float32), (*lead, 4, 4))
    intrinsics = np.broadcast_to(np.float32([4, 4, 2, 2]), (*lead, 4))
    near, far = np.full(lead, 1.0, np.float32), np.full(lead, 9.0, np.float32)
    return Views(images, Cameras(pose, intrinsics, near, far, 4, 4))


def batches(batch_size: int = 8, bad: int | None = None) -> grain.DatasetIterator:
    """Shuffled batches for ever, with Grain's iterator state."""
    data = grain.MapDataset.source(Scenes(bad)).seed(3).shuffle().repeat()
    data = data.batch(batch_size, drop_remainder=True)
    data = data.map(lambda s: Batch(views(s["context"]), views(s["target"])))
    return iter(data.to_iter_dataset())


def config(**changes) -> ml_collections.ConfigDict:
    """The config of a short run on one device; changes may name fields of sections, `optim.b1`."""
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.num_steps = 6
    c.batch_size = 8
    c.accumulate = 1
    c.log_every = 2
    c.eval_every = 0
    c.checkpoint_every = 2
    c.keep_checkpoints = 3
    c.ema = 0.0
    c.max_skipped = 3
    c.stop_after_minutes = 0.0
    c.profile = (0, 0)
    c.init_from = ""
    c.mesh = dict(data=1, fsdp=1, tensor=1, context=1)
    c.optim = dict(
        learning_rate=1e-2,
        warmup_steps=0,
        schedule="constant",
        decay_steps=0,
        b1=0.9,
        b2=0.99,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    c.update_from_flattened_dict(changes)
    return c
