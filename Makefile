# The few commands a person types. A new environment uses PYTHON; `make run` takes a run's NAME and papermill's ARGS.
PYTHON ?= python3
NAME ?= first
ARGS ?=
GRID ?= benchmarks/ablations.json
CLUSTER ?=
WORKERS ?= 0
BIN := .venv/bin
NOTEBOOK := notebooks/pet_segmentation.ipynb
COMPARE := notebooks/compare_runs.ipynb

.PHONY: run sweep compare test lab bench outputs

run: .venv/installed
	mkdir -p "runs/$(NAME)"
	$(BIN)/papermill --log-output $(NOTEBOOK) "runs/$(NAME)/notebook.ipynb" -r RUN_NAME "$(NAME)" $(ARGS)
	$(BIN)/jupyter nbconvert --log-level WARN --to html --template classic "runs/$(NAME)/notebook.ipynb" \
		--HTMLExporter.preprocessors=nbconvert.preprocessors.CoalesceStreamsPreprocessor  # one line a progress bar
	@echo "Done: open runs/$(NAME)/notebook.html"

# Make the runs of a grid, here or on a Dask scheduler: make sweep GRID=my.json CLUSTER=tcp://host:8786
sweep: .venv/installed
	$(BIN)/python -m sweep "$(GRID)" "$(CLUSTER)" "$(WORKERS)"

# Put runs side by side: four small ones made for it, or, say, ARGS='-r RUNS "runs/*" -p MAKE_RUNS False'.
compare: .venv/installed
	mkdir -p runs
	$(BIN)/papermill --log-output $(COMPARE) runs/compare.ipynb $(ARGS)
	$(BIN)/jupyter nbconvert --log-level WARN --to html --template classic runs/compare.ipynb
	@echo "Done: open runs/compare.html"

test: .venv/installed
	$(BIN)/python -m pytest --nbval

lab: .venv/installed
	$(BIN)/jupyter lab $(NOTEBOOK)

bench: .venv/installed
	$(BIN)/python -m benchmarks.throughput

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
