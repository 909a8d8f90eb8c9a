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
