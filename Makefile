# The few commands a person types. A new environment uses PYTHON.
PYTHON ?= python3
NAME ?= first
RECIPE ?=
DATA ?=
ARGS ?=
GRID ?= experiments/ablations.json
CLUSTER ?=
WORKERS ?= 0
BIN := .venv/bin
NOTEBOOK := notebooks/pet_segmentation.ipynb
COMPARE := notebooks/compare_runs.ipynb

.PHONY: run photo sweep compare test faults lab bench outputs grade mutants student

# Execute the narrative into runs/NAME, by a RECIPE of recipes/, on the dataset in the folder DATA
# and with papermill's own options in ARGS: make run NAME=oxford RECIPE=best DATA=FOLDER
run: .venv/installed
	@$(BIN)/python -m experiments.command run "$(NAME)" $(if $(RECIPE),--recipe "$(RECIPE)") \
		$(if $(DATA),--data "$(DATA)") $(ARGS)

# Find the pet in a photo with the kept net, without training or dataset: make photo PHOTO=my_cat.jpg
photo: .venv/installed
	@$(BIN)/python -m experiments.command photo "$(PHOTO)"

# Make the runs of a grid, here or on a Dask scheduler: make sweep GRID=my.json CLUSTER=tcp://host:8786
sweep: .venv/installed
	@$(BIN)/python -m experiments.command sweep "$(GRID)" "$(CLUSTER)" "$(WORKERS)"

# Put runs side by side: four small ones made for it, or, say, ARGS='-r RUNS "runs/*" -p MAKE_RUNS False'.
compare: .venv/installed
	@$(BIN)/python -m experiments.command compare $(ARGS)

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --nbval

# The long form of the fault tests: kills, full disks, damaged files, and every parameter, some seven minutes.
faults: .venv/installed
	PETSEG_FAULTS=long $(BIN)/python -m pytest tests/test_faults.py

lab: .venv/installed
	$(BIN)/jupyter lab $(NOTEBOOK)

bench: .venv/installed
	$(BIN)/python -m experiments.throughput

# Execute the notebooks in place, after a change of their cells, to refresh the outputs that nbval compares.
outputs: .venv/installed
	TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False $(NOTEBOOK) notebooks/going_deeper.ipynb $(COMPARE)

# Grade a hand-in by grading/rubric.toml, or the project itself without HAND_IN, or a class, each of
# whose hand-ins is a folder in HAND_INS; QUICK=1 judges the module alone.
grade: .venv/installed
	@$(BIN)/python -m grading $(if $(HAND_IN),--hand-in "$(HAND_IN)") \
		$(if $(HAND_INS),--hand-ins "$(HAND_INS)") $(if $(OUT),--out "$(OUT)") $(if $(QUICK),--quick)

# Grade some hundred seeded faults and harmless variants: each fault has to cost its criterion.
mutants: .venv/installed
	$(BIN)/python -m grading.mutate

# Write the edition for students into student/.
student: .venv/installed
	$(BIN)/python -m grading.student

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
