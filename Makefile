# The few commands a person types. A new environment uses PYTHON; `make run` takes a run's NAME and papermill's ARGS,
# `make photo` a PHOTO.
PYTHON ?= python3
NAME ?= first
ARGS ?=
BIN := .venv/bin
NOTEBOOK := notebooks/pet_segmentation.ipynb
COMPARE := notebooks/compare_runs.ipynb
TO_HTML := $(BIN)/jupyter nbconvert --log-level WARN --to html --template-file notebooks/page.html.j2

.PHONY: run photo compare test lab bench outputs

run: .venv/installed
	mkdir -p "runs/$(NAME)"
	$(BIN)/papermill --log-output $(NOTEBOOK) "runs/$(NAME)/notebook.ipynb" -r RUN_NAME "$(NAME)" $(ARGS)
	$(TO_HTML) "runs/$(NAME)/notebook.ipynb"
	@echo "Done: open runs/$(NAME)/notebook.html"

# Find the pet in a photo with the kept net: no training, no dataset.
photo: .venv/installed
	$(BIN)/python photo.py "$(PHOTO)"

# Put runs side by side: two small ones made for it, or, say, ARGS='-r RUNS "runs/*" -p MAKE_RUNS False'.
compare: .venv/installed
	mkdir -p runs
	$(BIN)/papermill --log-output $(COMPARE) runs/compare.ipynb $(ARGS)
	$(TO_HTML) runs/compare.ipynb
	@echo "Done: open runs/compare.html"

test: .venv/installed
	$(BIN)/python -m pytest --nbval

lab: .venv/installed
	$(BIN)/jupyter lab $(NOTEBOOK)

bench: .venv/installed
	$(BIN)/python benchmarks/throughput.py

# Execute the notebooks in place, after a change of their cells, to refresh the outputs that nbval compares.
outputs: .venv/installed
	TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False $(NOTEBOOK) $(COMPARE)

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
