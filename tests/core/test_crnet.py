"""CR-Net: its formula, its sizes, and recomputation that changes no bit."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clapping_ds import crnet
from clapping_ds.crnet import CRLinear, CRNetConfig, counts
from clapping_ds.crnet.model import CRLayer, Outputs

SMALL = {
    "vocabulary": 40, "width": 32, "intermediate": 48, "num_layers": 8, "num_heads": 2, "rank": 6,
    "checkpoint_every": 4,
}  # fmt: skip


def make(num_stages=1, seed=0, **options):
    torch.manual_seed(seed)
    model = crnet.build(CRNetConfig(**{**SMALL, **options}), num_stages)
    for name, parameter in model.named_parameters():  # no two layers alike
        if name.endswith("residual"):
            nn.init.uniform_(parameter, 0.9, 1.1)
    return model


def train(model, autocast=False, seed=1):
    """The loss, and the gradients."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (2, 9), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten().roll(-1))
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: each.grad.clone() for name, each in model.named_parameters()}


def test_a_map_is_what_the_paper_says():
    for residual in (0.7, -0.4, 0.0):
        linear = CRLinear(5, 3, rank=2, residual=residual)
        x, before = torch.randn(4, 5), torch.randn(4, 3)
        y, product = linear(x, before)
        sign = (residual > 0) - (residual < 0)
        torch.testing.assert_close(y, sign * (abs(residual) + 1e-6) * before + x @ linear.a_DR @ linear.b_RD)
        torch.testing.assert_close(product, x @ linear.a_DR)
        assert torch.equal(linear.rebuild(before, product), y)
        if residual:
            torch.testing.assert_close(linear.invert(y, product), before, rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    linear, before = linear.double(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: linear(*given)[0], (x, before))


FORMS = {
    "exact": {},
    "stage-anchored": {"num_stages": 2, "anchor": "stage"},
    "low-rank first layer": {"first_layer": "low_rank"},
    "rank per layer": {"rank": (1, 2, 3, 4, 5, 6, 7, 8)},
    "segments of one layer": {"checkpoint_every": 1},
    "one segment": {"checkpoint_every": 8},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_rebuilding_forward_changes_no_bit(form, dtype, autocast):
    plain, rebuilt = (make(**FORMS[form], recompute=how).to(dtype) for how in (None, "forward"))
    loss, gradients = train(plain, autocast)
    other, others = train(rebuilt, autocast)
    assert torch.equal(loss, other)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


def test_frozen_parameters_get_no_gradient():
    plain, rebuilt = (make(recompute=how) for how in (None, "forward"))
    for model in (plain, rebuilt):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q" not in name.split(".") and "norm_mlp" not in name)
        tokens = torch.arange(18).view(2, 9)
        model(tokens).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), rebuilt.parameters(), strict=True):
        if one.requires_grad:
            assert torch.equal(one.grad, other.grad), name
        else:
            assert one.grad is other.grad is None


def test_rebuilding_backward_multiplies_errors():
    """In fp32 the error after three inversions is that of a rounding, divided by b each time."""
    errors = []
    for residual, below in ((1.0, 0.02), (0.5, 8.0), (0.1, 1e3)):
        models = [make(recompute=how, residual=residual, largest_growth=1e9) for how in (None, "inverse")]
        for model in models:
            for name, parameter in model.named_parameters():
                if name.endswith("residual"):
                    nn.init.constant_(parameter, residual)
        (_, gradients), (_, others) = map(train, models)
        for name, gradient in gradients.items():
            assert (gradient - others[name]).norm() <= below * 1e-3 * gradient.norm() + 1e-9, name
        total = sum((gradient - others[name]).square().sum() for name, gradient in gradients.items())
        errors.append(float(total.sqrt()))
    assert errors[0] > 0 and errors[2] > 3 * max(errors[:2])


def invert_in_bf16(residual, num_layers=7):
    """The relative error of the outputs before so many layers, rebuilt from those after them."""
    torch.manual_seed(0)
    width, rank = 256, 64
    maps = [CRLinear(width, width, rank, residual).bfloat16() for _ in range(num_layers)]
    y = first = torch.randn(64, width).bfloat16()
    products = []
    with torch.no_grad():
        for each in maps:
            y, product = each(torch.randn(64, width).bfloat16(), y)
            products.append(product)
        for each, product in zip(reversed(maps), reversed(products), strict=True):
            y = each.invert(y, product)
    return float((y.float() - first.float()).norm() / first.float().norm())


def test_the_inverse_is_unstable_where_b_is_small():
    errors = [invert_in_bf16(residual) for residual in (1.0, 0.5, 0.3)]
    assert errors == pytest.approx([0.0078, 0.21, 6.4], rel=0.2)


def test_the_inverse_is_refused_above_its_guard():
    model = make(recompute="inverse")
    for parameter in (each.maps["gate"].residual for part in model[1:-1] for each in part.layers[1:]):
        nn.init.constant_(parameter, 0.5)
    with pytest.raises(ValueError, match=r"recompute = 'inverse' with 1 / \|b\| of gate multiplied up to 8"):
        train(model)
    unguarded = make(recompute="inverse", largest_growth=float("inf"))
    unguarded.load_state_dict(model.state_dict())
    train(unguarded)
    nn.init.zeros_(model[1].layers[1].maps["k"].residual)
    with pytest.raises(ValueError, match=r"1 / \|b\| of k multiplied up to .* accepted: at most"):
        train(model)


def test_the_guard_sees_the_worst_run_of_layers():
    model = make(recompute="inverse", checkpoint_every=8)
    values = (8.0, 8.0, 8.0, 1.0, 1 / 8, 1 / 8, 1 / 8)  # 1 in all
    for layer, value in zip(model[1].layers[1:], values, strict=True):
        nn.init.constant_(layer.maps["up"].residual, value)
    with pytest.raises(ValueError, match=r"1 / \|b\| of up multiplied up to 512"):
        train(model)


@pytest.mark.parametrize("frozen", ["residual", "a_DR", "b_RD", "0.weight", "norm_mlp"])
def test_some_parameters_may_be_frozen(frozen):
    plain, rebuilt = (make(recompute=how) for how in (None, "forward"))
    for model in (plain, rebuilt):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        model(torch.arange(18).view(2, 9)).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), rebuilt.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None) == (frozen in name), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name


class Gate(torch.autograd.Function):
    """Lets no gradient through."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_odd_ways_to_use_a_segment():
    """No gradient at all; a norm that two layers share; weights that changed between the two passes."""
    shared = []
    for how in (None, "forward"):
        model = make(recompute=how, checkpoint_every=8)
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
        Gate.apply(model[1](x)).sum().backward()
        assert x.grad is None or not x.grad.any()
        model[1].layers[3].norm_mlp = model[1].layers[5].norm_mlp
        model[1](x).square().sum().backward()
        shared.append(model[1].layers[3].norm_mlp.weight.grad.clone())
        told = model[1](x).sum()
        with torch.no_grad():
            model[1].layers[3].maps["v"].b_RD.mul_(1.5)
        with pytest.raises(RuntimeError, match=r"in ?place"):
            told.backward()
    torch.testing.assert_close(*shared)


def test_hooks_of_parameters_run_once():
    plain, rebuilt = (make(recompute=how) for how in (None, "forward"))
    for model in (plain, rebuilt):
        model[1].layers[2].maps["o"].a_DR.register_hook(lambda gradient: gradient * 2)
        model(torch.arange(18).view(2, 9)).square().mean().backward()
    for one, other in zip(plain.parameters(), rebuilt.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_segments_may_be_traced_and_tracked():
    """Hooks on several gradients at once, as torch's trackers and sharded wrappers set them."""
    plain, rebuilt = (make(recompute=how) for how in (None, "forward"))
    _, gradients = train(plain)
    called = []

    def track(_, given):
        if given[0].requires_grad:
            torch.autograd.graph.register_multi_grad_hook([given[0]], called.append)

    for layer in rebuilt[1].layers:
        layer.register_forward_pre_hook(track)
    _, others = train(rebuilt)
    assert called
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


def test_what_is_rebuilt_is_not_compiled():
    """Fused operations would round in another way than the backward pass, which is not compiled."""
    graphs = []

    def compiler(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    for how, is_compiled in ((None, True), ("forward", False)):
        graphs.clear()
        torch._dynamo.reset()
        plain = make(recompute=how)
        loss, gradients = train(plain)
        other, others = train(torch.compile(make(recompute=how), backend=compiler))
        assert any("silu" in graph for graph in graphs) == is_compiled
        assert torch.equal(loss, other)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, others["_orig_mod." + name]), name


def test_what_is_kept_is_read_once():
    """As offloading and checkpoints need it."""
    kept, read = [], []
    model, x = make(recompute="forward"), torch.randn(2, 9, 32, requires_grad=True)
    hooks = lambda tensor: kept.append(tensor) or tensor, lambda tensor: read.append(tensor) or tensor
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        told = model[1](x)
    num_kept = len(kept)
    sum(each.sum() for each in told).backward()
    assert len(read) == num_kept > 0
    model.zero_grad()
    tokens, plain = torch.arange(18).view(2, 9), make()
    torch.utils.checkpoint.checkpoint(model, tokens, use_reentrant=False).square().mean().backward()
    plain(tokens).square().mean().backward()
    for one, other in zip(plain[1].parameters(), model[1].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_b_is_not_rounded_to_the_type_of_outputs():
    """1.003 is 1 in bf16, and 1.003 * 1.98 is not 1.98."""
    linear = CRLinear(4, 2, rank=1, residual=1.003)
    before = torch.tensor([1.0, 1.98]).bfloat16()
    y = linear.add(before, torch.zeros_like(before))
    assert y.dtype == torch.bfloat16
    assert y[0] == before[0] and y[1] > before[1]


def test_b_can_start_from_the_data():
    """At the fit what the output before explains of x A B is orthogonal to the rest."""
    model, tokens = make(num_stages=2, anchor="stage"), torch.arange(36).view(4, 9)
    crnet.fit_residuals(model, tokens)
    with torch.no_grad():
        x, before = model[0](tokens), None
        for layer in model[1].layers:
            _, alone, _ = layer(x, None)
            assert layer.is_anchor == (before is None)
            pairs = [] if before is None else zip(crnet.POSITIONS, alone, before, strict=True)
            for name, y, y_before in pairs:
                b = layer.maps[name].residual
                if b.abs() > 1e-3:
                    assert float(((y - b * y_before) * y_before).sum()) == pytest.approx(
                        0, abs=1e-2 * float(y_before.norm() * y.norm())
                    )
                assert b.abs() > 0
            x, before, _ = layer(x, before)
    assert model[2].layers[0].maps["q"].residual is None


# Sizes


def count_saved(model, tokens):
    """Values that autograd keeps of activations, each storage once."""
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    seen = {}

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own and tensor.is_floating_point():
            seen[pointer] = (tensor.untyped_storage().nbytes() // tensor.element_size(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens)
    return sum(number for number, _ in seen.values())


@pytest.mark.parametrize("how", ["forward", "inverse"])
@pytest.mark.parametrize("form", ["exact", "stage-anchored", "low-rank first layer"])
def test_what_segments_keep_is_what_the_formula_says(form, how):
    options = {**FORMS[form], "recompute": how}
    num_stages = options.get("num_stages", 1)
    model = make(**options)
    segments = list(model[1:-1])
    x = torch.randn(2, 9, 32, requires_grad=True)
    config = CRNetConfig(**{**SMALL, **{k: v for k, v in options.items() if k != "num_stages"}})
    anchors = config.find_anchors(num_stages)
    given = x
    for number, segment in enumerate(segments):
        first = 4 * number
        expected = counts.count_kept(config, first, first in anchors)
        assert count_saved(segment, given) == 18 * expected
        with torch.no_grad():
            told = segment(given)
        given = tuple(each.requires_grad_(True) for each in (told if isinstance(told, tuple) else (told,)))


def test_costs_of_the_usual_proportions():
    """r = h / 4, f = 8h / 3: forward 0.396 of full rank, rebuild 0.215, 4.05 h values kept."""
    h = 1536
    config = CRNetConfig(
        width=h, intermediate=8 * h // 3, rank=h // 4, num_layers=8, num_heads=8, checkpoint_every=8
    )
    full = 2 * (4 * h * h + 3 * h * config.intermediate)
    low = 2 * (h // 4) * (11 * h + 3 * config.intermediate)
    assert low / full == pytest.approx(0.396, abs=5e-4)
    assert counts.count_rebuild_flops(config, 1) / full == pytest.approx(0.215, abs=5e-4)
    assert counts.count_kept(config, 0, False) / 8 / h == pytest.approx(4.05, abs=0.01)
    assert counts.count_linear_flops(config) == full + 7 * low


@pytest.mark.parametrize("form", FORMS)
def test_linear_flops_are_what_is_counted(form):
    """By torch, of all matrix products but attention's."""
    options = {name: value for name, value in FORMS[form].items() if name != "num_stages"}
    num_stages = FORMS[form].get("num_stages", 1)
    config = CRNetConfig(**{**SMALL, **options})
    tokens = torch.zeros(2, 9, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        crnet.build(config, num_stages)(tokens)
    products = sum(
        number for operation, number in counter.get_flop_counts()["Global"].items() if "mm" in str(operation)
    )
    head = 2 * config.vocabulary * config.width
    assert products == tokens.numel() * (counts.count_linear_flops(config, num_stages) + head)


@pytest.mark.parametrize("how", ["forward", "inverse"])
@pytest.mark.parametrize("form", ["exact", "stage-anchored", "one segment", "segments of one layer"])
def test_rebuilding_costs_what_the_formula_says(form, how):
    """Of matrix products but attention's: each low-rank layer's outputs once more, each anchor's maps."""
    options = {name: value for name, value in FORMS[form].items() if name != "num_stages"}
    num_stages = FORMS[form].get("num_stages", 1)
    config = CRNetConfig(**{**SMALL, **options})
    counted = []
    for recompute in (None, how):
        model = make(num_stages, recompute=recompute, **options)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, 9, dtype=torch.long)).sum().backward()
        flops = counter.get_flop_counts()["Global"].items()
        counted.append(sum(number for operation, number in flops if "mm" in str(operation)))
    anchors = config.find_anchors(num_stages)
    full = 2 * (4 * config.width**2 + 3 * config.width * config.intermediate)
    per_layer = [full if n in anchors else counts.count_rebuild_flops(config, n) for n in range(8)]
    assert counted[1] - counted[0] == 18 * sum(per_layer)


@pytest.mark.parametrize(("size", "num_stages", "millions"), [("1B", 1, 582), ("1B", 4, 681)])
def test_parameters_of_the_published_sizes(size, num_stages, millions):
    anchor = "stage" if num_stages > 1 else "model"
    config = CRNetConfig(**crnet.SIZES[size], anchor=anchor, checkpoint_every=6)
    assert counts.count_parameters(config, num_stages) == pytest.approx(millions * 1e6, rel=1e-3)


@pytest.mark.parametrize("size", crnet.SIZES)
@pytest.mark.parametrize("anchor", ["model", "stage"])
def test_models_have_the_parameters_that_the_formula_says(size, anchor):
    config = CRNetConfig(**crnet.SIZES[size], anchor=anchor, checkpoint_every=2)
    with torch.device("meta"):
        model = crnet.build(config, num_stages=2)
    assert sum(each.numel() for each in model.parameters()) == counts.count_parameters(config, 2)


def test_shapes_on_the_meta_device():
    config = CRNetConfig.model_validate(crnet.SIZES["7B"])
    with torch.device("meta"):
        x, outputs, products = CRLayer(config, 3, False)(torch.empty(1, 16, 4096), None)
    assert isinstance(outputs, Outputs)
    assert x.shape == (1, 16, 4096)
    assert [each.shape[-1] for each in outputs] == [4096] * 4 + [11008] * 2 + [4096]
    assert {product.shape[-1] for product in products} == {512}
    with torch.device("meta"):
        make(recompute="forward")(torch.zeros(1, 4, dtype=torch.long)).sum().backward()


# Bad input

BAD_INPUT = {
    "rank above width": ({"rank": 33}, "rank = 33; accepted: 1 to 32"),
    "rank of nothing": ({"rank": 0}, "rank = 0; accepted: 1 to 32"),
    "ranks": ({"rank": (1, 2)}, r"rank = \[1, 2\] with num_layers = 8; accepted: a number, or one for each"),
    "one layer": ({"num_layers": 1}, "num_layers"),
    "interval": ({"checkpoint_every": 3}, "checkpoint_every = 3 with num_layers = 8; accepted: a divisor"),
    "residual": ({"residual": 0.0}, "residual = 0, from which no b could go"),
    "heads": ({"num_heads": 3}, "width = 32 with num_heads = 3; accepted: a width of an even"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_error(case):
    options, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        CRNetConfig(**{**SMALL, **options})


def test_ranks_come_from_json_too():
    assert CRNetConfig.model_validate({**SMALL, "rank": [6] * 8}).rank == (6,) * 8


def test_a_segment_gets_what_it_needs():
    model = make()
    x = torch.randn(2, 9, 32)
    with pytest.raises(ValueError, match="a segment was given 1 tensors; accepted: 8, x and the seven out"):
        model[2](x)
    with pytest.raises(ValueError, match="a segment was given 2 tensors; accepted: 1, x, as it begins anew"):
        model[1]((x, x))


@pytest.mark.parametrize("anchor", ["model", "stage"])
def test_stages_in_a_row_are_the_model(anchor):
    config = CRNetConfig(**SMALL, anchor=anchor)
    torch.manual_seed(0)
    whole = crnet.build(config, 2)
    torch.manual_seed(0)
    stages = [crnet.build_stage(config, number, 2) for number in range(2)]
    tokens = torch.arange(18).view(2, 9)
    between = stages[0](tokens)
    assert isinstance(between, tuple) == (anchor == "model")
    told = stages[1](*between) if anchor == "model" else stages[1](between)
    assert torch.equal(told, whole(tokens))
    with pytest.raises(ValueError, match="stage = 2 of 2; accepted: 0 to 1"):
        crnet.build_stage(config, 2, 2)


def test_a_stage_without_layers_is_refused():
    config = CRNetConfig(**SMALL)
    with pytest.raises(ValueError, match="3 stages with 2 segments of checkpoint_every = 4 layers; accepted"):
        crnet.list_parts(config, 3)
