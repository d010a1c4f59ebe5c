"""Files wherever they live: anything pyarrow.fs opens (a local path, s3://, gs://), with "a thing exists when its
manifest exists" (design §5b): write the parts, then the manifest in one atomic put.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from distmeta.errors import RunError, UserError


@dataclass(frozen=True)
class Location:
    """A file or folder on some filesystem. `Location.of("runs/a")`, `Location.of("s3://bucket/runs/a")`."""

    fs: pafs.FileSystem
    path: str

    @classmethod
    def of(cls, uri: "str | os.PathLike[str] | Location") -> "Location":
        if isinstance(uri, Location):
            return uri
        text = os.fspath(uri)
        if "://" in text:
            try:
                fs, path = pafs.FileSystem.from_uri(text)
            except (pa.ArrowInvalid, OSError) as e:
                raise UserError(
                    f"{text}: cannot be opened ({e}); give a path or a URI like s3://bucket/folder"
                ) from None
            return cls(fs, path)
        return cls(pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text)))

    def __truediv__(self, name: str) -> "Location":
        return Location(self.fs, str(PurePosixPath(self.path) / name))

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.fs.type_name}://{self.path}"

    @property
    def parent(self) -> "Location":
        """The folder that this lies in."""
        return Location(self.fs, str(PurePosixPath(self.path).parent))

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
        return sorted((Location(self.fs, i.path) for i in infos), key=lambda c: c.path)

    def make_dir(self) -> "Location":
        with writing(self):
            self.fs.create_dir(self.path, recursive=True)
        return self

    def remove(self) -> None:
        """Delete this file or folder with all it holds; nothing where it does not exist."""
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
            if self.is_dir():
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
            raise UserError(f"{self}: not readable as JSON ({e}); {mend}") from None

    def write_json(self, value: Any) -> None:
        self.write_bytes((json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


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
        raise UserError(f"{where}: cannot be written ({e.strerror or e}); choose a place that you may write to") from e
