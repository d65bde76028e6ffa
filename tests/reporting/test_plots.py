"""loss.png: what is drawn of which rows."""

import os

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from gpt2_flax.errors import StorageError
from gpt2_flax.reporting import plots


def train_row(step, **more):
    row = {"step": step, "tokens": 100 * step, "train_loss": 5.0 / step, "learning_rate": 0.1}
    return row | {"grad_norm": 0.5 * step, "tokens_per_second": 70.0} | more


ROWS = [
    train_row(1, tokens_per_second=None),
    train_row(2, validation_loss=2.75),
    {"step": 3, "tokens": 300, "validation_loss": 2.25},
    train_row(4, grad_norm=float("nan")),
    {"step": 5, "train_loss": 9.0},  # of which the tokens are not known
    train_row(6, train_loss=float("inf"), validation_loss=2.5),
]
LONG = [train_row(n, train_loss=3 + 90 / n) for n in range(1, 1001)]


@pytest.mark.parametrize(
    "rows",
    [ROWS, ROWS[:1], [], ROWS[2:3], [{"step": 1}], LONG],
    ids=["all", "one", "none", "validation only", "no numbers", "long"],
)
def test_the_curves_are_a_picture_whatever_rows_there_are(rows, tmp_path):
    plots.draw(rows, tmp_path / "loss.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "loss.png").shape
    assert (height, width) == (880, 880)
    assert os.listdir(tmp_path) == ["loss.png"]


@pytest.fixture
def axes(monkeypatch):
    """Draws rows and gives the four axes back."""
    seen = []
    savefig = matplotlib.figure.Figure.savefig

    def keep(figure, *arguments, **options):
        seen[:] = figure.axes
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)

    def draw(rows, folder):
        plots.draw(rows, folder / "loss.png")
        return seen

    return draw


def test_every_value_is_drawn_over_its_tokens(axes, tmp_path):
    losses, rates, norms, speeds = axes(ROWS, tmp_path)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert drawn == {
        "training": [[100, 5.0], [200, 2.5], [400, 1.25]],
        "validation": [[200, 2.75], [300, 2.25], [600, 2.5]],
    }
    assert [text.get_text() for text in losses.texts] == ["2.250", "2.500"]  # lowest and last
    assert rates.lines[0].get_xydata().tolist() == [[n, 0.1] for n in (100, 200, 400, 600)]
    assert norms.lines[0].get_xydata().tolist() == [[100, 0.5], [200, 1.0], [600, 3.0]]
    assert speeds.lines[0].get_xydata().tolist() == [[n, 70.0] for n in (200, 400, 600)]
    labels = [each.get_ylabel() for each in (losses, rates, norms, speeds)]
    assert labels == ["loss, nats per token", "learning rate", "gradient norm", "tokens/s"]


def test_a_run_without_validation_or_values_says_so(axes, tmp_path):
    losses, *others = axes([{"step": 1, "tokens": 7, "train_loss": 2.0}], tmp_path)
    assert [line.get_label() for line in losses.lines] == ["training"]
    assert losses.lines[0].get_marker() == "o"  # a line of one point cannot be seen
    assert [each.texts[0].get_text() for each in others] == ["no values yet"] * 3


def test_a_long_run_shows_means_of_neighbours_and_its_end_in_detail(axes, tmp_path):
    losses = axes([*LONG, {"step": 1001, "tokens": 100_100, "validation_loss": 6.0}], tmp_path)[0]
    raw, mean, held_out = losses.lines
    assert (raw.get_label(), mean.get_label()) == ("training", "training, mean of 10 points")
    y = np.array([row["train_loss"] for row in LONG])
    np.testing.assert_allclose(mean.get_ydata(), y.reshape(100, 10).mean(1))
    np.testing.assert_allclose(mean.get_xdata()[0], 550)
    bottom, top = losses.get_ylim()
    assert bottom < 3.09 < 6.0 < top < 10  # the first losses, up to 93, are above
    assert held_out.get_ydata().tolist() == [6.0]


def test_a_rest_at_the_end_is_a_mean_of_its_own():
    np.testing.assert_allclose(plots.means(np.array([1.0, 3, 5, 7, 100]), 2), [2, 6, 100])


@pytest.mark.parametrize(
    ("values", "top"),
    [([0.5] * 99 + [900.0], 1.0), ([0.5, 0.6], 0.6), ([0.0, 0.0], 1.0)],
)
def test_a_few_outliers_do_not_push_the_rest_down(values, top):
    assert plots.limits(np.array(values)) == (0.0, pytest.approx(1.08 * top))


def test_curves_that_cannot_be_written_are_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*loss\.png: No such file"):
        plots.draw(ROWS, tmp_path / "missing" / "loss.png")
