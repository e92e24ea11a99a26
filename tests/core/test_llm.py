"""Hugging Face models as stages: the whole model's logits, whatever the cut; errors; saving."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from peft import PeftModel

from launch import llm
from launch.finetuning import Finetuning, prepare

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
WINDOW = {"sliding_window": 8}
CONFIGS = {
    "gemma": hf.GemmaConfig(**SIZES, **TOKENS, head_dim=16),
    "gemma2": hf.Gemma2Config(**SIZES, **TOKENS, **WINDOW, head_dim=16),
    "gemma3_text": hf.Gemma3TextConfig(**SIZES, **TOKENS, **WINDOW, head_dim=16, sliding_window_pattern=2),
    "gpt2": hf.GPT2Config(vocab_size=97, n_embd=64, n_layer=5, n_head=4, n_positions=64, **TOKENS, **DRY),
    "gpt_neox": hf.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if "key_value" not in k}, **TOKENS),
    "llama": hf.LlamaConfig(**SIZES),
    "llama, tied": hf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": hf.MistralConfig(**SIZES, **WINDOW),
    "olmo2": hf.Olmo2Config(**SIZES, **TOKENS),
    "phi3": hf.Phi3Config(**SIZES, **TOKENS),
    "qwen2": hf.Qwen2Config(**SIZES, **WINDOW, use_sliding_window=True, max_window_layers=2),
    "qwen3": hf.Qwen3Config(**SIZES, head_dim=16),
    "smollm3": hf.SmolLM3Config(**SIZES, **TOKENS),
}
NUM_STAGES = (1, 2, 3, 5)


def make(name, seed=0):
    torch.manual_seed(seed)
    return hf.AutoModelForCausalLM.from_config(CONFIGS[name])


def make_ids(seed=0):
    """Longer than the sliding windows."""
    return torch.randint(3, 97, (2, 32), generator=torch.Generator().manual_seed(seed))


def make_stages(model, num_stages):
    cuts = llm.Cuts(model, num_stages)
    return cuts, [llm.Stage(cuts, index) for index in range(num_stages)]


def run(stages, ids):
    value = ids
    for stage in stages:
        value = stage(value)
    return value


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_stages", NUM_STAGES)
def test_stages_compute_what_the_whole_model_does(name, num_stages):
    """The same operations on the same values: no bit differs."""
    model = make(name).eval()
    with torch.no_grad():
        expected = model(make_ids()).logits
        _, stages = make_stages(model, num_stages)
        assert torch.equal(run(stages, make_ids()), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_whole_models(name):
    """Those of a tied weight are the sum of both ends', which autograd does here."""
    found = []
    for num_stages in (0, 3):
        model = make(name).eval()
        stages = make_stages(model, num_stages)[1] if num_stages else [lambda ids, m=model: m(ids).logits]
        llm.loss(run(stages, make_ids()), make_ids(1)).backward()
        found.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(mine, whole) for mine, whole in zip(*found, strict=True))


def test_every_tested_family_is_here():
    assert {config.model_type for config in CONFIGS.values()} == set(llm.TESTED)


def test_recomputed_blocks_give_the_same_gradients():
    found = []
    for recomputes in (False, True):
        model = make("llama")
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        _, stages = make_stages(model, 2)
        llm.loss(run([stage.train() for stage in stages], make_ids()), make_ids(1)).backward()
        found.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_the_whole_is_left_as_it_was():
    model = make("qwen2").eval()
    before = model(make_ids()).logits
    make_stages(model, 3)
    assert torch.equal(model(make_ids()).logits, before)
    assert model.config.num_hidden_layers == 5


def test_blocks_are_shared_so_that_the_costliest_stage_costs_least():
    assert llm.share_blocks([1] * 6, 0, 3) == [range(2), range(2, 4), range(4, 6)]
    assert llm.share_blocks([1] * 30, 8, 2) == [range(19), range(19, 30)]
    assert llm.share_blocks([1] * 3, 50, 3) == [range(1), range(1, 2), range(2, 3)]


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(ValueError, match="6 stages of 5 blocks; accepted: 1 to 5 stages"):
        llm.Cuts(make("llama"), 6)


def test_an_architecture_that_is_not_known_is_refused():
    config = hf.OPTConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, ffn_dim=16,
                          num_attention_heads=2, word_embed_proj_dim=16)  # fmt: skip
    with pytest.raises(ValueError, match=r"type 'opt' cannot be cut into stages; accepted: .*llama"):
        llm.Cuts(hf.AutoModelForCausalLM.from_config(config), 1)


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model = .*; accepted: 'smollm2', a folder, a .gguf file"):
        llm.load(str(tmp_path))


def save(stages, cuts, folder, lora=None):
    """As ranks would: what one gathers is what all pass. Twice, as the first stage's comes first."""
    passed = []

    def note(item):
        passed.append(item)
        return passed

    for index, stage in enumerate(stages):
        llm.save(stage, index, cuts, folder, note, lora)
    llm.save(stages[0], 0, cuts, folder, lambda item: passed, lora)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_gives_the_same_logits(name, tmp_path):
    model = make(name).eval()
    cuts, stages = make_stages(model, 3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)  # as after training
        expected = run(stages, make_ids())
    save(stages, cuts, tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(make_ids()).logits, expected)


def test_of_a_tied_weight_one_is_saved(tmp_path):
    cuts, stages = make_stages(make("llama, tied"), 2)
    assert cuts.is_tied
    save(stages, cuts, tmp_path)
    index = (tmp_path / "model.safetensors.index.json").read_text()
    assert "lm_head" not in index and "embed_tokens" in index


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_saved_adapters_give_the_same_logits(name, tmp_path):
    model = make(name).eval()
    lora = llm.add_lora(model, 4)
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_()
    cuts, stages = make_stages(model, 3)
    with torch.no_grad():
        expected = run([stage.eval() for stage in stages], make_ids())
    save(stages, cuts, tmp_path, lora)
    loaded = PeftModel.from_pretrained(make(name), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(make_ids()).logits, expected)


def test_one_stage_with_a_tied_weight_is_saved_once(tmp_path):
    cuts, stages = make_stages(make("gemma2"), 1)
    save(stages, cuts, tmp_path)
    assert "lm_head" not in (tmp_path / llm.INDEX).read_text()


def test_a_folder_lacks_what_another_machine_wrote(tmp_path):
    cuts, stages = make_stages(make("llama"), 2)
    save(stages, cuts, tmp_path)
    assert llm.is_complete(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert not llm.is_complete(tmp_path)


def test_a_tokenizer_without_an_encoder_is_refused():
    with pytest.raises(ValueError, match="a tokenizer of type str; accepted: a fast one"):
        llm.find_encoder("")


@pytest.fixture(scope="module")
def smollm2():
    return llm.load(llm.SMOLLM2)


def test_smollm2_is_read_and_can_be_saved_again(smollm2, tmp_path):
    model, tokenizer = smollm2
    assert model.config.num_hidden_layers == 30 and model.num_parameters() == 134_515_008
    assert llm.Cuts(model, 2).blocks == [range(19), range(19, 30)]
    ids = llm.find_encoder(tokenizer).encode("tensor " * 9000).ids
    assert len(ids) > 9000 and ids[:2] == tokenizer("tensor tensor").input_ids
    model.config.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


PREPARE = {"model": "small", "data": Path(__file__), "lora_rank": 0, "length": 16}


@pytest.fixture
def small(monkeypatch, smollm2):
    """A small random model with SmolLM2's tokenizer, which is all that `prepare` looks at."""
    config = hf.LlamaConfig(**{**SIZES, "vocab_size": 49152})
    monkeypatch.setattr(
        llm, "load", lambda name, dtype: (hf.AutoModelForCausalLM.from_config(config), smollm2[1])
    )


def test_what_fits_is_prepared(small):
    prepared = prepare(Finetuning(**PREPARE), 2)
    assert prepared.cuts.num_stages == 2 and prepared.lora is None and prepared.corpus.max() < 49152


def test_a_folder_with_files_is_refused(small, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"--save = .* has files; accepted: an empty folder, or a new one"):
        prepare(Finetuning(**PREPARE, save=tmp_path), 2)


def test_samples_longer_than_the_model_reads_are_refused(small):
    with pytest.raises(ValueError, match="--length = 65; accepted: at most 64, the model's positions"):
        prepare(Finetuning(**{**PREPARE, "length": 65}), 2)


def test_tokens_that_the_model_does_not_have_are_refused(small, tmp_path):
    path = tmp_path / "numbers.u16"
    np.array([1, 49152], np.uint16).tofile(path)
    with pytest.raises(ValueError, match="has token 49152; accepted: below 49152, the model's"):
        prepare(Finetuning(**{**PREPARE, "data": path}), 2)


def test_text_that_is_not_there_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        prepare(Finetuning(**{**PREPARE, "data": tmp_path / "nothing"}), 2)
