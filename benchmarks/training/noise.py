"""The step-size rules of `clapping_ds.gradients.rules`, checked by Monte Carlo where theory is exact.

    python -m benchmarks.training.noise [--quick] [--parts stationary scaling delay network]

Sources: arXiv 2502.17009 (DCSGD, DSignSGD: noise and step sizes) and arXiv 1806.06573 (step sizes for delayed
and compressed gradients). Four parts, one process on one core, ten minutes together:

    stationary   loss of a noisy quadratic over windows of growing length, with and without heavy tails
    scaling      the same loss relative to a base, where batch, replicas or codec change and the step size
                 follows a rule or does not
    delay        largest stable step size over the guaranteed one, gradients tau steps old
    network      the scaling rules on a two-layer network, teacher and student, every sample new

The quadratic: f(x) = 1/2 sum_i l_i x_i^2, 64 coordinates, l from 1/4 to 1. A replica's gradient is l x + the
mean of B draws of noise: Gaussian with variance 1, or Student's t with nu degrees of freedom, whose variance
is nu / (nu - 2), infinite for nu <= 2. All independent trials are one tensor [trials, replicas, coordinates].

Runs start at the minimum, which knows nothing of a prediction, and are as long as their step size demands:
equally many times 1 / (step * pull), where `pull` is the mean update over step * l x. Standard errors are of
the mean over trials (or teachers); with infinite variance of the loss (nu <= 4) they say little.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import RESULTS, write_results
from clapping_ds.codecs import Codec, Context, Eden, Quantizer
from clapping_ds.gradients.rules import (
    add_variances,
    find_stable_step,
    measure_omega,
    scale_dcsgd,
    scale_dsignsgd,
)
from clapping_ds.report import format_table

NUM_COORDINATES = 64
"""One group of the codecs, so that every trial's every gradient has a scale of its own."""
FLATTEST = 0.25
"""The least curvature; the largest is 1."""
GAUSSIAN = math.inf
"""nu of Gaussian noise, as Student's t tends to it."""
BURN_IN = 0.4
"""Share of a run that is not measured: with 20 times 1 / (step * pull), exp(-4) of the slowest coordinate's
distance to its stationary loss is left."""
STATIONARY_STEP = 0.02
"""step * pull of the first part."""
EXPLODED = 1e12
"""times the first ||x||^2: no need to go on."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    trials: int = 128
    relaxations: float = 20.0
    """Length of a run in units of 1 / (step * pull)."""
    base_step: float = 0.004
    """eta that batch and replicas multiply by up to 16."""
    windows: tuple[int, ...] = (128, 1024, 8192)
    delays: tuple[int, ...] = (0, 4, 16)
    delayed_steps: int = 2000
    seeds: int = 8
    network_time: float = 60.0
    """step * pull * steps of the network."""
    network_step: float = 0.005


FULL = Size()
QUICK = Size(16, 6.0, 0.02, (32, 128), (0, 4), 200, 2, 0.5, 0.01)


@dataclass(frozen=True)
class Method:
    """How the replicas' gradients become one update.

    omega    relative variance of random dropping, or the codec's own as measured
    gather   relative variance of random dropping of the mean
    """

    name: str
    omega: float = 0.0
    gather: float = 0.0
    codec: Codec | None = None
    feedback: bool = False

    def compress(self, value: torch.Tensor, seed: int, generator: torch.Generator) -> torch.Tensor:
        """What arrives of fp32 values [..., coordinates], each row by itself."""
        if self.name == "dsignsgd":
            return value.sign()
        if self.codec is not None:
            return apply_codec(self.codec, value, seed)
        return drop(value, self.omega, generator)


NONE = Method("none")
DSIGNSGD = Method("dsignsgd")
SIGN = Method("sign", codec=Quantizer(name="sign", group_size=NUM_COORDINATES))
SIGN_EF14 = replace(SIGN, name="sign + EF14", feedback=True)


@dataclass(frozen=True)
class Setup:
    """One optimizer under one noise."""

    method: Method
    step: float
    batch: int = 1
    replicas: int = 2
    nu: float = GAUSSIAN


def make_dropping(omega: float, gather: float = 0.0) -> Method:
    """Coordinates dropped at random, exactly unbiased, at the replicas and of their mean."""
    return Method("drop both ways" if gather else "drop", omega, gather)


def make_eden(bits: int) -> Method:
    """The package's unbiased codec of so many bits, with its omega as measured."""
    codec = Eden.model_validate({"name": f"eden{bits}", "scale": "unbiased", "group_size": NUM_COORDINATES})
    return Method(codec.name, measure_omega(codec), codec=codec)


def make_spectrum() -> torch.Tensor:
    """Curvatures l [coordinates], evenly spaced in their logarithm."""
    return torch.logspace(math.log10(FLATTEST), 0, NUM_COORDINATES)


def draw_noise(shape: Sequence[int], nu: float, batch: int, generator: torch.Generator) -> torch.Tensor:
    """fp32 [*shape], means of `batch` draws of noise each."""
    if nu == GAUSSIAN:
        return torch.randn(*shape, generator=generator) / batch**0.5
    # Infinite variance knows no division by sqrt(batch), so the draws are drawn.
    return draw_student((*shape, batch), nu, generator).mean(-1).float()


def draw_student(shape: Sequence[int], nu: float, generator: torch.Generator) -> torch.Tensor:
    """fp64 [*shape] of Student's t, by the polar method of Bailey (1994), exact for every nu."""
    # The least uniform number makes the largest draw: fp32's 2^-24 would cut the tails that are to be seen.
    uniform = 1 - torch.rand(*shape, generator=generator, dtype=torch.float64)
    angle = 2 * torch.pi * torch.rand(*shape, generator=generator)
    return (nu * (uniform ** (-2 / nu) - 1)).sqrt() * angle.cos()


def drop(value: torch.Tensor, omega: float, generator: torch.Generator) -> torch.Tensor:
    """Every coordinate kept with probability 1 / (1 + omega) and then scaled by 1 + omega."""
    if not omega:
        return value
    kept = torch.rand(value.shape, generator=generator) < 1 / (1 + omega)
    return value * kept * (1 + omega)


def apply_codec(codec: Codec, value: torch.Tensor, seed: int) -> torch.Tensor:
    """What arrives of fp32 `value`, any shape."""
    value, received = value.contiguous(), torch.zeros(value.shape)
    payload = torch.empty(codec.nbytes(value.shape, value.dtype), dtype=torch.uint8)
    codec.encode_(value, payload, Context(received, seed=seed))
    return received


def exchange(
    method: Method,
    gradient_TND: torch.Tensor,
    error_TND: torch.Tensor,
    seed: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """The update [trials, coordinates] of all replicas; with feedback their errors are kept (EF14)."""
    wanted_TND = gradient_TND + error_TND if method.feedback else gradient_TND
    sent_TND = method.compress(wanted_TND, seed, generator)
    if method.feedback:
        torch.sub(wanted_TND, sent_TND, out=error_TND)
    return drop(sent_TND.mean(1), method.gather, generator)


def simulate(setup: Setup, num_steps: int, num_trials: int, seed: int) -> torch.Tensor:
    """Loss [steps, trials] of the quadratic from its minimum on."""
    generator = torch.Generator().manual_seed(seed)
    curvature_D = make_spectrum()
    x_TD = torch.zeros(num_trials, NUM_COORDINATES)
    shape = (num_trials, setup.replicas, NUM_COORDINATES)
    error_TND = torch.zeros(shape)
    losses = torch.empty(num_steps, num_trials)
    for step in range(num_steps):
        noise_TND = draw_noise(shape, setup.nu, setup.batch, generator)
        gradient_TND = (curvature_D * x_TD)[:, None] + noise_TND
        x_TD -= setup.step * exchange(setup.method, gradient_TND, error_TND, seed << 32 | step, generator)
        losses[step] = x_TD.square() @ curvature_D / 2
    return losses


def find_density(nu: float) -> float:
    """The noise's density at 0."""
    if nu == GAUSSIAN:
        return (2 * math.pi) ** -0.5
    return math.gamma((nu + 1) / 2) / (math.gamma(nu / 2) * (nu * math.pi) ** 0.5)


def find_magnitude(nu: float) -> float:
    """The noise's mean magnitude."""
    if nu == GAUSSIAN:
        return (2 / math.pi) ** 0.5
    return 2 * nu * find_density(nu) / (nu - 1)


def find_variance(nu: float) -> float:
    """The noise's variance."""
    if nu == GAUSSIAN:
        return 1.0
    return nu / (nu - 2) if nu > 2 else math.inf


def find_pull(method: Method, nu: float = GAUSSIAN, batch: int = 1) -> float:
    """Mean update over step * l x where gradients are mostly noise. Exact for Gaussian noise and for B = 1;
    else as for the stable law that means of many draws tend to."""
    if method.name == "dsignsgd":
        return 2 * find_density(nu) * batch ** (1 - 1 / min(nu, 2))
    if method.name == "sign":  # The mean magnitude falls as the slope of the mean sign grows.
        return 2 * find_density(nu) * find_magnitude(nu)
    return 1.0


def count_steps(setup: Setup, time: float) -> int:
    """How many steps make step * pull * steps equal to `time`."""
    return math.ceil(time / (setup.step * find_pull(setup.method, setup.nu, setup.batch)))


def predict_loss(setup: Setup) -> float | None:
    """Stationary loss of the quadratic; None where nothing simple is known.

    DCSGD: exact for independent dropping. Each coordinate's second moment m obeys
        m <- (1 - eta l)^2 m + eta^2 ((a - 1) l^2 m + (1 + omega)(1 + gather) V / (N B))
    with a = (1 + omega / N)(1 + gather) and V the noise's variance. Signs: first order in the step size.
    """
    method, variance = setup.method, find_variance(setup.nu)
    share = setup.step * NUM_COORDINATES / (4 * setup.replicas)
    if method.name in ("dsignsgd", "sign") and setup.nu < GAUSSIAN and setup.batch > 1:
        return None
    if method.name == "dsignsgd":
        return share / find_pull(method, setup.nu, setup.batch)
    if method.name == "sign":
        square = find_magnitude(setup.nu) ** 2
        square += (variance - square) / NUM_COORDINATES  # The scale is a mean over the group.
        return share * square / find_pull(method, setup.nu) / setup.batch
    growth = (1 + method.omega / setup.replicas) * (1 + method.gather)
    noise = (1 + add_variances(method.omega, method.gather)) * variance / setup.batch
    return float((share * noise / (1 - setup.step * make_spectrum() * growth / 2)).mean())


def measure_stationary(setup: Setup, size: Size, seed: int) -> tuple[float, float, int]:
    """Mean stationary loss, its standard error and the number of steps of the run."""
    num_steps = count_steps(setup, size.relaxations)
    losses = simulate(setup, num_steps, size.trials, seed)[int(BURN_IN * num_steps) :]
    return *find_mean(losses.mean(0)), num_steps


def find_mean(value: torch.Tensor) -> tuple[float, float]:
    """Of independent values: the mean and its standard error."""
    return float(value.mean()), float(value.std() / len(value) ** 0.5)


def make_row(part: str, setup: Setup, **found: Any) -> Row:
    """One line of the table."""
    noise = "Gaussian" if setup.nu == GAUSSIAN else "Student t"
    blank = {"tau": 0, "rule": "", "factor": 1.0, "steps": 0, "trials": 0, "quantity": "", "value": 0.0}
    return {
        "part": part,
        "method": setup.method.name,
        "noise": noise,
        "nu": setup.nu,
        "batch": setup.batch,
        "replicas": setup.replicas,
        "omega": add_variances(setup.method.omega, setup.method.gather),
        "step size": setup.step,
        **blank,
        "standard error": None,
        "predicted": None,
        **found,
    }


def list_stationary() -> list[Setup]:
    """The methods under three noises, all with the same pull."""
    methods = [NONE, make_dropping(9), make_eden(4), make_eden(1), SIGN, SIGN_EF14, DSIGNSGD]
    return [
        Setup(method, STATIONARY_STEP / find_pull(method, nu), nu=nu)
        for nu in (GAUSSIAN, 3, 1.5)
        for method in methods
    ]


def measure_windows(setup: Setup, size: Size, seed: int) -> Iterator[Row]:
    """Loss over windows of growing length: mean, the median trial's mean, the largest; then by trials."""
    burn_in = int(8 / STATIONARY_STEP)
    losses = simulate(setup, burn_in + size.windows[-1], size.trials // 2, seed)[burn_in:]
    shared: Row = {"predicted": predict_loss(setup)}
    for steps in size.windows:
        window = losses[:steps]
        mean, error = find_mean(window.mean(0))
        facts = {"steps": steps, "trials": window.shape[1]}
        statistics = {"median": float(window.mean(0).median()), "largest": float(window.max())}
        yield make_row(
            "stationary", setup, **facts, quantity="mean", value=mean, **{"standard error": error}, **shared
        )
        for quantity, value in statistics.items():
            yield make_row("stationary", setup, **facts, quantity=quantity, value=value)
    for trials in (size.trials // 32, size.trials // 8):
        mean = float(losses[:, :trials].mean())
        facts = {"steps": size.windows[-1], "trials": trials}
        yield make_row("stationary", setup, **facts, quantity="mean", value=mean, **shared)


def run_stationary(size: Size) -> Iterator[Row]:
    """Part 1."""
    for seed, setup in enumerate(list_stationary()):
        yield from measure_windows(setup, size, seed)


@dataclass(frozen=True)
class Change:
    """What changes against a base, and the rules that the step size is changed by.

    batch, replicas   factors
    method            the method instead of the base's
    """

    batch: float = 1
    replicas: int = 1
    method: Method | None = None
    rules: tuple[str, ...] = ("dcsgd", "none")


def find_factor(rule: str, change: Change, nu: float) -> float:
    """k for step -> k step, from a base without compression.

    dcsgd, dsignsgd   the package's rules
    none              1
    linear            as if nothing were compressed
    stable            signs of means of draws with nu < 2: their scale falls as B^(1/nu - 1)
    """
    omega = 0.0 if change.method is None else add_variances(change.method.omega, change.method.gather)
    return {
        "dcsgd": scale_dcsgd(change.batch, change.replicas, omega),
        "dsignsgd": scale_dsignsgd(change.batch, change.replicas),
        "none": 1.0,
        "linear": change.replicas * change.batch,
        "stable": change.replicas * change.batch ** (1 - 1 / min(nu, 2)),
    }[rule]


def apply_change(base: Setup, change: Change, rule: str) -> tuple[Setup, float]:
    """The changed setup, and the step size's factor."""
    factor = find_factor(rule, change, base.nu)
    setup = replace(
        base,
        method=change.method or base.method,
        step=base.step * factor,
        batch=round(base.batch * change.batch),
        replicas=base.replicas * change.replicas,
    )
    return setup, factor


def list_changes(step: float) -> list[tuple[Setup, list[Change]]]:
    """Bases, and what is changed of each. The first base's step size leaves room for a factor of 16."""
    signs = ("dsignsgd", "none", "linear")
    both = ("dcsgd", "dsignsgd")
    edens = [make_eden(bits) for bits in (4, 3, 2, 1)]
    drops = [make_dropping(method.omega) for method in edens]
    more = [Change(4), Change(16), Change(replicas=4), Change(replicas=16)]
    compressed = [*edens, *drops, make_dropping(9), make_dropping(0.571, 0.571)]
    many = (edens[3], make_dropping(9))
    return [
        (
            Setup(NONE, step, batch=4),
            [
                *(Change(0.25), *more, Change(4, 4)),
                *(Change(4, 4, method, ("dcsgd", "linear", "none")) for method in many),
                Change(16, 1, make_dropping(9), ("dcsgd", "linear", "none")),
            ],
        ),
        (Setup(NONE, 5 * step, batch=4), [Change(method=method) for method in compressed]),
        (
            Setup(DSIGNSGD, step / find_pull(DSIGNSGD, GAUSSIAN, 16), batch=16),
            [replace(change, rules=signs) for change in (Change(0.25), *more, Change(4, 4))],
        ),
        *(
            (
                Setup(DSIGNSGD, step / find_pull(DSIGNSGD, nu, 4), batch=4, nu=nu),
                [Change(4, rules=("dsignsgd", "stable")), Change(16, rules=("dsignsgd", "stable"))],
            )
            for nu in (3, 1.5)
        ),
        (
            Setup(NONE, step, batch=4),
            [Change(method=method, rules=("dcsgd",)) for method in (SIGN, SIGN_EF14)],
        ),
        *(
            (Setup(method, step, batch=4), [replace(change, rules=both) for change in (more[1], more[3])])
            for method in (SIGN, SIGN_EF14)
        ),
    ]


def run_scaling(size: Size) -> Iterator[Row]:
    """Part 2."""
    seed = 1000
    for base, changes in list_changes(size.base_step):
        loss, error, num_steps = measure_stationary(base, size, seed)
        facts = {"trials": size.trials, "quantity": "loss", "predicted": predict_loss(base)}
        yield make_row(
            "scaling", base, rule="base", steps=num_steps, value=loss, **{"standard error": error}, **facts
        )
        for change in changes:
            for rule in change.rules:
                seed += 1
                setup, factor = apply_change(base, change, rule)
                yield measure_change(base, (loss, error), setup, factor, rule, size, seed)
        seed += 1


def measure_change(
    base: Setup,
    of_base: tuple[float, float],
    setup: Setup,
    factor: float,
    rule: str,
    size: Size,
    seed: int,
) -> Row:
    """The stationary loss relative to the base's. of_base: its mean and standard error."""
    loss, error, num_steps = measure_stationary(setup, size, seed)
    ratio = loss / of_base[0]
    predicted, of_predicted = predict_loss(setup), predict_loss(base)
    return make_row(
        "scaling",
        setup,
        rule=rule,
        factor=factor,
        steps=num_steps,
        trials=size.trials,
        quantity="loss / base",
        value=ratio,
        predicted=predicted and of_predicted and predicted / of_predicted,
        **{"standard error": ratio * math.hypot(error / loss, of_base[1] / of_base[0])},
    )


def find_growth(step: float, growth: float, delay: int) -> float:
    """Factor per step of E x^2 for x <- x - step C(x `delay` steps ago), E C(v) = v, E C(v)^2 = growth v^2.

    Exact: the spectral radius of M -> A M A' + (growth - 1) G M G', M the second moments of the last
    delay + 1 iterates, A the mean of the step and G what the error multiplies.
    """
    size = delay + 1
    mean = torch.diag(torch.ones(delay, dtype=torch.float64), -1)
    mean[0, 0] = 1
    mean[0, delay] -= step
    error = torch.zeros(size, size, dtype=torch.float64)
    error[0, delay] = step
    moments = torch.kron(mean, mean) + (growth - 1) * torch.kron(error, error)
    return float(torch.linalg.eigvals(moments).abs().max())


def find_threshold(growth: float, delay: int) -> float:
    """The largest step size at curvature 1 for which E x^2 does not grow, by bisection to 2^-20 of itself."""
    low, high = 0.0, 2.0
    while high - low > high * 2**-20:
        step = (low + high) / 2
        low, high = (step, high) if find_growth(step, growth, delay) < 1 else (low, step)
    return low


def simulate_delay(
    setup: Setup, delay: int, num_steps: int, num_trials: int, seed: int
) -> tuple[torch.Tensor, int]:
    """||x||^2 over its first value [trials], after all steps or when it exploded, and the number of steps.
    No noise but the codec's; all replicas have the same gradient."""
    generator = torch.Generator().manual_seed(seed)
    curvature_D = make_spectrum()
    recent = [torch.ones(num_trials, NUM_COORDINATES)] * (delay + 1)
    shape = (num_trials, setup.replicas, NUM_COORDINATES)
    error_TND = torch.zeros(shape)
    for step in range(num_steps):
        gradient_TND = (curvature_D * recent[0])[:, None].expand(shape)
        update_TD = exchange(setup.method, gradient_TND, error_TND, seed << 32 | step, generator)
        recent = [*recent[1:], recent[-1] - setup.step * update_TD]
        square_T = recent[-1].square().mean(1)
        if square_T.mean() > EXPLODED:
            break
    return square_T, step + 1


def list_delayed() -> list[tuple[Method, int]]:
    """Methods and numbers of replicas."""
    return [
        *((make_dropping(omega) if omega else NONE, 1) for omega in (0.0, 0.57, 9.0)),
        (make_dropping(9), 4),
        (make_eden(1), 1),
    ]


def run_delay(size: Size) -> Iterator[Row]:
    """Part 3: the exact threshold over the guaranteed step size, and trials just below and far above it."""
    for seed, (method, replicas) in enumerate(list_delayed(), 2000):
        for delay in size.delays:
            bound = find_stable_step(1.0, method.omega, replicas, delay)
            setup = Setup(method, bound, replicas=replicas)
            threshold = find_threshold(1 + method.omega / replicas, delay)
            yield make_row("delay", setup, tau=delay, quantity="threshold / bound", value=threshold / bound)
            for factor in (0.95, 4.0):
                yield from measure_delay(replace(setup, step=factor * bound), delay, factor, size, seed)
    yield from check_gather()


def measure_delay(setup: Setup, delay: int, factor: float, size: Size, seed: int) -> Iterator[Row]:
    """The exact factor of E x^2 per step at curvature 1, and what became of ||x||^2 of the trials. Their mean
    can fall where E x^2 grows: with a large omega that is the work of trials too rare to be among them."""
    growth = find_growth(setup.step, 1 + setup.method.omega / setup.replicas, delay)
    num_trials = size.trials // 4
    square_T, steps = simulate_delay(setup, delay, size.delayed_steps, num_trials, seed)
    facts = {"tau": delay, "rule": f"{factor:g} x bound", "factor": factor, "steps": steps}
    yield make_row("delay", setup, **{**facts, "steps": 1}, quantity="E x^2 / before", value=growth)
    for quantity, value in (("mean", square_T.mean()), ("median", square_T.median())):
        quantity = f"{quantity} ||x||^2 / first"
        yield make_row("delay", setup, **facts, trials=num_trials, quantity=quantity, value=float(value))


def check_gather() -> Iterator[Row]:
    """The threshold where the mean is compressed as well: its error is not averaged over replicas, so that
    a = (1 + omega / N)(1 + gather), which `add_variances` and a division by N do not give."""
    method, replicas = make_dropping(0.57, 9), 16
    growth = (1 + method.omega / replicas) * (1 + method.gather)
    bounds = {
        "omega both ways / N": find_stable_step(
            1.0, add_variances(method.omega, method.gather), replicas=replicas
        ),
        "(1 + omega / N)(1 + gather)": find_stable_step(1.0, growth - 1),
    }
    for rule, bound in bounds.items():
        value = find_threshold(growth, 0) / bound
        setup = Setup(method, bound, replicas=replicas)
        yield make_row("delay", setup, rule=rule, quantity="threshold / bound", value=value)


NUM_HIDDEN = 16
NUM_INPUTS = 15
NUM_WEIGHTS = NUM_HIDDEN * (NUM_INPUTS + 1)
NUM_HELD_OUT = 2048
NUM_EVALUATIONS = 200


def draw_teacher(num_seeds: int, generator: torch.Generator) -> torch.Tensor:
    """Weights [seeds, hidden, inputs + 1]; the last column leads to the output."""
    weights_SHI = torch.randn(num_seeds, NUM_HIDDEN, NUM_INPUTS + 1, generator=generator)
    weights_SHI[..., :-1] *= 2 / NUM_INPUTS**0.5
    return weights_SHI


def apply_network(weights_SHI: torch.Tensor, input_SRI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [seeds, samples] and hidden values [seeds, samples, hidden]."""
    hidden_SRH = (input_SRI @ weights_SHI[..., :-1].mT).tanh()
    return (hidden_SRH @ weights_SHI[..., -1:])[..., 0], hidden_SRH


def find_gradients(
    weights_SHI: torch.Tensor, input_SNBI: torch.Tensor, target_SNB: torch.Tensor
) -> torch.Tensor:
    """Gradients [seeds, replicas, weights] of 1/2 (output - target)^2, means over a replica's samples."""
    output_SR, hidden_SRH = apply_network(weights_SHI, input_SNBI.flatten(1, 2))
    batch = input_SNBI.shape[2]
    error_SNB1 = (output_SR.view(target_SNB.shape) - target_SNB)[..., None] / batch
    hidden_SNBH = hidden_SRH.view(*target_SNB.shape, NUM_HIDDEN)
    of_output_SNH = (error_SNB1 * hidden_SNBH).sum(2)
    before_SNBH = error_SNB1 * weights_SHI[:, None, None, :, -1] * (1 - hidden_SNBH.square())
    of_hidden_SNHI = before_SNBH.mT @ input_SNBI
    return torch.cat([of_hidden_SNHI, of_output_SNH[..., None]], -1).flatten(2)


def train_network(setup: Setup, size: Size, seed: int) -> torch.Tensor:
    """Loss [seeds] above the noise of the labels (variance 1), a mean over the second half of a run that
    starts at the teacher's weights. Every run has the same time step * pull * steps and the same teachers;
    the samples are its own."""
    teacher_SHI = draw_teacher(size.seeds, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    held_out_SRI = torch.randn(size.seeds, NUM_HELD_OUT, NUM_INPUTS, generator=generator)
    wanted_SR, _ = apply_network(teacher_SHI, held_out_SRI)
    num_steps = count_steps(setup, size.network_time)
    every = max(1, num_steps // NUM_EVALUATIONS)
    weights_SHI, losses = teacher_SHI.clone(), []
    error_SND = torch.zeros(size.seeds, setup.replicas, NUM_WEIGHTS)
    for step in range(num_steps):
        input_SRI = torch.randn(size.seeds, setup.replicas * setup.batch, NUM_INPUTS, generator=generator)
        target_SR, _ = apply_network(teacher_SHI, input_SRI)
        target_SR += torch.randn(target_SR.shape, generator=generator)
        shape = (size.seeds, setup.replicas, setup.batch)
        gradient_SND = find_gradients(weights_SHI, input_SRI.view(*shape, -1), target_SR.view(shape))
        update_SD = exchange(setup.method, gradient_SND, error_SND, seed << 32 | step, generator)
        weights_SHI -= setup.step * update_SD.view(weights_SHI.shape)
        if 2 * (step + 1) >= num_steps and step % every == 0:
            output_SR, _ = apply_network(weights_SHI, held_out_SRI)
            losses.append((output_SR - wanted_SR).square().mean(1) / 2)
    return torch.stack(losses).mean(0)


def list_network_changes(step: float) -> list[tuple[Setup, list[Change]]]:
    """Bases, and what is changed of each."""
    three, signs = ("dcsgd", "linear", "none"), ("dsignsgd", "linear")
    more = [Change(4), Change(16), Change(replicas=4), Change(replicas=16)]
    edens = [make_eden(bits) for bits in (4, 2, 1)]
    plain = Setup(NONE, step, batch=4)
    return [
        (
            plain,
            [
                *(replace(change, rules=("dcsgd",)) for change in more),
                Change(4, 4),
                *(Change(method=method) for method in edens),
                Change(4, 4, edens[2], three),
                *(Change(method=method, rules=("dcsgd",)) for method in (SIGN, SIGN_EF14)),
            ],
        ),
        (
            Setup(DSIGNSGD, step / find_pull(DSIGNSGD, GAUSSIAN, 4), batch=4),
            [*(replace(change, rules=signs) for change in more), Change(4, 4, rules=(*signs, "none"))],
        ),
        *(
            (Setup(method, step, batch=4), [Change(4, 4, rules=("dcsgd", "dsignsgd", "none"))])
            for method in (SIGN, SIGN_EF14)
        ),
    ]


def run_network(size: Size) -> Iterator[Row]:
    """Part 4: losses relative to the same teacher's under the base; the standard error is over teachers."""
    seed = 3000
    for base, changes in list_network_changes(size.network_step):
        loss_S = train_network(base, size, seed)
        mean, error = find_mean(loss_S)
        of_runs = {"trials": size.seeds, "steps": count_steps(base, size.network_time)}
        found: Row = {"rule": "base", "quantity": "loss", "value": mean, "standard error": error}
        yield make_row("network", base, **of_runs, **found)
        for change in changes:
            for rule in change.rules:
                seed += 1
                setup, factor = apply_change(base, change, rule)
                ratio, error = find_mean(train_network(setup, size, seed) / loss_S)
                found = {"rule": rule, "factor": factor, "quantity": "loss / base", "value": ratio}
                of_runs["steps"] = count_steps(setup, size.network_time)
                yield make_row("network", setup, **of_runs, **found, **{"standard error": error})
        seed += 1


PARTS = {"stationary": run_stationary, "scaling": run_scaling, "delay": run_delay, "network": run_network}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds, for a test")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = QUICK if options.quick else FULL
    rows = []
    for part in options.parts:
        of_part = list(PARTS[part](size))
        print(format_table(of_part), flush=True)
        rows += of_part
    write_results(options.results / "noise", rows, {"size": vars(size)})


if __name__ == "__main__":
    main()
