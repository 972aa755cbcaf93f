"""A copy of a run's folder elsewhere: at any URL that fsspec knows, such as `s3://bucket/runs/first`.

A checkpoint there is complete once its manifest is, which is written last and taken away first, so whoever is stopped
in the midst of it leaves what can be gone on from.
"""

import posixpath
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fsspec.core import url_to_fs

from aegpo import checkpoint

MANIFEST, METRICS, RECORD = "manifest.json", "metrics.jsonl", ".ray"


class Storage:
    """The place of one run.

    Args:
        url: of a folder, which need not exist.

    Raises:
        ValueError: nothing here can open such a URL.
    """

    def __init__(self, url: str) -> None:
        try:
            self.fs, root = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"--storage: {url} cannot be opened: {error}") from None
        self.root = root.rstrip("/")
        self.url = self.fs.unstrip_protocol(self.root)
        self._sent: dict[str, tuple[int, int]] = {}  # the size and the time of each file that is there

    def files(self) -> dict[str, int]:
        """The files there, by their paths in the run's folder, and their sizes; not those of unfinished checkpoints."""
        paths = self._listed()
        return {
            path: size for path, size in paths.items() if not path.endswith(".partial") and _is_complete(path, paths)
        }

    def read(self, path: str) -> bytes | None:
        """What a file holds, or nothing if there is none."""
        return self.fs.cat_file(self._at(path)) if self.fs.exists(self._at(path)) else None

    def put(self, folder: Path, is_a_runs: Callable[[str], bool]) -> None:
        """Make this place as the run's folder is; of what else is here, all is deleted that `is_a_runs` by its name."""
        own = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        own = {name: path for name, path in own.items() if not name.startswith(".")}
        newest = max((checkpoint.step_of(saved) for saved in checkpoint.checkpoints(folder)), default=-1)
        there = self._listed()
        left = {path.partition("/")[0] for path in there if checkpoint.step_of(Path(path).parent) > newest}
        for name in left:  # a course that the run has left; its metrics are about to be
            self._drop_checkpoint(name)
        checkpoints = [name for name in own if checkpoint.step_of(Path(name).parent) >= 0]
        for name in sorted(set(own) - set(checkpoints), key=lambda name: name == METRICS):
            about = own[name].stat()
            if self._sent.get(name) != (about.st_size, about.st_mtime_ns):
                self._send(own[name], name)
                self._sent[name] = about.st_size, about.st_mtime_ns
        for saved in checkpoint.checkpoints(folder):
            manifest = f"{saved.name}/{MANIFEST}"
            if self.read(manifest) == (folder / manifest).read_bytes():
                continue
            self._drop_checkpoint(saved.name)
            for file in sorted(saved.iterdir(), key=lambda file: file.name == MANIFEST):
                self._send(file, f"{saved.name}/{file.name}")
        for name in {path.partition("/")[0] for path in there if checkpoint.step_of(Path(path).parent) >= 0} - left:
            if not (folder / name).exists():
                self._drop_checkpoint(name)
        for name in there:
            top = name.partition("/")[0]
            if name not in own and checkpoint.step_of(Path(top)) < 0 and is_a_runs(top.removesuffix(".partial")):
                with suppress(FileNotFoundError):  # what was half sent was sent again, and moved
                    self.fs.rm_file(self._at(name))

    def get(self, folder: Path) -> None:
        """Make the run's folder as this place is; what else it holds of that run is gone then.

        Raises:
            ValueError: no run is here, or the folder holds another one.
        """
        there = self.files()
        if "config.yaml" not in there:
            raise ValueError(f"--storage: {self.url} holds no run")
        if self._is_in(folder, there):
            return
        if folder.exists() and any(folder.iterdir()) and not self.is_of(folder):
            raise ValueError(f"output_dir: {folder} holds another run than {self.url}; give another --output-dir")
        aside = folder / ".fetched"
        shutil.rmtree(aside, ignore_errors=True)
        for name in there:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(self._at(name), str(aside / name))
        for saved in checkpoint.checkpoints(folder):
            shutil.rmtree(saved)
        for item in sorted(aside.iterdir(), key=lambda item: checkpoint.step_of(item) >= 0):
            target = folder / item.name
            if target.is_dir():
                shutil.rmtree(target)
            item.replace(target)
        aside.rmdir()

    def is_of(self, folder: Path) -> bool:
        """Whether the folder holds the run that is here: the first lines of their metrics, with its time, are equal."""
        here, there = folder / METRICS, self.read(METRICS)
        return here.is_file() and there is not None and here.read_bytes().split(b"\n")[0] == there.split(b"\n")[0]

    def _listed(self) -> dict[str, int]:
        self.fs.invalidate_cache()
        found = self.fs.find(self.root, detail=True) if self.fs.exists(self.root) else {}
        paths = {posixpath.relpath(path, self.root): about["size"] for path, about in found.items()}
        return {path: size for path, size in paths.items() if path.partition("/")[0] != RECORD}

    def _is_in(self, folder: Path, there: dict[str, int]) -> bool:
        """Whether the folder is as this place is already."""
        saved = {path.name for path in checkpoint.checkpoints(folder)}
        if saved != {name.partition("/")[0] for name in there if checkpoint.step_of(Path(name).parent) >= 0}:
            return False
        if any(not (folder / name).is_file() or (folder / name).stat().st_size != size for name, size in there.items()):
            return False
        alike = [name for name in there if posixpath.basename(name) in (MANIFEST, METRICS, "config.yaml")]
        return all(self.read(name) == (folder / name).read_bytes() for name in alike)

    def _send(self, file: Path, name: str) -> None:
        """Copy a file there; one that may be there already is never half written."""
        target = self._at(name)
        self.fs.makedirs(posixpath.dirname(target), exist_ok=True)
        if "/" in name:
            self.fs.put_file(str(file), target)
        else:
            self.fs.put_file(str(file), f"{target}.partial")
            self.fs.mv(f"{target}.partial", target)

    def _drop_checkpoint(self, name: str) -> None:
        if self.fs.exists(self._at(f"{name}/{MANIFEST}")):
            self.fs.rm_file(self._at(f"{name}/{MANIFEST}"))
        if self.fs.exists(self._at(name)):
            self.fs.rm(self._at(name), recursive=True)

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"


def _is_complete(path: str, paths: dict[str, int]) -> bool:
    """Whether a file there is none of a checkpoint, or of one that has its manifest."""
    folder = path.partition("/")[0]
    return checkpoint.step_of(Path(folder)) < 0 or f"{folder}/{MANIFEST}" in paths
