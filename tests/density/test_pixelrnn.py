"""PixelRNN: who sees whom, how many steps it takes, and one recurrence in loop and Scan."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anomalyd.density import pixelrnn
from anomalyd.density.base import ImageShape
from anomalyd.density.pixelrnn import DiagonalBiLSTM, RowLSTM
from anomalyd.detect.runtime import Session
from anomalyd.train.export import check_parity, to_onnx

MODELS = (RowLSTM, DiagonalBiLSTM)


def noisy(model: type, shape: ImageShape, **options):
    """A small one whose weights are noise, so that nothing it says is nearly uniform."""
    torch.manual_seed(0)
    density = model(shape, **({"features": 4, "layers": 2, "components": 3} | options))
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return density.eval()


def every_image(shape: ImageShape) -> Tensor:
    """All images of a shape, (levels ** dims, H, W, C)."""
    levels = [256 * level // shape.levels for level in range(shape.levels)]
    every = torch.tensor(list(itertools.product(levels, repeat=shape.dims)), dtype=torch.uint8)
    return every.reshape(-1, *shape[:3])


def influence(density) -> Tensor:
    """Whether the context of pixel (r, c) moves with pixel (i, j): bool (i, j, r, c)."""
    height, width = density.shape[:2]
    density = density.double()
    changes = torch.cat([torch.zeros(1, height * width), torch.eye(height * width)]).double()
    pixels = torch.randn(height, width, dtype=torch.float64)
    with torch.no_grad():
        context = density.context(changes.reshape(-1, 1, height, width) + pixels)
    # The place in the batch decides how sums round.
    moved = (context[1:] - context[:1]).abs().amax(dim=(1, 2)) > 1e-13
    return moved.unflatten(0, (height, width))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("shape", "pixel"),
    [
        (ImageShape(3, 3, 1, levels=2), "bernoulli"),
        (ImageShape(3, 3, 1, levels=2), "hierarchical"),
        (ImageShape(1, 2, 3, levels=4), "categorical"),
        (ImageShape(2, 1, 3, levels=4), "logistic-mixture"),
        (ImageShape(1, 1, 1), "hierarchical"),
    ],
)
def test_density_sums_to_one_over_all_images(model, shape, pixel):
    """exp(log_prob) over every image there is adds up to one, and is far from uniform."""
    with torch.no_grad():
        log_p = noisy(model, shape, pixel=pixel).log_prob(every_image(shape)).double()

    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_p.std() > 0.2


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("pixel", ["categorical", "logistic-mixture"])
def test_table_for_sampling_agrees_with_the_score(model, pixel):
    """log p of the levels that are there, taken from the table of all levels, is the map."""
    density = noisy(model, ImageShape(5, 4, 3, levels=16), pixel=pixel)
    x = torch.randint(0, 256, (3, 5, 4, 3), dtype=torch.uint8)
    with torch.no_grad():
        table = density.log_probs(x)
        taken = table.gather(4, density.quantise(x).unsqueeze(4))[..., 0].sum(dim=3)

        torch.testing.assert_close(-taken, density.nll_maps(x)[:, 0], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(table.exp().sum(dim=4), torch.ones(3, 5, 4, 3))


def test_row_lstm_sees_a_triangle():
    """A row further up widens the view by one column to either side, and no more."""
    height, width, layers = 5, 15, 2
    moved = influence(noisy(RowLSTM, ImageShape(height, width), layers=layers))

    for i, j, row, column in itertools.product(range(height), range(width), repeat=2):
        up, right = row - i, j - column
        left_end = -(3 + layers + up)  # 3 columns of the first convolution, 1 of each layer
        right_end = up + 2 if up else -1  # 3 columns in the first row above
        assert moved[i, j, row, column] == (up >= 0 and left_end <= right <= right_end)


@pytest.mark.parametrize("shape", [ImageShape(6, 9), ImageShape(9, 4)])
def test_diagonal_bilstm_sees_all_that_comes_before(shape):
    """One layer is enough for each pixel to depend on every earlier pixel, and on no other."""
    moved = influence(noisy(DiagonalBiLSTM, shape, layers=1))
    pixels = shape.height * shape.width

    later = torch.ones(pixels, pixels).triu(1).bool()
    assert torch.equal(moved.reshape(pixels, pixels), later)


@pytest.mark.parametrize(("model", "steps"), [(RowLSTM, 28), (DiagonalBiLSTM, 55)])
def test_a_layer_takes_a_step_per_line(model, steps, monkeypatch):
    """28x28 images take 28 rows, or 55 diagonals for both directions together: not 784 steps."""
    calls, cell = [], pixelrnn.cell
    monkeypatch.setattr(pixelrnn, "cell", lambda *args: calls.append(1) or cell(*args))
    density = noisy(model, ImageShape(28, 28), layers=1)
    density.log_prob(torch.zeros(2, 28, 28, 1, dtype=torch.uint8))

    assert len(calls) == steps


def lstm(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The LSTM equations, channels first."""
    i, f, o, g = gates.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def test_rows_follow_the_equations():
    """gates = K_is x + K_ss * h_(i-1), a convolution three wide; one row after the other."""
    torch.manual_seed(0)
    gates, kernel = torch.randn(4, 12, 5, 2), torch.randn(12, 3, 3)
    expected = []
    h = c = torch.zeros(3, 5, 2)
    for line in gates:
        around = F.conv1d(h.permute(2, 0, 1), kernel, padding=1).permute(1, 2, 0)
        h, c = lstm(line + around, c)
        expected.append(h)

    # `recurrence` takes taps one after the other, from the pixel before to the one after.
    taps = kernel.permute(0, 2, 1).flatten(1)
    found = pixelrnn.recurrence(gates.unsqueeze(1), taps.unsqueeze(0), (1, 0, -1))
    torch.testing.assert_close(found[:, 0], torch.stack(expected))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (5, 2), (1, 4), (4, 1), (1, 1)])
def test_diagonals_follow_the_equations(height, width):
    """gates = K_is x + K_above h above + K_left h left, c from the left: short or skewed."""
    torch.manual_seed(0)
    gates, kernel = torch.randn(2, 12, height, width, 3), torch.randn(2, 12, 6)
    expected = torch.zeros(2, 3, height, width, 3)
    outside = torch.zeros(3, 3)
    for d in range(2):
        cells = {}
        for r, k in itertools.product(range(height), range(width)):
            above = expected[d, :, r - 1, k] if r else outside
            left = expected[d, :, r, k - 1] if k else outside
            seen = gates[d, :, r, k] + kernel[d] @ torch.cat([above, left])
            expected[d, :, r, k], cells[r, k] = lstm(seen, cells.get((r, k - 1), outside))

    short = pixelrnn.over_diagonals(gates, kernel)
    skewed = pixelrnn.recurrence(pixelrnn.skew(gates).movedim(3, 0), kernel, (1, 0))
    torch.testing.assert_close(short, expected)
    torch.testing.assert_close(pixelrnn.unskew(skewed.movedim(0, 3)), expected)


def test_skewing_turns_diagonals_into_columns():
    """Row r moves r columns to the right, over zeros, and back."""
    x = torch.arange(1.0, 7.0).reshape(1, 2, 3, 1)
    skewed = pixelrnn.skew(x)

    assert skewed[0, :, :, 0].tolist() == [[1, 2, 3, 0], [0, 4, 5, 6]]
    assert torch.equal(pixelrnn.unskew(skewed), x)


@pytest.mark.parametrize("model", MODELS)
def test_cell_state_keeps_its_precision_under_autocast(model, monkeypatch):
    """Where autocast multiplies in bfloat16 the cell state, a sum over steps, stays float32."""
    kept, cell = set(), pixelrnn.cell
    monkeypatch.setattr(
        pixelrnn, "cell", lambda h, c, *rest: kept.add(c.dtype) or cell(h, c, *rest)
    )
    density = noisy(model, ImageShape(5, 4))
    with torch.autocast("cpu", torch.bfloat16):
        density.loss(torch.zeros(2, 5, 4, 1, dtype=torch.uint8)).backward()

    assert kept == {torch.float32}


@pytest.fixture(
    scope="module",
    params=[(RowLSTM, ImageShape(5, 7, 3)), (DiagonalBiLSTM, ImageShape(28, 28))],
    ids=["row-lstm", "diagonal-bilstm"],
)
def exported(request):
    """A density and its graph."""
    model, shape = request.param
    density = noisy(model, shape)
    return density, to_onnx(density)


def test_graph_tells_nothing_of_the_machine_it_was_exported_on(exported):
    """No path of a source file is left in it, not even inside the scans."""
    assert b"anomalyd/density" not in exported[1]


def test_graph_holds_one_scan_a_layer_of_a_step_per_line(exported):
    """The recurrences are Scan nodes: 5 steps for 5 rows, 55 for the diagonals of 28x28."""
    density, graph = exported
    proto = onnx.load_from_string(graph)
    scans = [node for node in proto.graph.node if node.op_type == "Scan"]
    assert len(scans) == 2

    hidden = [node.output[-1] for node in scans]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in hidden)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.zeros((1, *density.shape[:3]), dtype=np.uint8)
    steps = {len(h) for h in session.run(hidden, {"image": image})}
    assert steps == ({5} if isinstance(density, RowLSTM) else {55})


def test_exported_graph_is_the_density(exported):
    """Scan gives the numbers of the loop, whatever the batch."""
    density, graph = exported
    size = (5, *density.shape[:3])
    images = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)

    check_parity(density, graph, images, batch=3)


def test_exported_graph_is_causal(exported):
    """A changed pixel moves itself and nothing before it."""
    density, graph = exported
    shape = density.shape[:3]
    pixels = shape[0] * shape[1]
    places = range(0, pixels, 1 if pixels < 100 else 13)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    same = np.repeat(image[None], len(places), axis=0)
    changed = same.copy()
    for one, place in zip(changed, places, strict=True):
        one[divmod(place, shape[1])] ^= 0x55
    # Pairs at the same place of equal batches: the place decides how sums round.
    session = Session(graph, device="cpu", threads=1)
    maps = [session.run(batch, nll_map=True).nll_map for batch in (same, changed)]
    moved = (maps[0] != maps[1]).reshape(len(places), pixels)

    for row, place in zip(moved, places, strict=True):
        assert row[place]
        assert not row[:place].any(), place


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", [{"features": 0}, {"layers": 0}])
def test_impossible_options_are_refused_with_a_reason(model, options):
    """A network without features or layers is a ValueError that names the rule."""
    with pytest.raises(ValueError, match="at least 1"):
        noisy(model, ImageShape(3, 3), **options)
