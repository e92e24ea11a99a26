"""Bilevel optimization over sites in one process: topologies, strategies, curvature, compressed gossip."""

import math

import pytest
import torch

from benchmarks.bilevel.quadratic import Quadratic, Run, make_plan
from clapping_ds import bilevel
from clapping_ds.bilevel import (
    Autograd,
    CentralDifference,
    DomainLoss,
    General,
    LocalGossip,
    Losses,
    Mixture,
    Penalty,
    Plan,
    Sparkle,
    Topology,
)
from clapping_ds.bilevel.gossip import MEMORY_STEPS
from clapping_ds.bilevel.levels import Level, advance
from clapping_ds.codecs import CODECS, Eden, LowRank, Quantizer, RandK, TopK
from clapping_ds.link.verification import VerificationError

STRATEGIES = ["dsgd", "extra", "ed", "atc-gt", "semi-atc-gt", "gt"]
RING, RING3 = bilevel.ring(8), bilevel.ring(3)


# Topologies


@pytest.mark.parametrize(
    ("topology", "neighbours"),
    [
        (bilevel.ring(8), [1, 7]),
        (bilevel.ring(2), [1]),
        (bilevel.torus(3, 4), [1, 3, 4, 8]),
        (bilevel.torus(2, 2), [1, 2]),
        (bilevel.exponential(8), [1, 2, 4, 6, 7]),
        (bilevel.full(5), [1, 2, 3, 4]),
        (bilevel.full(1), []),
    ],
)
def test_topologies(topology, neighbours):
    assert topology.neighbours(0) == neighbours
    weights = topology.weights
    torch.testing.assert_close(weights.sum(0), torch.ones(topology.num_sites, dtype=torch.float64))
    assert 0 <= topology.rho < 1
    assert topology.smallest_eigenvalue >= -1e-9


def test_rho_is_what_is_left_of_a_difference():
    values = torch.cos(2 * math.pi * torch.arange(8, dtype=torch.float64) / 8)
    torch.testing.assert_close(RING.weights @ values, RING.rho * values)
    assert RING.rho == pytest.approx(0.5 + 0.5 * math.cos(2 * math.pi / 8))
    assert bilevel.full(6).rho == pytest.approx(0, abs=1e-12)


W = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
BAD_MATRICES = {
    "not square": (torch.ones(2, 3), r"of shape \(2, 3\); accepted: a square one"),
    "below zero": (torch.tensor([[1.5, -0.5], [-0.5, 1.5]]), "an entry below zero"),
    "not symmetric": (torch.tensor([[0.5, 0.5], [0.4, 0.6]]), "not symmetric"),
    "rows": (0.9 * W, "row 0 sums to 0.9; accepted: 1"),
    "not connected": (torch.eye(3), "sites that are not connected"),
    "eigenvalue": (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), r"the eigenvalue -1; .* as of \(I \+ W\) / 2"),
}


@pytest.mark.parametrize("case", BAD_MATRICES)
def test_bad_matrices(case):
    weights, message = BAD_MATRICES[case]
    with pytest.raises(ValueError, match=message):
        Topology(weights)


def test_edges():
    with pytest.raises(ValueError, match=r"edge \(0, 3\) of 3 sites"):
        bilevel.from_edges(3, [(0, 3)])
    lazy = bilevel.make_lazy(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    assert lazy.weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


# Strategies


def path(plan, steps=40, noise=0.3):
    """x, y and z of all sites after each step; steps shrink."""
    problem = Quadratic()
    run, found = Run(problem, RING, plan, noise=noise), []
    for number in range(steps):
        run.train(1)
        run.solver.steps = {name: size / (1 + 0.01 * number) for name, size in run.solver.steps.items()}
        found.append(torch.stack([run.solver.value(level, n)[:5] for n in range(8) for level in "xyz"]))
    return torch.stack(found)


@pytest.mark.parametrize("name", [*STRATEGIES, "local"])
def test_two_step_forms_are_the_general_form(name):
    plan = make_plan([name] * 3)
    general = plan.model_copy(update=dict.fromkeys("xyz", General.named(name)))
    torch.testing.assert_close(path(plan), path(general), rtol=1e-12, atol=1e-12)


def test_dsgd_is_d_soba():
    """Written out, with the matrix: s <- W (s - step d), d at the values before; x's is a moving average."""
    problem = Quadratic()
    run = Run(problem, RING, make_plan(["dsgd"] * 3))
    x, y, z = (torch.zeros(8, size, dtype=torch.float64) for size in (5, 10, 10))
    average = torch.zeros(8, 5, dtype=torch.float64)
    for _ in range(30):
        run.train(1)
        v = (
            torch.einsum("sij,sj->si", problem.h, y)
            - torch.einsum("sij,sj->si", problem.b_of_x, x)
            - problem.b
        )
        p = torch.einsum("sij,sj->si", problem.h, z) - (y - problem.t)
        u = x - problem.c + torch.einsum("sji,sj->si", problem.b_of_x, z)
        average = 0.7 * average + 0.3 * u
        x, y, z = (RING.weights @ s for s in (x - 0.05 * average, y - 0.2 * v, z - 0.2 * p))
    for name, expected in (("x", x), ("y", y), ("z", z)):
        found = torch.stack([run.solver.value(name, site) for site in range(8)])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_corrections_reach_the_solution_and_d_soba_does_not():
    """And the correction of the lower level matters more."""
    problem = Quadratic()
    for name, below in (("extra", 2e-5), ("ed", 2e-5), ("atc-gt", 0.01), ("semi-atc-gt", 0.01), ("gt", 0.02)):
        assert Run(problem, RING, make_plan([name] * 3)).train(150) < below, name
    floors = [
        Run(problem, RING, make_plan(["dsgd"] * 3, scale)).train(int(150 / scale)) for scale in (1, 0.5, 0.25)
    ]
    assert floors == pytest.approx([0.349, 0.237, 0.145], abs=0.001)
    lower = Run(problem, RING, make_plan(["dsgd", "ed", "ed"])).train(150)
    upper = Run(problem, RING, make_plan(["ed", "dsgd", "dsgd"])).train(150)
    assert lower < 0.7 * upper < upper < floors[0]


def test_a_lower_level_of_each_site():
    """x is common; each site's y solves its own problem."""
    problem = Quadratic(num_sites=4)
    run = Run(problem, bilevel.ring(4), Plan(y="local", z="local", x_step=0.01, y_step=0.3, z_step=0.3))
    run.train(500)
    x = run.solver.value("x", 3)
    own = torch.linalg.solve(problem.h[3], problem.b_of_x[3] @ x + problem.b[3])
    torch.testing.assert_close(run.solver.value("y", 3), own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.solver.value("x", 0), x, rtol=1e-3, atol=1e-3)


# Curvature


def bend(x, y):
    """A lower loss with third derivatives."""
    weights = torch.linspace(0.5, 1.5, len(y), dtype=y.dtype)
    return (x[0].exp() * weights * y).exp().sum() + (x[1] * y).sin().sum() + y.square().sum()


def upper(x, y):
    return (y - 1).square().sum() + x.square().sum() * y[0]


def draw(generator_seed=0):
    generator = torch.Generator().manual_seed(generator_seed)
    return [0.5 * torch.randn(size, generator=generator, dtype=torch.float64) for size in (2, 6, 6)]


def test_autograd_is_the_formula():
    x, y, z = draw()
    found = Autograd().find(upper, bend, x, y, z)
    hessian = torch.func.hessian(bend, argnums=1)(x, y)
    mixed = torch.func.jacfwd(torch.func.grad(bend, argnums=1), argnums=0)(x, y)
    of_x, of_y = torch.func.grad(upper, argnums=(0, 1))(x, y)
    torch.testing.assert_close(found.y, torch.func.grad(bend, argnums=1)(x, y))
    torch.testing.assert_close(found.z, hessian @ z - of_y)
    torch.testing.assert_close(found.x, of_x - mixed.T @ z)


def test_central_differences_are_off_by_the_square_of_the_radius():
    x, y, z = draw()
    exact = Autograd().find(upper, bend, x, y, z)
    for part in ("x", "z"):
        errors = [
            float(
                (
                    getattr(CentralDifference(radius).find(upper, bend, x, y, z), part) - getattr(exact, part)
                ).norm()
            )
            for radius in (0.04, 0.02, 0.01)
        ]
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.01)
        assert errors[1] / errors[2] == pytest.approx(4, rel=0.01)
    near = CentralDifference().find(upper, bend, x, y, z)
    for found, expected in zip(near, exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    at_zero = CentralDifference().find(upper, bend, x, y, torch.zeros_like(z))
    torch.testing.assert_close(at_zero.z, Autograd().find(upper, bend, x, y, torch.zeros_like(z)).z)


def test_losses_that_do_not_depend_on_a_level():
    x, y, z = draw()
    for curvature in (Autograd(), CentralDifference(), Penalty(2.0)):
        found = curvature.find(lambda x, y: y.sum(), lambda x, y: y.sum(), x, y, z)
        assert torch.equal(found.x, torch.zeros(2, dtype=torch.float64))
        with pytest.raises(ValueError, match="depends on neither x nor y; accepted: a scalar of x and y"):
            curvature.find(lambda x, y: torch.ones(()), lambda x, y: y.sum(), x, y, z)
        with pytest.raises(ValueError, match=r"a loss of shape \(6,\)"):
            curvature.find(lambda x, y: y, lambda x, y: y.sum(), x, y, z)


def test_penalty_is_off_by_one_over_its_factor():
    """Where y and z are solved."""
    problem, (f, g) = Quadratic(num_sites=1), Quadratic(num_sites=1).losses(0)
    h, b_of_x, b, t = (each[0] for each in (problem.h, problem.b_of_x, problem.b, problem.t))
    x, identity = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.eye(10, dtype=torch.float64)
    y = torch.linalg.solve(h, b_of_x @ x + b)
    exact = Autograd().find(f, g, x, y, torch.linalg.solve(h, y - t))
    errors = []
    for factor in (50.0, 100.0):
        z = torch.linalg.solve(identity + factor * h, t + factor * (b_of_x @ x + b))
        found = Penalty(factor).find(f, g, x, y, z)
        torch.testing.assert_close(found.z, torch.zeros(10, dtype=torch.float64), atol=1e-10, rtol=0)
        errors.append(float((found.x - exact.x).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[0] < 0.1 * exact.x.norm()
    assert torch.equal(Penalty(2.0).start(y), y)


# Compressed gossip


def test_with_difference_memory_compression_costs_nothing():
    problem, codec = Quadratic(num_sites=3, num_x=64, num_y=64, coupling=0.2), Eden(name="eden4")
    ring = bilevel.ring(3)
    runs = {
        name: Run(problem, ring, make_plan(["ed"] * 3), **options)
        for name, options in (
            ("raw", {}),
            ("memory", {"codec": codec}),
            ("without", {"codec": codec, "memory": False}),
        )
    }
    errors = {name: run.train(160) for name, run in runs.items()}
    assert errors["memory"] == pytest.approx(errors["raw"], rel=0.1)
    assert errors["without"] > 100 * errors["raw"]
    assert runs["memory"].bytes_sent < 0.31 * runs["raw"].bytes_sent


def test_the_mean_stays_whatever_the_codec():
    torch.manual_seed(0)
    gossip = LocalGossip(RING, Quantizer(name="sign"), memory=False)
    values = [torch.randn(300, dtype=torch.float64) for _ in range(8)]
    mixed = [each["s"] for each in gossip.start([{"s": value} for value in values]).wait()]
    assert not torch.equal(mixed[0], values[0])
    torch.testing.assert_close(sum(mixed), sum(values))


# State, and what goes wrong


@pytest.mark.parametrize("strategies", [["ed", "gt", "extra"], [General.named("atc-gt")] * 3])
def test_a_resumed_run_is_the_uninterrupted_one(strategies):
    problem, codec = Quadratic(num_sites=4, num_x=64, num_y=128), Eden(name="eden4")
    runs = [Run(problem, bilevel.ring(4), make_plan(strategies), codec) for _ in range(2)]
    for run in runs:
        run.train(7)
    saved = runs[0].solver.state_dict()
    for run in runs:
        run.train(3)
    runs[1].train(2)
    runs[1].solver.load_state_dict(saved)
    runs[1].train(3)
    for level in "xyz":
        for site in range(4):
            assert torch.equal(runs[0].solver.value(level, site), runs[1].solver.value(level, site))
    assert runs[0].bytes_sent == runs[1].bytes_sent
    with pytest.raises(ValueError, match="a state of plan = "):
        Run(problem, bilevel.ring(4), make_plan(["gt"] * 3)).solver.load_state_dict(saved)


def test_what_is_not_finite_is_named():
    problem = Quadratic()
    run = Run(problem, RING, make_plan(["ed"] * 3))
    losses = [problem.losses(site) for site in range(8)]
    losses[5] = Losses(losses[5].upper, lambda x, y: y.sum() / 0)
    with pytest.raises(ArithmeticError, match=r"gossip, round 1: what site 5 has of y\.s is not finite"):
        run.solver.step(*losses)


def test_sites_out_of_step_are_found():
    gossip = LocalGossip(bilevel.ring(3))
    values = [{"s": torch.ones(4)}] * 3
    gossip.sites[1].encode(values[1])
    with pytest.raises(VerificationError, match="site 0, round 1, from site 1: step: expected 1, found 2"):
        gossip.start(values).wait()


def test_bad_input_is_one_clear_error():
    zeros = torch.zeros(3)
    gossip = LocalGossip(bilevel.ring(3))
    with pytest.raises(ValueError, match=r"y is torch.float32 of shape \(3, 1\); accepted: floating-point"):
        Sparkle(gossip, zeros, torch.zeros(3, 1), Plan())
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        Sparkle(gossip, torch.zeros(3, dtype=torch.long), zeros, Plan())
    with pytest.raises(ValueError, match="losses of 1 sites; accepted: of 3"):
        Sparkle(gossip, zeros, zeros, Plan()).step(Losses(upper, bend))
    with pytest.raises(ValueError, match=r"'dsgd', 'extra', 'ed', 'atc-gt'"):
        Plan(x="adam")
    with pytest.raises(ValueError, match="x_step"):
        Plan(x_step=0)
    with pytest.raises(ValueError, match=r"radius = 0\.0; accepted: a number above zero"):
        CentralDifference(0.0)
    with pytest.raises(ValueError, match=r"factor = -1\.0"):
        Penalty(-1.0)


# Mixtures

DOMAINS = ["a", "b", "c"]


def test_a_mixture_follows_the_gradient_of_its_shares():
    """J (l(second) - l(first)), of domains of which one lies at two sites, and one site has two."""
    held = [["a"], ["b", "c"], ["a"]]
    mixture = Mixture(LocalGossip(bilevel.full(3)), DOMAINS, held, factor=2.0, step=0.1, momentum=1.0)
    first = {"a": 3.0, "b": 2.0, "c": 1.0}
    second = {"a": 2.5, "b": 2.2, "c": 1.1}
    x = torch.zeros(3)
    for _ in range(4):
        weighted = [
            mixture.weight(name, site) * first[name] for site, names in enumerate(held) for name in names
        ]
        expected = float(x.softmax(0) @ torch.tensor(list(first.values())))
        assert sum(weighted) / 3 == pytest.approx(expected, rel=1e-6)
        mixture.update(
            *([{name: each[name] for name in names} for names in held] for each in (first, second))
        )
        p = x.softmax(0)
        x = x - 0.1 * 2.0 * (torch.diag(p) - torch.outer(p, p)) @ torch.tensor([-0.5, 0.2, 0.1])
        for site in range(3):
            torch.testing.assert_close(mixture.shares(site), x.softmax(0))
    assert mixture.shares()[0] > 1 / 3


def test_a_resumed_mixture_is_the_uninterrupted_one():
    losses = [[{name: float(number)} for number, name in enumerate(DOMAINS, start)] for start in (1, 2)]
    runs = [Mixture(LocalGossip(RING3), DOMAINS, [["a"], ["b"], ["c"]], step=5.0) for _ in range(2)]
    runs[0].update(losses[0], losses[1])
    runs[1].load_state_dict(runs[0].state_dict())
    for run in runs:
        run.update(losses[0], [{"a": 0.0}, {"b": 5.0}, {"c": 1.0}])
    assert all(torch.equal(runs[0].shares(site), runs[1].shares(site)) for site in range(3))
    assert not torch.equal(runs[0].shares(), torch.full((3,), 1 / 3))
    with pytest.raises(
        ValueError, match=r"a state of domains = \['a', 'b', 'c'\]; accepted: of \['a', 'b'\]"
    ):
        Mixture(LocalGossip(RING3), DOMAINS[:2], [["a"], ["b"], ["a"]]).load_state_dict(runs[0].state_dict())


BAD_MIXTURES = {
    "one": ((["a"], [["a"]] * 3), {}, r"domains \['a'\]; accepted: two or more different names"),
    "twice": ((["a", "a"], [["a"]] * 3), {}, "two or more different names"),
    "unknown": ((DOMAINS, [["a"], ["b"], ["d"]]), {}, "domain 'd'; accepted: a, b, c"),
    "nowhere": ((DOMAINS, [["a"], ["b"], ["a"]]), {}, "domain 'c' that no site has"),
    "sites": ((DOMAINS, [["a"]]), {}, "domains of 1 sites; accepted: of 3"),
    "factor": ((DOMAINS, [["a"], ["b"], ["c"]]), {"factor": 0.0}, r"factor = 0\.0; accepted: a number above"),
    "momentum": ((DOMAINS, [["a"], ["b"], ["c"]]), {"momentum": 2.0}, r"momentum = 2\.0; accepted: above 0"),
    "strategy": ((DOMAINS, [["a"], ["b"], ["c"]]), {"strategy": "adam"}, "strategy 'adam'; accepted: dsgd, "),
}


@pytest.mark.parametrize("case", BAD_MIXTURES)
def test_bad_mixtures(case):
    arguments, options, message = BAD_MIXTURES[case]
    with pytest.raises(ValueError, match=message):
        Mixture(LocalGossip(RING3), *arguments, **options)


def test_a_mixture_wants_the_losses_of_its_domains():
    mixture = Mixture(LocalGossip(RING3), DOMAINS, [["a"], ["b"], ["c"]])
    losses = [{"a": 1.0}, {"b": 1.0}, {"a": 1.0}]
    with pytest.raises(ValueError, match=r"losses on \['a'\] and \['a'\]; accepted: on \['c'\]"):
        mixture.update(losses, losses)


def test_alignment_is_what_a_step_does_for_the_target():
    """To first order, by a step of Adam's size per value."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    adam = torch.optim.AdamW([weight], lr=0.1)
    for _ in range(3):
        weight.grad = torch.randn(6, dtype=torch.float64)
        adam.step()
    losses = {"d": lambda w: (w**2).sum() + w[0], "f": lambda w: (w - 1).square().sum() + w.exp().sum()}
    of_domain, of_target = (torch.autograd.grad(losses[name](weight), weight) for name in "df")
    (scale,) = bilevel.adam_scales(adam)
    changes = [
        losses["f"](weight - 1e-7 * scale * gradient[0]) - losses["f"](weight)
        for gradient in (of_domain, of_target)
    ]
    gain = bilevel.align(of_domain, of_target, [scale])
    assert gain == pytest.approx(float(changes[0] / changes[1]), rel=1e-3)
    assert bilevel.align(of_target, of_target, [scale]) == pytest.approx(1)
    mixture = Mixture(LocalGossip(RING3), DOMAINS, [["a"], ["b"], ["c"]])
    mixture.follow([{"a": 1.0}, {"b": 0.2}, {"c": -0.5}])
    assert mixture.shares()[0] > mixture.shares()[1] > mixture.shares()[2]
    with pytest.raises(ValueError, match=r"gains of \['b'\]; accepted: of \['a'\]"):
        mixture.follow([{"b": 1.0}, {"b": 0.2}, {"c": -0.5}])


def test_a_module_as_a_vector():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    vector, call = bilevel.flatten(module)
    x = torch.randn(5, 3)
    assert torch.equal(call(vector, x), module(x))
    leaf = vector.clone().requires_grad_(True)
    call(leaf, x).sum().backward()
    module(x).sum().backward()
    assert torch.equal(leaf.grad, torch.cat([each.grad.flatten() for each in module.parameters()]))
    with pytest.raises(ValueError, match="accepted: one dtype on one device"):
        bilevel.flatten(torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16()]))


# Failures, states, codecs and domains at their edges


def test_a_step_that_fails_leaves_all_as_it_was():
    """A loss that raises, or is not finite, at the last site, after messages of the others left."""
    problem = Quadratic(num_sites=3, num_x=6, num_y=64)
    for strategy in ("ed", "extra", "gt"):
        plain, failing = (
            Run(problem, RING3, make_plan([strategy] * 3), Eden(name="eden4")) for _ in range(2)
        )
        for run in (plain, failing):
            run.train(4)
        losses = [problem.losses(site) for site in range(3)]

        def fail(x, y):
            raise MemoryError("no room")

        with pytest.raises(MemoryError):
            failing.solver.step(*losses[:2], Losses(losses[2].upper, fail))
        with pytest.raises(ArithmeticError):
            failing.solver.step(*losses[:2], Losses(losses[2].upper, lambda x, y: y.sum() / 0))
        for run in (plain, failing):
            run.train(4)
        for level in "xyz":
            assert torch.equal(plain.solver.value(level, 1), failing.solver.value(level, 1))
        assert plain.bytes_sent == failing.bytes_sent


UNBIASED = [("eden4", "unbiased"), ("eden3", "unbiased"), ("eden2", "unbiased")]


@pytest.mark.parametrize(("name", "scale"), [*((name, None) for name in MEMORY_STEPS), *UNBIASED])
@pytest.mark.parametrize("strategy", ["ed", "extra"])
def test_codecs_that_are_accepted_converge(name, scale, strategy):
    """Of sites that minimise h (y - t)^2 / 2, 64 values each."""
    codec = CODECS[name].model_validate({"name": name, **({"scale": scale} if scale else {})})
    generator = torch.Generator().manual_seed(3)
    h, t = (torch.rand(5, 64, generator=generator, dtype=torch.float64) + offset for offset in (1.0, 0.0))
    solution = (h * t).sum(0) / h.sum(0)
    gossip = LocalGossip(bilevel.ring(5), codec)
    levels = [{"y": Level(torch.zeros(64, dtype=torch.float64), strategy)} for _ in range(5)]
    for _ in range(100):
        advance(
            gossip,
            levels,
            lambda: [{"y": 0.2 * h[n] * (each["y"].value - t[n])} for n, each in enumerate(levels)],
        )
    assert max(float((each["y"].value - solution).norm()) for each in levels) < 1e-4


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (Quantizer(name="int2"), "codec int2 with memory, whose errors grow"),
        (Quantizer(name="sign"), "codec sign with memory"),
        (TopK(name="topk"), "codec topk with memory"),
        (RandK(name="randk"), "codec randk with memory"),
        (Eden(name="eden1", scale="unbiased"), "codec eden1 scale=unbiased with memory"),
        (LowRank(name="lowrank"), "codec lowrank, which learns from messages"),
    ],
)
def test_codecs_that_are_not(codec, message):
    with pytest.raises(ValueError, match=message):
        LocalGossip(RING, codec)
    with pytest.raises(ValueError, match=r"step = 2 of gossip; accepted: above 0, to 1"):
        LocalGossip(RING, step=2)


def test_a_state_is_of_its_site_topology_and_curvature():
    problem, codec = Quadratic(num_sites=4), Eden(name="eden4")
    saved = Run(problem, bilevel.ring(4), make_plan(["ed"] * 3), codec).solver.state_dict()
    with pytest.raises(ValueError, match="a state of sites = "):
        Run(problem, bilevel.full(4), make_plan(["ed"] * 3), codec).solver.load_state_dict(saved)
    with pytest.raises(ValueError, match="a state of sites = "):
        Run(problem, bilevel.ring(4), make_plan(["ed"] * 3)).solver.load_state_dict(saved)
    zeros = [torch.zeros(size, dtype=torch.float64) for size in (5, 10)]
    other = Sparkle(LocalGossip(bilevel.ring(4), codec), *zeros, make_plan(["ed"] * 3), Penalty(2.0))
    with pytest.raises(ValueError, match=r"a state of curvature = Autograd\(\); accepted: of Penalty"):
        other.load_state_dict(saved)
    with pytest.raises(ValueError, match="a state of plan = None"):
        other.load_state_dict({})


def test_matrices_from_single_precision():
    near = bilevel.ring(4).weights.clone()
    near[0, 2] = 1e-12
    assert Topology(near).neighbours(0) == [1, 3]
    assert Topology(torch.full((3, 3), 1 / 3)).weights.sum(1).tolist() == pytest.approx([1, 1, 1], abs=1e-15)


def test_central_differences_in_half_precision():
    x, y = torch.zeros(2, dtype=torch.float16), torch.full((64,), 50.0, dtype=torch.float16)
    for size in (1e-6, 1.0):
        z = torch.full_like(y, size)
        found = CentralDifference().find(lambda x, y: y.sum(), lambda x, y: 0.01 * (y * y).sum(), x, y, z)
        assert found.z.isfinite().all()
    assert (found.z + 1).float().mean() == pytest.approx(0.02, rel=0.2)


def test_a_domain_loss_of_several_domains():
    """The mean over micro-batches is the sum over the site's domains; evaluations are left alone."""
    mixture = Mixture(LocalGossip(bilevel.full(2)), DOMAINS, [["a", "b"], ["c"]], factor=3.0)
    losses = {"a": 1.0, "b": 2.0, None: 5.0}
    weighted = 2 / 3 * (losses["a"] + losses["b"])  # two sites, shares of a third
    for domains, expected in (
        (["a", "b"], weighted),
        (["a", "b", "b", "b"], weighted),
        (["a", None, "b", None], (losses[None] + 3 * weighted) / 4),
    ):
        values = iter([losses[name] for name in domains] + [9.0])
        of_domain = DomainLoss(mixture, lambda: torch.tensor(next(values), requires_grad=True), domains)
        found = [float(of_domain().detach()) for _ in domains]
        assert sum(found) / len(found) == pytest.approx(expected, rel=1e-6)
        with torch.no_grad():
            assert float(of_domain()) == 9.0
        assert of_domain.take() == {"a": 1.0, "b": 2.0}
    of_domain = DomainLoss(mixture, lambda: torch.ones(()), ["a", "b"])
    of_domain()
    with pytest.raises(ValueError, match="losses of 1 micro-batches; accepted: 2 a step"):
        of_domain.take()
