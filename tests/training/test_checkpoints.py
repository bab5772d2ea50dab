"""Checkpoints that are damaged, truncated, foreign or locked, and folders full of strays."""

import errno
import fcntl
import gc
import hashlib
import json
import os
import pathlib
import resource
import shutil
import stat
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxgru import atomic_files
from jaxgru.atomic_files import flush_folder, remove_leftovers, write_atomically
from jaxgru.training import (
    CheckpointError,
    find_checkpoint,
    init_train_state,
    load_checkpoint,
    save_checkpoint,
)
from jaxgru.training.checkpoints import _require_room
from jaxgru.training.processes import locked

RUN = {"config": {"hidden_size": 3, "spec": "cho"}, "vocabulary_sha256": "abc"}


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
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def test_state_comes_back_bit_for_bit_with_its_metadata(tmp_path):
    path = save(tmp_path, 7, loop={"in_row": 2})
    found = find_checkpoint(tmp_path)
    assert found == (path, 7, RUN, {"in_row": 2}, None)
    assert path == tmp_path / "step-00000007"
    loaded = load_checkpoint(found.path, make_state(1), run=RUN)
    assert bits(loaded) == bits(make_state())
    assert jax.tree.structure(loaded) == jax.tree.structure(make_state())
    for leaf in (loaded.params["w"], loaded.carry[0], loaded.step):
        assert not leaf.weak_type and not leaf.committed


def test_orbax_reads_a_checkpoint_without_this_package(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(save(tmp_path, 7))
    leaves = jax.tree.leaves(make_state().params)
    for number, leaf in enumerate(leaves):
        np.testing.assert_array_equal(arrays[str(number)], leaf)


def test_the_last_three_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        save(tmp_path / "new" / "folder", step, best_step=2 if step >= 2 else None)
    folder = tmp_path / "new" / "folder"
    assert steps(folder) == [2, 4, 5, 6]
    assert find_checkpoint(folder).step == 6
    assert find_checkpoint(folder, "best").step == 2
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step-0000000{step}" for step in (2, 4, 5, 6)
    ]


def test_manifest_holds_sums_of_every_file_and_of_itself(tmp_path):
    path = save(tmp_path, 7, loop={"in_row": 2})
    with_checksum = json.loads((path / "manifest.json").read_text())
    assert set(with_checksum) == {"sha256", "manifest"}
    assert with_checksum["sha256"] == hashlib.sha256(with_checksum["manifest"].encode()).hexdigest()
    record = json.loads(with_checksum["manifest"])
    assert record.pop("files") == {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }
    leaves = record.pop("leaves")
    assert list(leaves) == [name for name, *_ in bits(make_state())]
    assert leaves[".params['half']"] == ["bfloat16", [2]]
    assert leaves[".key"] == ["key threefry2x32", []]
    metadata = {"step": 7, "run": RUN, "loop": {"in_row": 2}, "best_step": None}
    assert record == {"format": "jaxgru checkpoint 1", "metadata": metadata}


def test_checkpoint_that_was_changed_says_how(tmp_path):
    path = save(tmp_path, 7)
    manifest = path / "manifest.json"
    intact = json.loads(manifest.read_text())

    def seal(text):
        return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text})

    for written, reason in (
        (json.dumps({**intact, "sha256": "0"}), "manifest.json does not match its sha256"),
        (seal(json.dumps({"format": "other"})), "its format is 'other'"),
        (seal(json.dumps({"format": "jaxgru checkpoint 1"})), "'files'"),
    ):
        manifest.write_text(written)
        with pytest.raises(CheckpointError) as refused:
            load_checkpoint(path, make_state())
        assert str(refused.value) == (
            f"load_checkpoint: {path} must be an intact 'jaxgru checkpoint 1': {reason}."
        )
    manifest.write_text(json.dumps(intact))
    first, *_ = sorted(json.loads(intact["manifest"])["files"])
    (path / first).unlink()
    (path / "a").write_text("")
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path, make_state())
    assert str(refused.value) == (
        f"load_checkpoint: {path} must be an intact 'jaxgru checkpoint 1': "
        f"files {sorted([first, 'a'])} were changed."
    )


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert find_checkpoint(tmp_path / "missing") is None
    assert find_checkpoint(tmp_path, "best") is None
    save(tmp_path, 1)
    assert find_checkpoint(tmp_path, "best") is None


@pytest.mark.parametrize("integer", [int, np.int64, jnp.int32])
def test_steps_of_any_integer_type_are_saved_as_python_integers(tmp_path, integer):
    path = save_checkpoint(tmp_path, integer(7), make_state(), best_step=integer(7))
    assert path.name == "step-00000007"
    found = find_checkpoint(tmp_path, "best")
    assert (found.step, found.best_step) == (7, 7)
    assert type(found.step) is type(found.best_step) is int


class Death(BaseException):
    """Stands for the end of a process, which cleans nothing up."""


@pytest.mark.parametrize("failure", [OSError, Death])
def test_failure_between_two_names_loses_no_checkpoint(tmp_path, monkeypatch, failure):
    """A step is saved again; the old checkpoint is moved aside when the failure comes."""
    path, rename, renamed = save(tmp_path, 7), pathlib.Path.rename, []
    before = contents(tmp_path)

    def fail_the_second_time(old, new):
        renamed.append(old.name)
        if len(renamed) == 2:
            raise failure
        return rename(old, new)

    with monkeypatch.context() as patch, pytest.raises(failure):
        patch.setattr(pathlib.Path, "rename", fail_the_second_time)
        save(tmp_path, 7, seed=1)
    assert renamed[:2] == ["step-00000007", ".jaxgru-step-00000007.tmp"]
    if failure is Death:  # both are there; the next run gives the old one its name again
        moved = [".jaxgru-step-00000007.tmp", ".jaxgru-step-00000007.tmp.replaced"]
        assert sorted(p.name for p in tmp_path.iterdir()) == moved
        remove_leftovers(tmp_path)
    assert contents(tmp_path) == before
    assert bits(load_checkpoint(path, make_state())) == bits(make_state())
    save(tmp_path, 7, seed=1)
    assert bits(load_checkpoint(path, make_state())) == bits(make_state(1))
    assert list(tmp_path.iterdir()) == [path]


def damages(path, stride):
    """The contents of a file with every so many bytes' bit flipped, and cut at as many bytes."""
    intact = path.read_bytes()
    for position in range(0, len(intact), stride):
        flipped = bytes([intact[position] ^ (1 << position % 8)])
        yield intact[:position] + flipped + intact[position + 1 :]
        yield intact[:position]


@pytest.mark.parametrize("stride", [499, pytest.param(97, marks=pytest.mark.slow)])
def test_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, stride):
    save(tmp_path, 7, seed=0)
    newer = save(tmp_path, 8, seed=1)
    rounds = files = 0
    for file in filter(pathlib.Path.is_file, newer.rglob("*")):
        intact = file.read_bytes()
        files += 1
        for content in damages(file, stride):
            rounds += 1
            file.write_bytes(content)
            with pytest.warns(UserWarning) as told:
                assert find_checkpoint(tmp_path).step == 7
            assert [str(w.message)[:37] for w in told] == ["find_checkpoint: checkpoint skipped: "]
            assert str(newer) in str(told[0].message)
            assert told[0].filename == __file__
        file.write_bytes(intact)
    assert files > 10 and rounds >= 2 * files
    assert find_checkpoint(tmp_path).step == 8


def test_folder_without_its_manifest_is_no_checkpoint(tmp_path):
    save(tmp_path, 7)
    path = save(tmp_path, 8, seed=1)
    (path / "manifest.json").unlink()
    with pytest.warns(UserWarning) as told:
        assert find_checkpoint(tmp_path).step == 7
    assert [str(warning.message) for warning in told] == [
        f"find_checkpoint: checkpoint skipped: {path} must be an intact 'jaxgru checkpoint 1': "
        "manifest.json is missing"
    ]
    save(tmp_path, 8, seed=1)  # and is written again
    assert find_checkpoint(tmp_path).step == 8


def test_strays_are_left_alone_and_never_loaded(tmp_path):
    path = save(tmp_path, 7)
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000010").write_bytes(b"")
    shutil.copytree(path, tmp_path / "step-00000011")
    strays = ("notes.txt", "step-12", "step-00000013.part", "weights.npz", "mine.tmp")
    strays += (".jaxgru-mine",)
    for name in strays:
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.warns(UserWarning, match="checkpoint skipped") as told:
        assert find_checkpoint(tmp_path).step == 7
    assert len(told) == 3
    stray = tmp_path / "step-00000011"
    assert str(told[0].message) == f"find_checkpoint: checkpoint skipped: {stray} holds step 7"
    save(tmp_path, 12)
    assert all((tmp_path / name).read_text() == "mine" for name in strays)
    assert (tmp_path / "folder").is_dir()


def where(number, *parts):
    return f"{number} different leaves in {' and '.join(parts)}, the first: "


WRONG = [
    (make_state(size=4), where(3, "params", "opt_state") + ".params['w'] must be float32[4, 2], "
     "got float32[3, 2]; .opt_state[0].mu['w'] must be float32[4, 2], got float32[3, 2]; "
     ".opt_state[0].nu['w'] must be float32[4, 2], got float32[3, 2]"),
    (make_state()._replace(carry=None), where(1, "carry") + ".carry[0] is not in the model"),
    (make_state()._replace(carry=(jnp.ones(2), jnp.ones(1))),
     where(1, "carry") + ".carry[1] is missing"),
    (make_state()._replace(opt_state=(), params={}), where(7, "params", "opt_state") + ".params["
     "'half'] is not in the model; .params['w'] is not in the model; .opt_state[0].count is not in "
     "the model"),
    (make_state()._replace(key=jax.random.key(0, impl="rbg")),
     where(1, "key") + ".key must be key rbg[], got key threefry2x32[]"),
    (make_state()._replace(key=jax.random.split(jax.random.key(0))),
     where(1, "key") + ".key must be key threefry2x32[2], got key threefry2x32[]"),
    (make_state()._replace(key=jnp.zeros(2, jnp.uint32)),
     where(1, "key") + ".key must be uint32[2], got key threefry2x32[]"),
    (make_state()._replace(skipped=jax.random.key(0)),
     where(1, "skipped") + ".skipped must be key threefry2x32[], got int32[]"),
]  # fmt: skip


def test_checkpoint_of_another_model_is_refused(tmp_path):
    path = save(tmp_path, 7)
    for like, message in WRONG:
        with pytest.raises(CheckpointError) as refused:
            load_checkpoint(path, like)
        assert str(refused.value) == (
            f"load_checkpoint: {path} belongs to another model: {message}. Resume with the model "
            "and optimizer it was saved with, or choose a new folder."
        )
    path = save_checkpoint(tmp_path, 8, [jnp.ones(2)])
    with pytest.raises(CheckpointError, match=r"model: 1 different leaves, the first: \[0\] must"):
        load_checkpoint(path, [jnp.ones(3)])


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
        f"load_checkpoint: {path} belongs to another run: {'; '.join(differences)}. Resume with "
        "the values it was saved with, or choose a new folder."
    )
    load_checkpoint(path, make_state(), run=json.loads(json.dumps(run)))


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Orbax leaves exceptions behind that nobody asked for.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("limit", [0, 100, 1000, 1600])  # the last is too small for the manifest
def test_write_that_the_disk_has_no_room_for_leaves_what_was_there(tmp_path, limit):
    save(tmp_path, 7)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        for step in (8, 7):
            with pytest.raises(OSError) as failed:
                save(tmp_path, step, seed=1)
            if limit == 0:
                path = tmp_path / f"step-0000000{step}"
                start = f"save_checkpoint: {path} could not be written: "
                assert str(failed.value).startswith(start)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = contents(tmp_path)  # a thread of Orbax may write a temporary file after its error
    assert {p: left[p] for p in left if ".jaxgru-" not in str(p)} == before
    save(tmp_path, 8, seed=1)
    names = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".jaxgru-")}
    assert names == {"step-00000007", "step-00000008"}
    gc.collect()  # they show here, and not in another test


def test_files_and_names_are_on_the_disk_before_the_checkpoint_counts(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, pathlib.Path.rename

    def flush(opened):
        number = opened if isinstance(opened, int) else opened.fileno()
        done.append(pathlib.Path(os.readlink(f"/proc/self/fd/{number}")))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(pathlib.Path, "rename", lambda a, b: (done.append((a, b)), rename(a, b))[1])
    path = save(tmp_path, 7)
    temporary = tmp_path / ".jaxgru-step-00000007.tmp"
    committed = done.index((temporary, path))
    files = {temporary / file.relative_to(path) for file in path.rglob("*")}
    flushed = set(done[:committed])
    assert {f for f in files if f.name != "manifest.json"} <= flushed  # that one has another name
    assert done[committed + 1 :] == [tmp_path]


def test_one_byte_dtypes_and_empty_arrays_come_back(tmp_path):
    state = {"x": jnp.arange(3).astype(jnp.float8_e4m3fn), "none": jnp.zeros((0, 3))}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, state), state)
    assert bits(loaded) == bits(state) and loaded["none"].shape == (0, 3)


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
    (tmp_path / ".jaxgru-step-00000009.tmp.orbax-checkpoint-tmp").mkdir()
    save(tmp_path, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000007", "step-00000008"]


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
        with pytest.raises(PermissionError, match="step-00000008 could not be written: "):
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
        f"fit: {tmp_path} is in use by the run of process {holder.pid}; wait until it ends or "
        "choose another folder."
    )
    holder.kill()  # the lock goes with it, whatever the file says
    holder.communicate()
    with locked(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    with locked(tmp_path / "new" / "folder"):
        pass


CURE = "use finite numbers, lists instead of tuples, and strings as keys."
CHANGED = [
    ({"a": {"sizes": (3, 4)}}, "['a']['sizes'] must be the same after it is saved as JSON, got "
     "(3, 4); "),
    ({"a": [(3,)]}, "['a'] must be the same after it is saved as JSON, got [(3,)]; "),
    ({1: "a"}, " must be the same after it is saved as JSON, got {1: 'a'}; "),
    ({"a": {1: "a", "1": "b"}}, "['a'] must be the same after it is saved as JSON, got {1: 'a', "
     "'1': 'b'}; "),
]  # fmt: skip


@pytest.mark.parametrize(("metadata", "message"), CHANGED)
def test_metadata_that_json_would_change_is_refused(tmp_path, metadata, message):
    path = save(tmp_path, 7)
    for name in ("run", "loop"):
        with pytest.raises(ValueError) as refused:
            save_checkpoint(tmp_path, 8, make_state(), **{name: metadata})
        assert str(refused.value) == f"save_checkpoint: {name}{message}{CURE}"
    with pytest.raises(ValueError) as refused:
        load_checkpoint(path, make_state(), run=metadata)
    assert str(refused.value) == f"load_checkpoint: run{message}{CURE}"
    assert steps(tmp_path) == [7]


NO_JSON = (
    "save_checkpoint: {} must be a JSON value, got {}; convert it to a Python number, string, list "
    "or dict (Object of type {} is not JSON serializable)."
)
ENABLE = "must have a dtype that JAX keeps, got"
BAD_ARGUMENTS = [
    ({"step": -1}, ValueError, "save_checkpoint: step must be at least 0, got -1."),
    ({"step": 1.0}, TypeError, "save_checkpoint: step must be an integer, got 1.0."),
    ({"step": np.True_}, TypeError, "save_checkpoint: step must be an integer, got True."),
    ({"best_step": -1}, ValueError, "save_checkpoint: best_step must be at least 0, got -1."),
    ({"run": {"a": [print]}}, TypeError, NO_JSON.format(
        "run['a']", "[<built-in function print>]", "builtin_function_or_method")),
    ({"loop": {"lr": np.float32(1)}}, TypeError,
     NO_JSON.format("loop['lr']", "np.float32(1.0)", "float32")),
    ({"run": {"rate": float("nan")}}, ValueError, "save_checkpoint: run['rate'] must be the same "
     f"after it is saved as JSON, got nan; {CURE}"),
    ({"run": "a"}, TypeError, "save_checkpoint: run must be a dict, got 'a'."),
    ({"loop": []}, TypeError, "save_checkpoint: loop must be a dict, got []."),
    ({"state": {"n": np.array(2**40 + 5)}}, TypeError,
     f"save_checkpoint: state['n'] {ENABLE} int64; cast it or enable x64."),
    ({"state": {"x": (np.array([1 / 3]),)}}, TypeError,
     f"save_checkpoint: state['x'][0] {ENABLE} float64; cast it or enable x64."),
    ({"state": {"x": np.array(["a"])}}, TypeError,
     f"save_checkpoint: state['x'] {ENABLE} <U1; cast it or enable x64."),
    ({"state": {"n": 3}}, TypeError,
     "save_checkpoint: state['n'] must be an array, got int; make one, e.g. with jnp.asarray."),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), BAD_ARGUMENTS)
def test_bad_argument_is_refused_and_writes_nothing(tmp_path, options, error, message):
    with pytest.raises(error) as refused:
        save_checkpoint(tmp_path, **{"step": 1, "state": make_state(), **options})
    assert str(refused.value) == message
    assert list(tmp_path.iterdir()) == []


def test_like_must_hold_arrays_that_jax_keeps(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"x": np.ones(2, np.float32)})
    assert load_checkpoint(path, {"x": np.zeros(2, np.float32)})["x"].tolist() == [1.0, 1.0]
    array = "an array, got ShapeDtypeStruct; make one, e.g. with jnp.asarray."
    for like, message in (
        (jax.ShapeDtypeStruct((2,), jnp.float32), f"must be {array}"),
        (np.zeros(2), f"{ENABLE} float64; cast it or enable x64."),
    ):
        with pytest.raises(TypeError) as refused:
            load_checkpoint(path, {"x": like})
        assert str(refused.value) == f"load_checkpoint: like['x'] {message}"
    with pytest.raises(TypeError) as refused:
        load_checkpoint(path, {"x": jnp.ones(2)}, run="a")
    assert str(refused.value) == "load_checkpoint: run must be a dict, got 'a'."


def test_wide_dtypes_come_back_where_they_are_enabled(tmp_path, x64):
    state = {"n": np.array(2**40 + 5), "x": np.array([1 / 3])}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, state), state)
    assert bits(loaded) == bits(state)


UNSUPPORTED = [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK]


def failing(number, ask=lambda *arguments: True, otherwise=None):
    """A function of the system that answers with an error, to the arguments that `ask` selects."""

    def fail(*arguments):
        if ask(*arguments):
            raise OSError(number, os.strerror(number))
        return otherwise(*arguments)

    return fail


@pytest.mark.parametrize("number", UNSUPPORTED)
def test_run_goes_on_where_the_file_system_has_no_locks(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.warns(UserWarning) as told, locked(tmp_path):
        pass
    assert [str(warning.message) for warning in told] == [
        f"fit: {tmp_path} could not be locked ([Errno {number}] {os.strerror(number)}): make sure "
        "that no other run uses it"
    ]


def test_run_goes_on_where_python_has_no_locks(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.warns(UserWarning, match="could not be locked .*fcntl"), locked(tmp_path):
        pass


def test_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass


def test_folders_that_cannot_be_flushed_are_left_to_the_system(tmp_path, monkeypatch):
    def is_folder(opened):
        return isinstance(opened, int) and stat.S_ISDIR(os.fstat(opened).st_mode)

    fsync = os.fsync
    for number in (errno.EINVAL, errno.EPERM):
        monkeypatch.setattr(os, "fsync", failing(number, is_folder, fsync))
        write_atomically(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"new"
        save(tmp_path / str(number), 7)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO, is_folder, fsync))
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "file", b"newer")
    assert (tmp_path / "file").read_bytes() == b"newer"  # only its name may not be on the disk
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))  # a file that cannot be flushed
    with pytest.raises(OSError, match="Invalid argument"):
        write_atomically(tmp_path / "file", b"newest")
    assert (tmp_path / "file").read_bytes() == b"newer"


def test_folders_are_not_opened_on_windows(tmp_path, monkeypatch):
    opened, open_ = [], os.open
    monkeypatch.setattr(os, "open", lambda *given, **more: opened.append(given) or open_(*given))
    flush_folder(tmp_path)
    assert opened == [(tmp_path, os.O_RDONLY)]
    monkeypatch.setattr(atomic_files, "os", types.SimpleNamespace(name="nt"))
    flush_folder(tmp_path)


def test_file_that_cannot_be_replaced_is_one_error(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(pathlib.Path, "replace", failing(errno.EEXIST))
    with pytest.raises(FileExistsError) as failed:
        write_atomically(path, b"new")
    message = f"write_atomically: {path} could not be replaced: File exists"
    assert str(failed.value) == f"[Errno {errno.EEXIST}] {message}"
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


def test_file_is_replaced_behind_a_link_and_keeps_its_mode(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "file", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert [p.name for p in target.parent.iterdir()] == ["file"]
    write_atomically(tmp_path / "other", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "other").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_disk_that_cannot_reserve_room_is_written_to_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    _require_room(tmp_path, [jnp.ones(3)])
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        _require_room(tmp_path, [jnp.ones(3)])


def test_choice_of_checkpoints_other_than_latest_and_best_is_refused(tmp_path):
    with pytest.raises(ValueError) as refused:
        find_checkpoint(tmp_path, "newest")
    assert str(refused.value) == (
        "find_checkpoint: which must be one of 'latest', 'best', got 'newest'."
    )


def test_missing_orbax_names_the_extra(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError) as missing:
        save(tmp_path, 2)
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
    for number, (written, like) in enumerate(((state, spread), (spread, state))):
        loaded = load_checkpoint(save_checkpoint(tmp_path / str(number), 1, written), like)
        assert bits(loaded) == bits(state)
        assert loaded["w"].sharding.is_equivalent_to(like["w"].sharding, 1)
        assert len(loaded["key"].sharding.device_set) == len(like["key"].sharding.device_set)
