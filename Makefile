# Everything runs in .venv, which the first target that needs it makes from the pinned constraints.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
EXTRAS := lm,app,fast,plots,notebooks,dev
SIZE   ?= full

.PHONY: demo test check fmt ci app notebooks slow gpu bench clean

demo: $(VENV)/ready
	$(BIN)/saelab run experiments/quickstart/demo.yaml
	@echo
	@echo "Open the browser with:  make app"

test: $(VENV)/ready
	$(BIN)/pytest

slow: $(VENV)/ready
	$(BIN)/pytest -m "slow"

gpu: $(VENV)/ready
	$(BIN)/pytest -m "gpu"

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/links
	@ln -sfn ../../app build/links/saelab_app
	@ln -sfn ../../experiments build/links/saelab_experiments
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python
	$(BIN)/lint-imports

fmt: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ci: check test

app: $(VENV)/ready
	$(BIN)/saelab app runs/demo

notebooks: $(VENV)/ready
	$(BIN)/python notebooks/run.py --size $(SIZE)

bench: $(VENV)/ready
	$(BIN)/python benchmarks/harvest.py
	$(BIN)/python benchmarks/reader.py

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
