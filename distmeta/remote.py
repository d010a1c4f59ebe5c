"""Filesystems that URIs name: opened once a process, asked at once whether they can be used, and in words where not.

Whoever opens one waits 20 s at most for its first answer. From then on a request is tried again for a minute or more,
as is fit for a run with hours behind it. What an object store then still refuses is an OSError, which workers of Ray
Train may outlive; `explained` makes it a sentence at the end of a command.
"""

import functools
import os
import re
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from distmeta.errors import RunError, Unreachable, UserError

URI = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_STORES = ("s3", "gs", "gcs")
_FIRST: dict[str, Any] = {"connect_timeout": 2.0, "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=4)}
"""Of the first request: 15 s at most for a server that does not answer."""
_LATER: dict[str, Any] = {
    "connect_timeout": 5.0,
    "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=10),  # 70 to 100 s
    "allow_delayed_open": True,  # a small file is one request instead of three
}
_GS_FIRST_S = 15
_REFUSED = {
    "ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID", "EXPIRED_TOKEN",
    "INVALID_SIGNATURE", "MISSING_AUTHENTICATION_TOKEN", "UNRECOGNIZED_CLIENT", "ACCOUNT_PROBLEM", "INVALID_TOKEN",
    "PERMISSION_DENIED", "UNAUTHENTICATED", "401", "403",
}  # fmt: skip
_ABSENT = {"NO_SUCH_BUCKET", "NOT_FOUND"}
_ELSEWHERE = {"301", "307", "MOVED_PERMANENTLY", "AUTHORIZATION_HEADER_MALFORMED"}


def opened(uri: str, ask: bool = True) -> tuple[pafs.FileSystem, str, str]:
    """The filesystem of a URI, the path there, and the URI up to its query with {} for the path.

    Args:
        ask: whether to find out that it can be used, where this process has not.

    Raises:
        UserError: it is no URI of a kind that is known; or of an object store that refuses, or has no such bucket.
        Unreachable: the object store does not answer.
    """
    parts = urlsplit(uri)
    bare = uri.split("?")[0]
    if re.search(r":.*@", parts.netloc) or (parts.scheme == "s3" and "@" in parts.netloc):
        masked = bare.replace(parts.netloc.rpartition("@")[0], "…", 1)
        raise UserError(
            f"{masked}: a URI with keys in it would be kept in files and logs; leave them out and set AWS_ACCESS_KEY_ID"
            " and AWS_SECRET_ACCESS_KEY (on every node)"
        )
    query = f"?{parts.query}" if parts.query else ""
    try:
        if parts.scheme not in _STORES:
            fs, path = pafs.FileSystem.from_uri(uri)
            return fs, path, f"{parts.scheme}://{{}}{query}"
        if not parts.netloc or parts.fragment:
            raise UserError(f"{bare}: has {'a #' if parts.netloc else 'no bucket'}; write it like s3://bucket/folder")
        path = "/".join([parts.netloc.rpartition("@")[2], *(p for p in unquote(parts.path).split("/") if p)])
        settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", "GOOGLE_"))))
        fs = _store(f"{parts.scheme}://{parts.netloc}", query, path, settings, ask)
        return fs, path, f"{parts.scheme}://{{}}{query}"
    except (pa.ArrowInvalid, OSError) as e:
        raise explained(e) or UserError(
            f"{bare}: cannot be opened ({str(e).splitlines()[0]}); give a path or a URI like s3://bucket/folder"
        ) from None


def written(pattern: str, path: str) -> str:
    """The URI of a path, by the pattern that `opened` gave."""
    return pattern.format(quote(path, safe="/~!$&'()*,;=:@+"))


@functools.lru_cache(maxsize=32)
def _kept(root: str, settings: tuple[tuple[str, str], ...]) -> dict[str, pafs.FileSystem]:
    """What there is of a bucket: `used`, and once it has answered `asked`; `settings`: the environment's."""
    return {}


def _store(root: str, query: str, path: str, settings: tuple[tuple[str, str], ...], ask: bool) -> pafs.FileSystem:
    kept = _kept(root + query, settings)
    if "used" in kept and ("asked" in kept or not ask):
        return kept["used"]
    fs, _ = pafs.FileSystem.from_uri(root + query)
    asked = used = fs
    if isinstance(fs, pafs.S3FileSystem):
        # what the URI, the environment and the bucket's region say is in the one that Arrow made of them
        _, (said, *_) = fs.__reduce__()
        asked, used = (pafs.S3FileSystem(**{**said, **extra}) for extra in (_FIRST, _LATER))
    elif ask and "retry_limit_seconds" not in query:
        asked, _ = pafs.FileSystem.from_uri(f"{root}{query}{'&' if query else '?'}retry_limit_seconds={_GS_FIRST_S}")
    kept["used"] = used
    if ask:
        _check(asked, written(f"{root.split('://')[0]}://{{}}{query}", path), path)
        kept["asked"] = asked
    return used


def _check(fs: pafs.FileSystem, uri: str, path: str) -> None:
    """Ask for a listing, as a command will; it, not a file's header, comes with the reason of a refusal."""
    bucket = path.split("/")[0]
    try:
        if fs.get_file_info(pafs.FileSelector(path, allow_not_found=True)):
            return
    except OSError as e:
        raise explained(e, uri) or e from None
    try:
        there = fs.get_file_info(bucket).type != pafs.FileType.NotFound
    except OSError:
        return  # whoever may list a folder need not be allowed to ask for the bucket
    if not there:
        raise _absent(uri, bucket)


def explained(e: BaseException, where: object = None) -> UserError | RunError | None:
    """A sentence for what an object store answered, or that it does not; None for any other error.

    Args:
        where: what was to be read or written; by default what the error names.
    """
    text = str(e)
    found = re.search(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))?|google::cloud::Status\((\w+)", text)
    if not found:
        return None
    code = found[2] or found[1] or found[3]
    key, bucket = re.search(r"key '([^']*)'", text), re.search(r"bucket '([^']*)'", text)
    place = where or f"s3://{bucket[1] if bucket else ''}/{key[1] if key else ''}"
    if code in _ABSENT:
        return _absent(place, bucket[1] if bucket else str(place).split("/")[2])
    if code in _REFUSED:
        return UserError(
            f"{place}: access is refused ({code}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or"
            " GOOGLE_APPLICATION_CREDENTIALS) on every node to those of somebody who may list, read and write there"
        )
    if code in _ELSEWHERE:
        return UserError(f"{place}: the bucket is in another region ({code}); set AWS_REGION to its own")
    why = text[found.end() :].split("Details: ")[-1].split("error_info")[0].strip(" :.") or code
    asked = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    at = f" at {asked}" if asked and found[1] and "endpoint_override" not in str(place) else ""
    way = "AWS_ENDPOINT_URL" if found[1] else "GOOGLE_APPLICATION_CREDENTIALS"
    return Unreachable(
        f"{place}: the object store{at} does not answer ({code}: {' '.join(why.split())[:200]}); look at the network"
        f" and at {way}, then run the command again (train: with --resume)"
    )


def let_pass(e: BaseException) -> None:
    """Raise `e` again where an object store's answer, or its silence, is behind it: no file is damaged then."""
    if explained(e):
        raise e


def _absent(place: object, bucket: str) -> UserError:
    return UserError(
        f"{place}: there is no bucket {bucket}; make it, or correct the name (or AWS_ENDPOINT_URL and AWS_REGION, which"
        " say where it is looked for)"
    )
