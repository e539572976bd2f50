"""Pictures for calibration, drawn with numpy and Pillow: of many kinds, sizes and exposures, and the same for a seed.

Photographs have a spectrum that falls with frequency, edges where one thing hides another, and patches of all sizes. Noise
of such a spectrum and overlapping leaves of power-law sizes (the "dead leaves" model) have the same, so that activations reach
about what a photograph makes them reach. Pages, charts and tables bring the sharp edges and the white paper.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mcv_calibration import drawn_pages as pages
from mcv_calibration.drawn_pages import Size

Field = NDArray[np.float32]
"""Values of about -2 to 2, [H, W]."""

SIZES: tuple[Size, ...] = (
    (448, 448), (640, 480), (224, 224), (1024, 768), (480, 640), (1280, 400), (336, 448), (320, 1000), (896, 896), (120, 90),
    (1280, 720), (560, 420), (700, 1000), (448, 300),
)  # fmt: skip
"""(width, height): of one slice, of up to nine, and smaller than a slice."""


def draw(number: int, seed: int = 0) -> bytes:
    """One picture as an encoded file: JPEG where a camera would have made it, else PNG."""
    rng = np.random.default_rng([seed, number])
    kind = KINDS[number % len(KINDS)]
    turn = number // len(KINDS)
    picture = kind(rng, SIZES[(number % len(KINDS) * 3 + turn * 5) % len(SIZES)])  # with the turns, each kind in each size
    file = io.BytesIO()
    if kind in PHOTOGRAPHS:
        picture.save(file, "JPEG", quality=92)
    else:
        picture.save(file, "PNG")
    return file.getvalue()


def landscape(rng: np.random.Generator, size: Size) -> Image.Image:
    """Sky with clouds, and ridges that are darker the nearer they are."""
    width, height = size
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    zenith, horizon = rng.uniform((20, 60, 130), (110, 150, 230)), rng.uniform((170, 150, 130), (255, 230, 220))
    picture = zenith + (horizon - zenith) * down[..., None] + np.zeros((1, width, 3))
    clouds = np.clip(noise(rng, size, 2.4) - 0.3, 0, 1.2)[..., None] * (1 - down[..., None])
    picture += clouds * (245 - picture) * 0.8
    for nearness in np.linspace(0.25, 1, int(rng.integers(3, 6))):
        profile = noise(rng, (width, 1), 2.2)[0]
        line = 0.35 + 0.55 * nearness + 0.08 * profile - 0.1
        ground = rng.uniform((30, 50, 20), (150, 140, 90)) * (1.15 - 0.6 * nearness)
        textured = ground * (1 + 0.35 * nearness * noise(rng, size, 1.2)[..., None])
        picture = np.where((down > line[None, :])[..., None], textured, picture)
    return _photo(rng, picture)


def leaves(rng: np.random.Generator, size: Size) -> Image.Image:
    """Things of all sizes, one before the other, each with its own colour and texture, under one light."""
    width, height = size
    down, across = np.mgrid[0:height, 0:width].astype(np.float32)
    texture, grain = noise(rng, size, 1.6), noise(rng, size, 0.8)
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = _tint(rng)
    largest = min(size) / 2
    for radius in np.sort(largest * (1 - rng.random(140) * 0.97) ** 2)[::-1]:
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        rows, columns = (slice(max(int(c - radius), 0), int(c + radius) + 1) for c in (y, x))
        dx, dy = (across[rows, columns] - x) / radius, (down[rows, columns] - y) / radius
        turn, squeeze = rng.uniform(0, np.pi), rng.uniform(0.4, 1)
        u, v = dx * np.cos(turn) + dy * np.sin(turn), (dy * np.cos(turn) - dx * np.sin(turn)) / squeeze
        inside = (np.maximum(abs(u), abs(v)) < 0.7) if rng.random() < 0.3 else (u * u + v * v < 1)
        own = 1 + rng.uniform(0, 0.3) * texture[rows, columns] + rng.uniform(0, 0.2) * grain[rows, columns]
        shade = (own * (1 - 0.4 * rng.random() * (dx + dy)))[..., None] * _tint(rng)
        picture[rows, columns] = np.where(inside[..., None], shade, picture[rows, columns])
    return _photo(rng, picture)


def surface(rng: np.random.Generator, size: Size) -> Image.Image:
    """Cloth, wood, water: noise along a direction, over a slowly changing colour."""
    width, height = size
    stripes = noise(rng, size, 1.0, stretch=float(rng.choice((0.08, 0.25, 4.0, 12.0))))
    colours = np.stack([noise(rng, size, 2.6) for _ in range(3)], axis=-1)
    waves = (
        np.sin(np.linspace(0, rng.uniform(5, 90), width))[None, :] * np.sin(np.linspace(0, rng.uniform(3, 60), height))[:, None]
    )
    light = 1 + 0.3 * stripes + 0.15 * waves * rng.integers(0, 2)
    return _photo(rng, (_tint(rng) + 15 * colours) * light[..., None])


def balls(rng: np.random.Generator, size: Size) -> Image.Image:
    """Round things with highlight and shadow before an unsharp background, as in a portrait."""
    width, height = size
    down, across = np.mgrid[0:height, 0:width].astype(np.float32)
    soft = np.stack([noise(rng, size, 3.0) for _ in range(3)], axis=-1)
    picture = _tint(rng) + 25 * soft
    for _ in range(int(rng.integers(1, 6))):
        radius = min(size) * rng.uniform(0.1, 0.4)
        x, y = rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height
        dx, dy = (across - x) / radius, (down - y) / radius
        shadow = np.exp(-((dx - 0.3) ** 2 + ((dy - 0.9) / 0.4) ** 2))
        picture *= 1 - 0.5 * shadow[..., None]
        inside = dx * dx + dy * dy < 1
        facing = np.sqrt(np.clip(1 - dx * dx - dy * dy, 0, 1))
        light = np.clip(0.75 * facing - 0.4 * dx - 0.5 * dy, 0.06, None)
        shine = 200 * np.clip(light - 0.95, 0, 1)
        ball = 1.3 * _tint(rng) * light[..., None] * (1 + 0.08 * noise(rng, size, 1.4)[..., None]) + shine[..., None]
        picture = np.where(inside[..., None], ball, picture)
    return _photo(rng, picture)


def night(rng: np.random.Generator, size: Size) -> Image.Image:
    """Nearly black, with small bright lights and their halos, and a camera's noise."""
    width, height = size
    down, across = np.mgrid[0:height, 0:width].astype(np.float32)
    picture = np.clip(8 + 6 * noise(rng, size, 2.2), 0, None)[..., None] * rng.uniform(0.6, 1.4, 3)
    for _ in range(int(rng.integers(6, 20))):
        squared = (across - rng.uniform(0, width)) ** 2 + (down - rng.uniform(0, height)) ** 2
        halo = (min(size) * rng.uniform(0.005, 0.03)) ** 2 / (squared + 4)
        picture += np.minimum(halo, 1.5)[..., None] * rng.uniform((180, 120, 60), (255, 240, 255))
    return _photo(rng, picture + rng.normal(0, 5, (height, width, 1)), exposure=1.0)


def glare(rng: np.random.Generator, size: Size) -> Image.Image:
    """A scene exposed for too long: much of it clipped to white."""
    return Image.fromarray(np.clip(np.asarray(leaves(rng, size)).astype(np.float32) * 1.6 + 60, 0, 255).astype(np.uint8))


def document_photo(rng: np.random.Generator, size: Size) -> Image.Image:
    """A page as a camera sees it: turned, unevenly lit, a little unsharp."""
    page = pages.page(rng, size).rotate(float(rng.uniform(-6, 6)), Image.Resampling.BICUBIC, fillcolor=(90, 75, 60))
    light = 0.75 + 0.15 * noise(rng, size, 3.0)[..., None]
    return _photo(rng, np.asarray(page.filter(ImageFilter.GaussianBlur(0.7))) * light, exposure=1.0)


def noise(rng: np.random.Generator, size: Size, slope: float, stretch: float = 1.0) -> Field:
    """Noise whose amplitude falls as frequency ** -`slope`, mean 0 and deviation 1; `stretch` draws it out along one axis."""
    width, height = size
    longest = max(width, height)  # a pixel is as high as it is wide
    down, across = np.fft.fftfreq(height) * longest * stretch, np.fft.rfftfreq(width) * longest
    frequency = np.hypot(down[:, None], across[None, :])
    amplitude = np.maximum(frequency, 1) ** -slope
    amplitude[0, 0] = 0
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) * amplitude, s=(height, width))
    result: Field = (field / max(float(field.std()), 1e-9)).astype(np.float32)
    return result


def _tint(rng: np.random.Generator) -> NDArray[np.float32]:
    """A colour of any lightness, more often dull than bright, as things are."""
    colour = rng.uniform(10, 235, 3)
    tint: NDArray[np.float32] = (colour.mean() + (colour - colour.mean()) * rng.beta(1.5, 2)).astype(np.float32)
    return tint


def _photo(rng: np.random.Generator, picture: NDArray[np.floating], exposure: float | None = None) -> Image.Image:
    """Expose and round: [H, W, 3] in levels of 255."""
    gain = rng.choice((0.6, 0.9, 1.0, 1.2)) if exposure is None else exposure
    return Image.fromarray(np.clip(picture * gain, 0, 255).astype(np.uint8))


Draw = Callable[[np.random.Generator, Size], Image.Image]
PHOTOGRAPHS: tuple[Draw, ...] = (landscape, leaves, balls, surface, document_photo, night, glare)
KINDS: tuple[Draw, ...] = (
    leaves, pages.page, landscape, pages.chart, balls, pages.table, surface, pages.shapes, night, document_photo, leaves,
    pages.screen, glare,
)  # fmt: skip
