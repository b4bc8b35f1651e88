"""Scores of images and clips: arrays in, one number per image (or clip) out."""

from d4d_jax.metrics.iou import alpha_iou
from d4d_jax.metrics.psnr import psnr
from d4d_jax.metrics.ssim import ssim

__all__ = ["alpha_iou", "psnr", "ssim"]
