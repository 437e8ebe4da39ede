"""Joins the processes of a distributed job where the environment asks for it."""

from __future__ import annotations

import os

import jax

from nvs_common import errors


def join() -> None:
    """Calls jax.distributed.initialize in a job of several processes; otherwise does nothing.

    It does so where one of these is set:
      JAX_COORDINATOR_ADDRESS (host:port) with JAX_NUM_PROCESSES and JAX_PROCESS_ID;
      SLURM_NTASKS above 1 inside `srun` (SLURM_STEP_NODELIST);
      OMPI_COMM_WORLD_SIZE above 1;
      several hosts in TPU_WORKER_HOSTNAMES, or NVS_DISTRIBUTED=1 (a TPU VM pod, where only the
      metadata server knows the hosts).

    Raises:
      InputError: JAX_COORDINATOR_ADDRESS without the other two, or values that are no numbers.
    """
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        try:
            count, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as e:
            raise errors.InputError(
                "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be "
                f"numbers too; {e} is missing or wrong."
            ) from e
        jax.distributed.initialize(env["JAX_COORDINATOR_ADDRESS"], count, index)
    elif _asked(env):
        jax.distributed.initialize()


def _asked(env) -> bool:
    slurm = "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1
    mpi = int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    tpu = "," in env.get("TPU_WORKER_HOSTNAMES", "")
    return slurm or mpi or tpu or env.get("NVS_DISTRIBUTED") == "1"
