"""loss.png: the curves of a run, drawn from the rows of its log."""

import io
import math

import numpy as np

from gpt2_flax.filesystem import replace_file

PLOT_FILE = "loss.png"
BLUE, RED, GREEN, GREY = "#4c78a8", "#e45756", "#54a24b", "#888888"
# More training losses than this are drawn pale, with the mean of so many neighbours over them.
CROWD, POINTS_OF_A_MEAN = 300, 100


def draw(rows: list[dict], path) -> None:
    """Draw losses, learning rate, gradient norm and tokens per second over tokens, as a PNG.

    rows: of metrics.jsonl; a value that is missing or not finite is not drawn.
    Raises StorageError.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 8), layout="constrained")
    losses, *others = figure.subplots(4, 1, sharex=True, height_ratios=(4, 1.2, 1.2, 1.2))
    draw_losses(losses, rows)
    names = {
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm",
        "tokens_per_second": "tokens/s",
    }
    for axes, (key, label) in zip(others, names.items(), strict=True):
        tokens, values = points(rows, key)
        axes.plot(tokens, values, marker_of_one(tokens), color=GREEN, lw=1, ms=4)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if len(values):
            axes.set_ylim(*limits(values))
        else:
            say_empty(axes)
    others[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    others[-1].yaxis.set_major_formatter(EngFormatter(sep=""))
    of_tokens = EngFormatter(sep="")
    of_tokens.ENG_PREFIXES = EngFormatter.ENG_PREFIXES | {9: "B", 12: "T"}  # not G for giga
    others[-1].xaxis.set_major_formatter(of_tokens)
    others[-1].set_xlabel("tokens trained on")
    figure.align_ylabels()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    replace_file(path, picture.getvalue())


def draw_losses(axes, rows: list[dict]) -> None:
    tokens, values = points(rows, "train_loss")
    crowd = len(values) // POINTS_OF_A_MEAN if len(values) > CROWD else 1
    if crowd > 1:
        axes.plot(tokens, values, color=BLUE, lw=0.5, alpha=0.35, label="training")
        label = f"training, mean of {crowd} points"
        axes.plot(means(tokens, crowd), means(values, crowd), color=BLUE, lw=1.5, label=label)
    elif len(values):
        axes.plot(tokens, values, marker_of_one(tokens), color=BLUE, lw=1, ms=4, label="training")
    at, held_out = points(rows, "validation_loss")
    if len(held_out):
        style = "o-" if len(held_out) <= 50 else "-"
        axes.plot(at, held_out, style, color=RED, ms=4, lw=1.5, label="validation")
        for index in sorted({int(held_out.argmin()), len(held_out) - 1}):
            axes.annotate(
                f"{held_out[index]:.3f}", (at[index], held_out[index]),
                textcoords="offset points", xytext=(-4, 9), ha="right", color=RED,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )  # fmt: skip
    if crowd > 1:  # the first fall would press all the rest into a flat line
        curves = [values, held_out] if len(held_out) else [values]
        low, high = min(map(min, curves)), max(np.percentile(curve, 98) for curve in curves)
        margin = 0.05 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    if len(values) or len(held_out):
        axes.legend(loc="upper right")
    else:
        say_empty(axes)


def points(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, values) of the rows that have both."""
    pairs = [(row.get("tokens"), row.get(key)) for row in rows]
    whole = [pair for pair in pairs if all(map(is_finite, pair))]
    tokens, values = np.array(whole, np.float64).reshape(-1, 2).T
    return tokens, values


def is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def means(values: np.ndarray, n: int) -> np.ndarray:
    """The means of n neighbours each; what is left over at the end is a mean of its own."""
    starts = np.arange(0, len(values), n)
    return np.add.reduceat(values, starts) / np.diff([*starts, len(values)])


def limits(values: np.ndarray) -> tuple[float, float]:
    """0 and a top that a few outliers, such as a first gradient, do not push away."""
    top = max(2 * np.percentile(values, 95), np.median(values))
    return 0.0, 1.08 * (min(values.max(), top) or 1.0)


def marker_of_one(tokens) -> str:
    return "o" if len(tokens) == 1 else "-"


def say_empty(axes) -> None:
    axes.set_yticks([])
    axes.text(
        0.5, 0.5, "no values yet", transform=axes.transAxes, ha="center", va="center", color=GREY
    )
