"""Checkpoints that are damaged, torn, foreign or locked, and folders full of strays."""

import gc
import hashlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgru.training import (
    CheckpointError,
    find_checkpoint,
    init_train_state,
    load_checkpoint,
    save_checkpoint,
)
from jaxgru.training.checkpoints import locked

RUN = {"config": {"hidden_size": 3, "spec": "cho"}, "vocabulary_sha256": "abc"}
FORMATS = ("npz", "orbax")


def make_state(seed=0, size=3):
    rng = np.random.default_rng(seed)
    params = {
        "w": jnp.asarray(rng.normal(size=(size, 2)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=2), jnp.bfloat16),
    }
    state = init_train_state(params, optax.adam(0.1), key=jax.random.key(seed))
    return state._replace(step=jnp.asarray(7 + seed, jnp.int32), carry=(jnp.ones(2), None))


def bits(state):
    """Every leaf's name, dtype and bytes."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = jax.random.key_data(leaf) if is_key else leaf
        found.append((jax.tree_util.keystr(path), str(leaf.dtype), np.asarray(data).tobytes()))
    return found


def save(folder, step, seed=0, **options):
    return save_checkpoint(folder, step, make_state(seed), run=RUN, **options)


def steps(folder):
    return sorted(int(p.name[5:13]) for p in folder.glob("step-*") if p.suffix != ".json")


@pytest.mark.parametrize("format", FORMATS)
def test_state_comes_back_bit_for_bit_with_its_facts(tmp_path, format):
    path = save(tmp_path, 7, loop={"in_row": 2}, format=format)
    found = find_checkpoint(tmp_path)
    assert found == (path, 7, RUN, {"in_row": 2}, None)
    assert path == tmp_path / f"step-00000007.{format}"
    loaded = load_checkpoint(found.path, make_state(1), run=RUN)
    assert bits(loaded) == bits(make_state())
    assert jax.tree.structure(loaded) == jax.tree.structure(make_state())


def test_equal_states_make_equal_bytes(tmp_path):
    files = [save(tmp_path / name, 7) for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_the_last_and_the_best_are_kept(tmp_path, format):
    for step in range(1, 7):
        save(tmp_path, step, keep=2, best_step=2 if step >= 2 else None, format=format)
    assert steps(tmp_path) == [2, 5, 6]
    assert find_checkpoint(tmp_path).step == 6
    assert find_checkpoint(tmp_path, "best").step == 2
    if format == "orbax":
        assert sorted(p.stem for p in tmp_path.glob("*.json")) == [
            "step-00000002", "step-00000005", "step-00000006",
        ]  # fmt: skip


def test_the_last_three_are_kept_as_npz_by_default(tmp_path):
    for step in range(5):
        path = save_checkpoint(tmp_path / "new" / "folder", step, {"x": jnp.ones(2)})
    assert steps(path.parent) == [2, 3, 4] and path.suffix == ".npz"
    assert find_checkpoint(path.parent) == (path, 4, {}, {}, None)


def test_orbax_manifest_holds_sums_of_every_file_and_of_itself(tmp_path):
    path = save(tmp_path, 7, format="orbax", loop={"in_row": 2})
    sealed = json.loads(path.with_suffix(".json").read_text())
    assert set(sealed) == {"sha256", "manifest"}
    assert sealed["sha256"] == hashlib.sha256(sealed["manifest"].encode()).hexdigest()
    record = json.loads(sealed["manifest"])
    sums = record.pop("files")
    assert sums == {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file()
    }
    names = [name for name, *_ in bits(make_state())]
    assert (record["format"], record["names"]) == ("jaxgru orbax 1", names)
    half, key = names.index(".params['half']"), names.index(".key")
    assert (record["dtypes"][half], record["shapes"][half]) == ("bfloat16", [2])
    assert (record["dtypes"][key], record["shapes"][key]) == ("key threefry2x32", [])
    assert record["metadata"] == {"step": 7, "run": RUN, "loop": {"in_row": 2}, "best_step": None}


def test_orbax_checkpoint_that_was_changed_says_how(tmp_path):
    path = save(tmp_path, 7, format="orbax")
    manifest = path.with_suffix(".json")
    whole = json.loads(manifest.read_text())

    def seal(text):
        return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text})

    for written, reason in (
        (json.dumps({**whole, "sha256": "0"}), "its sha256 is another"),
        (seal(json.dumps({"format": "other"})), "format 'other'"),
        (seal(json.dumps({"format": "jaxgru orbax 1"})), "'files'"),
    ):
        manifest.write_text(written)
        with pytest.raises(CheckpointError) as refused:
            load_checkpoint(path, make_state())
        assert str(refused.value) == (
            f"{path} must have a whole 'jaxgru orbax 1' manifest beside it: {reason}"
        )
    manifest.write_text(json.dumps(whole))
    first, *_ = sorted(json.loads(whole["manifest"])["files"])
    (path / first).unlink()
    (path / "a").write_text("")
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path, make_state())
    changed = sorted([first, "a"])
    assert str(refused.value) == f"{path} must be as it was written; others are now {changed}"


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert find_checkpoint(tmp_path / "missing") is None
    assert find_checkpoint(tmp_path, "best") is None
    save(tmp_path, 1)
    assert find_checkpoint(tmp_path, "best") is None


def damages(path):
    """The contents of a file with every 97th byte's bit flipped, and cut at every 97th byte."""
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        flipped = bytes([whole[position] ^ (1 << position % 8)])
        yield whole[:position] + flipped + whole[position + 1 :]
        yield whole[:position]


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, format):
    save(tmp_path, 7, seed=0, format=format)
    newer = save(tmp_path, 8, seed=1, format=format)
    files = [newer] if format == "npz" else [newer.with_suffix(".json"), *newer.rglob("*")]
    rounds = survived = 0
    for file in filter(pathlib.Path.is_file, files):
        whole = file.read_bytes()
        for content in damages(file):
            rounds += 1
            file.write_bytes(content)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                found = find_checkpoint(tmp_path)
            assert found is not None
            if found.step == 7:
                assert [str(w.message)[:20] for w in told] == ["checkpoint skipped: "]
                assert str(newer) in str(told[0].message)
                assert told[0].filename == __file__
            else:  # a flipped bit that no array and no fact depends on, in a date say
                survived += 1
                assert bits(load_checkpoint(found.path, make_state(), run=RUN)) == bits(
                    make_state(1)
                )
        file.write_bytes(whole)
    assert rounds > 40 and survived < 0.2 * rounds
    assert find_checkpoint(tmp_path).step == 8


def test_orbax_folder_without_its_manifest_is_no_checkpoint(tmp_path):
    save(tmp_path, 7, format="orbax")
    path = save(tmp_path, 8, seed=1, format="orbax")
    path.with_suffix(".json").unlink()  # as if the writer was killed before it
    with pytest.warns(UserWarning) as told:
        assert find_checkpoint(tmp_path).step == 7
    assert [str(warning.message) for warning in told] == [
        f"checkpoint skipped: {path} must have a whole 'jaxgru orbax 1' manifest beside it: it is "
        "missing"
    ]
    save(tmp_path, 8, seed=1, format="orbax")  # and is written again
    assert find_checkpoint(tmp_path).step == 8


def test_strays_are_left_alone_and_never_loaded(tmp_path):
    save(tmp_path, 7)
    (tmp_path / "step-00000009.npz").mkdir()
    (tmp_path / "step-00000010.npz").write_bytes(b"")
    (tmp_path / "step-00000011.npz").write_bytes((tmp_path / "step-00000007.npz").read_bytes())
    strays = ("notes.txt", "step-12.npz", "step-00000013.npz.part", "weights.npz", "mine.tmp")
    strays += (".jaxgru-mine",)
    for name in strays:
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.warns(UserWarning, match="checkpoint skipped") as told:
        assert find_checkpoint(tmp_path).step == 7
    assert len(told) == 3
    stray = tmp_path / "step-00000011.npz"
    assert str(told[0].message) == f"checkpoint skipped: {stray} holds step 7"
    save(tmp_path, 12, keep=1)
    assert all((tmp_path / name).read_text() == "mine" for name in strays)
    assert (tmp_path / "folder").is_dir()


SIZES = "must hold the leaves of `like`, got"
WRONG = [  # what each format says
    (make_state(size=4), "is of another model: .params['w'] must be float32[4, 2], got float32[3, "
     "2]; .opt_state[0].mu['w'] must be float32[4, 2], got float32[3, 2]; .opt_state[0].nu['w'] "
     "must be float32[4, 2], got float32[3, 2].", None),
    (make_state()._replace(carry=None), f"{SIZES} missing [] and surplus ['.carry[0]'].", None),
    (make_state()._replace(average=jnp.ones(1)), f"{SIZES} missing ['.average'] and surplus [].",
     None),
    (make_state()._replace(key=jax.random.key(0, impl="rbg")),
     "is of another model: .key must be key<rbg>[], got key threefry2x32.",
     "is of another model: .key must be key rbg[], got key threefry2x32[]."),
    (make_state()._replace(key=jax.random.split(jax.random.key(0))),
     "is of another model: .key must be key<fry>[2], got key threefry2x32.",
     "is of another model: .key must be key threefry2x32[2], got key threefry2x32[]."),
    (make_state()._replace(key=jnp.zeros(2, jnp.uint32)),
     "is of another model: .key must be uint32[2], got key threefry2x32.",
     "is of another model: .key must be uint32[2], got key threefry2x32[]."),
    (make_state()._replace(skipped=jax.random.key(0)),
     "is of another model: .skipped must be key<fry>[], got int32.",
     "is of another model: .skipped must be key threefry2x32[], got int32[]."),
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("like", "npz", "orbax"), WRONG)
def test_checkpoint_of_another_model_is_refused(tmp_path, format, like, npz, orbax):
    path = save(tmp_path, 7, format=format)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path, like)
    function, message = ("load_arrays", npz) if format == "npz" else ("load_checkpoint", orbax)
    assert str(refused.value) == f"{function}: {path} {message or npz}"


def test_checkpoint_of_another_run_is_refused_with_every_difference(tmp_path):
    long = {"at the limit": "x" * 78, "over it": "x" * 79}
    run = {**RUN, **long, "nothing": None}
    path = save_checkpoint(tmp_path, 7, make_state(), run=run)
    config = {"hidden_size": 4, "spec": "cho"}
    other = {"config": config, "vocabulary_sha256": "xyz", "text": {"a": 1}, "nothing": None}
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path, make_state(), run=other)
    differences = (
        f'at the limit must be null, got "{"x" * 78}"',
        "config.hidden_size must be 4, got 3",
        f'over it must be null, got "{"x" * 76}...',
        'text must be {"a": 1}, got null',
        'vocabulary_sha256 must be "xyz", got "abc"',
    )
    assert str(refused.value) == (
        f"load_checkpoint: {path} is of another run: {'; '.join(differences)}. Resume with what it "
        "was made with, or give a new folder."
    )
    load_checkpoint(path, make_state(), run=json.loads(json.dumps(run)))


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Orbax leaves threads and files open where it fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("format", "limit"),  # 1600 is room enough for each of Orbax's files
    [*(("npz", limit) for limit in (0, 100, 1000, 1600)), *(("orbax", n) for n in (0, 100, 1000))],
)
def test_write_that_the_disk_has_no_room_for_leaves_what_was_there(tmp_path, format, limit):
    save(tmp_path, 7, format=format)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError) as failed:
            save(tmp_path, 8, seed=1, keep=1, format=format)
        if (format, limit) == ("orbax", 0):
            path = tmp_path / "step-00000008.orbax"
            assert str(failed.value).startswith(f"{path} could not be written: ")
        with pytest.raises(OSError):
            save(tmp_path, 7, seed=1, keep=1, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = find_checkpoint(tmp_path)
    assert bits(load_checkpoint(found.path, make_state(), run=RUN)) == bits(make_state())
    if format == "npz":
        assert contents(tmp_path) == before
    save(tmp_path, 8, seed=1, keep=1, format=format)
    assert len(list(tmp_path.glob("*.npz"))) + len(list(tmp_path.glob("*.json"))) == 1
    assert not list(tmp_path.glob(".jaxgru-*"))
    gc.collect()  # what Orbax never awaited warns here, and not in another test


def test_short_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    save(tmp_path, 7)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def savez(file, **arrays):
        file.write(b"PK" * 100)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path, 8)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_array_that_was_exchanged_is_found_by_its_sum(tmp_path):
    """The zip's own checksum is right: only the sha256 can tell."""
    save(tmp_path, 7)
    path = save(tmp_path, 8, seed=1)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays[".params['w']"] = arrays[".params['w']"] + 1
    np.savez(path, **arrays)
    with pytest.warns(UserWarning) as told:
        assert find_checkpoint(tmp_path).step == 7
    assert [str(warning.message) for warning in told] == [
        f"checkpoint skipped: {path} must be a whole 'jaxgru arrays 2' file: the sha256 of "
        ".params['w'] is another"
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_file_and_its_name_are_on_the_disk_before_it_counts(tmp_path, monkeypatch, format):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda d: (done.append(os.readlink(f"/proc/self/fd/{d}")), fsync(d))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    save(tmp_path, 7, format=format)
    own = [entry for entry in done if entry == "replace" or ".orbax" not in entry]
    assert own[-3].endswith(".tmp") and own[-2:] == ["replace", str(tmp_path)]


@pytest.mark.parametrize("format", FORMATS)
def test_newer_format_of_a_number_takes_its_place(tmp_path, format):
    other = FORMATS[format == "npz"]
    save(tmp_path, 7, seed=0, format=other)
    path = save(tmp_path, 7, seed=1, format=format)
    assert find_checkpoint(tmp_path).path == path
    assert bits(load_checkpoint(path, make_state())) == bits(make_state(1))
    assert len([p for p in tmp_path.iterdir() if p.suffix != ".json"]) == 1


def test_one_byte_dtypes_come_back(tmp_path):
    state = {"x": jnp.arange(3).astype(jnp.float8_e4m3fn)}
    assert bits(load_checkpoint(save_checkpoint(tmp_path, 1, state), state)) == bits(state)


def test_checkpoint_that_may_not_be_read_is_no_damage(tmp_path, monkeypatch):
    path = save(tmp_path, 7)

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError):
        find_checkpoint(tmp_path)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    save(tmp_path, 7)
    (tmp_path / ".jaxgru-abc.tmp").write_bytes(b"half")
    (tmp_path / ".jaxgru-step-00000009.orbax.tmp.orbax-checkpoint-tmp").mkdir()
    save(tmp_path, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000007.npz", "step-00000008.npz"]


def test_folder_that_may_only_be_read_is_one_error(tmp_path):
    save(tmp_path, 7)
    shutil.copymode(tmp_path, tmp_path)
    tmp_path.chmod(0o555)
    root = os.geteuid() == 0
    if root:  # to whom no file says no
        parents = [p for p in (tmp_path, *tmp_path.parents) if not p.stat().st_mode & 0o001]
        modes = [(p, p.stat().st_mode) for p in parents]
        for parent in parents:
            parent.chmod(0o755 if parent != tmp_path else 0o555)
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            save(tmp_path, 8)
        with pytest.raises(PermissionError), locked(tmp_path):
            pass
        assert find_checkpoint(tmp_path).step == 7
    finally:
        if root:
            os.seteuid(0)
            for parent, mode in modes:
                parent.chmod(mode)
        tmp_path.chmod(0o755)


def test_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path):
    save(tmp_path, 7)
    with locked(tmp_path):  # as a process that has ended leaves the file
        pass
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    (tmp_path / "plain").write_text("")
    modes = [(tmp_path / name).stat().st_mode for name in ("lock", "plain")]
    assert modes[0] == modes[1]
    code = (
        "import fcntl, os, sys\n"
        f"file = open({str(tmp_path / 'lock')!r}, 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(os.getpid(), file=file, flush=True)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OSError) as refused, locked(tmp_path):
        pass
    assert str(refused.value) == (
        f"{tmp_path} is in use by the run of process {holder.pid}; wait for its end or give "
        "another folder"
    )
    holder.kill()  # the lock goes with it, whatever the file says
    holder.communicate()
    with locked(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(FileExistsError) as refused, locked(tmp_path, new=True):
        pass
    assert str(refused.value) == (
        f"{tmp_path} holds the checkpoints of another run; resume it or give another folder. "
        "Nothing was overwritten"
    )
    with locked(tmp_path / "new" / "folder", new=True):
        pass


NO_JSON = "Object of type object is not JSON serializable"
BAD_ARGUMENTS = [
    ({"step": -1}, ValueError, "save_checkpoint: step must be at least 0, got -1."),
    ({"step": 1.0}, TypeError, "save_checkpoint: step must be an integer, got 1.0."),
    ({"keep": 0}, ValueError, "save_checkpoint: keep must be at least 1, got 0."),
    (
        {"format": "pickle"},
        ValueError,
        "save_checkpoint: format must be one of 'npz', 'orbax', got 'pickle'.",
    ),
    ({"run": {"spec": object()}}, TypeError, NO_JSON),
    ({"loop": {"spec": object()}, "format": "orbax"}, TypeError, NO_JSON),
    ({"run": {"rate": float("nan")}}, ValueError, "Out of range float values are not JSON compli"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_ARGUMENTS)
def test_bad_argument_is_refused_and_writes_nothing(tmp_path, options, error, message):
    with pytest.raises(error) as refused:
        save_checkpoint(tmp_path, **{"step": 1, "state": make_state(), **options})
    own = message.startswith("save_checkpoint")  # the others are Python's
    assert str(refused.value) == message if own else str(refused.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_choice_of_checkpoints_other_than_latest_and_best_is_refused(tmp_path):
    with pytest.raises(ValueError) as refused:
        find_checkpoint(tmp_path, "newest")
    assert str(refused.value) == (
        "find_checkpoint: which must be one of 'latest', 'best', got 'newest'."
    )


def test_missing_orbax_names_the_extra(tmp_path, monkeypatch):
    path = save(tmp_path, 1, format="orbax")
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError) as missing:
        save(tmp_path, 2, format="orbax")
    assert str(missing.value) == "save_checkpoint: needs orbax; install jaxgru[orbax]."
    with pytest.raises(ImportError) as missing:
        load_checkpoint(path, make_state())
    assert str(missing.value) == "load_checkpoint: needs orbax; install jaxgru[orbax]."


def test_checkpoint_of_one_layout_loads_under_another(tmp_path):
    devices = jax.devices()
    assert len(devices) == 4
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = {"w": jnp.arange(8.0), "key": jax.random.key(3)}
    spread = {"w": jax.device_put(state["w"], split), "key": jax.device_put(state["key"], whole)}
    for format in FORMATS:
        for written, like in ((state, spread), (spread, state)):
            folder = tmp_path / f"{format}-{written is state}"
            loaded = load_checkpoint(save_checkpoint(folder, 1, written, format=format), like)
            assert bits(loaded) == bits(state)
            assert loaded["w"].sharding.is_equivalent_to(like["w"].sharding, 1)
            assert len(loaded["key"].sharding.device_set) == len(like["key"].sharding.device_set)
