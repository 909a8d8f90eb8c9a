"""Triggers one pixel and one image at a time, in NumPy and SciPy."""

import numpy as np
from scipy import fft, ndimage


def ftrojan(image, magnitude, block, positions):
    """`(3, H, W)` in [0, 1] through YCrCb (BT.601) and the DCT of every block and back."""
    red, green, blue = image.astype(np.float64)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = [(red - luma) * 0.713, (blue - luma) * 0.564]
    for plane in chroma:
        for top in range(0, plane.shape[0], block):
            for left in range(0, plane.shape[1], block):
                window = (slice(top, top + block), slice(left, left + block))
                coefficients = fft.dctn(plane[window], norm="ortho")
                for row, column in positions:
                    coefficients[row, column] += magnitude
                plane[window] = fft.idctn(coefficients, norm="ortho")
    cr, cb = chroma
    return np.stack([luma + 1.403 * cr, luma - 0.714 * cr - 0.344 * cb, luma + 1.773 * cb]).clip(0, 1)


def floyd_steinberg(image, levels):
    """`(C, H, W)` in [0, 1], pixel by pixel in reading order."""
    work = image.astype(np.float64).copy()
    channels, height, width = work.shape
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                old = work[channel, y, x]
                new = np.round(old * (levels - 1)) / (levels - 1)
                work[channel, y, x] = new
                for dy, dx, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                    if y + dy < height and 0 <= x + dx < width:
                        work[channel, y + dy, x + dx] += (old - new) * share / 16
    return work


def warp(image, grid):
    """`(C, H, W)` sampled at `(H, W, 2)` positions in [-1, 1], x before y, corners at the pixels' centres."""
    height, width = image.shape[1:]
    columns, rows = (grid[..., 0] + 1) / 2 * (width - 1), (grid[..., 1] + 1) / 2 * (height - 1)
    return np.stack([ndimage.map_coordinates(plane, [rows, columns], order=1, mode="nearest") for plane in image])


def gaussian_low_pass(plane, cutoff):
    """`(H, W)` times a Gaussian in the frequency domain, by the full complex transform."""
    rows, columns = (np.fft.fftfreq(side) * side for side in plane.shape)
    gain = np.exp(-(rows[:, None] ** 2 + columns[None] ** 2) / (2 * cutoff**2))
    return np.fft.ifft2(np.fft.fft2(plane) * gain).real


def wanet_grid(offsets, strength, height, width):
    """`(2, k, k)` offsets, x before y, to a `(H, W, 2)` grid: Keys' bicubic interpolation (a = -0.75), by hand."""
    offsets = offsets / np.abs(offsets).mean()
    grid = np.empty((height, width, 2))
    for i in range(height):
        for j in range(width):
            identity = (2 * j / (width - 1) - 1, 2 * i / (height - 1) - 1)
            for axis, size in enumerate((width, height)):
                smooth = _bicubic(offsets[axis], i * 3 / (height - 1), j * 3 / (width - 1))
                grid[i, j, axis] = np.clip(identity[axis] + strength * smooth / size, -1, 1)
    return grid


def _bicubic(plane, row, column):
    def weight(distance, a=-0.75):
        x = abs(distance)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    top, left, last = int(np.floor(row)), int(np.floor(column)), plane.shape[0] - 1
    return sum(
        weight(row - y) * weight(column - x) * plane[min(max(y, 0), last), min(max(x, 0), last)]
        for y in range(top - 1, top + 3)
        for x in range(left - 1, left + 3)
    )


def furthest(images, changed, grid, pixels):
    """How far ``changed`` leaves the range that `(B, C, H, W)` images have within some pixels of the grid's places."""
    height, width = images.shape[2:]
    steps = np.linspace(-pixels, pixels, 21)
    worst = 0.0
    for image, one in zip(images, changed, strict=True):
        samples = [
            warp(image, (grid + np.array([dx * 2 / width, dy * 2 / height])).clip(-1, 1))
            for dx in steps
            for dy in steps
        ]
        low, high = np.min(samples, axis=0), np.max(samples, axis=0)
        worst = max(worst, float((low - one).max()), float((one - high).max()))
    return worst
