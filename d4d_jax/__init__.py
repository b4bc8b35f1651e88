"""d4d_jax: 4D generation by Diffusion4D (arXiv 2405.16645) in JAX.

Import the part you need, for example::

    from d4d_jax import clips, sampling
    from d4d_jax.models.unet import SpatioTemporalUNet

This file imports nothing, so that `import d4d_jax` stays fast.
"""

__version__ = "0.1.0"
