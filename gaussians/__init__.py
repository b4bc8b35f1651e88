"""Moving 3D Gaussians in JAX: differentiable rasterization, deformation and 4D reconstruction.

Import the part you need, for example::

    from gaussians.rasterize import rasterize
    from gaussians.reconstruct import reconstruct

This file imports nothing, so that `import gaussians` stays fast.
"""
