"""Pairs of frames with exact flow: pieces of pictures that move over a moving picture."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

PICTURES = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "moon",
            "rocket")  # fmt: skip
"""Of scikit-image, in the public domain or free; those that its wheel contains."""


MARGIN = 32
"""Pixels of the background around the frame."""


@dataclass(frozen=True)
class Pair:
    """Two gray frames of range 1, the flow between them, and which pixels the second frame shows too."""

    first: Tensor  # (1, H, W)
    second: Tensor  # (1, H, W)
    flow: Tensor  # (2, H, W)
    visible: Tensor  # (1, H, W) bool


@dataclass(frozen=True)
class MovingPictures:
    """Pairs made from pictures, as many as there are seeds: the recipe of FlyingChairs with other objects.

    A background and some pieces with smooth outlines are cut from random pictures; some get so little contrast that they are
    nearly without texture. The background moves by an affine map and a smooth deformation, each piece by a further affine map,
    by 1 to 100 pixels. The flow is exact, because each frame is drawn from the maps themselves. Noise and a change of
    brightness are added.

    Example:
        >>> pairs = MovingPictures([torch.rand(1, 60, 80)], size=(48, 64))
        >>> pair = pairs.pair(7)
        >>> pair.first.shape, pair.flow.shape, pair.visible.dtype
        (torch.Size([1, 48, 64]), torch.Size([2, 48, 64]), torch.bool)

    Args:
        pictures: gray, ``(1, H, W)`` each, of range 1.
        size: of the frames.
        pace: a factor of all motions; the frames of FlyingChairs go with 1.

    Source: Dosovitskiy et al. (2015), FlowNet: the recipe.
    """

    pictures: Sequence[Tensor]
    size: tuple[int, int] = (384, 512)
    pace: float = 1.0

    def pair(self, seed: int) -> Pair:
        """The pair of a seed, always the same."""
        chance = Chance(seed)
        height, width = self.size
        ground = Background.random(chance, self._texture(chance, (height + 2 * MARGIN, width + 2 * MARGIN)), self)
        layers: list[Layer] = [ground]
        for _ in range(chance.integer(3, 11)):
            layers.append(Piece.random(chance, self._texture(chance, self.size), ground, self))
        grid = pixels(self.size)
        (number, first), (later, second) = draw(layers, [grid] * len(layers)), draw(layers, [one.origin(grid) for one in layers])
        flow = torch.zeros(*self.size, 2)
        for index, layer in enumerate(layers):
            flow = torch.where((number == index)[..., None], layer.target(grid) - grid, flow)
        noise, gain, shift = 0.02 * chance.uniform(), 1 + 0.05 * chance.normal(), 0.02 * chance.normal()
        first, second = (chance.photographed(frame, noise)[None] for frame in (first, gain * second + shift))
        return Pair(first, second, flow.movedim(-1, 0).contiguous(), (number_at(later, grid + flow) == number)[None])

    def _texture(self, chance: "Chance", size: tuple[int, int]) -> Tensor:  # (1, 1, *size)
        """A piece of a picture, enlarged at random, of random contrast."""
        picture = self.pictures[chance.integer(0, len(self.pictures))]
        picture = picture.flip(-1) if chance.uniform() < 0.5 else picture
        factor = max(size[0] / picture.shape[-2], size[1] / picture.shape[-1], 0.5) * (1 + 0.5 * chance.uniform())
        whole = [max(math.ceil(factor * side), least) for side, least in zip(picture.shape[-2:], size)]
        large = interpolate(picture[None], size=whole, mode="bicubic", antialias=True)
        top, left = chance.integer(0, whole[0] - size[0] + 1), chance.integer(0, whole[1] - size[1] + 1)
        piece = large[..., top : top + size[0], left : left + size[1]].clamp(0, 1)
        contrast = 1.0 if chance.uniform() < 0.7 else 0.05 + 0.95 * chance.uniform()
        level = piece.mean() if contrast == 1 else 0.2 + 0.6 * chance.uniform()
        return level + contrast * (piece - piece.mean())


class Chance:
    """Random numbers of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(1_000_003 * seed + 17)

    def uniform(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def normal(self) -> float:
        return float(torch.randn((), generator=self.generator))

    def integer(self, low: int, high: int) -> int:
        """From low to high − 1."""
        return int(torch.randint(low, high, (), generator=self.generator))

    def motion(self, least: float, most: float) -> Tensor:  # (2,)
        """A vector in any direction; the logarithm of its length is uniform."""
        length = least * (most / least) ** self.uniform()
        angle = 2 * math.pi * self.uniform()
        return torch.tensor([length * math.cos(angle), length * math.sin(angle)])

    def photographed(self, frame: Tensor, noise: float) -> Tensor:
        """With noise, and in 256 steps."""
        return (255 * (frame + noise * torch.randn(frame.shape, generator=self.generator)).clamp(0, 1)).round() / 255

    def affine(self, strength: float) -> Tensor:  # (2, 2)
        """Rotation and zoom, mostly small."""
        angle, zoom = strength * self.normal() * self.uniform(), 1 + strength * self.normal() * self.uniform()
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        return torch.tensor([[cos, -sin], [sin, cos]])


class Layer(ABC):
    """A part of the scene. Subclasses are final."""

    @abstractmethod
    def target(self, x: Tensor) -> Tensor:  # (..., 2) -> (..., 2)
        """Where points of the first frame are in the second."""

    @abstractmethod
    def origin(self, y: Tensor) -> Tensor:  # (..., 2) -> (..., 2)
        """Where points of the second frame were in the first: the inverse of `target`."""

    @abstractmethod
    def cover(self, x: Tensor) -> Tensor:  # (..., 2) -> (...)
        """How much of a point of the first frame it covers, from 0 to 1."""

    @abstractmethod
    def color(self, x: Tensor) -> Tensor:  # (H, W, 2) -> (H, W)
        """How bright it is there."""


@dataclass(frozen=True)
class Background(Layer):
    """A picture everywhere, which moves by x -> A (x − c) + c + t + a smooth wave."""

    texture: Tensor  # (1, 1, h, w), with a `MARGIN` around the frame
    matrix: Tensor  # (2, 2)
    shift: Tensor  # (2,)
    center: Tensor  # (2,)
    wave: Tensor  # (2, 4): per component amplitude, frequency along both axes, phase

    @classmethod
    def random(cls, chance: Chance, texture: Tensor, scene: MovingPictures) -> "Background":
        size = scene.size
        center = torch.tensor([size[1] / 2, size[0] / 2])
        strong = 4 * scene.pace * chance.uniform() ** 2 if chance.uniform() < 0.5 else 0.0
        periods = [(80 + 300 * chance.uniform()) * (1 if chance.uniform() < 0.5 else -1) for _ in range(4)]
        rows = [[strong * chance.normal(), 2 * math.pi / periods[2 * k], 2 * math.pi / periods[2 * k + 1], 6.3 * chance.uniform()]
                for k in range(2)]  # fmt: skip
        return cls(texture, chance.affine(0.04), scene.pace * chance.motion(0.3, 40), center, torch.tensor(rows))

    def waved(self, x: Tensor) -> Tensor:  # (H, W, 2)
        return self.wave[:, 0] * torch.sin(x @ self.wave[:, 1:3].T + self.wave[:, 3])

    def target(self, x: Tensor) -> Tensor:
        return (x - self.center) @ self.matrix.T + self.center + self.shift + self.waved(x)

    def origin(self, y: Tensor) -> Tensor:
        inverse = torch.linalg.inv(self.matrix).T
        x = y
        for _ in range(30):  # a contraction: the wave is flat
            x = (y - self.center - self.shift - self.waved(x)) @ inverse + self.center
        return x

    def cover(self, x: Tensor) -> Tensor:
        return torch.ones_like(x[..., 0])

    def color(self, x: Tensor) -> Tensor:
        return sample(self.texture, x + MARGIN)


@dataclass(frozen=True)
class Piece(Layer):
    """A piece of a picture with a smooth outline, which moves with the background and by a map of its own."""

    texture: Tensor  # (1, 1, h, w)
    center: Tensor  # (2,)
    matrix: Tensor  # (2, 2)
    shift: Tensor  # (2,)
    outline: Tensor  # (n, 2): r(φ) = Σ a cos kφ + b sin kφ
    squeeze: Tensor  # (2,): longer along one axis

    @classmethod
    def random(cls, chance: Chance, texture: Tensor, ground: Background, scene: MovingPictures) -> "Piece":
        size = scene.size
        center = torch.tensor([size[1] * chance.uniform(), size[0] * chance.uniform()])
        radius = min(size) * (0.03 + 0.22 * chance.uniform())
        waves = [[radius * 0.35 * chance.normal() / k, radius * 0.35 * chance.normal() / k] for k in range(1, 6)]
        own = scene.pace * chance.motion(1.0, 100.0)
        shift = ground.target(center) - center + own
        squeeze = torch.tensor([1.0, 0.3 + 0.7 * chance.uniform()])
        return cls(texture, center, ground.matrix @ chance.affine(0.1), shift, torch.tensor([[radius, 0.0], *waves]), squeeze)

    def target(self, x: Tensor) -> Tensor:
        return (x - self.center) @ self.matrix.T + self.center + self.shift

    def origin(self, y: Tensor) -> Tensor:
        return (y - self.center - self.shift) @ torch.linalg.inv(self.matrix).T + self.center

    def cover(self, x: Tensor) -> Tensor:
        away = (x - self.center) / self.squeeze
        angle = torch.atan2(away[..., 1], away[..., 0])
        orders = torch.arange(len(self.outline))
        waves = angle[..., None] * orders
        radius = torch.cos(waves) @ self.outline[:, 0] + torch.sin(waves) @ self.outline[:, 1]
        return (radius - torch.linalg.vector_norm(away, dim=-1) + 0.5).clamp(0, 1)

    def color(self, x: Tensor) -> Tensor:
        return sample(self.texture, x)


def draw(layers: Sequence[Layer], points: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # -> 2 × (H, W)
    """The number of the layer on top, and the picture, given which point of each layer is seen at each pixel."""
    number, frame = torch.zeros(points[0].shape[:-1], dtype=torch.long), torch.zeros(points[0].shape[:-1])
    for index, (layer, x) in enumerate(zip(layers, points)):
        cover = layer.cover(x)  # soft at the outline
        frame = (1 - cover) * frame + cover * layer.color(x)
        number = torch.where(cover > 0.5, index, number)
    return number, frame


def pixels(size: tuple[int, int]) -> Tensor:  # (H, W, 2)
    """Column and row of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return torch.stack([columns, rows], -1).float()


def sample(texture: Tensor, x: Tensor) -> Tensor:  # (1, 1, h, w), (H, W, 2) -> (H, W)
    """A texture at some points, mirrored beyond its border."""
    sides = torch.tensor([texture.shape[-1] - 1, texture.shape[-2] - 1])
    return grid_sample(texture, (2 * x / sides - 1)[None], mode="bicubic", padding_mode="reflection", align_corners=True)[0, 0]


def number_at(number: Tensor, x: Tensor) -> Tensor:  # (H, W), (H, W, 2) -> (H, W)
    """The layer that is seen at some points; −1 outside the frame."""
    near = x.round().long()
    here = ((near >= 0) & (near < torch.tensor([number.shape[1], number.shape[0]]))).all(-1)
    rows, columns = near[..., 1].clamp(0, number.shape[0] - 1), near[..., 0].clamp(0, number.shape[1] - 1)
    return torch.where(here, number[rows, columns], -1)


def bundled_pictures() -> list[Tensor]:
    """Those of `PICTURES`, gray."""
    import numpy as np
    from skimage import color, data

    found = []
    for name in PICTURES:
        image = np.asarray(getattr(data, name)())
        gray = color.rgb2gray(image[..., :3]) if image.ndim == 3 else image / 255
        found.append(torch.from_numpy(np.ascontiguousarray(gray, dtype=np.float32))[None])
    return found
