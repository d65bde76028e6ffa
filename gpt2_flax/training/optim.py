"""Schedule, decay mask, clipping and update rule, as one optax chain."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib


def make_schedule(
    kind: str, peak: float, floor: float, warmup_steps: int, total_steps: int, decay_steps: int = 0
) -> optax.Schedule:
    """Learning rate of update n (from 0): a linear rise to `peak`, then `kind` down to `floor`.

    The first update is not wasted on a rate of 0: the rise takes n = 0 to peak / warmup_steps.
    The last update, n = total_steps - 1, is the last one above the floor.
    decay_steps: length of the linear fall that ends "wsd" (warmup, stable, decay: Hu et al. 2024,
    https://arxiv.org/abs/2404.06395); the other kinds fall from the warmup on.
    """
    falling = max(1, total_steps - warmup_steps)
    stable = max(0, falling - decay_steps)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, floor, falling),
        "cosine": optax.cosine_decay_schedule(peak, falling, alpha=floor / peak),
        "wsd": optax.linear_schedule(peak, floor, falling - stable, transition_begin=stable),
    }[kind]
    if not warmup_steps:
        return after
    rise = optax.linear_schedule(peak / warmup_steps, peak, max(1, warmup_steps - 1))
    return optax.join_schedules([rise, after], [warmup_steps])


def count_part(setting: float, total_steps: int) -> int:
    """Steps of a part of a run: a share of all steps below 1, a number of steps from 1 on."""
    return min(total_steps, round(setting * total_steps if setting < 1 else setting))


def scale_by_rate_of_step(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Descend at the learning rate of the `step` that `update` is given, a scalar from 0.

    It is not counted here: a step that leaves the optimizer alone still uses up its rate, so
    that the schedule ends at the last step.
    """

    def update(updates, state, params=None, *, step, **unused):
        del params, unused
        descent = -schedule(step)
        scaled = jax.tree.map(lambda leaf: jnp.asarray(descent, leaf.dtype) * leaf, updates)
        return scaled, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


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
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm (0: none), the update rule, decoupled decay, learning rate.

    Its `update` takes the keyword `step`, the number of the update from 0.
    """
    rule = {
        "adamw": lambda: optax.scale_by_adam(beta1, beta2, epsilon),
        "lion": lambda: optax.scale_by_lion(beta1, beta2),
        "sgd": lambda: optax.trace(decay=beta1),
        "muon": lambda: scale_by_muon(beta1, beta2, epsilon),
        "adafactor": scale_by_adafactor,
    }[name]()
    clip = clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    return optax.chain(clip, rule, decay, scale_by_rate_of_step(schedule))


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """optax's clipping, by one factor: where each number is divided, XLA keeps the quotients."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, largest / optax.tree.norm(updates))
        return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adafactor() -> optax.GradientTransformation:
    """Adafactor without momentum: of a matrix it keeps squared gradients by row and by column.

    Updates are clipped to a root mean square of 1 and not scaled by the size of the parameters,
    so that learning rates are of Adam's size (Shazeer and Stern 2018,
    https://arxiv.org/abs/1804.04235, sections 4 to 7).
    """
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


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


def describe_decay(params, weight_decay: float) -> str:
    """Which tensors decay and which don't, as a line for whoever started the run."""
    sizes = {True: [], False: []}
    mask = decay_mask(params)
    for leaf, decays in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True):
        sizes[decays and weight_decay > 0].append(leaf.size)
    parts = [
        f"{how} {len(found)} {'tensor' if len(found) == 1 else 'tensors'}"
        f" ({sum(found):,} parameters)"
        for how, found in ((f"{weight_decay:g} on", sizes[True]), ("none on", sizes[False]))
        if found
    ]
    return "weight decay: " + ", ".join(parts)
