"""A run on a Ray cluster: Ray Train's workers run the same loop, and rewards may be actors of their own.

Here is the driver, in the process that `aegpo train --cluster` began, and what it starts on the cluster: the workers,
and an actor that keeps notes of the run. What goes between them goes by Ray's own transport, which pickles and is
between the machines of one user; files that users exchange never are.
"""

import contextlib
import io
import logging
import os
import posixpath
import shutil
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs
import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchTrainer

import aegpo
from aegpo import build, checkpoint
from aegpo.config import Config
from aegpo.distributed import SaidElsewhere, Team
from aegpo.folder import is_a_runs, refuse_existing
from aegpo.notes import Notes
from aegpo.rewards import actors
from aegpo.stopping import BEGUN, Stop, begun, how_to_resume
from aegpo.storage import RECORD, Storage

SETTINGS = {  # of Ray, unless a user has others
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
FAILURES = 100  # of workers in a run, whatever it gained between them
NO_ROOM = 60  # minutes, about, that a run waits for machines that are gone
TOGETHER = 10.0  # seconds in which what one worker finds wrong is found by all, if it is of the same kind
REACH = 10.0  # seconds in which a cluster has to let us in
POLL = 0.2  # seconds between two looks at what the run says


@dataclass(frozen=True)
class Job:
    """What each worker is told.

    Attributes:
        config: a resolved config.
        resume: as `aegpo.build.run` takes it.
        overwrite: likewise.
        storage: the URL of the run's copy, if it has one.
        where: the folder that the driver was started in; relative paths are meant from there.
        columns: the width of the driver's terminal.
        command: that began the run, for what is said of how it goes on.
        notes: the handle of a `Notes` actor.
        judges: handles of the actors that judge, if there are any, and what they say of their rewards.
    """

    config: Config
    resume: str | None
    overwrite: bool
    storage: str | None
    where: str
    columns: int
    command: str
    notes: Any
    judges: Sequence[Any]
    about: Sequence[actors.About]


# ---------------------------------------------------------------- the driver


def run(
    config: Config,
    cluster: str,
    *,
    processes: int = 1,
    reward_actors: int = 0,
    storage: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Train as `aegpo.build.run` does, on a Ray cluster; a worker that is lost costs the steps since a checkpoint.

    Args:
        config: a resolved config.
        cluster: `local` for a cluster of this machine alone, `auto` for the one this machine belongs to, HOST:PORT or
            ray://HOST:PORT.
        processes: workers, of a GPU each if the cluster has any.
        reward_actors: actors that judge, each with its own copy of the rewards; by default every worker does.
        storage: an fsspec URL for a copy of the run's folder; by default all machines see the folder itself.
        resume: `latest`, or a checkpoint folder of this run to go on from.
        overwrite: whether a run that stands in the folder may be replaced.

    Returns:
        The path of the report.

    Raises:
        ValueError: anything the user got wrong, in one plain line, or a run that does not get on.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    folder = Path(config.output_dir)
    place = storage_beside(storage, folder)
    if resume is None:
        refuse_existing(folder, overwrite)
        if place:
            _refuse_stored(place, overwrite)
    where = {"--cluster": cluster, "--processes": processes, "--reward-actors": reward_actors}
    where |= {"--storage": place and place.url}
    with begun(where) as command, _connected(cluster, processes + reward_actors) as local:
        _refuse_too_small(processes, reward_actors)
        with _record(folder, place) as (root, files):
            if not local:
                _look_at_machines(root, files, folder if place is None else None)
            judges = actors.start(config, reward_actors, _gpu_share(processes, reward_actors))
            about = actors.about(judges) if judges else []
            here = _on(ray.get_runtime_context().get_node_id(), soft=True)  # no lost machine may take them along
            notes = ray.remote(Notes).options(num_cpus=0, max_concurrency=1, scheduling_strategy=here).remote(processes)
            columns = shutil.get_terminal_size().columns
            job = Job(
                config, resume, overwrite, place and place.url, os.getcwd(), columns, command, notes, judges, about
            )
            trainer = TorchTrainer(
                _work,
                train_loop_config={"job": ray.put(job)},  # which Ray Train's own process need not read
                scaling_config=_scaling(processes, reward_actors, local),
                run_config=_running(root, files),
            )
            _fit(trainer, notes, folder, local)
            if place:
                place.get(folder)
    return folder / "report.html"


def storage_beside(url: str | None, folder: Path) -> Storage | None:
    """The place of a URL; none if that is the run's folder itself.

    Raises:
        ValueError: it cannot be opened, or no other process could.
    """
    if url is None:
        return None
    place = Storage(url)
    if "memory" in place.fs.protocol:
        raise ValueError(f"--storage: {url} is the memory of one process, and no worker sees it; give another URL")
    return None if place.url == Storage(str(folder)).url else place


def _refuse_stored(place: Storage, overwrite: bool) -> None:
    """Raise ValueError unless a run may begin there: it is empty, or to be overwritten and a run's own."""
    held = {name.partition("/")[0] for name in place.files()}
    if held and not overwrite:
        raise ValueError(f"--storage: {place.url} exists; give --overwrite, --resume latest, or another URL")
    if others := sorted(name for name in held if not is_a_runs(name)):
        raise ValueError(f"--storage: {place.url} holds {others[0]}, which is not a run's; it is not overwritten")


def fetch(url: str, folder: Path) -> None:
    """Bring a run home that is to be resumed from its copy; raises ValueError if it has none."""
    if place := storage_beside(url, folder):
        place.get(folder)


@contextlib.contextmanager
def _connected(cluster: str, cpus: int) -> Iterator[bool]:
    """Connect to Ray, unless this process is already; whether it is this machine alone."""
    local = cluster == "local"
    _refuse_unreachable(cluster)
    if ray.is_initialized():
        yield local
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if local:
            cpus = max(cpus, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what does not answer is said below
                ray.init(address=cluster, **quiet)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, ImportError) as error:
        why = " ".join(str(error).split()).partition(". ")[0]
        token = "" if local else "; if it wants a token, RAY_AUTH_MODE=token sends yours"
        raise ValueError(f"--cluster: there is no Ray at {cluster}: {why}{token}") from None
    try:
        yield local
    finally:
        ray.shutdown()


def _refuse_unreachable(cluster: str) -> None:
    """Raise ValueError where nothing listens at HOST:PORT, which Ray would try for minutes, or Ray has no client."""
    host, colon, port = cluster.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except (OSError, ValueError) as error:
        raise ValueError(f"--cluster: there is no Ray at {cluster}: {error}") from None
    if cluster.startswith("ray://") and find_spec("grpc") is None:
        raise ValueError(f"--cluster: {cluster} takes Ray's client: pip install 'ray[client]'; or give HOST:PORT")


@contextlib.contextmanager
def _record(folder: Path, place: Storage | None) -> Iterator[tuple[str, Any]]:
    """A folder for the time of a run in which Ray Train sees whether all machines share one; and its file system."""
    files = place.fs if place else fsspec.filesystem("file")
    root = f"{place.root}/{RECORD}" if place else str(folder.absolute().parent / f".{folder.name}{RECORD}")
    try:
        files.makedirs(root, exist_ok=True)
        yield root, files
    finally:
        with contextlib.suppress(FileNotFoundError):
            files.rm(root, recursive=True)


def _fit(trainer: TorchTrainer, notes: Any, folder: Path, local: bool) -> None:
    """Let it train in a thread, and meanwhile say what the run says, and tell it of signals.

    On a cluster of this machine alone it is over once the workers are: Ray Train then asks a dashboard, which is not
    there, for twelve seconds what became of its own actors.
    """
    failed: list[BaseException] = []
    written, told, over, wrong, lost = -1, False, False, "", ""

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # told below, in the thread that waits
            failed.append(error)

    def last_words() -> str:
        if written < 0:
            return "stopped before its first checkpoint; start it again with --overwrite"
        return f"stopped; to go on: {how_to_resume(folder)}"

    thread = threading.Thread(target=fit, name="ray", daemon=True)
    thread.start()
    try:
        with Stop(last_words) as stop:
            while thread.is_alive() and not over:
                thread.join(POLL)
                if stop.asked and not told:
                    told = ray.get(notes.stop.remote()) is None
                over = local and ray.get(notes.all_over.remote())
                said, written = ray.get(notes.take.remote())
                for text, is_error in said:
                    print(text, end="", file=sys.stderr if is_error else sys.stdout, flush=True)
        wrong, lost = ray.get(notes.wrong.remote())
    except ray.exceptions.RayError as error:  # the notes are lost, and with them how the run stands
        failed.append(error)
        ray.shutdown()  # which ends the workers
    except BaseException:
        ray.shutdown()
        raise
    hint = f"; to go on from the newest checkpoint: {how_to_resume(folder)}" if written >= 0 else ""
    if wrong:
        raise ValueError(wrong if "--resume latest" in wrong else wrong + hint)
    if failed:
        why = lost or " ".join(str(failed[0]).split())[-300:]
        raise ValueError(f"the run ended on the cluster: {why}{hint}") from failed[0]


def _total(kind: str) -> float:
    return ray.cluster_resources().get(kind, 0.0)


def _refuse_too_small(processes: int, reward_actors: int) -> None:
    cpus, gpus = int(_total("CPU")), int(_total("GPU"))
    if processes + reward_actors > cpus:
        takers = f"{processes} workers" + (f" and {reward_actors} reward actors" if reward_actors else "")
        raise ValueError(f"--processes: {takers} take a CPU each, and the cluster has {cpus}")
    if gpus and processes > gpus:
        raise ValueError(f"--processes: {processes} workers take a GPU each, and the cluster has {gpus}")


def _scaling(processes: int, reward_actors: int, local: bool) -> ray.train.ScalingConfig:
    """What a worker reserves: a GPU if there are any; of one machine its share of CPUs, by which Ray counts threads."""
    cpus = max(1, (int(_total("CPU")) - reward_actors) // processes) if local else 1
    return ray.train.ScalingConfig(
        num_workers=processes, use_gpu=_total("GPU") > 0, resources_per_worker={"CPU": cpus} | _gpus()
    )


def _running(root: str, files: Any) -> ray.train.RunConfig:
    """How often Ray Train begins again, and a folder that it must have; what it should go on from is in ours."""
    return ray.train.RunConfig(
        name=f"aegpo-{uuid.uuid4().hex[:12]}",
        storage_path=root,
        storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files)),
        failure_config=ray.train.FailureConfig(max_failures=FAILURES, controller_failure_limit=NO_ROOM),
        logging_config=ray.train.LoggingConfig(log_level="ERROR"),
    )


def _gpus() -> dict[str, int]:
    return {"GPU": 1} if _total("GPU") else {}


def _gpu_share(processes: int, reward_actors: int) -> float:
    """The part of a GPU that an actor reserves, of those that the workers leave; none if they leave none."""
    left = int(_total("GPU")) - processes
    return 1 / -(-reward_actors // left) if reward_actors and left > 0 else 0


def _look_at_machines(root: str, files: Any, folder: Path | None) -> None:
    """Raise ValueError unless all machines have this version, and see what the driver sees."""
    token = posixpath.join(root, uuid.uuid4().hex)
    files.pipe_file(token, b"")
    machines = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    asked = [
        ray.remote(_look)
        .options(num_cpus=0, scheduling_strategy=_on(node["NodeID"]), max_retries=1)
        .remote(token, files)
        for node in machines
    ]
    for node, look in zip(machines, asked, strict=True):
        name = node["NodeManagerHostname"]
        try:
            version, sees = ray.get(look)
        except ray.exceptions.RayError as error:
            why = " ".join(str(error).split())[-200:]
            raise ValueError(f"--cluster: aegpo does not run on machine {name}: {why}") from None
        if version != aegpo.__version__:
            raise ValueError(f"--cluster: machine {name} has aegpo {version}, and this one {aegpo.__version__}")
        if not sees and folder:
            raise ValueError(f"output_dir: machine {name} does not see {folder}; give --storage URL, a place all see")
        if not sees:
            raise ValueError(f"--storage: machine {name} does not see what is written there")


def _look(token: str, files: Any) -> tuple[str, bool]:
    return aegpo.__version__, files.exists(token)


def _on(node: str, soft: bool = False) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=soft)


# ---------------------------------------------------------------- a worker


class _Out(io.TextIOBase):
    """A stream whose lines go to the driver."""

    def __init__(self, notes: Any, is_error: bool) -> None:
        self.notes, self.is_error, self.begun = notes, is_error, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        whole, newline, self.begun = (self.begun + text).rpartition("\n")
        if newline:
            self.notes.say.remote(whole + newline, self.is_error)
        return len(text)


def _work(told: dict[str, Any]) -> None:
    """What Ray Train runs in each worker, again after one is lost."""
    job: Job = ray.get(told["job"])
    logging.getLogger().setLevel(logging.WARNING)  # where it is by default, and was before Ray Train
    team = Team.join()  # the group that Ray Train has made
    rank = team.rank
    if os.path.isdir(job.where):
        os.chdir(job.where)
    os.environ |= {"COLUMNS": str(job.columns), BEGUN: job.command}
    wrong, step, before = team.tell(ray.get(job.notes.begin.remote()) if team.is_first else None)[0]
    if wrong:
        ray.get(job.notes.end.remote(rank))
        return
    out, err = (_Out(job.notes, False), _Out(job.notes, True)) if rank == 0 else (io.StringIO(), io.StringIO())
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if before:
            print("a worker was lost: the run goes on from its last checkpoint")
        try:
            _train(job, team, step, before)
            ray.get(job.notes.end.remote(rank))  # by then, what was said has arrived
        except (ValueError, FloatingPointError) as error:
            line = "" if isinstance(error, SaidElsewhere) else " ".join(str(error).split())
            ray.get(job.notes.fail.remote(rank, line, True))
            ends = time.monotonic() + TOGETHER
            while not ray.get(job.notes.all_over.remote()):
                if time.monotonic() > ends:
                    raise  # the others wait for this one: they end when Ray Train begins again
                time.sleep(POLL)
        except Exception as error:
            ray.get(job.notes.fail.remote(rank, f"{type(error).__name__}: {error}", False))
            raise


def _train(job: Job, team: Team, step: int, before: int) -> None:
    """Train, or go on from the last checkpoint if `step` is that of one."""
    folder, place = Path(job.config.output_dir), Storage(job.storage) if job.storage else None
    resume = "latest" if step >= 0 else job.resume
    machine = ray.get_runtime_context().get_node_id() if place else "all"  # which then share the folder
    own: Any = ray.get(job.notes.is_own.remote(machine, before))
    if place and resume:
        for turn in (team.is_first, ray.train.get_context().get_local_rank() == 0):  # others may share the first's disk
            with team.agreed():
                if turn:
                    place.get(folder)
    judges = actors.ask(job.config, job.judges, job.about, team.rank) if job.judges else None

    def saved(written: Path) -> None:
        if place:
            place.put(folder, is_a_runs)
        ray.get(job.notes.save.remote(checkpoint.step_of(written)))

    overwrite = resume is None and (job.overwrite or own)

    def asked() -> bool:
        return team.is_first and bool(ray.get(job.notes.stopping.remote()))

    build.run(job.config, resume=resume, overwrite=overwrite, judges=judges, saved=saved, asked=asked)
    if team.is_first and place:
        place.put(folder, is_a_runs)
