"""The DATA argument: what is read, in which batches, and every refusal."""

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.core.data import as_data, load_data
from twofour.core.errors import InputError


def arrays(n=10):
    x = np.arange(n * 6, dtype=np.float32).reshape(n, 2, 3)
    return {"x": x, "labels": np.arange(n) % 3}


@pytest.fixture(params=["npz", "npz compressed", "directory", "function", "dict", "batches"])
def source(request, tmp_path, monkeypatch):
    """Opens the same ten samples from each kind of source."""
    data = arrays()
    if request.param == "dict":
        return as_data(data, ["x"])
    if request.param == "batches":
        return as_data([{k: v[i : i + 4] for k, v in data.items()} for i in (0, 4, 8)], ["x"])
    if request.param == "function":
        name = "data_module_for_test"
        np.savez(tmp_path / "d.npz", **data)
        (tmp_path / f"{name}.py").write_text(
            "import numpy as np\n"
            "def batches():\n"
            f"    d = np.load({str(tmp_path / 'd.npz')!r})\n"
            "    for i in (0, 4, 8):\n"
            "        yield {k: d[k][i:i + 4] for k in d}\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return load_data(f"{name}:batches", ["x"])
    if request.param == "directory":
        for key, value in data.items():
            np.save(tmp_path / f"{key}.npy", value)
        return load_data(tmp_path, ["x"])
    save = np.savez_compressed if "compressed" in request.param else np.savez
    save(tmp_path / "d.npz", **data)
    return load_data(tmp_path / "d.npz", ["x"])


@pytest.mark.parametrize("size", [1, 3, 4, 10, 11])
@pytest.mark.parametrize("limit", [None, 1, 7, 10, 99])
def test_every_source_yields_all_samples_in_order_and_again(source, size, limit):
    expected = arrays()
    wanted = min(limit or 10, 10)
    for _ in range(2):
        got = list(source.batches(size, limit))
        assert all(1 <= len(batch) <= size for batch in got)
        assert [batch.start for batch in got] == list(np.cumsum([0, *map(len, got)]))[:-1]
        x = np.concatenate([batch.inputs["x"] for batch in got])
        labels = np.concatenate([batch.labels for batch in got])
        assert x.dtype == np.float32
        assert np.array_equal(x, expected["x"][:wanted])
        assert np.array_equal(labels, expected["labels"][:wanted])
    assert source.count in (10, None)


@settings(deadline=None)
@given(n=st.integers(1, 40), size=st.integers(1, 50), limit=st.integers(1, 50))
def test_batches_partition_the_samples(n, size, limit):
    got = list(as_data({"x": np.arange(n)}, ["x"]).batches(size, limit))
    assert np.array_equal(
        np.concatenate([b.inputs["x"] for b in got]), np.arange(n)[: min(n, limit)]
    )
    assert all(len(batch) <= size for batch in got)


def test_file_without_labels(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.ones((2, 3)))
    assert next(load_data(tmp_path / "d.npz", ["x"]).batches(2)).labels is None


def test_fortran_order_is_read_right(tmp_path):
    x = np.arange(12.0).reshape(3, 4).T
    np.savez(tmp_path / "d.npz", x=x)
    got = np.concatenate([b.inputs["x"] for b in load_data(tmp_path / "d.npz", ["x"]).batches(3)])
    assert np.array_equal(got, x)


def test_a_member_larger_than_the_batch_is_not_read_whole(tmp_path):
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((4000, 1000), np.float32))
    batches = load_data(tmp_path / "d.npz", ["x"]).batches(8)
    assert next(batches).inputs["x"].nbytes == 8 * 4000
    batches.close()


def refused(*parts):
    return pytest.raises(InputError, match="(?s)" + ".*".join(parts))


def test_missing_file(tmp_path):
    with refused("no data at", "absent.npz", "fix: check the path"):
        load_data(tmp_path / "absent.npz", ["x"])


@pytest.mark.parametrize("content", [b"", b"hello world\n" * 20, b"PK\x03\x04" + bytes(50)])
def test_not_an_npz(tmp_path, content):
    (tmp_path / "d.npz").write_bytes(content)
    with refused("d.npz is not an .npz file"):
        load_data(tmp_path / "d.npz", ["x"])


def test_empty_directory(tmp_path):
    with refused("holds no data"):
        load_data(tmp_path, ["x"])


def test_no_array_named_like_the_input_lists_both(tmp_path):
    np.savez(tmp_path / "d.npz", image=np.ones((2, 3)), labels=np.ones(2))
    with refused("no array for input 'x'", "expected arrays x, y", "got image, labels", "x=..."):
        load_data(tmp_path / "d.npz", ["x", "y"])


def test_lengths_differ(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.ones((2, 3)), labels=np.ones(3))
    with refused("do not match", "got x 2, labels 3"):
        load_data(tmp_path / "d.npz", ["x"])


def test_scalar(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.float32(1))
    with refused("do not match", "a scalar"):
        load_data(tmp_path / "d.npz", ["x"])


def test_empty_set(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.ones((0, 3)))
    with refused("holds no samples"):
        load_data(tmp_path / "d.npz", ["x"])
    with refused("holds no samples"):
        list(as_data([], ["x"]).batches(4))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_names_array_and_index(tmp_path, value):
    x = np.ones((9, 2, 3), np.float32)
    x[7, 1, 2] = value
    np.savez(tmp_path / "d.npz", x=x)
    with refused(r"x\[7, 1, 2\] is", "mend or drop"):
        list(load_data(tmp_path / "d.npz", ["x"]).batches(4))


def test_pickles_are_not_loaded(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    with refused("cannot read", "pickled objects"):
        load_data(tmp_path / "d.npz", ["x"])


def test_text_is_not_data(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.array(["a", "b"]))
    with refused("cannot be used as data", "dtype <U1"):
        load_data(tmp_path / "d.npz", ["x"])


@pytest.mark.parametrize("name", ["nowhere_at_all:f", "json:no_such_function", "json:__doc__"])
def test_function_that_is_not_there(name):
    with refused("data"):
        load_data(name, ["x"])


@pytest.mark.parametrize("batches", [[np.ones(3)], [{"y": np.ones(3)}], [{"x": np.array("a")}]])
def test_batches_of_the_wrong_kind(batches):
    with refused("data batches"):
        list(as_data(batches, ["x"]).batches(4))


def hostile_headers():
    for shape in ["(10**15,)", "(5, 10**12)", "(-5, 3)", "(5, -3)", "'x'", "(1.5,)"]:
        if "**" in shape:
            shape = str(eval(shape))
        yield f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        yield f"{{'descr': '<f4', 'fortran_order': True, 'shape': {shape}, }}"
    yield "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }"
    yield "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }"
    yield "not a dict"


@pytest.mark.parametrize("header", list(hostile_headers()))
@pytest.mark.parametrize("container", ["npy", "npz"])
def test_hostile_headers(tmp_path, header, container):
    text = header.encode().ljust(118) + b"\n"
    npy = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(40)
    path = tmp_path / "x.npy"
    path.write_bytes(npy)
    if container == "npz":
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            archive.write(path, "x.npy")
    with pytest.raises(InputError):
        list(load_data(tmp_path if container == "npy" else tmp_path / "d.npz", ["x"]).batches(2))


def every_cut(path: Path, step: int):
    whole = path.read_bytes()
    for size in range(0, len(whole), step):
        path.write_bytes(whole[:size])
        yield size


def test_every_truncation_is_one_error(tmp_path):
    np.savez_compressed(tmp_path / "d.npz", x=np.random.default_rng(0).random((20, 5)))
    for _ in every_cut(tmp_path / "d.npz", 7):
        with pytest.raises(InputError):
            list(load_data(tmp_path / "d.npz", ["x"]).batches(8))
    np.save(tmp_path / "x.npy", np.ones((20, 5)))
    for _ in every_cut(tmp_path / "x.npy", 7):
        with pytest.raises(InputError):
            list(load_data(tmp_path, ["x"]).batches(8))


def test_altered_bytes_never_crash(tmp_path):
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).random((20, 5)))
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    refusals = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            list(load_data(path, ["x"]).batches(8))
        except InputError:
            refusals += 1
    assert refusals > 200
