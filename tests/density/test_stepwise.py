"""Densities one pixel at a time: the same probabilities as from whole images."""

from __future__ import annotations

import pytest
import torch

from anomalyd.density.base import Density, ImageShape
from anomalyd.density.gated_pixelcnn import GatedPixelCNN
from anomalyd.density.pixelcnn import PixelCNN
from anomalyd.density.pixelcnnpp import PixelCNNPP
from anomalyd.density.pixelrnn import DiagonalBiLSTM, RowLSTM


def gated(shape: ImageShape, classes: int) -> Density:
    return GatedPixelCNN(shape, classes, features=6, dilations=(1, 2, 1))


def read_out(shape: ImageShape, classes: int) -> Density:
    return GatedPixelCNN(shape, classes, features=6, dilations=(1, 2), readout=7, nearby=3)


def halved(shape: ImageShape, classes: int) -> Density:
    pixel = "logistic-mixture" if shape.levels > 2 else "bernoulli"
    return PixelCNNPP(shape, classes, features=(4, 6, 8), blocks=(1, 0, 2), pixel=pixel)


def masked(shape: ImageShape, classes: int) -> Density:
    return PixelCNN(shape, features=6, blocks=3, kernel=5)


def lines(shape: ImageShape, classes: int) -> Density:
    return RowLSTM(shape, features=4, layers=2)


def diagonals(shape: ImageShape, classes: int) -> Density:
    return DiagonalBiLSTM(shape, features=4, layers=2)


@pytest.mark.parametrize(
    "sides",
    [(8, 8, 1, 256), (9, 11, 3, 16), (7, 5, 1, 2), (1, 6, 1, 4), (6, 1, 3, 4)],
    ids=["even", "odd", "binary", "one row", "one column"],
)
@pytest.mark.parametrize(
    ("density", "classes"),
    [
        *((each, classes) for each in (gated, read_out, halved) for classes in (0, 3)),
        *((each, 0) for each in (masked, lines, diagonals)),
    ],
)
@torch.no_grad()
def test_a_pixel_at_a_time_gives_the_probabilities_of_whole_images(density, sides, classes):
    """Row by row and pixel by pixel, from states alone, p(x_t | x_<t) is what `log_probs` says."""
    torch.manual_seed(0)
    shape = ImageShape(*sides)
    made = density(shape, classes).eval()
    for parameter in made.parameters():
        parameter.normal_(std=0.15)
    images = torch.randint(0, 256, (3, *shape[:3]), dtype=torch.uint8)
    labels = torch.tensor([2, 0, 2]) if classes else None
    row, step = made.one_by_one()
    label = {"label": labels} if classes else {}

    whole = made.log_probs(images, labels).exp()
    rows = torch.zeros(3, row.state_size)
    for y in range(shape.height):
        drawn = images[:, max(0, y - 1)]
        given = label if row.labelled else {}
        above, rows = row(drawn, torch.tensor([y]), rows, **given)
        state = torch.zeros(3, step.state_size)
        for x in range(shape.width):
            place, left = torch.tensor([y, x]), images[:, y, max(0, x - 1)]
            log_p, state = step(left, images[:, y, x], above[:, x], place, state, **label)
            torch.testing.assert_close(log_p.exp(), whole[:, y, x], atol=1e-6, rtol=0)
