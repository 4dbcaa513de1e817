"""Run functions in processes of their own that may hang, crash, fork or eat memory without harm to
the grader.

Each gets limits, a process group that is killed as a whole and, where Linux allows it, namespaces
of its own: without a network, with its own process numbers, and with chosen folders read-only. It
is no security boundary: see README.md.
"""

import ctypes
import fcntl
import json
import os
import resource
import secrets
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

MEMORY = 12 * 2**30  # of address space; PyTorch reserves more than it uses
FILE_SIZE = 2**28
PROCESSES = 1000  # threads included; without namespaces all that the user runs counts, so it is four times as many
NOBODY = 65534
REPORTS = 2**20  # bytes that a job may report

NEW_MOUNTS, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x00020000, 0x10000000, 0x20000000, 0x40000000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18  # flags of mount(2)
DEATH_SIGNAL, KEEP_CAPABILITIES, AMBIENT, RAISE = 1, 8, 47, 2  # of prctl(2)
FILES_OF_ALL, CAPABILITIES = 1, 0x20080522  # CAP_DAC_OVERRIDE, and the version of capset(2)


class Job(NamedTuple):
    """A function that reports dicts through the function it is given, with its limit in seconds."""

    name: str
    work: Callable[[Callable[[dict], None]], None]
    seconds: float
    after: str = ""  # the job that has to end first


class Outcome(NamedTuple):
    """What a job reported, and how it ended: 'finished', 'stopped' (by itself, too early), 'killed' (by the limit)."""

    reports: list[dict]
    end: str
    seconds: float


def isolate(read_only: list[Path]) -> bool:
    """Move into namespaces of our own, as far as the system allows; return whether children get process numbers."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        uid, new = os.getuid(), NEW_MOUNTS | NEW_PROCESSES | NEW_NETWORK
        if libc.unshare(new) != 0:
            if libc.unshare(new | NEW_USER) != 0:
                return False
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        libc.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None)
        for folder in {str(folder).encode() for folder in read_only}:
            libc.mount(folder, folder, None, BIND, None)
            libc.mount(b"none", folder, None, BIND | REMOUNT | READ_ONLY, None)
        with (
            socket.socket() as any_socket,
            suppress(OSError),
        ):  # kernels talk to us through the loopback device
            fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
        return True
    return False


def leave_root() -> None:
    """Become nobody, but reach the files that root does: Linux counts everybody's processes but those of root."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.prctl(KEEP_CAPABILITIES, 1)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        header, kept = struct.pack("Ii", CAPABILITIES, 0), 1 << FILES_OF_ALL
        libc.capset(
            header, struct.pack("6I", kept, kept, kept, 0, 0, 0)
        )  # effective, permitted, inheritable
        libc.prctl(AMBIENT, RAISE, FILES_OF_ALL, 0, 0)  # so that kernels have it, too


def limit(processes: int) -> None:
    """Set the limits that the system knows by process, and be the first to go when the memory is used up."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    for kind, most in (("AS", MEMORY), ("FSIZE", FILE_SIZE), ("NPROC", processes), ("CORE", 0)):
        with suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
    if os.getuid() == 0:
        leave_root()


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that forked it ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)


class Child:
    """A job in a process of its own, forked from this one, so that what was imported here is there at once."""

    def __init__(self, job: Job, read_only: list[Path]) -> None:
        self.job, self.start, self.received = job, time.monotonic(), b""
        self.nonce = secrets.token_hex(16)  # without it nothing that comes through the pipe counts
        self.pipe, inner = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                self.run(inner, read_only)
            finally:
                os._exit(1)
        os.close(inner)
        os.set_blocking(self.pipe, False)

    def run(self, pipe: int, read_only: list[Path]) -> None:
        """Do the job, in the child."""
        os.close(self.pipe)
        die_with_parent()
        alone = isolate(read_only)
        if alone and (
            inner := os.fork()
        ):  # the first one born there takes all others along when it dies
            os.write(pipe, f"{self.nonce} {json.dumps({'inner': inner})}\n".encode())
            os.waitpid(inner, 0)
            return
        if alone:
            ctypes.CDLL(None).mount(
                b"proc", b"/proc", b"proc", 0, None
            )  # it shows what lives there, and no more
        limit(PROCESSES if alone else 4 * PROCESSES)
        die_with_parent()
        nothing = os.open(os.devnull, os.O_RDWR)  # nobody reads what a hand-in prints
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        nonce, write, dumps = (
            self.nonce,
            os.write,
            json.dumps,
        )  # bound before a hand-in can replace them

        def report(content: dict) -> None:
            write(pipe, f"{nonce} {dumps(content)}\n".encode())

        self.job.work(report)
        report({"end": "finished"})

    def poll(self) -> Outcome | None:
        """Return the outcome once there is one, with everything that the job started killed."""
        with suppress(BlockingIOError):
            while len(self.received) <= REPORTS and (part := os.read(self.pipe, 2**16)):
                self.received += part
        gone = self.pid == os.waitpid(self.pid, os.WNOHANG)[0]
        finished = b'{"end": "finished"}\n' in self.received
        seconds = time.monotonic() - self.start
        late = seconds > self.job.seconds or len(self.received) > REPORTS
        if not (gone or finished or late):
            return None
        reports = self.read_reports()
        for pid in (
            -self.pid,
            *(report["inner"] for report in reports[:1] if "inner" in report),
        ):  # - is the group
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not gone:
            os.waitpid(self.pid, 0)
        os.close(self.pipe)
        ended = reports and reports[-1] == {"end": "finished"}
        return Outcome(reports, "finished" if ended else "killed" if late else "stopped", seconds)

    def read_reports(self) -> list[dict]:
        """Return what came through the pipe, without lines that are not ours, cut off, or mixed by forked writers."""
        reports = []
        for line in self.received.split(b"\n")[:-1]:
            nonce, _, text = line.partition(b" ")
            with suppress(ValueError):
                reports += [json.loads(text)] if nonce == self.nonce.encode() else []
        return reports


def run_jobs(
    jobs: list[Job], read_only: list[Path], workers: int, seconds: float
) -> dict[str, Outcome]:
    """Run jobs side by side, each after the one it waits for; what has not ended after `seconds` is killed."""
    deadline = time.monotonic() + seconds
    waiting, running, outcomes = list(jobs), [], {}
    while waiting or running:
        ready = [job for job in waiting if not job.after or job.after in outcomes]
        for job in ready[: workers - len(running)]:
            waiting.remove(job)
            left = max(0.0, deadline - time.monotonic())
            running.append(Child(job._replace(seconds=min(job.seconds, left)), read_only))
        for child in list(running):
            outcome = child.poll()
            if outcome:
                outcomes[child.job.name] = outcome
                running.remove(child)
        time.sleep(0.02)
    return outcomes
