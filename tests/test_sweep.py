"""Sweeps: grids, what is kept, refused or fails, and a worker that is killed in the middle."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest
from damage import damage

import petseg_utils as pets
from experiments import sweep

TINY = {"IMAGE_SIZE": 32, "DEPTH": 2, "BASE_CHANNELS": 4, "EPOCHS": 1, "LIMIT": 60, "BATCH_SIZE": 8}


@pytest.fixture
def names():
    """Give names of runs that no other test has, and remove their folders afterwards."""
    prefix = f"test-sweep-{uuid4().hex[:8]}"
    yield lambda *ends: [f"{prefix}-{end}" for end in ends]
    for folder in (pets.ROOT / "runs").glob(f"{prefix}*"):
        shutil.rmtree(folder)


# -------------------------------------------------------------------------------------------- grids


def test_a_grid_has_a_run_for_each_change_and_seed(tmp_path):
    path = tmp_path / "mine.json"
    changes = {"a": {}, "b": {"SKIPS": False}}
    path.write_text(json.dumps({"base": {"SKIPS": True}, "changes": changes, "seeds": [0, 3]}))
    assert sweep.read_grid(path) == {
        "mine_a_seed_0": {"SKIPS": True, "SEED": 0},
        "mine_a_seed_3": {"SKIPS": True, "SEED": 3},
        "mine_b_seed_0": {"SKIPS": False, "SEED": 0},
        "mine_b_seed_3": {"SKIPS": False, "SEED": 3},
    }


@pytest.mark.parametrize("content", [
    "", "[]", "7", '{"changes": []}', '{"changes": {"a": 3}}', '{"base": {}}', "\0",
    '{"changes": {}}', '{"changes": {"a": {}}, "seeds": 3}', '{"changes": {"a": {}}, "seed": [0]}',
    '{"base": 1, "changes": {"a": {}}}',
])  # fmt: skip
def test_a_malformed_grid_ends_in_a_sentence(content, tmp_path, complains):
    (tmp_path / "grid.json").write_text(content)
    with complains("grid.json"):
        sweep.read_grid(tmp_path / "grid.json")


def test_a_wrong_parameter_is_told_with_its_run_before_any_starts(complains, monkeypatch):
    monkeypatch.setattr(sweep, "start_workers", lambda *_: pytest.fail("workers were started"))
    with complains("the run second: ", "no parameter EPOCH"):
        sweep.make_runs({"first": TINY, "second": TINY | {"EPOCH": 3}})


def test_no_scheduler_ends_in_a_sentence(complains, monkeypatch):
    client = sweep.Client
    monkeypatch.setattr(sweep, "Client", lambda address, timeout: client(address, timeout="1s"))
    with complains("no Dask scheduler answers at tcp://127.0.0.1:9"):
        sweep.make_runs({"first": TINY}, "tcp://127.0.0.1:9")


def test_as_many_workers_are_started_as_asked_for_and_numbered(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Dask sets it here, too: undone after the test
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(sweep, "CPU_COUNT", 8)
    with sweep.start_workers("", 2) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        threads = client.run(os.environ.get, "OMP_NUM_THREADS")
    assert [worker["nthreads"] for worker in workers] == [1, 1]
    assert sorted(worker["name"] for worker in workers) == [0, 1]
    assert list(threads.values()) == ["4", "4"]


# ------------------------------------------------------------------------------------ what is there


def write_metrics(folder: Path) -> dict:
    """Write a complete run's files, as far as a sweep looks at them, and return its parameters."""
    parameters = pets.Recipe(**TINY).model_dump()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.csv").write_text("epoch,seconds\n1,2\n")
    (folder / "metrics.json").write_text(json.dumps({"parameters": parameters}))
    (folder / "notebook.ipynb").touch()
    return parameters


def test_a_complete_run_counts_wherever_it_was_made_but_not_one_with_other_parameters(
    tmp_path, complains
):
    parameters = write_metrics(tmp_path)
    elsewhere = parameters | {"RESUME": True, "DATA_DIR": "elsewhere", "RUN_NAME": "another"}
    told = "complete, made by another version of petseg_utils.py"
    assert sweep.what_is_there(tmp_path, elsewhere) == told
    assert sweep.what_is_there(tmp_path / "nowhere", parameters) == ""
    with complains("another run", "EPOCHS 1, not 2", "another name"):
        sweep.what_is_there(tmp_path, parameters | {"EPOCHS": 2})


@pytest.mark.parametrize(("file", "text"), [
    ("metrics.json", ""), ("metrics.json", "[]"), ("metrics.json", "{}"),
    ("metrics.json", '{"parameters": []}'), ("notebook.ipynb", None),
])  # fmt: skip
def test_a_run_that_is_damaged_or_did_not_reach_its_last_cell_is_gone_on_with(file, text, tmp_path):
    parameters = write_metrics(tmp_path)
    damage(tmp_path / file, "", text)
    assert sweep.what_is_there(tmp_path, parameters) == ""


def test_gpus_are_shared_out_among_the_workers_of_this_machine(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep.gpu_of(1) == {} or sweep.torch.cuda.is_available()
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    given = [sweep.gpu_of(worker)["CUDA_VISIBLE_DEVICES"] for worker in (0, 1, 2)]
    assert given == ["0", "1", "0"]
    assert sweep.gpu_of("tcp://10.0.0.1:4000") == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")  # given to a worker by whoever started it
    assert sweep.gpu_of(1) == {}


# --------------------------------------------------------------------------------------------- runs


def test_runs_are_made_kept_refused_and_fail_without_stopping_the_others(names):
    good, bad, kept, other = names("good", "bad", "kept", "other")
    runs = {bad: TINY | {"DATASET": "oxford", "DATA_DIR": "nowhere"}, good: TINY}
    runs |= {kept: TINY, other: TINY | {"EPOCHS": 2}}
    for name in (kept, other):
        write_metrics(pets.ROOT / "runs" / name)
    outcomes = sweep.make_runs(runs, workers=2)
    assert [one["run"] for one in outcomes] == [bad, good, kept, other]
    assert [one["outcome"] for one in outcomes] == ["failed", "made", "kept", "failed"]
    count, *told = sweep.report(outcomes).splitlines()
    assert count == "1 made, 1 kept, 2 failed"
    assert told[0].startswith(f"failed {bad}: there is no dataset at ")
    assert told[1].startswith(f"kept {kept}: complete, made by another version")
    assert "EPOCHS 1, not 2" in told[2]
    made = pets.Recipe(**TINY).model_dump()
    assert sweep.what_is_there(pets.ROOT / "runs" / good, made) == "complete"
    assert (pets.ROOT / "runs" / good / "notebook.html").exists()


def start(*arguments: str, folder: Path = pets.ROOT) -> subprocess.Popen:
    """Start a Dask process as sweep.py says, in the project's folder or elsewhere."""
    command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(command, cwd=folder, env=environment, **quiet)


@pytest.fixture
def scheduler():
    """A Dask scheduler, started by hand, and what was started with it; all end with the test."""
    processes = [start("scheduler", "--host", "127.0.0.1", "--port", "0")]
    for line in processes[0].stderr:
        if found := re.search(r"Scheduler at:\s+(tcp://\S+)", line):
            break
    yield found[1], processes
    for process in reversed(processes):
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_killed_workers_run_goes_on_from_its_checkpoint_elsewhere(scheduler, names, tmp_path):
    address, processes = scheduler
    (stem,) = names("grid")
    grid = tmp_path / f"{stem}.json"
    grid.write_text(json.dumps({"base": TINY | {"EPOCHS": 60}, "changes": {"killed": {}}}))
    folder = pets.ROOT / "runs" / f"{stem}_killed_seed_0"

    worker = ("worker", address, "--nthreads", "1", "--no-nanny")
    processes.append(start(*worker))
    with sweep.Client(address, timeout="30s") as client:
        client.wait_for_workers(1, timeout=60)
        command = [sys.executable, "-m", "experiments.command", "sweep", str(grid), address]
        kept = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        made = subprocess.Popen(command, cwd=pets.ROOT, **kept)
        processes.append(start(*worker))
        while not (folder / "checkpoint.pt").exists():
            assert made.poll() is None, "the sweep ended before"
            time.sleep(0.2)
        busy = next(worker for worker, tasks in client.processing().items() if tasks)
        os.kill(client.run(os.getpid, workers=[busy])[busy], signal.SIGKILL)
        assert not (folder / "metrics.json").exists(), "the run was over before that"
        assert not (folder / "notebook.ipynb").exists(), "it is written once, at the end"
        output, _ = made.communicate(timeout=400)
    assert made.returncode == 0, output
    assert output.splitlines()[-1] == "1 made, 0 kept, 0 failed"
    assert len(pets.read_run(folder)["history"]) == 60
    assert not (folder / "checkpoint.old.pt").exists()  # where one that starts anew puts it


@pytest.mark.parametrize(("threads", "elsewhere", "told", "mend"), [
    ("2", False, "more than one thread", "--nthreads 1"),
    ("1", True, "can't import this project", "start them in its folder"),
])  # fmt: skip
def test_workers_that_are_unfit_end_in_a_sentence(
    threads, elsewhere, told, mend, scheduler, complains, tmp_path
):
    address, processes = scheduler
    folder = tmp_path if elsewhere else pets.ROOT
    processes.append(start("worker", address, "--nthreads", threads, "--no-nanny", folder=folder))
    with sweep.Client(address, timeout="30s") as client:
        client.wait_for_workers(1, timeout=60)
        with complains(told, mend):
            sweep.check_workers(client)
