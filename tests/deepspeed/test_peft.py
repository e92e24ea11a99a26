"""Hugging Face models, built from a configuration without a download, with PEFT's adapters, as pipelines."""

import peft
import pytest
import torch
import transformers
from torch import nn

from tests import models
from tests.cluster import free_groups
from tests.deepspeed import odd_models
from tests.deepspeed.test_models import HELPED, STOCK, check, losses
from tests.models import INT2, NONE

SIZES = {"num_hidden_layers": 4, "hidden_size": models.WIDTH, "num_attention_heads": 4}
COMMON = {"vocab_size": models.VOCABULARY, "attn_implementation": "sdpa", "use_cache": False}


class Embedding(nn.Module):
    """The model's own, with the positions. rotates: passes on (hidden, cos, sin), which need no gradient."""

    def __init__(self, tokens, positions, rotates):
        super().__init__()
        self.tokens = tokens
        self.positions = positions
        self.rotates = rotates

    def forward(self, ids):
        places = torch.arange(ids.shape[1])
        hidden = self.tokens(ids)
        if self.rotates:
            return hidden, *self.positions(hidden, places[None])
        return hidden + self.positions(places)


class Block(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, inputs):
        if torch.is_tensor(inputs):
            return _tensor(self.block(inputs))
        hidden, *angles = inputs
        return _tensor(self.block(hidden, position_embeddings=tuple(angles))), *angles


class Head(nn.Module):
    def __init__(self, norm, linear):
        super().__init__()
        self.norm = norm
        self.linear = linear

    def forward(self, inputs):
        return self.linear(self.norm(inputs if torch.is_tensor(inputs) else inputs[0]))


def _tensor(output):
    return output if torch.is_tensor(output) else output[0]


def gpt2():
    config = transformers.GPT2Config(
        **SIZES, **COMMON, n_positions=models.LENGTH, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = adapted(transformers.GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"])
    body = model.transformer
    blocks = [Block(block) for block in body.h]
    return [Embedding(body.wte, body.wpe, False), *blocks, Head(body.ln_f, model.lm_head)]


def llama():
    config = transformers.LlamaConfig(**SIZES, **COMMON, intermediate_size=128, num_key_value_heads=2)
    model = adapted(transformers.LlamaForCausalLM(config), ["q_proj", "v_proj", "up_proj"])
    body = model.model
    blocks = [Block(block) for block in body.layers]
    return [Embedding(body.embed_tokens, body.rotary_emb, True), *blocks, Head(body.norm, model.lm_head)]


def adapted(model, names):
    """The model itself: its linear layers replaced by PEFT's, which alone train."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, fan_in_fan_out="c_attn" in names)
    return peft.get_peft_model(model, config).get_base_model()


def run(model, reference, steps):
    found = []
    for block in (None, NONE, INT2):
        torch.manual_seed(7)
        layers = {"gpt2": gpt2, "llama": llama}[model]()
        if block is None and reference == HELPED:
            layers = [odd_models.Helped(layer) for layer in layers]
        engine = odd_models.start(layers, 2, block)
        trained = [name for name, p in engine.module.named_parameters() if p.requires_grad]
        assert trained and all("lora_" in name or name.endswith(".nothing") for name in trained)
        found.append(losses(engine, (4,) * steps, models.batches()))
        if block is INT2:
            found.append(models.memories(engine))
        del engine
        free_groups()
    return found


@pytest.mark.parametrize(("model", "reference"), [("gpt2", STOCK), ("llama", HELPED)])
def test_adapters_train_over_a_pipeline(two_ranks, model, reference):
    """Stock cannot pass on Llama's angles: a stage whose output needs no gradient crashes in its backward
    pass."""
    outcomes = two_ranks.run(run, model, reference, 20)
    check(outcomes)
    for _, none, int2, _ in outcomes:
        assert int2[0] - int2[-1] > 0.5 * (none[0] - none[-1]) > 0.05
