"""Equations that several oracles share, one operation at a time."""

import itertools

import torch


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(actual, expected):
    actual, expected = (torch.as_tensor(value).detach().double() for value in (actual, expected))
    return float((actual - expected).norm() / expected.norm())


def pool(maps, size):
    """Average the cells of (B, C, H, W) that fall into each cell of the smaller grid."""
    rows = []
    for h in range(size[0]):
        top, bottom = h * maps.shape[2] // size[0], -(-(h + 1) * maps.shape[2] // size[0])
        cells = []
        for w in range(size[1]):
            left, right = w * maps.shape[3] // size[1], -(-(w + 1) * maps.shape[3] // size[1])
            cells.append(maps[:, :, top:bottom, left:right].mean((2, 3)))
        rows.append(torch.stack(cells, 2))
    return torch.stack(rows, 2)


def convolve(maps, weight):
    """Convolve with an odd kernel and zero padding, without bias."""
    reach = weight.shape[2] // 2
    height, width = maps.shape[2:]
    padded = maps.new_zeros(*maps.shape[:2], height + 2 * reach, width + 2 * reach)
    padded[:, :, reach : reach + height, reach : reach + width] = maps
    out = 0
    for dy, dx in itertools.product(range(weight.shape[2]), repeat=2):
        window = padded[:, :, dy : dy + height, dx : dx + width]
        out = out + torch.einsum("bchw,oc->bohw", window, weight[:, :, dy, dx])
    return out


def batch_normalize(maps, layer):
    mean = maps.mean((0, 2, 3), keepdim=True)
    variance = ((maps - mean) ** 2).mean((0, 2, 3), keepdim=True)
    scaled = (maps - mean) / (variance + layer.eps).sqrt()
    return scaled * layer.weight[:, None, None] + layer.bias[:, None, None]
