"""Files wherever they live: anything pyarrow.fs opens (a local path, s3://, gs://), with "a thing exists when its
manifest exists" (design §5b): write the parts, then the manifest in one atomic put.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from distmeta import remote
from distmeta.errors import RunError, Unreachable, UserError


@dataclass(frozen=True)
class Location:
    """A file or folder on some filesystem. `Location.of("runs/a")`, `Location.of("s3://bucket/runs/a")`.

    `str` gives what `of` makes the same of, query and all; pickled it is that text, so that whoever unpickles it asks
    their own environment for the way there.
    """

    fs: pafs.FileSystem
    path: str
    pattern: str = "{}"
    """The URI with {} for the path; of a local file the path alone."""

    @classmethod
    def of(cls, uri: "str | os.PathLike[str] | Location") -> "Location":
        if isinstance(uri, Location):
            return uri
        text = os.fspath(uri)
        if remote.URI.match(text):
            fs, path, pattern = remote.opened(text)
            if not isinstance(fs, pafs.LocalFileSystem):
                return cls(fs, path, pattern)
            text = path
        return cls(pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text)))

    def _at(self, path: str) -> "Location":
        return replace(self, path=path)

    def __truediv__(self, name: str) -> "Location":
        return self._at(str(PurePosixPath(self.path) / name))

    def __str__(self) -> str:
        return self.path if self.is_local else remote.written(self.pattern, self.path)

    def __reduce__(self) -> Any:
        return _unpickled, (str(self),)

    @property
    def parent(self) -> "Location":
        """The folder that this lies in."""
        return self._at(str(PurePosixPath(self.path).parent))

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def exists(self) -> bool:
        return self.fs.get_file_info(self.path).type != pafs.FileType.NotFound

    def is_dir(self) -> bool:
        return self.fs.get_file_info(self.path).type == pafs.FileType.Directory

    def children(self) -> list["Location"]:
        """The entries of this folder, sorted by name; empty where the folder does not exist."""
        infos = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted((self._at(i.path) for i in infos), key=lambda c: c.path)

    def below(self) -> list[str]:
        """Paths of all files and folders in this folder, however deep, relative to it, sorted: one request for each
        1,000 of them; empty where it does not exist."""
        infos = self.fs.get_file_info(pafs.FileSelector(self.path, recursive=True, allow_not_found=True))
        return sorted(i.path[len(self.path.rstrip("/")) + 1 :] for i in infos)

    def make_dir(self) -> "Location":
        """Make this folder and those that it lies in; object stores have none to be made."""
        if self.is_local:
            with writing(self):
                self.fs.create_dir(self.path, recursive=True)
        return self

    def remove(self) -> None:
        """Delete this file or folder with all it holds; nothing where it does not exist.

        Of the folder that it lay in an object store keeps an empty mark, where there is nothing else.
        """
        kind = self.fs.get_file_info(self.path).type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(self.path)
        elif kind != pafs.FileType.NotFound:
            self.fs.delete_file(self.path)

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: there is none. UserError: it is a folder, or may not be read.
        """
        try:
            with self.fs.open_input_file(self.path) as f:
                return f.read()
        except FileNotFoundError:
            raise
        except PermissionError:
            raise UserError(f"{self}: may not be read by you; ask for the right to, or give another") from None
        except OSError:
            if self.is_local and self.is_dir():
                raise UserError(f"{self}: is a folder where a file is expected; move it away or give a file") from None
            raise

    def write_bytes(self, data: bytes) -> None:
        """Write the whole file or nothing: locally by a temporary name and os.replace, elsewhere in one put."""
        with writing(self):
            target = self.path
            if self.is_local:
                target = f"{self.path}.tmp-{os.getpid()}"
            try:
                with self.fs.open_output_stream(target) as f:
                    f.write(data)
                if self.is_local:
                    with open(target, "rb") as f:
                        os.fsync(f.fileno())
                    os.replace(target, self.path)
            except BaseException:
                if self.is_local:
                    with contextlib.suppress(OSError):
                        os.remove(target)
                raise

    def read_json(self, mend: str = "it is damaged, make it again") -> Any:
        """The parsed JSON file; UserError naming the file where it is missing, or not JSON: `mend` ends that."""
        try:
            return json.loads(self.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{self}: no such file") from None
        except (ValueError, RecursionError, OSError) as e:
            remote.let_pass(e)
            raise UserError(f"{self}: not readable as JSON ({e}); {mend}") from None

    def write_json(self, value: Any) -> None:
        self.write_bytes((json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[str], None]]:
        """A function that appends a line to this text file; where files do not grow, the whole is written anew."""
        if self.is_local:
            with writing(self), open(self.path, "a") as f:
                yield lambda line: print(line, file=f, flush=True)
            return
        text = self.read_bytes() if self.exists() else b""

        def say(line: str) -> None:
            nonlocal text
            text += f"{line}\n".encode()
            self.write_bytes(text)

        yield say


def _unpickled(uri: str) -> Location:
    """The location of a text that was one; no store is asked, as what cannot be unpickled tells nobody why."""
    if not remote.URI.match(uri):
        return Location(pafs.LocalFileSystem(), uri)
    return Location(*remote.opened(uri, ask=False))


@contextlib.contextmanager
def writing(where: object) -> Iterator[None]:
    """Turn the filesystem's refusals into a sentence: no permission is the user's to mend, a full disk fails a run."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(e):
            raise RunError(
                f"{where}: no space left on the device; free some and run the command again (train: with --resume)"
            ) from e
        refused = remote.explained(e, where)
        if isinstance(refused, Unreachable):
            raise  # not a place that is wrong, but one that may answer again
        raise refused or UserError(
            f"{where}: cannot be written ({e.strerror or e}); choose a place that you may write to"
        ) from e
