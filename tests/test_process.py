"""What a process has of the machine."""

import os

import pytest

from distmeta.process import cores


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 3), ("250000 100000", 3), ("150000 100000", 2), ("50000 100000", 1), ("800000 100000", 3), ("", 3)],
)
def test_cores_are_what_a_container_leaves(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    file = tmp_path / "cpu.max"
    file.write_text(f"{quota}\n")
    assert cores(str(file)) == expected
    assert cores(str(tmp_path / "absent")) == 3
