"""The only table from a system's name to its code."""

from depth_decoder_jax import task as depth_decoder_task
from lvsm_jax import task as lvsm_task
from quark_jax import task as quark_task
from vqnerf_jax import task as vqnerf_task
from vqnerf_jax import vqgan_task

TASKS = {
    "depth_decoder": depth_decoder_task.make,
    "lvsm": lvsm_task.make,
    "quark": quark_task.make,
    "vqgan": vqgan_task.make,
    "vqnerf": vqnerf_task.make,
}
