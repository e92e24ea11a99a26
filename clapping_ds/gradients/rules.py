"""How the step size of SGD follows batch, replicas and compression, and what is printed of it.

N replicas with B samples each and step size eta; a codec C that is right on average, with relative variance
omega: E C(v) = v, E ||C(v) - v||^2 <= omega ||v||^2. Sources: arXiv 2502.17009 (DCSGD, DSignSGD) and arXiv
1806.06573 (delayed and compressed gradients); `benchmarks.training.noise` checks each rule by Monte Carlo.

    DCSGD      x <- x - eta / N * sum C(g_i)         stationary loss ~ eta (1 + omega) / (N B)
    DSignSGD   x <- x - eta / N * sum sign(g_i)      stationary loss ~ eta / (N sqrt(B))

The codec `sign` has a scale, the mean magnitude of each group, so it is no DSignSGD: at the same eta its
loss is that of SGD, 2 / pi as fast; so is that of other codecs that shrink what they send, by their
distortion. With `ef14` it is that of SGD, at full speed. All of this is of SGD, for the loss at which it
stays, to first order in eta; Adam, which divides by the size of gradients, divides by their noise as well.
"""

from functools import lru_cache

import torch

from clapping_ds.codecs import AnyCodec, Codec, Context, Eden, Float8, Quantizer, Raw, bits_per_value
from clapping_ds.codecs.sequence import label
from clapping_ds.config import DataParallelConfig

NUM_VALUES = 1 << 14
NUM_DRAWS = 8
MOST_BITS = 2.0
"""With fewer and error feedback a warm-up is advised: 1-bit Adam, arXiv 2102.02888."""
WORTH_SAYING = 1.05
"""Changes by less are none."""


@lru_cache
def measure_omega(codec: Codec) -> float:
    """E ||C(v) - v||^2 / ||v||^2 of Gaussian values, by Monte Carlo with a fixed seed. For eden with the
    unbiased scale that is omega = D / (1 - D), D the distortion of Max's code; of codecs that are wrong on
    average (`sign`, least squares) it is no omega."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for draw in range(NUM_DRAWS):
        value = torch.randn(NUM_VALUES, generator=generator)
        payload = torch.empty(codec.nbytes(value.shape, value.dtype), dtype=torch.uint8)
        received = torch.zeros_like(value)
        codec.encode_(value, payload, Context(received, seed=draw, state=codec.new_state(1, value.device)))
        total += float((received - value).square().sum() / value.square().sum())
    return total / NUM_DRAWS


def add_variances(scatter: float, gather: float) -> float:
    """omega of both ways together, each right on average: replicas' gradients with `scatter`, then their mean
    with `gather`; while gradients are mostly noise, 1 + omega is the product."""
    return (1 + scatter) * (1 + gather) - 1


def scale_dcsgd(
    batch: float = 1.0, replicas: float = 1.0, omega: float = 0.0, omega_before: float = 0.0
) -> float:
    """k for eta -> k eta, where B -> `batch` B and N -> `replicas` N and omega changes, that keeps the
    stationary loss: k (1 + omega) = replicas * batch * (1 + omega_before)."""
    return replicas * batch * (1 + omega_before) / (1 + omega)


def scale_dsignsgd(batch: float = 1.0, replicas: float = 1.0) -> float:
    """The same for DSignSGD: k = replicas * sqrt(batch)."""
    return float(replicas * batch**0.5)


def find_stable_step(
    smoothness: float, omega: float = 0.0, replicas: int = 1, delay: int = 0, gather: float = 0.0
) -> float:
    """A step size of SGD that is small enough: 1 / (L (a + tau sqrt(a))), a = (1 + omega / N) (1 + gather).
    On quadratics 1.6 to 4 times as much still was.

    smoothness   L, the largest curvature
    omega        of what replicas send, alike on all of them
    delay        tau, steps that gradients are old
    gather       omega of what the mean is sent with: that error is the same on all replicas
    """
    growth = (1 + omega / replicas) * (1 + gather)
    return float(1 / (smoothness * (growth + delay * growth**0.5)))


def describe(plan: DataParallelConfig, num_replicas: int, has_gather: bool) -> str:
    """For the user: what the exchange costs, and what it asks of the step size. has_gather: whether the mean
    is compressed again."""
    legs = [plan.scatter, plan.gather] if has_gather else [plan.scatter]
    bits = [bits_per_value(codec, torch.float32) for codec in legs]
    costs = ", ".join(
        f"{label(codec)} {of:.2f} bit" + (" and a byte per column" if plan.equalizes(codec) else "")
        for codec, of in zip(legs, bits, strict=True)
    )
    saving = 32 * len(legs) / sum(bits)
    lines = [f"gradients of {num_replicas} replicas: {costs} ({saving:.1f}x less than fp32)"]
    if plan.weights is not None:
        bits_of_weights = bits_per_value(plan.weights, torch.float32)
        lines.append(f"changes of weights: {label(plan.weights)} {bits_of_weights:.2f} bit")
    lines.append(_advise(plan, legs))
    has_one_bit = any(
        plan.feedback(codec) != "none" and of < MOST_BITS for codec, of in zip(legs, bits, strict=True)
    )
    if has_one_bit and plan.warmup_steps == 0:
        lines.append(
            "warmup_steps = 0: with Adam give those in which the learning rate rises, while its second "
            "moment learns of gradients"
        )
    return "\n".join(lines)


def _advise(plan: DataParallelConfig, legs: list[AnyCodec]) -> str:
    growth = speed = 1.0
    for codec in legs:
        if plan.feedback(codec) == "none" and not isinstance(codec, Eden | Quantizer | Float8 | Raw):
            return f"step size of SGD: none is known for {label(codec)} without error feedback"
        if plan.feedback(codec) == "none" and isinstance(codec, Eden | Quantizer):
            if codec.is_unbiased:
                growth *= 1 + measure_omega(codec)
            else:
                speed *= 1 - measure_omega(codec)
    advice = "step size of SGD: as uncompressed"
    if growth > WORTH_SAYING:
        advice = (
            f"step size of SGD: noise grows by 1 + omega = {growth:.2f}; learning rate x {1 / growth:.2f}, "
            f"or batch x {growth:.2f}, keeps the loss at which it stays"
        )
    if speed < 1 / WORTH_SAYING:
        advice += f"; {speed:.2f} times as fast without error feedback"
    return advice
