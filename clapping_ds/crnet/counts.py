"""What a CR-Net costs, by formula: h the width, f the intermediate values, r the rank, L the layers."""

from clapping_ds.crnet.config import POSITIONS, CRNetConfig


def count_parameters(config: CRNetConfig, num_stages: int = 1, embeddings: bool = True) -> int:
    """4h^2 + 3hf for each anchor, r (11h + 3f) and seven b for every other layer, norms, and twice the
    vocabulary."""
    h, f, num_layers = config.width, config.intermediate, config.num_layers
    anchors = config.find_anchors(num_stages)
    total = (2 * num_layers + 1) * h
    for layer in range(num_layers):
        low_rank = config.rank_of(layer) * (11 * h + 3 * f)
        if layer in anchors:
            total += 4 * h * h + 3 * h * f if config.first_layer == "full" else low_rank
        else:
            total += low_rank + len(POSITIONS)
    return total + (2 * config.vocabulary * h if embeddings else 0)


def count_linear_flops(config: CRNetConfig, num_stages: int = 1) -> int:
    """Of all layers' linear maps, per token, forward: two for each multiplication and addition of weights."""
    vectors = (2 * config.num_layers + 1) * config.width
    residuals = len(POSITIONS) * (config.num_layers - len(config.find_anchors(num_stages)))
    return 2 * (count_parameters(config, num_stages, embeddings=False) - vectors - residuals)


def count_rebuild_flops(config: CRNetConfig, layer: int) -> int:
    """Per token, to rebuild one layer's outputs from products that are kept: 2 r (5h + 2f)."""
    return 2 * config.rank_of(layer) * (5 * config.width + 2 * config.intermediate)


def count_kept(config: CRNetConfig, first: int, is_anchored: bool) -> int:
    """Values per token that a segment keeps for its backward pass: x and seven products of each layer, seven
    outputs. Anchors of full rank have no products."""
    h, f = config.width, config.intermediate
    layers = range(first, first + config.checkpoint_every)
    is_full = is_anchored and config.first_layer == "full"
    products = sum(
        len(POSITIONS) * config.rank_of(layer) for layer in layers if not (is_full and layer == first)
    )
    return len(layers) * h + products + 5 * h + 2 * f
