"""Schedule, decay mask, clipping and update rule, as one optax chain."""

import jax
import optax
import optax.contrib


def make_schedule(
    kind: str, peak: float, floor: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Learning rate of update n (from 0): a linear rise to `peak`, then `kind` down to `floor`.

    The first update is not wasted on a rate of 0: the rise takes n = 0 to peak / warmup_steps.
    The last update, n = total_steps - 1, is the last one above the floor.
    """
    falling = max(1, total_steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, floor, falling),
        "cosine": optax.cosine_decay_schedule(peak, falling, alpha=floor / peak),
    }[kind]
    if not warmup_steps:
        return after
    rise = optax.linear_schedule(peak / warmup_steps, peak, max(1, warmup_steps - 1))
    return optax.join_schedules([rise, after], [warmup_steps])


def count_warmup(setting: float, total_steps: int) -> int:
    """Steps of warmup: a share of all steps below 1, a number of steps from 1 on."""
    return min(total_steps, round(setting * total_steps if setting < 1 else setting))


def decay_mask(params) -> dict:
    """True for the leaves that decay: matrices, not biases and LayerNorm scales."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad_clip: float,
) -> optax.GradientTransformation:
    """Clipping by global norm (0: none), the update rule, decoupled decay, learning rate."""
    rule = {
        "adamw": lambda: optax.scale_by_adam(beta1, beta2, epsilon),
        "lion": lambda: optax.scale_by_lion(beta1, beta2),
        "sgd": lambda: optax.trace(decay=beta1),
        "muon": lambda: scale_by_muon(beta1, beta2, epsilon),
    }[name]()
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    return optax.chain(clip, rule, decay, optax.scale_by_learning_rate(schedule))


def scale_by_muon(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Muon for the matrices inside the blocks, Adam for embeddings, head, scales and biases.

    Both look ahead along the momentum (Nesterov), as optax's Muon does by default.
    Muon's updates are given Adam's usual size, so that one learning rate serves both
    (Liu et al. 2025, https://arxiv.org/abs/2502.16982).
    """
    muon = optax.contrib.muon(
        learning_rate=1.0,
        adam_learning_rate=1.0,
        beta=beta1,
        adam_b1=beta1,
        adam_b2=beta2,
        eps=epsilon,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_dimensions,
    )
    return optax.chain(muon, optax.scale(-1.0))  # it descends by itself; the chain does that


def muon_dimensions(params):
    """Which axes of a kernel are (in, out), None for what Muon leaves to Adam."""

    def dimensions(path, leaf):
        names = [key.key for key in path]
        inside_a_block = names[-1] == "kernel" and names[0] != "lm_head"
        return optax.contrib.MuonDimensionNumbers((1,), (0,)) if inside_a_block else None

    return jax.tree_util.tree_map_with_path(dimensions, params)
