"""Scores of images and clips: arrays in, one number per image (or clip) out."""

from d4d_jax.metrics.fvd import I3D, frechet_distance, load_i3d
from d4d_jax.metrics.iou import alpha_iou
from d4d_jax.metrics.lpips import Lpips
from d4d_jax.metrics.perceptual_weights import load_lpips, load_stlpips
from d4d_jax.metrics.psnr import psnr
from d4d_jax.metrics.ssim import ssim

__all__ = [
    "I3D",
    "Lpips",
    "alpha_iou",
    "frechet_distance",
    "load_i3d",
    "load_lpips",
    "load_stlpips",
    "psnr",
    "ssim",
]
