"""Packaging of the two libraries; the experiment binaries run from a checkout."""

import importlib.util
import pathlib

from setuptools import Extension, find_packages, setup


def native_extensions() -> list[Extension]:
    """The CPU rasterizer. Without a C++ compiler the installation goes on without it."""
    found = importlib.util.find_spec("jaxlib")
    if found is None or found.origin is None:  # an installation without build isolation
        return []
    folder = "gaussians/rasterize/native"
    return [
        Extension(
            "gaussians.rasterize._cpu",
            sources=[f"{folder}/blend.cpp", f"{folder}/project.cpp"],
            depends=[str(path) for path in pathlib.Path(folder).glob("*.[hi]*")],
            include_dirs=[str(pathlib.Path(found.origin).parent / "include")],
            extra_compile_args=["-std=c++17", "-O3", "-g0"],
            language="c++",
            optional=True,
        )
    ]


# Shift-tolerant LPIPS: the weights are read from the package, nothing of it runs.
PERCEPTUAL = ["stlpips_pytorch>=0.0.2", "safetensors>=0.4"]
VIEWER = ["viser>=1.1"]
# Metrics of training beside metrics.jsonl.
METRICS = ["tensorboardX>=2.6", "wandb>=0.17"]
# Prompts of words: CLIP's byte pair encoding. The vocabulary is a file of its own.
TEXT = ["tokenizers>=0.20", "ftfy>=6.1"]
# To write weights as torch's own files; they are read without it.
CONVERT = ["torch>=2.2"]
TEST = [
    *PERCEPTUAL,
    *VIEWER,
    "tensorboardX>=2.6",
    *TEXT,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "scikit-image>=0.24",
    "plyfile>=1.0",
    "gsply>=0.4.6",
    "gaussforge>=0.6",
    "pygltflib>=1.16",
    "jaxtyping>=0.3",
    "beartype>=0.20",
]
FORMATS = ["gsply>=0.4.6"]
# Bulk work on other machines; Dask is one of the runners.
BEAM = ["apache-beam[dask]>=2.65"]
BROWSER = ["playwright>=1.50"]
PARITY = ["torch==2.13.0", "diffusers>=0.35", "transformers>=5", "gsplat==1.5.3"]
# On its own: beside a CPU build of torch, torchvision breaks the import of diffusers.
PARITY_LPIPS = ["torch==2.13.0", "torchvision==0.28.0", "lpips==0.1.4"]
DEV = ["ruff>=0.9", "pyright>=1.1.400", "pre-commit>=4", "clang-format>=21"]

setup(
    name="d4d_jax",
    version="0.1.0",
    description="4D generation by Diffusion4D in JAX: orbital video to moving 3D Gaussians.",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["d4d_jax", "d4d_jax.*", "gaussians", "gaussians.*"]),
    package_data={
        "d4d_jax": ["assets/*", "assets/clips/*", "assets/clips/*/*"],
        "gaussians.rasterize": ["native/*"],
        "gaussians.viewer": ["*.html", "*.css", "*.js", "vendor/*"],
    },
    ext_modules=native_extensions(),
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11,<0.13",
        "grain>=0.2.10",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources>=6",  # which tensorflow-datasets needs to build, and does not ask for
        "array_record>=0.5",
        "msgpack>=1.0",
        "numpy>=1.26",
        "scipy>=1.11",
        "absl-py>=2.1",
        "ml_collections>=1.0",
        "jaxtyping>=0.3",
        "matplotlib>=3.8",
        "pillow>=10",
        "imageio[ffmpeg]>=2.34",
    ],
    extras_require={
        "formats": FORMATS,
        "perceptual": PERCEPTUAL,
        "viewer": VIEWER,
        "metrics": METRICS,
        "text": TEXT,
        "convert": CONVERT,
        "test": TEST,
        "dev": TEST + DEV,
        "parity": TEST + PARITY,
        "parity-lpips": TEST + PARITY_LPIPS,
        "beam": BEAM,
        "browser": TEST + BROWSER,
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "License :: OSI Approved :: Apache Software License",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
