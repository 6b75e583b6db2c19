# Thin: each target is one line that also works without make (see README).
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS ?=

.PHONY: run test lab lint clean
run: .venv/.ready       ## every lesson on embedded data
	$(BIN)/python -m kdlib run all --scale smoke

test: .venv/.ready      ## unit tests and every notebook, in parallel processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lab: .venv/.ready       ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

lint: .venv/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check kdlib tests notebooks/exercises

clean:
	rm -rf .venv

.venv/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -r requirements.txt $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	touch $@
