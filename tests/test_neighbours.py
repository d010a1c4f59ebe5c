"""The neighbour index against plain loops; the same bits however a step is spread, stopped or sharded; its recall."""

from typing import Any

import numpy as np
import pytest

from distmeta.commands import benchmark_neighbours
from distmeta.errors import RunError, UserError
from distmeta.memory import search
from distmeta.memory.base import Arrays
from distmeta.memory.neighbours import Neighbours

K, D = 3, 4


class Plain:
    """Algorithm 2 and resolutions.md in plain loops, float64."""

    def __init__(self, capacity: int, lr: float) -> None:
        self.capacity, self.lr, self.step = capacity, lr, 0
        self.nodes: dict[int, list[Any]] = {}

    def read(self, key: int, vector: Any) -> list[tuple[float, int]]:
        """(squared distance, key) of the K nearest."""
        found = []
        for other, (v, _, _) in self.nodes.items():
            if other != key:
                found.append((sum((float(a) - float(b)) ** 2 for a, b in zip(v, vector, strict=True)), other))
        return sorted(found)[:K]

    def merge(self, w: Arrays) -> None:
        self.step += 1
        order = sorted(range(len(w["task"])), key=lambda i: w["task"][i])
        change: dict[int, Any] = {}
        for i in order:
            for j, key in enumerate(w["used"][i]):
                if int(key) in self.nodes:
                    vector, rate = change.setdefault(int(key), [np.zeros(D), 0.0])
                    change[int(key)] = [vector + w["vector_grad"][i, j], rate + w["rate_grad"][i, j]]
        for key, (vector, rate) in change.items():
            node = self.nodes[key]
            mean = [vector / len(order), rate / len(order)]
            self.nodes[key] = [node[0] - self.lr * mean[0], node[1] - self.lr * mean[1], self.step]
        for i in order:
            self.nodes[int(w["key"][i])] = [w["vector"][i].copy(), w["rate"][i], self.step]
        while len(self.nodes) > self.capacity:
            del self.nodes[min(self.nodes, key=lambda k: (self.nodes[k][2], k))]


def dyadic(rng: np.random.Generator, *shape: int) -> Any:
    """Few values and no rounding: distances tie often, and exactly."""
    return rng.integers(-2, 3, shape) / 2


def visit(rng: np.random.Generator, read: Any, tasks: int, users: int, dtype: Any = np.float64) -> Arrays:
    """What a step of `tasks` tasks would write: keys may come twice, some of what was found is left out."""
    task, key = np.sort(rng.choice(10 * users, tasks, replace=False)), rng.integers(0, users, tasks)
    vector = dyadic(rng, tasks, D).astype(dtype)
    used = read({"key": key, "vector": vector})["key"]
    used[rng.random(used.shape) < 0.2] = -1
    used[0, 0] = rng.integers(0, users)  # perhaps nobody's any more
    grads = {"vector_grad": dyadic(rng, tasks, K, D).astype(dtype), "rate_grad": dyadic(rng, tasks, K).astype(dtype)}
    return {"task": task, "key": key, "vector": vector, "rate": dyadic(rng, tasks).astype(dtype), "used": used, **grads}


def stored(keys: Any, vectors: Any, used: Any = None, tasks: Any = None) -> Arrays:
    """A write of stores at rate 1, and of what was used, without gradients."""
    keys, vectors = np.asarray(keys), np.asarray(vectors)
    used = np.full((len(keys), K), -1) if used is None else np.asarray(used)
    return {
        "task": keys if tasks is None else np.asarray(tasks),
        "key": keys,
        "vector": vectors,
        "rate": np.ones(len(keys), vectors.dtype),
        "used": used,
        "vector_grad": np.zeros((*used.shape, vectors.shape[1]), vectors.dtype),
        "rate_grad": np.zeros(used.shape, vectors.dtype),
    }


def rows(write: Arrays, which: Any) -> Arrays:
    return {name: values[which] for name, values in write.items()}


def assert_same(a: Arrays, b: Arrays) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture
def small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that split and are given up within a few steps."""
    for name, value in (("LIMIT", 16), ("LEAST", 3), ("PROBES", 2)):
        monkeypatch.setattr(search, name, value)


@pytest.mark.parametrize("exact", [True, False])
def test_reads_and_merges_equal_plain_loops(exact):
    rng, index, plain = np.random.default_rng(0), Neighbours(24, K, 0.5, exact), Plain(24, 0.5)
    left = 0
    for _ in range(60):
        w = visit(rng, index.read, 8, 40)
        left += sum(int(k) not in plain.nodes for k in w["used"].ravel() if k >= 0)
        index.merge([w])
        plain.merge(w)
        key, vector = np.arange(12), dyadic(rng, 12, D)
        found = index.read({"key": key, "vector": vector})
        assert found["nodes"] == [len(plain.nodes)]
        for i in range(12):
            expected = plain.read(i, vector[i])
            there = found["key"][i] >= 0
            assert list(zip(found["distance"][i][there], found["key"][i][there], strict=True)) == expected
            assert np.isinf(found["distance"][i][~there]).all()
            for j, (_, k) in enumerate(expected):
                v, rate, last = plain.nodes[k]
                np.testing.assert_array_equal(found["vector"][i, j], v)
                assert (found["rate"][i, j], found["age"][i, j]) == (rate, plain.step - last)
    assert len(plain.nodes) == 24
    assert left > 5


@pytest.mark.usefixtures("small_cells")
def test_a_step_is_the_same_however_it_is_spread_over_writers_and_reads():
    rng, one, many = np.random.default_rng(1), Neighbours(150, K, 0.1), Neighbours(150, K, 0.1)
    for _ in range(40):
        w = visit(rng, one.read, 17, 250, np.float32)
        for name in ("vector", "vector_grad", "rate_grad"):
            w[name] += rng.standard_normal(w[name].shape, dtype=np.float32)
        one.merge([w])
        owner = rng.integers(0, 4, 17)
        many.merge([rows(w, rng.permutation(np.flatnonzero(owner == r))) for r in range(4)])
        assert_same(one.snapshot(), many.snapshot())
        request = {"key": np.arange(30), "vector": rng.standard_normal((30, D), dtype=np.float32)}
        whole = one.read(request)
        parts = [one.read(rows(request, slice(i, j))) for i, j in ((0, 1), (1, 1), (1, 20), (20, 30))]
        for name in whole.keys() - {"nodes"}:
            np.testing.assert_array_equal(whole[name], np.concatenate([p[name] for p in parts]), err_msg=name)
    assert one.report()["rebuilds"] > 20


def test_the_least_recently_used_leave():
    """By hand."""

    def keys() -> list[int]:
        return sorted(index.key[: index.size].tolist())

    index = Neighbours(3, K, 0.1)
    index.merge([stored([1, 2, 3], np.eye(3))])
    index.merge([stored([4], np.zeros((1, 3)), [[1, -1, -1]])])
    assert keys() == [1, 3, 4]  # 2 and 3 are the oldest; the smaller key goes
    index.merge([stored([3, 5], np.zeros((2, 3)), [[2, -1, -1], [-1, -1, -1]])])
    assert keys() == [3, 4, 5]  # 1 and 4 were used at step 2; that 2 was asked for changes nothing
    index.merge([])
    found = index.read({"key": np.array([5]), "vector": np.zeros((1, 3))})
    assert found["key"].tolist() == [[3, 4, -1]]
    assert found["age"].tolist() == [[1, 2, -1]]
    index.merge([stored([9, 6, 4, 8], np.zeros((4, 3)), tasks=[1, 2, 3, 4])])
    assert keys() == [6, 8, 9]  # four at once are too many: the smallest leaves, known as it is
    assert index.report() == {
        "nodes": 3, "stored": 10, "evicted": 5, "hits": 1, "age": [1], "rebuilds": 0,
    }  # fmt: skip
    assert index.report()["stored"] == 0


@pytest.mark.usefixtures("small_cells")
def test_a_restored_index_goes_on_bit_for_bit():
    rng, index = np.random.default_rng(2), Neighbours(200, K, 0.3)
    again: Neighbours | None = None
    for step in range(60):
        w = visit(rng, index.read, 16, 300, np.float32)
        w["vector"] += np.float32(0.1) * rng.standard_normal(w["vector"].shape, dtype=np.float32)
        index.merge([w])
        if step == 25:
            snapshot = index.snapshot()
            again = Neighbours(200, K, 0.3)
            again.restore(snapshot)
            splits = index.cells.splits
        elif again is not None:
            again.merge([w])
            request = {"key": np.arange(40), "vector": rng.standard_normal((40, D), dtype=np.float32)}
            assert_same(index.read(request), again.read(request))
            assert_same(index.snapshot(), again.snapshot())
    assert again is not None
    assert index.cells.splits > splits + 5
    assert index.report() == again.report()
    assert index.report() == again.report()
    plain = Neighbours(200, K, 0.3, exact=True)
    plain.restore(snapshot)  # taken with the other search: nodes are nodes
    searched = Neighbours(200, K, 0.3)
    searched.restore(plain.snapshot())
    assert searched.cells.count.sum() == len(snapshot["key"])


@pytest.mark.parametrize("exact", [True, False])
def test_shards_answer_like_one(exact):
    rng, one = np.random.default_rng(3), Neighbours(300, K, 0.5, exact)
    parts = [one.part(i, 3) for i in range(3)]
    assert [p.capacity for p in parts] == [100, 100, 100]
    for _ in range(20):
        w = visit(rng, one.read, 9, 90)
        halves = [rows(w, slice(0, 5)), rows(w, slice(5, 9))]
        one.merge(halves)
        routed = [one.route(h, 3) for h in halves]
        for i, part in enumerate(parts):
            part.merge([r[i] for r in routed])
        request = {"key": np.arange(20), "vector": dyadic(rng, 20, D)}
        assert_same(one.read(request), one.combine([p.read(request) for p in parts]))
    assert min(p.size for p in parts) > 15


def test_it_finds_what_is_near():
    """95 % of the nearest in a mixture, and no worse after steps that move, store and drop nodes; looking at few."""
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((200, 16), dtype=np.float32)

    def draw(n: int) -> Any:
        return centres[rng.integers(0, 200, n)] + np.float32(0.1) * rng.standard_normal((n, 16), dtype=np.float32)

    index, exact = Neighbours(20_000, 8, 0.5), Neighbours(20_000, 8, 0.5, exact=True)
    for start in range(0, 20_000, 2_000):
        index.merge([stored(np.arange(start, start + 2_000), draw(2_000))])
    for step in range(31):
        key = np.arange(20_000 + 256 * step, 20_256 + 256 * step)
        vector = draw(256)
        found = index.read({"key": key, "vector": vector})
        if step % 10 == 0:
            exact.restore(index.snapshot())
            truth = exact.read({"key": key, "vector": vector})
            recall = (found["distance"] <= truth["distance"][:, -1:]).mean()
            assert recall >= 0.95, step
        w = stored(key, vector, found["key"])
        w["vector_grad"] = 64 * (found["vector"] - vector[:, None])  # towards who found them
        index.merge([w])
    assert index.cells.candidates(vector[:1]).shape[1] < index.size / 7
    assert index.cells.count.sum() == index.size == 20_000


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cells_are_ordered_in_whole_numbers(dtype):
    """Exact sums are what makes an answer the same in any batch and for any number of threads."""
    rng = np.random.default_rng(5)
    cells, vectors = search.Cells(4_000, 48, dtype), (3 * rng.standard_normal((4_000, 48))).astype(dtype)
    vectors[3_000:3_600] = vectors[3_000]  # more than one cell of equals
    cells.add(np.arange(4_000), vectors)
    unit, centre, square = cells._rounded()
    queries = vectors[:200] * np.repeat([0.01, 1], 100)[:, None].astype(dtype)
    score = cells._scores(queries, unit, centre, square)
    grid = np.rint(np.clip(queries.astype(float) / unit, -2 * search.GRID, 2 * search.GRID)).astype(np.int64)
    whole = grid @ centre.T.astype(np.int64) + np.where(np.isinf(square), 0, square).astype(np.int64)
    np.testing.assert_array_equal(score[:, np.isfinite(square)], whole[:, np.isfinite(square)])
    assert np.abs(whole).max() > 2**40
    true = search.distances(queries, cells.centre)[:, np.isfinite(square)]
    assert (score.argmin(1) == np.flatnonzero(np.isfinite(square))[true.argmin(1)]).mean() > 0.99


@pytest.mark.parametrize("exact", [True, False])
def test_all_users_identical(exact):
    index, same = Neighbours(3_000, 8, 0.1, exact), np.full((3_000, D), 0.3, np.float32)
    for start in range(0, 3_000, 500):
        index.merge([stored(np.arange(start, start + 500), same[:500])])
    found = index.read({"key": np.array([2, 700]), "vector": same[:2]})
    assert (found["distance"] == 0).all()
    assert all(len(set(k)) == 8 and own not in k for own, k in zip((2, 700), found["key"].tolist(), strict=True))
    assert (np.diff(found["key"], axis=1) > 0).all()
    if exact:
        assert found["key"].tolist() == [[0, 1, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_nothing_stored_and_nobody_asking():
    index = Neighbours(10, K, 0.1)
    found = index.read({"key": np.array([1, 2]), "vector": np.zeros((2, D))})
    assert found["nodes"] == [0]
    assert (found["key"] == -1).all()
    assert found["vector"].shape == (2, K, D)
    again = Neighbours(10, K, 0.1)
    again.restore(index.snapshot())
    nobody = np.zeros((0, D))
    again.merge([stored(np.zeros(0, np.int64), nobody)])
    again.merge([stored([7], np.ones((1, D))), stored(np.zeros(0, np.int64), nobody)])
    found = again.read({"key": np.zeros(0, np.int64), "vector": nobody})
    assert {n: a.shape for n, a in found.items()} == {
        "key": (0, K), "vector": (0, K, D), "rate": (0, K), "distance": (0, K), "age": (0, K), "nodes": (1,),
    }  # fmt: skip
    assert again.read({"key": np.array([1]), "vector": np.zeros((1, D))})["distance"].tolist() == [[4, np.inf, np.inf]]


def test_what_it_refuses():
    with pytest.raises(UserError, match=r"--capacity 2 is less than --nearest 3"):
        Neighbours(2, K, 0.1)
    with pytest.raises(UserError, match=r"--capacity 1000000000000000: no memory"):
        Neighbours(10**15, K, 0.1)
    with pytest.raises(UserError, match=r"--capacity 8 over 3 shards leaves one 2 nodes"):
        Neighbours(8, K, 0.1).part(2, 3)
    index = Neighbours(10, K, 1e30)
    index.merge([stored([1, 2, 3, 4], np.eye(4, dtype=np.float32))])
    before = index.snapshot()
    with pytest.raises(UserError, match=r"holds 4 users; --capacity 3"):
        Neighbours(3, K, 0.1).restore(before)
    good = stored([5, 6], np.ones((2, 4), np.float32), [[1, 2, -1], [3, -1, -1]], tasks=[50, 60])
    for name, at, said in (
        ("vector", (1, 2), "embedding that task 60 stores"),
        ("rate", 0, "step size that task 50 stores"),
        ("vector_grad", (0, 1, 3), "task 50's gradient at a stored embedding"),
        ("rate_grad", (1, 0), "task 60's gradient at a stored step size"),
    ):
        bad = {n: a.copy() for n, a in good.items()}
        bad[name][at] = np.nan if name != "rate" else np.inf
        with pytest.raises(ValueError, match=said):
            index.merge([bad])
        with pytest.raises(RunError, match=said):
            index.merge([bad])
    bad = {n: a.copy() for n, a in good.items()}
    bad["vector_grad"][0, 1, 0] = 1e10
    with pytest.raises(RunError, match="the node of user 2 leaves the range of numbers; lower --node-lr"):
        index.merge([bad])
    bad["vector_grad"][0] = [[0] * 4, [0] * 4, [np.nan] * 4]  # of nobody
    assert_same(index.snapshot(), before)
    index.merge([bad])
    with pytest.raises(ValueError, match="user 9 asks with"):
        index.read({"key": np.array([8, 9]), "vector": np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]])})


def test_the_benchmark_writes_a_row_a_mode(capsys, tmp_path):
    rows = benchmark_neighbours.main(["--nodes", "3000", "--batch-size", "32", "--turns", "1", "--nearest", "4"])
    assert [(r["case"], r["variant"], r["nearest"]) for r in rows] == [
        ("3000 x 32", "approximate", 4),
        ("3000 x 32", "exact", 4),
    ]
    assert all(r["recall"] > 0.9 and r["value"] > 0 and r["stores_per_s"] > 0 and r["merge_ms"] > 0 for r in rows)
    assert 1 < rows[1]["memory_over_vectors"] < rows[0]["memory_over_vectors"] < 2
    assert "recall@4" in capsys.readouterr().out
    for flags, said in (["--nodes", "0"], "--nodes must be"), (["--run", str(tmp_path)], "no checkpoint with an index"):
        with pytest.raises(UserError, match=said):
            benchmark_neighbours.main(flags)
