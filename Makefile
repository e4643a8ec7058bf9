# Every target sets up a bare machine by itself: Python >= 3.11 and pip's index are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo demo-text test test-slow parity lint format clean

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[demo,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m fid_imagegen.demo --workdir runs/demo

# Text to image in three stages on procedural scenes.
demo-text: $(VENV)/.installed
	$(BIN)/python -m fid_imagegen.text_demo --workdir runs/demo-text

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# torch is an oracle of tests only. The CPU wheel is named so that no CUDA wheels come along; torchvision's binary does not match
# it and breaks transformers' import, so that it lies apart and is seen by the one test that reads its networks.
parity: $(VENV)/.installed
	$(BIN)/pip install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/torchvision torchvision==0.28.0
	$(BIN)/python -m pytest -m parity
	PYTHONPATH=$(VENV)/torchvision $(BIN)/python -m pytest -m parity tests/interop/test_interop_efficientnet.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info
