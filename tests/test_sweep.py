"""Sweeps: grids, what is kept, what is refused, what fails, and a worker that is killed in the middle."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

import petseg_utils as pets
from experiments import sweep

TINY = {"IMAGE_SIZE": 32, "DEPTH": 2, "BASE_CHANNELS": 4, "EPOCHS": 1, "LIMIT": 60, "BATCH_SIZE": 8}


@pytest.fixture
def names():
    """Give names of runs that no other test has, and remove their folders afterwards."""
    prefix = f"test-sweep-{uuid4().hex[:8]}"
    yield lambda *ends: [f"{prefix}-{end}" for end in ends]
    for folder in (pets.ROOT / "runs").glob(f"{prefix}*"):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


# -------------------------------------------------------------------------------------------- grids


def test_a_grid_has_a_run_for_each_change_and_seed(tmp_path):
    path = tmp_path / "mine.json"
    grid = {
        "base": {"EPOCHS": 2, "SKIPS": True},
        "changes": {"a": {}, "b": {"SKIPS": False}},
        "seeds": [0, 3],
    }
    path.write_text(json.dumps(grid))
    assert sweep.read_grid(path) == {
        "mine_a_seed_0": {"EPOCHS": 2, "SKIPS": True, "SEED": 0},
        "mine_a_seed_3": {"EPOCHS": 2, "SKIPS": True, "SEED": 3},
        "mine_b_seed_0": {"EPOCHS": 2, "SKIPS": False, "SEED": 0},
        "mine_b_seed_3": {"EPOCHS": 2, "SKIPS": False, "SEED": 3},
    }


@pytest.mark.parametrize(
    "content",
    ["", "[]", "7", '{"changes": []}', '{"changes": {"a": 3}}', '{"base": {}}', '{"changes": {}}', "\0",
     '{"changes": {"a": {}}, "seeds": 3}', '{"changes": {"a": {}}, "seed": [0]}', '{"base": 1, "changes": {"a": {}}}'],
)  # fmt: skip
def test_a_malformed_grid_ends_in_a_sentence(content, tmp_path, complains):
    (tmp_path / "grid.json").write_text(content)
    with complains("grid.json"):
        sweep.read_grid(tmp_path / "grid.json")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"EPOCH": 3}, "no parameter EPOCH"),
        ({"EPOCHS": 0}, "EPOCHS"),
        ({"IMAGE_SIZE": 33}, "make it 32"),
    ],
)
def test_a_wrong_parameter_ends_in_a_sentence_that_names_the_run_before_any_starts(
    parameters, words, complains, monkeypatch
):
    monkeypatch.setattr(sweep, "start_workers", lambda *_: pytest.fail("workers were started"))
    with complains("the run second: ", words):
        sweep.make_runs({"first": TINY, "second": TINY | parameters})


def test_the_ablations_are_a_grid_of_valid_recipes():
    grid = sweep.read_grid(pets.ROOT / "experiments" / "ablations.json")
    assert len(sweep.check_runs(grid)) == len(grid) >= 30


def test_no_scheduler_ends_in_a_sentence(complains):
    with (
        complains("no Dask scheduler answers at tcp://127.0.0.1:9"),
        sweep.start_workers("tcp://127.0.0.1:9", 1),
    ):
        pass


def test_as_many_workers_are_started_as_asked_for_and_numbered(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with sweep.start_workers("", 3) as client:
        threads = client.nthreads()
        names = [
            worker["name"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()
        ]
        shares = sweep.threads_by_host(client)
    assert list(threads.values()) == [1, 1, 1]
    assert sorted(names) == [0, 1, 2]
    assert list(shares.values()) == [max(1, sweep.CPU_COUNT // 3)]


# ------------------------------------------------------------------------------------ what is there


def write_metrics(folder: Path, **changes: object) -> dict:
    """Write a complete run's files, as far as a sweep looks at them, and return its parameters."""
    parameters = pets.Recipe(**TINY).but(**changes).model_dump()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.csv").write_text("epoch,seconds\n1,2\n")
    (folder / "metrics.json").write_text(json.dumps({"parameters": parameters}))
    record = {"papermill": {"end_time": "2026-11-24T16:00:00", "exception": None}}
    (folder / "notebook.ipynb").write_text(json.dumps({"metadata": record}))
    return parameters


def test_a_complete_run_counts_wherever_it_was_made(tmp_path):
    parameters = write_metrics(tmp_path)
    elsewhere = parameters | {"RESUME": True, "DATA_DIR": "elsewhere", "RUN_NAME": "another"}
    assert sweep.what_is_there(tmp_path, elsewhere).startswith("complete")
    assert sweep.what_is_there(tmp_path / "nowhere", parameters) == ""


def test_a_run_with_other_parameters_under_the_same_name_is_refused(tmp_path, complains):
    parameters = write_metrics(tmp_path)
    with complains("another run", "EPOCHS 1, not 2", "another name"):
        sweep.what_is_there(tmp_path, parameters | {"EPOCHS": 2})


def test_a_damaged_run_is_made_again(tmp_path):
    parameters = write_metrics(tmp_path)
    for damage in ("", "[]", "{}", '{"parameters": []}'):
        (tmp_path / "metrics.json").write_text(damage)
        assert sweep.what_is_there(tmp_path, parameters) == ""


@pytest.mark.parametrize(
    "record", [{"end_time": None, "exception": None}, {"end_time": "now", "exception": True}, {}]
)
def test_a_run_killed_between_its_results_and_its_last_cell_is_gone_on_with(record, tmp_path):
    parameters = write_metrics(tmp_path)
    (tmp_path / "notebook.ipynb").write_text(json.dumps({"metadata": {"papermill": record}}))
    assert sweep.what_is_there(tmp_path, parameters) == ""


def test_a_run_by_another_version_is_told(tmp_path):
    parameters = write_metrics(tmp_path)
    assert "another version" in sweep.what_is_there(tmp_path, parameters)


def test_gpus_are_shared_out_among_the_workers_of_this_machine(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep.gpu_of(1) == {} or sweep.torch.cuda.is_available()
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    assert [sweep.gpu_of(worker) for worker in (0, 1, 2)] == [
        {"CUDA_VISIBLE_DEVICES": n} for n in "010"
    ]
    assert sweep.gpu_of("tcp://10.0.0.1:4000") == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")  # given to a worker by whoever started it
    assert sweep.gpu_of(1) == {}


# --------------------------------------------------------------------------------------------- runs


def test_runs_are_made_kept_refused_and_fail_without_stopping_the_others(names):
    good, bad = names("good", "bad")
    wrong = TINY | {"DATASET": "oxford", "DATA_DIR": "nowhere"}
    first = sweep.make_runs({bad: wrong, good: TINY}, workers=2)
    assert [one["run"] for one in first] == [bad, good]
    assert [one["outcome"] for one in first] == ["failed", "made"]
    assert first[0]["why"].startswith("there is no dataset at ")
    assert pets.read_run(pets.ROOT / "runs" / good)["parameters"]["EPOCHS"] == 1
    report = sweep.report(first).splitlines()
    assert report[0] == "1 made, 0 kept, 1 failed"
    assert report[1].startswith(f"failed {bad}: there is no dataset at ")

    again = sweep.make_runs({good: TINY})
    assert again[0]["outcome"] == "kept"
    assert again[0]["why"] == "complete"
    other = sweep.make_runs({good: TINY | {"EPOCHS": 2}})
    assert other[0]["outcome"] == "failed"
    assert "EPOCHS 1, not 2" in other[0]["why"]


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


def wait_for(condition, seconds: float = 400) -> None:
    """Wait until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


def test_a_run_of_a_killed_worker_goes_on_from_its_checkpoint_on_another(
    scheduler, names, tmp_path
):
    address, processes = scheduler
    (name,) = names("killed_seed_0")
    stem, _, change = name.removesuffix("_seed_0").rpartition("-")
    stem, long = f"{stem}-grid", TINY | {"EPOCHS": 60}
    (tmp_path / f"{stem}.json").write_text(json.dumps({"base": long, "changes": {change: {}}}))
    folder = pets.ROOT / "runs" / f"{stem}_{change}_seed_0"

    worker = ("worker", address, "--nthreads", "1", "--no-nanny")
    processes.append(start(*worker))
    with pets_client(address) as client:
        client.wait_for_workers(1, timeout=60)
        command = [
            sys.executable,
            "-m",
            "experiments.command",
            "sweep",
            str(tmp_path / f"{stem}.json"),
            address,
        ]
        made = subprocess.Popen(
            command, cwd=pets.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        processes.append(start(*worker))
        wait_for((folder / "checkpoint.pt").exists)
        victim = processes[1] if is_busy(client, processes[1].pid) else processes[2]
        os.kill(victim.pid, signal.SIGKILL)
        assert not (folder / "metrics.json").exists(), (
            "the run was over before its worker was killed"
        )
        assert not (folder / "notebook.ipynb").exists(), "it is written once, at the end"
        output, _ = made.communicate(timeout=400)
    assert made.returncode == 0, output
    assert output.splitlines()[-1] == "1 made, 0 kept, 0 failed"
    assert len(pets.read_run(folder)["history"]) == 60
    assert not (
        folder / "checkpoint.old.pt"
    ).exists()  # that is where a training that starts anew puts it


def pets_client(address: str) -> sweep.Client:
    """Return a client that looks on."""
    return sweep.Client(address, timeout="30s")


def is_busy(client: sweep.Client, pid: int) -> bool:
    """Return whether the worker with this process id has a task."""
    with suppress(OSError):
        pids = client.run(os.getpid)
        return any(
            client.processing().get(address) for address, number in pids.items() if number == pid
        )
    return False


def test_workers_with_two_threads_are_refused(scheduler, complains):
    address, processes = scheduler
    processes.append(start("worker", address, "--nthreads", "2", "--no-nanny"))
    with pets_client(address) as client:
        client.wait_for_workers(1, timeout=60)
        with complains("more than one thread", "--nthreads 1"), sweep.start_workers(address, 1):
            pass


def test_workers_that_cannot_import_the_project_end_in_a_sentence(scheduler, complains, tmp_path):
    address, processes = scheduler
    processes.append(start("worker", address, "--nthreads", "1", "--no-nanny", folder=tmp_path))
    with pets_client(address) as client:
        client.wait_for_workers(1, timeout=60)
        with (
            complains("can't import this project", "start them in its folder"),
            sweep.start_workers(address, 1),
        ):
            pass
