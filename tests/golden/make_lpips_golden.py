"""Makes lpips.npz and two small files as torch writes them.

    pip install -e '.[parity-lpips]'
    python tests/golden/make_lpips_golden.py

lpips.npz holds the distances, gradients and maps of the PyPI packages `lpips` and
`stlpips_pytorch`. Every weight, heads and biases included, is drawn from a generator seeded by its
name, so the test draws the same; the shift-tolerant networks are also run with the weights in
their package. lpips_archive.pth and lpips_sequence.pth are torch's two layouts of a state dict,
the second with the calls that torch wrote before version 0.4.
"""

import io
import pathlib
import pickle
import sys
import types
import zlib

import numpy as np

BACKBONES = ("vgg", "alex", "squeeze", "vgg_shift_tolerant", "alex_shift_tolerant")
SIZES = ((32, 37), (47, 46))  # odd and even rows reach the pools

_FOLDER = pathlib.Path(__file__).parent


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random tensor of a torch name and shape, scaled to keep activations of order one."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.startswith("lin"):
        return rng.uniform(-0.2, 1.0, shape).astype(np.float32)
    values = rng.standard_normal(shape, dtype=np.float32)
    return values * np.float32(np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.2)


def images(size: tuple[int, int]) -> np.ndarray:
    """A smooth image and a noisy one of the same scene, (2, h, w, 3) in [0, 1]."""
    rng = np.random.default_rng(sum(size))
    rows, columns = np.mgrid[: size[0], : size[1]] / max(size)
    waves = np.sin(9 * rows[..., None] + [5, 7, 11] * columns[..., None] + [0, 1, 2])
    clean = 0.5 + 0.4 * waves
    noisy = clean + 0.15 * rng.standard_normal(clean.shape)
    return np.clip([clean, noisy], 0, 1).astype(np.float32)


def tensors() -> dict[str, np.ndarray]:
    """What the two small files hold, in the order of their names below."""
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7
    return {
        "plain": base,
        "transposed": base.transpose(2, 0, 1),
        "part": base[1, 1:, ::2],
        "half": base.astype(np.float16),
        "bfloat16": np.round(base),
        "double": base.astype(np.float64),
        "count": np.array(17),
        "parameter": base[0],
    }


def _import_peers():
    """`lpips` and `stlpips_pytorch`, without what they import and these networks do not use."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # its compiled half is for another build of torch: declare the operators
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for module, name in (("IPython", "embed"), ("torchsummary", "summary")):
        sys.modules.setdefault(module, types.ModuleType(module)).__dict__.setdefault(name, None)
    import lpips
    from stlpips_pytorch import stlpips

    return lpips, stlpips


def _peer(backbone: str, *, shipped: bool = False):
    """The packages' network, with drawn weights or with those in the package."""
    import torch

    lpips, stlpips = _import_peers()
    network, _, tolerant = backbone.partition("_")
    if tolerant:
        model = stlpips.LPIPS(net=network, variant=tolerant, verbose=False)
    else:
        model = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    if not shipped:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith("lins."):
                    name = name if name.startswith("lin") else _torchvision_name(name)
                    parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))
    return model.eval()


def _torchvision_name(name: str) -> str:
    """net.slice2.5.weight -> features.5.weight"""
    return "features." + name.split(".", 2)[2]


def _run(model, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The distance, and its gradient with respect to the first image, (h, w, 3)."""
    import torch

    first, second = torch.from_numpy(images(size).transpose(0, 3, 1, 2))[:, None]
    distance = model(first.requires_grad_(), second, normalize=True).sum()
    distance.backward()
    return distance.detach().numpy(), first.grad.numpy()[0].transpose(1, 2, 0)


def _write_torch_files() -> None:
    import torch

    class OldPickler(pickle.Pickler):
        """Writes tensors as torch did before 0.4."""

        def reducer_override(self, value):
            if type(value) is torch.Tensor:
                return torch._utils._rebuild_tensor, value.__reduce_ex__(2)[1][:4]
            return NotImplemented

    base = torch.from_numpy(tensors()["plain"])
    state = {
        "plain": base,
        "transposed": base.permute(2, 0, 1),
        "part": base[1, 1:, ::2],
        "half": base.half(),
        "bfloat16": base.round().bfloat16(),
        "double": base.double(),
        "count": torch.tensor(17),
        "parameter": torch.nn.Parameter(base[0]),
    }
    torch.save(state, _FOLDER / "lpips_archive.pth")
    old = types.SimpleNamespace(**vars(pickle) | {"Pickler": OldPickler})
    buffer = io.BytesIO()
    torch.save(state, buffer, pickle_module=old, _use_new_zipfile_serialization=False)
    (_FOLDER / "lpips_sequence.pth").write_bytes(buffer.getvalue())


def main() -> None:
    data = {}
    for backbone in BACKBONES:
        model = _peer(backbone)
        for size in SIZES:
            distance, gradient = _run(model, size)
            data[f"{backbone}/{size[0]}/distance"] = distance
            if size == SIZES[0]:
                data[f"{backbone}/gradient"] = gradient
        if backbone == "alex":
            import torch

            model.spatial = True
            with torch.no_grad():
                pair = torch.from_numpy(images(SIZES[0]).transpose(0, 3, 1, 2))[:, None]
                data["alex/spatial"] = model(*pair, normalize=True)[0, 0].numpy()
        if backbone.endswith("shift_tolerant"):
            shipped = _peer(backbone, shipped=True)
            for size in SIZES:
                data[f"{backbone}/{size[0]}/shipped"], _ = _run(shipped, size)
    np.savez_compressed(_FOLDER / "lpips.npz", **data)
    _write_torch_files()


if __name__ == "__main__":
    main()
