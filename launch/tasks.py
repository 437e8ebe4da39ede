"""The only table from a system's name to its code."""

from quark_jax import task as quark_task

TASKS = {"quark": quark_task.make}
