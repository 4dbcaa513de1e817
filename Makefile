# The few commands a person types. A new environment uses PYTHON; `make run` takes a run's NAME and papermill's ARGS.
PYTHON ?= python3
NAME ?= first
ARGS ?=
BIN := .venv/bin
NOTEBOOK := notebooks/pet_segmentation.ipynb

.PHONY: run test lab outputs

run: .venv/installed
	mkdir -p "runs/$(NAME)"
	$(BIN)/papermill --log-output $(NOTEBOOK) "runs/$(NAME)/notebook.ipynb" -r RUN_NAME "$(NAME)" $(ARGS)
	$(BIN)/jupyter nbconvert --log-level WARN --to html --template classic "runs/$(NAME)/notebook.ipynb" \
		--HTMLExporter.preprocessors=nbconvert.preprocessors.CoalesceStreamsPreprocessor  # one line a progress bar
	@echo "Done: open runs/$(NAME)/notebook.html"

test: .venv/installed
	$(BIN)/python -m pytest --nbval

lab: .venv/installed
	$(BIN)/jupyter lab $(NOTEBOOK)

# Execute the notebook in place, after a change of its cells, to refresh the outputs that nbval compares.
outputs: .venv/installed
	TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False $(NOTEBOOK)

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
