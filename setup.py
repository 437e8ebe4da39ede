"""Installs the libraries; configs, launch and tests stay in the checkout."""

from setuptools import find_packages, setup

SYSTEMS = ["quark_jax*", "lvsm_jax*", "vqnerf_jax*", "depth_decoder_jax*"]

setup(
    name="viewsynth-jax",
    version="0.1.0",
    description="Neural view synthesis in JAX: Quark, LVSM and more on shared cameras.",
    license="Apache-2.0",
    # common/ is a source root: it holds nvs_common, so no one imports `common`.
    package_dir={"nvs_common": "common/nvs_common"},
    packages=find_packages(include=SYSTEMS) + find_packages("common"),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.1",
        "optax",
        "orbax-checkpoint>=0.12.3",
        "chex",
        "grain>=0.2.14",
        "tensorflow-datasets",
        "einops",
        "numpy>=2.0",
        "ml-collections",
        "clu",
        "absl-py",
        "pillow>=10",
        "imageio",
        "imageio-ffmpeg",
        "tensorboardX",
        "tqdm",
        "safetensors",
    ],
    extras_require={
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # The compilers of TPUs and NVIDIA GPUs, for machines without (launch/absent_devices.py).
        "aot": ["jax[tpu]", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc"],
        "mesh": ["scikit-image", "scipy", "trimesh"],
        "viewer": ["viser>=1.0"],
        "torch": ["torch"],
        "test": [
            "pytest",
            "pytest-xdist",
            "equinox",
            "scikit-image",
            "trimesh",
            "build",
            "setuptools>=69",
            "wheel",
            "viser>=1.0",
        ],
        "dev": ["ruff", "pyright[nodejs]"],
    },
)
