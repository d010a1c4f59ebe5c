"""Being a job that `ray job submit` started: its working directory is a copy that Ray deletes after it."""

import json
import os

from distmeta.errors import UserError


def submitted() -> bool:
    """Whether this process is one, by what Ray hands a job's command; it documents no sign of it (ray issue 28089)."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return "job_submission_id" in (config.get("metadata") or {})


def check(flag: str, place: str) -> None:
    """UserError where this is such a job and `place`, which must outlive it, would lie in its working directory.

    Args:
        flag: what `place` was given with. place: a path or URI; empty where a default under runs/ would be taken.
    """
    if not submitted() or "://" in place or os.path.isabs(os.path.expanduser(place)):
        return
    what = f"{flag} {place}: is relative to" if place else f"{flag} is missing, and its default lies in"
    raise UserError(
        f"{what} the working directory of this submitted job, which Ray deletes after it; give {flag} as an absolute"
        " path or URI, on storage that all nodes share"
    )
