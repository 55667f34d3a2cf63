"""Break the file system on purpose, at every operation in turn.

``Interposer`` stands between the code and the system's calls that change files: it counts them, and lets a hook end
the process there, raise an error, write half of the bytes, or keep a log. ``Log`` is what a disk would keep of a run
of operations if the power failed: what was synced, and any part of the rest.

Run as a program it does the trials that need a process each, by forking from one process that has everything loaded;
see ``main``. Everything is one thread, because threads do not survive a fork.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from anellm import checkpoint, metrics, safeio, train
from anellm.config import ModelConfig, TrainConfig
from anellm.data import TokenDataset
from anellm.errors import AnellmError
from anellm.model import Model
from anellm.trainer import Trainer

SHAPE = ModelConfig(dim=8, hidden_dim=12, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=20, max_seq_len=8)
DATA = TokenDataset(np.random.default_rng(0).integers(0, 20, 400).astype(np.uint16))
HELD_OUT = TokenDataset(np.random.default_rng(1).integers(0, 20, 60).astype(np.uint16))
STEPS, KEEP_LAST = 3, 2
CALLS = ("open", "write", "pwrite", "ftruncate", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
DEAD = 77  # exit status of a process that a trial ended

# (name of the call, its arguments, what does it really) -> what the caller gets
Hook = Callable[[str, tuple[Any, ...], Callable[[], Any]], Any]


@contextmanager
def interposed(hook: Hook, *, reads: bool = False) -> Iterator[None]:
    """Pass every call that changes the file system to a hook; with ``reads``, those that only open to read too."""
    real = {name: getattr(os, name) for name in CALLS}
    real_flock = fcntl.flock

    def make(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not reads and not args[1] & os.O_CREAT:
                return real[name](*args, **kwargs)
            if "dir_fd" in kwargs and kwargs["dir_fd"] is not None and name in ("unlink", "rmdir"):
                args = (os.path.join(os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}"), args[0]),)
                kwargs = {}
            return hook(name, args, lambda: real[name](*args, **kwargs))

        return call

    def flock(*args: Any) -> Any:
        return hook("flock", args, lambda: real_flock(*args))

    for name in CALLS:
        setattr(os, name, make(name))
    fcntl.flock = flock
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        fcntl.flock = real_flock


class Count:
    """Count the points of a run: each call, and the middle of each write. At the point ``last``, do ``act``."""

    def __init__(self, last: int = 0, act: Callable[[str], None] | None = None) -> None:
        self.points, self.last, self.act = 0, last, act

    def _point(self, name: str) -> bool:
        self.points += 1
        return self.points == self.last and self.act is not None

    def __call__(self, name: str, args: tuple[Any, ...], do: Callable[[], Any]) -> Any:
        if self._point(name):
            self.act(name)
        if name in ("write", "pwrite") and self._point(name):
            do_half(name, args)
            self.act(name)
        return do()


_real_write, _real_pwrite = os.write, os.pwrite


def do_half(name: str, args: tuple[Any, ...]) -> None:
    """Write the first half of what a write was asked to."""
    data = bytes(args[1])
    if name == "write":
        _real_write(args[0], data[: len(data) // 2])
    else:
        _real_pwrite(args[0], data[: len(data) // 2], args[2])


# ---- what is tried -----------------------------------------------------------------------------------------------


def trainer(out: Path, acknowledge: Callable[[int], None] = lambda step: None) -> Trainer:
    """Return a short training that saves every step, and goes on where one was stopped."""

    def callback(record: Any) -> None:
        if record["kind"] == "save":
            acknowledge(record["step"])

    config = TrainConfig(
        steps=STEPS, batch_size=2, seq_len=8, learning_rate=1e-2, warmup_steps=1, eval_interval=2, save_interval=1,
        keep_last=KEEP_LAST, out=str(out), resume="auto",
    )  # fmt: skip
    return Trainer(Model(SHAPE, seed=3), config, DATA, HELD_OUT, callbacks=(callback,))


def digests(run: Path) -> dict[str, str]:
    """Return the SHA-256 of the last checkpoint's tensors."""
    step = checkpoint.step_dir(run, STEPS)
    names = (checkpoint.MODEL, checkpoint.OPTIMIZER)
    return {name: hashlib.sha256((step / name).read_bytes()).hexdigest() for name in names}


def whole_steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints that verify; a step_ folder that does not is a broken promise."""
    steps = checkpoint.list_steps(run)
    for step in steps:
        assert checkpoint.verify(checkpoint.step_dir(run, step)) == step
    return steps


def must_have(acknowledged: int) -> set[int]:
    """Return the steps whose checkpoints must be there once step ``acknowledged`` was reported as saved.

    The one being removed may be gone or not; the best is among the last two here or checked by the resumed run.
    """
    return set(range(max(1, acknowledged - KEEP_LAST + 1), acknowledged + 1))


def check(run: Path, acknowledged: int, expected: dict[str, str], *, records: bool = True) -> None:
    """Check a run directory that a fault left: whole, nothing lost, and it goes on to the same bytes."""
    steps = whole_steps(run) if run.exists() else []
    # One more may have been saved, and the one that it displaces removed, before that was reported.
    expected_steps = sorted(must_have(acknowledged))
    displaced = set(expected_steps[:1]) if steps and steps[-1] > acknowledged else set()
    assert set(expected_steps) - set(steps) <= displaced, (steps, acknowledged)
    assert not steps or steps[-1] >= acknowledged
    again = trainer(run)
    assert again.state.step == (steps[-1] if steps else 0)
    again.train()
    assert digests(run) == expected
    assert not [name for name in os.listdir(run) if name.startswith(".")]
    best = checkpoint.read_best(run)
    assert best is None or checkpoint.is_whole(checkpoint.step_dir(run, best))
    if records:
        lines = [record for record in metrics.read(run) if record["kind"] == "step"]
        assert [record["step"] for record in lines] == list(range(1, STEPS + 1)), lines
        assert sum(1 for _ in metrics._lines(run / metrics.NAME)) == sum(1 for _ in metrics.read(run))


def whole_run(folder: Path) -> dict[str, str]:
    """Return the hashes that a run which nothing disturbs ends with."""
    trainer(folder / "whole").train()
    found = digests(folder / "whole")
    shutil.rmtree(folder / "whole")
    return found


def forked(body: Callable[[Callable[[int], None]], None]) -> tuple[int, int]:
    """Run ``body`` in a child process; return its exit status and the last step that it acknowledged."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            body(lambda step: _real_write(writer, bytes([step])) and None)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as file:
        steps = file.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), max(steps, default=0)


def crashes(folder: Path) -> dict[str, Any]:
    """End the training at every point in turn, and check what is left each time."""
    expected = whole_run(folder)
    run = folder / "run"
    trials, point = 0, 0
    while True:
        point += 1

        def body(acknowledge: Callable[[int], None], last: int = point) -> None:
            with interposed(Count(last, lambda name: os._exit(DEAD))):
                trainer(run, acknowledge).train()

        status, acknowledged = forked(body)
        assert status in (0, DEAD), (point, status)
        check(run, acknowledged, expected)
        shutil.rmtree(run)
        trials += status == DEAD
        if status == 0:
            return {"trials": trials}


def crashes_twice(folder: Path, seed: int = 1, trials: int = 60) -> dict[str, Any]:
    """End the training at a random point, then the resumed one too, and again, before it may end."""
    expected = whole_run(folder)
    random_points = random.Random(seed)
    run = folder / "run"
    deaths = 0
    for _ in range(trials):
        last_acknowledged = 0
        for _ in range(4):

            def body(acknowledge: Callable[[int], None], last: int = random_points.randrange(1, 130)) -> None:
                with interposed(Count(last, lambda name: os._exit(DEAD))):
                    trainer(run, acknowledge).train()

            status, acknowledged = forked(body)
            deaths += status == DEAD
            last_acknowledged = max(last_acknowledged, acknowledged)
        check(run, last_acknowledged, expected)
        shutil.rmtree(run)
    return {"deaths": deaths}


class Refuse:
    """Refuse one call of a run, the ``point``-th, or that one and all later ones, with an error number."""

    def __init__(self, code: int, point: int, *, forever: bool) -> None:
        self.code, self.point, self.forever, self.count = code, point, forever, 0

    def __call__(self, name: str, args: tuple[Any, ...], do: Callable[[], Any]) -> Any:
        self.count += 1
        if self.count < self.point or (self.count > self.point and not self.forever):
            return do()
        if name == "write" and self.code == errno.ENOSPC:
            do_half(name, args)
        raise OSError(self.code, os.strerror(self.code))


def refused(run: Path, refuse: Refuse) -> int:
    """Train against refusals; check what is said, and return the last step that was reported as saved."""
    saved = [0]
    try:
        with interposed(refuse, reads=refuse.code == errno.EMFILE):
            one = trainer(run, saved.append)
            try:
                one.train()
            finally:
                one.run.close()
    except AnellmError as error:
        said = str(error)
        assert "\n" not in said
        assert saved[-1] == 0 or any(f"keeps step_{saved[-1] + more:08d}" in said for more in (0, 1)), said
    except OSError as error:  # the directory could not be opened: there is no run yet
        assert saved == [0], error
    return saved[-1]


def refusals(folder: Path, code: int, stride: int = 1) -> dict[str, Any]:
    """Let every call in turn be refused, once and from then on; the run must say so and go on later."""
    expected = whole_run(folder)
    run = folder / "run"
    trials = 0
    for forever in (False, True):
        for point in itertools.count(1, stride):
            refuse = Refuse(code, point, forever=forever)
            saved = refused(run, refuse)
            if refuse.count >= point:
                check(run, saved, expected)
                trials += 1
            shutil.rmtree(run)
            if refuse.count < point:
                break
    return {"trials": trials}


# ---- lost writes -------------------------------------------------------------------------------------------------


class Log:
    """Everything that was done to the files below a folder, and what a disk may keep of it when the power fails.

    A file's content is sure after its fsync, a name after the fsync of its folder; of anything later, each part may
    be there or not, except that a name never goes back behind a later sure one. A file whose later writes are lost
    may be as it was synced, or have a piece missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[tuple[Any, ...]] = []
        self._inode = 0
        self._names: dict[str, int] = {}  # path -> inode, as the running system sees it

    def _path(self, value: Any) -> str:
        if isinstance(value, int):
            return os.readlink(f"/proc/self/fd/{value}")
        return os.path.abspath(os.fspath(value))

    def __call__(self, name: str, args: tuple[Any, ...], do: Callable[[], Any]) -> Any:
        path = self._path(args[0])
        existed = os.path.lexists(path)
        result = do()
        if not path.startswith(str(self.root)):
            return result
        if name == "open" and not existed:
            self._new(path, is_dir=False)
        elif name == "mkdir":
            self._new(path, is_dir=True)
        elif name in ("write", "pwrite"):
            self.events.append(("write", self._names[path], bytes(args[1])[:result], len(args) > 2))
        elif name == "ftruncate":
            self.events.append(("truncate", self._names[path]))
        elif name == "fsync":
            self.events.append(("sync", self._names.get(path), path))
        elif name in ("rename", "replace"):
            target = self._path(args[1])
            moved = {p: i for p, i in self._names.items() if p == path or p.startswith(path + "/")}
            for old, inode in moved.items():
                del self._names[old]
                self._names[target + old[len(path) :]] = inode
            self.events.append(("rename", path, target, self._names[target]))
        elif name in ("unlink", "rmdir"):
            self.events.append(("unlink", path))
            self._names.pop(path, None)
        return result

    def _new(self, path: str, *, is_dir: bool) -> None:
        self._inode += 1
        self._names[path] = self._inode
        self.events.append(("create", path, self._inode, is_dir))

    def after(self, n: int, choose: Callable[[], bool]) -> dict[str, bytes | None]:
        """Return what is on the disk after a power failure behind ``n`` events: path -> content, None for a folder.

        ``choose`` says of each thing that is not sure whether it is there.
        """
        content: dict[int, bytes] = {}
        sure: dict[int, bytes] = {}
        folders: set[int] = set()
        parents: dict[int, dict[str, int]] = {0: {}}  # folder -> its names on the disk; 0 is the root
        live: dict[str, int] = {str(self.root): 0}  # path -> folder's inode, as the running system sees it

        def apply(change: tuple[str, int, str, int]) -> None:
            kind, folder, name, inode = change
            if kind == "add":
                parents.setdefault(folder, {})[name] = inode
            elif parents.setdefault(folder, {}).get(name) == inode:
                del parents[folder][name]

        pending: list[list[tuple[str, int, str, int]]] = []  # each entry happens as a whole

        def folder_of(path: str) -> tuple[int, str]:
            parent, name = os.path.split(path)
            return live[parent], name

        names: dict[str, int] = {}
        for event in self.events[:n]:
            if event[0] == "create":
                _, path, inode, is_dir = event
                names[path] = inode
                content[inode] = sure[inode] = b""
                if is_dir:
                    folders.add(inode)
                    parents[inode] = {}
                    live[path] = inode
                folder, name = folder_of(path)
                pending.append([("add", folder, name, inode)])
            elif event[0] == "write":
                _, inode, data, at_start = event
                content[inode] = data if at_start else content[inode] + data
            elif event[0] == "truncate":
                content[event[1]] = b""
            elif event[0] == "sync":
                _, inode, path = event
                if path in live:
                    inode = live[path]
                    kept = []
                    for change in pending:
                        if any(part[1] == inode for part in change):
                            for part in change:
                                apply(part)
                        else:
                            kept.append(change)
                    pending[:] = kept
                elif inode is not None:
                    sure[inode] = content[inode]
            elif event[0] == "rename":
                _, path, target, inode = event
                old_folder, old_name = folder_of(path)
                for table in (live, names):
                    for old in [p for p in table if p == path or p.startswith(path + "/")]:
                        table[target + old[len(path) :]] = table.pop(old)
                folder, name = folder_of(target)
                pending.append([("del", old_folder, old_name, inode), ("add", folder, name, inode)])
            else:
                path = event[1]
                folder, name = folder_of(path)
                pending.append([("del", folder, name, names.pop(path))])
                live.pop(path, None)
        for change in pending:
            # A file that was never given a name on the disk cannot be renamed there: its creation comes with it.
            if choose():
                for part in change:
                    apply(part)
        found: dict[str, bytes | None] = {}

        def walk(folder: int, path: str) -> None:
            for name, inode in sorted(parents.get(folder, {}).items()):
                inner = f"{path}/{name}" if path else name
                if inode in folders:
                    found[inner] = None
                    walk(inode, inner)
                elif content[inode] == sure[inode] or choose():
                    found[inner] = content[inode]
                elif choose():
                    found[inner] = sure[inode]
                else:  # the length is there, some of the bytes are not
                    lost = len(content[inode]) - len(sure[inode])
                    found[inner] = (sure[inode] + b"\0" * lost)[: len(content[inode])]

        walk(0, "")
        return found


def lay_out(files: dict[str, bytes | None], root: Path) -> None:
    """Write what a disk kept to a folder."""
    root.mkdir()
    for name, content in files.items():
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)


def lost_writes(folder: Path, samples: int = 4, seed: int = 1, without: str = "") -> dict[str, Any]:
    """Fail the power after every operation: nothing unsure kept, all kept, and some at random; check each outcome.

    ``without`` names an operation of safeio that does nothing, to see that the trial notices.
    """
    expected = whole_run(folder)
    if without:
        setattr(safeio, without, lambda *args: None)
    log = Log(folder)
    marks: list[tuple[int, int]] = []
    with interposed(log):
        one = trainer(folder / "run", lambda step: marks.append((len(log.events), step)))
        one.train()
    shutil.rmtree(folder / "run")
    chance = random.Random(seed)
    seen: set[str] = set()
    for n in range(len(log.events) + 1):
        acknowledged = max((step for at, step in marks if at <= n), default=0)
        for sample in range(samples):
            odds = (0.0, 1.0, 0.5, 0.8)[sample % 4]
            files = log.after(n, lambda odds=odds: chance.random() < odds)
            key = hashlib.sha256(repr((acknowledged, sorted(files.items(), key=str))).encode()).hexdigest()
            if key in seen:
                continue
            seen.add(key)
            again = folder / "again"
            lay_out(files, again)
            try:
                check(again / "run", acknowledged, expected, records=False)
            except Exception as error:
                raise AssertionError(f"event {n} of {len(log.events)}, sample {sample}: {sorted(files)}") from error
            shutil.rmtree(again)
    return {"events": len(log.events), "outcomes": len(seen)}


# ---- SIGKILL -----------------------------------------------------------------------------------------------------


def kills(folder: Path, n: int, seed: int) -> dict[str, Any]:
    """Kill a training that saves and removes a checkpoint every step, n times, at random; it must end as if never."""
    run = folder / "run"
    chance = random.Random(seed)
    options = [
        "--preset", "stories260k", "--batch-size", "1", "--seq-len", "8", "--eval-interval", "0", "--eval-windows", "1",
        "--sample-tokens", "0", "--save-interval", "1", "--keep-last", "1", "--schedule", "constant",
        "--warmup-steps", "0", "--quiet", "--threads", "2", "--val-fraction", "0",
    ]  # fmt: skip
    where: dict[str, int] = {}

    def start(out: Path, steps: int) -> int:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                status = train.main([*options, "--out", str(out), "--steps", str(steps), "--resume"])
            finally:
                os._exit(status)
        return child

    reached = 0
    for _ in range(n):
        child = start(run, 10**6)
        deadline = time.monotonic() + 60
        while not (steps := checkpoint.list_steps(run)) or steps[-1] <= reached:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps = whole_steps(run)
        assert steps, "no checkpoint left"
        assert steps[-1] >= reached, (steps, reached)
        reached = steps[-1]
        left = [name for name in os.listdir(run) if name.startswith(".")]
        what = "save" if any(name.startswith(".tmp-") for name in left) else "removal" if left else "neither"
        where[what] = where.get(what, 0) + 1
    last = reached + 2
    hashes = []
    for out in (run, folder / "whole"):
        _, status = os.waitpid(start(out, last), 0)
        assert os.waitstatus_to_exitcode(status) == 0
        step = checkpoint.step_dir(out, last)
        files = (checkpoint.MODEL, checkpoint.OPTIMIZER)
        hashes.append([hashlib.sha256((step / name).read_bytes()).hexdigest() for name in files])
        lines = [record["step"] for record in metrics.read(out) if record["kind"] == "step"]
        assert lines == list(range(1, last + 1))
    assert hashes[0] == hashes[1]
    return {"kills": n, "steps": last, "during": where}


TRIALS: dict[str, Callable[..., dict[str, Any]]] = {
    "crashes": crashes,
    "crashes_twice": crashes_twice,
    "refusals": refusals,
    "lost_writes": lost_writes,
    "kills": kills,
}


def main() -> None:
    """Do one trial: ``crash.py NAME [JSON arguments]``; it prints a JSON object with what it counted."""
    name, *arguments = sys.argv[1:]
    values = [json.loads(text) for text in arguments]
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="anellm-", dir=shm if shm.is_dir() and os.access(shm, os.W_OK) else None
    ) as folder:
        print(json.dumps(TRIALS[name](Path(folder), *values)))


if __name__ == "__main__":
    main()
