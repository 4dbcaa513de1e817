"""Run functions in processes that may hang, crash, fork or eat memory without harm to the grader.

Each gets limits, a process group that is killed as a whole and, where Linux allows it, namespaces
of its own: without a network, with its own process numbers, and with nothing to write to but one
folder and a small /tmp of its own. It is no security boundary: see README.md.
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
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

MEMORY = 12 * 2**30  # of address space; PyTorch reserves more than it uses
FILE_SIZE = 2**28
SPACE = 2**30  # bytes in the folder that a job may write to, and as many in its /tmp
PROCESSES = 1000  # threads included; without namespaces all of the user's count: four times as many
NOBODIES = 100_000  # from here on, numbers of users that nobody has
REPORTS = 2**20  # bytes that a job may report
GUARD = compile((Path(__file__).parent / "guard.py").read_text(encoding="utf-8"), "guard", "exec")
TEMPORARY = Path(tempfile.gettempdir()).resolve()
LIBC = ctypes.CDLL(None, use_errno=True)

NEW_MOUNTS, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x00020000, 0x10000000, 0x20000000, 0x40000000
BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18  # flags of mount(2)
SET_ATTRIBUTES, OF_ALL_BELOW, READ_ONLY = 442, 0x8000, 1  # mount_setattr(2)
DEATH_SIGNAL, DUMPABLE, KEEP_CAPABILITIES, NO_NEW = 1, 4, 8, 38  # of prctl(2)
AMBIENT, RAISE = 47, 2  # also
FILES_OF_ALL, CAPABILITIES = 1, 0x20080522  # CAP_DAC_OVERRIDE, and the version of capset(2)


class Job(NamedTuple):
    """A function that tells its dicts by `report`, with its limit in seconds."""

    name: str
    work: Callable[[], None]
    seconds: float
    after: str = ""  # the job that has to end first
    writable: Path | None = None  # the folder that it may write to, beside a /tmp of its own
    readable: Sequence[Path] = ()  # what it reads, also if that lies in /tmp


class Outcome(NamedTuple):
    """What a job reported, and how it ended."""

    reports: list[dict]
    end: str  # 'finished', 'stopped' (by itself, too early), or 'killed' (by a limit)
    seconds: float


def isolate(job: Job) -> bool:
    """Move into namespaces of our own; return whether the system allows it."""
    with suppress(OSError, AttributeError):
        ids = {"uid": os.getuid(), "gid": os.getgid()}
        new = NEW_MOUNTS | NEW_PROCESSES | NEW_NETWORK
        if LIBC.unshare(new) != 0:
            if LIBC.unshare(new | NEW_USER) != 0:
                return False
            Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
            for kind, number in ids.items():
                Path(f"/proc/self/{kind}_map").write_text(f"0 {number} 1", encoding="utf-8")
        close_files(job)
        # Kernels talk to us through the loopback device: SIOCSIFFLAGS, IFF_UP.
        with socket.socket() as any_socket, suppress(OSError):
            fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 1))
        return True
    return False


def close_files(job: Job) -> None:
    """Make all files read-only, and /tmp and /dev/shm empty, small and our own."""
    LIBC.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None)
    python = Path(sys.prefix)  # perhaps a link
    seen = [python, python.resolve(), *job.readable, *filter(None, [job.writable])]
    doors = {path: os.open(path, os.O_RDONLY) for path in seen}  # they may lie in /tmp
    set_read_only(Path("/"), True, OF_ALL_BELOW)
    for folder, size in ((TEMPORARY, SPACE), (Path("/dev/shm"), FILE_SIZE)):
        options = f"size={size},mode=1777".encode()
        LIBC.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, options)
    for path, door in doors.items():
        if path == job.writable or TEMPORARY in path.parents:
            path.mkdir(parents=True, exist_ok=True)
            LIBC.mount(f"/proc/self/fd/{door}".encode(), bytes(path), None, BIND, None)
            set_read_only(path, path != job.writable)
        os.close(door)
    os.environ["HOME"] = str(TEMPORARY)  # in which kernels keep their notes


def set_read_only(folder: Path, wanted: bool, flags: int = 0) -> None:
    """Set whether a mounted folder may be written to."""
    attributes = struct.pack("4Q", READ_ONLY * wanted, READ_ONLY * (not wanted), 0, 0)
    LIBC.syscall(SET_ATTRIBUTES, -100, bytes(folder), flags, attributes, len(attributes))


def leave_root() -> None:
    """Become nobody, since Linux counts no process of root, but still reach root's files.

    Each job is another nobody: Linux counts by user, and who forks without end hurts nobody else.
    """
    with suppress(AttributeError):
        LIBC.prctl(KEEP_CAPABILITIES, 1)
        with suppress(OSError):  # in a namespace of users there is nobody else
            own = NOBODIES + secrets.randbelow(NOBODIES)
            os.setresuid(own, own, own)
            os.environ["USER"] = "nobody"  # the system has no name for this number
        header, kept = struct.pack("Ii", CAPABILITIES, 0), 1 << FILES_OF_ALL
        # effective, permitted, inheritable
        LIBC.capset(header, struct.pack("6I", kept, kept, kept, 0, 0, 0))
        LIBC.prctl(AMBIENT, RAISE, FILES_OF_ALL, 0, 0)  # so that kernels have it, too
        LIBC.prctl(NO_NEW, 1, 0, 0, 0)


def limit(processes: int) -> None:
    """Set limits, and be the first to go when the memory is used up."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    for kind, most in (("AS", MEMORY), ("FSIZE", FILE_SIZE), ("NPROC", processes), ("CORE", 0)):
        with suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
    if os.getuid() == 0:
        leave_root()


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, and to let no other read its memory."""
    with suppress(AttributeError):
        LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL)
        LIBC.prctl(DUMPABLE, 0, 0, 0, 0)


def size_of(folder: Path) -> int:
    """Return the bytes that a folder's files take."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


class Child:
    """A job in a process forked from this one, so that what was imported here is there at once."""

    def __init__(self, job: Job) -> None:
        self.job, self.start, self.received = job, time.monotonic(), b""
        self.measured, self.full = self.start, False
        self.nonce = secrets.token_hex(16)  # without it nothing that comes through the pipe counts
        self.pipe, inner = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                self.run(inner)
            finally:
                os._exit(1)
        os.close(inner)
        os.set_blocking(self.pipe, False)

    def run(self, pipe: int) -> None:
        """Do the job, in the child."""
        os.closerange(3, pipe)  # whatever the grader has open is out of reach
        os.closerange(pipe + 1, 4096)
        die_with_parent()
        alone = isolate(self.job)
        if alone and (inner := os.fork()):  # the first one born there takes all others along
            os.write(pipe, f"{self.nonce} {json.dumps({'inner': inner})}\n".encode())
            os.waitpid(inner, 0)
            return
        if alone:  # /proc shows what lives there, and no more
            LIBC.mount(b"proc", b"/proc", b"proc", 0, None)
        limit(PROCESSES if alone else 4 * PROCESSES)
        die_with_parent()
        nothing = os.open(os.devnull, os.O_RDWR)  # nobody reads what a hand-in prints
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        guard = {"__name__": "guard"}
        exec(GUARD, guard)
        guard["open_channel"](pipe, self.nonce, Child.run.__code__)
        del guard, self.nonce  # from here on, the channel alone has it
        self.job.work()
        report({"end": "finished"})

    def poll(self) -> Outcome | None:
        """Return the outcome once there is one, with everything that the job started killed."""
        with suppress(BlockingIOError):
            while len(self.received) <= REPORTS and (part := os.read(self.pipe, 2**16)):
                self.received += part
        gone = self.pid == os.waitpid(self.pid, os.WNOHANG)[0]
        finished = b'{"end": "finished"}\n' in self.received
        now = time.monotonic()
        if self.job.writable and now > self.measured + 1:
            self.measured, self.full = now, size_of(self.job.writable) > SPACE
        late = now - self.start > self.job.seconds * slowness()
        late |= len(self.received) > REPORTS or self.full
        if not (gone or finished or late):
            return None
        reports = self.read_reports()
        # A negative number is the group's.
        for pid in (-self.pid, *(report["inner"] for report in reports[:1] if "inner" in report)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not gone:
            os.waitpid(self.pid, 0)
        os.close(self.pipe)
        ended = reports and reports[-1] == {"end": "finished"}
        end = "finished" if ended else "killed" if late else "stopped"
        return Outcome(reports, end, now - self.start)

    def read_reports(self) -> list[dict]:
        """Return what came through the pipe; a line that isn't signed is reported as tampering."""
        reports = []
        for line in self.received.split(b"\n")[:-1]:
            nonce, _, text = line.partition(b" ")
            with suppress(ValueError):
                signed = nonce == self.nonce.encode()
                reports.append(json.loads(text) if signed else {"tampered": "a report unsigned"})
        return reports


def report(content: dict, items: list | None = None) -> None:
    """Report from within a job; `items` are the tests that pytest collected."""
    sys.audit("grading.report", json.dumps(content).encode(), items)


def slowness() -> float:
    """Return how many times longer than on an idle machine a job may take on this one now."""
    return min(4.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def run_jobs(jobs: list[Job], workers: int, seconds: float) -> dict[str, Outcome]:
    """Run jobs side by side, each after the one it waits for; kill what is left after `seconds`."""
    start = time.monotonic()
    waiting, running, outcomes = list(jobs), [], {}
    while waiting or running:
        ready = [job for job in waiting if not job.after or job.after in outcomes]
        for job in ready[: workers - len(running)]:
            waiting.remove(job)
            left = max(0.0, seconds - (time.monotonic() - start) / slowness())
            running.append(Child(job._replace(seconds=min(job.seconds, left))))
        for child in list(running):
            if outcome := child.poll():
                outcomes[child.job.name] = outcome
                running.remove(child)
        time.sleep(0.02)
    return outcomes
