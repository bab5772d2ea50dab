"""The character model: a run of seconds from end to end, and its messages for bad input."""

import hashlib
import json
import pathlib
import re
import shlex
import shutil
import types

import jax
import numpy as np
import pytest
from conftest import stop_and_resume
from saved_bits import saved_bits

from experiments import char_lm, data
from jaxgru import interop, training

pytestmark = pytest.mark.usefixtures("saved_programs")

TEXT = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    arguments = ["--smoke", "--text", "text.txt", "--out", "run", "--epochs", "10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert char_lm.main([*arguments, "--prompt", "the "]) == 0
    return folder / "run"


def test_run_learns_and_leaves_all_its_files(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "checkpoints", "config.json", "cross_check.txt", "loss.png", "metrics.jsonl", "samples.txt",
        "weights.safetensors",
    }  # fmt: skip
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    name = "validation_bits_per_character"
    scores = [record[name] for record in records if name in record]
    assert len(scores) > 3
    assert scores[-1] < 0.7 * scores[0]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "passed, all" in (run / "cross_check.txt").read_text()
    assert (run / "samples.txt").read_text().count("--- update") == len(scores)


def test_check_without_a_gradient_that_could_be_compared_is_reported(tmp_path, monkeypatch, capsys):
    rows = [types.SimpleNamespace(dtype="float64", reference="finite-difference", tolerance=1.0)]
    report = types.SimpleNamespace(rows=rows, passed=True)
    monkeypatch.setattr(char_lm.report.checks, "check_gradients", lambda *args, **options: report)
    assert char_lm.report.cross_check(None, tmp_path, None, None, None, None)
    shown = capsys.readouterr().out
    assert "finite differences  largest relative error 0.0e+00  (limit 1e-06; 1 gradients" in shown


def test_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, run, capsys):
    config = json.loads((run / "config.json").read_text())
    arguments = ["--smoke", "--text", config["text"], "--epochs", "10", "--prompt", "the "]
    arguments += ["--checkpoint-every", "7"]
    out = stop_and_resume(char_lm.main, arguments, tmp_path / "run", 37)
    assert (out / "checkpoints" / "step-00000175").exists()  # 7 times 25: after the stop, too
    shown = capsys.readouterr().err
    assert f"continue with: python -m experiments.char_lm --resume {out}" in shown
    assert shown.count("stopped by SIGTERM after update 37, saved in") == 1
    for name in ("samples.txt", "cross_check.txt"):
        assert (out / name).read_bytes() == (run / name).read_bytes(), name
    saved = [interop.load_weights(folder / "weights.safetensors") for folder in (out, run)]
    assert saved[0][1:] == saved[1][1:]  # the spec and the metadata
    for one, other in zip(*map(jax.tree.leaves, saved), strict=True):
        np.testing.assert_array_equal(one, other)
    logs = [training.read_json_lines(folder / "metrics.jsonl") for folder in (out, run)]
    for records in logs:
        for record in records:
            del record["seconds"], record["characters_per_second"]
    assert logs[0] == logs[1]
    last = max((run / "checkpoints").glob("step-*"))
    assert saved_bits(out / "checkpoints" / last.name) == saved_bits(last)


def test_run_of_a_relative_path_goes_on_in_any_folder_and_says_what_it_is(
    tmp_path, run, monkeypatch, capsys
):
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(char_lm.report, "cross_check", lambda *args: pytest.fail("checked again"))
    assert char_lm.main(["--resume", "run"]) == 0
    shown = capsys.readouterr().out
    text = str(run.parent / "text.txt")
    assert f"text:     {text}: 2,700 characters, 28 of them different; a tenth for valid" in shown
    sizes = [v.size for v in jax.tree.leaves(char_lm.load_run(run)[2])]
    assert f"GRU of 16 units, reset before the product; {sum(sizes):,} parameters" in shown
    assert f"results:  {tmp_path / 'run'}\n" in shown
    records = training.read_json_lines(run / "metrics.jsonl")
    name = "validation_bits_per_character"
    best = min((record for record in records if name in record), key=lambda record: record[name])
    wanted = f"{best[name]:.4f} at best (perplexity {2 ** best[name]:.3f}), after update "
    assert wanted + f"{best['update']}; {records[-1][name]:.4f} at the end" in shown
    assert "train with --spec pytorch" in " ".join(shown.split())
    (command,) = re.findall(r"sample: +python -m experiments.char_lm (.*)", shown)
    assert char_lm.main(shlex.split(command)) == 0
    assert capsys.readouterr().out.startswith("the ")


def test_check_before_training_can_be_skipped(tmp_path, run, monkeypatch, capsys):
    def stop(*args, **options):
        raise data.DataError("at the training")

    monkeypatch.setattr(char_lm.report, "cross_check", lambda *args: pytest.fail("checked"))
    monkeypatch.setattr(training, "fit", stop)
    text = str(run.parent / "text.txt")
    arguments = ["--smoke", "--text", text, "--skip-check", "--out", str(tmp_path / "run")]
    assert char_lm.main(arguments) == 2
    assert capsys.readouterr().err == "char_lm: at the training\n"


def test_run_is_resumed_only_as_what_it_is(tmp_path, run, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for arguments, message in (
        (["--resume", str(out), "--epochs", "10"], "leave out --epochs"),
        (["--resume", str(out), "--out", "x"], "leave out --out"),
        (["--resume", str(tmp_path / "none")], "--resume must be a run"),
        (["--resume", str(out), "--checkpoint-every", "-1"], "must be at least 0, got -1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            char_lm.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    text.write_text(TEXT.replace("quick", "quiet"))
    (out / "config.json").write_text(json.dumps({**config, "text": str(text)}))
    assert char_lm.main(["--resume", str(out)]) == 2
    shown = capsys.readouterr().err
    assert "belongs to another run: config.text must be" in shown and "text_sha256 must be" in shown
    for path, content in before.items():
        assert path.name in ("config.json", "lock") or path.read_bytes() == content, path


def test_saved_run_continues_a_prompt_the_same_way_each_time(run, capsys):
    texts = []
    for _ in range(2):
        arguments = ["--sample", str(run), "--prompt", "the quick", "--sample-size", "30"]
        assert char_lm.main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("the quick")
    assert len(texts[0].rstrip("\n")) == len("the quick") + 30


@pytest.mark.slow
def test_classic_preset_is_the_documented_setting(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 3)
    out = tmp_path / "run"
    arguments = ["--preset", "classic", "--passage", "60", "--epochs", "55", "--out", str(out)]
    assert char_lm.main([*arguments, "--text", str(tmp_path / "text.txt")]) == 0
    assert (out / "samples.txt").read_text().count("--- update") == 2  # at 25 and 50
    config = json.loads((out / "config.json").read_text())
    expected = {
        "spec": "chung", "embedding_size": 0, "hidden_size": 64, "optimizer": "sgd",
        "learning_rate": 0.01, "clip_value": 5.0, "clip_norm": 0.0, "reduction": "sum",
        "batch_size": 1, "num_steps": 59, "sample_size": 100, "num_updates": 55,
        "temperature": 1.0,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert char_lm.parse_args(["--preset", "classic"]).passage == 5000
    assert char_lm.parse_args(["--preset", "classic"]).epochs == 100
    assert "float64 against jax.grad" in capsys.readouterr().out


def bad_inputs(tmp_path, run):
    tmp_path = pathlib.Path(tmp_path)
    for name, content in {
        "empty": b"",
        "short": b"too short",
        "one": b"x",
        "latin": "caf\xe9".encode("latin-1"),
        "fine": TEXT.encode(),
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "keep").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    fine = ["--text", str(tmp_path / "fine"), "--smoke"]
    return {
        "missing file": (["--text", str(tmp_path / "none")], "cannot be read: No such file"),
        "folder as file": (["--text", str(tmp_path)], "cannot be read: Is a directory"),
        "empty file": (["--text", str(tmp_path / "empty")], "is empty"),
        "short file": (
            ["--text", str(tmp_path / "short")],
            "characters, but one batch of 32 x 128 needs 4097",
        ),
        "one character": (["--text", str(tmp_path / "one"), "--preset", "classic"], "has 1 char"),
        "default prompt asked for": ([*fine, "--prompt", "T"], "--prompt has characters outside"),
        "undecodable": (["--text", str(tmp_path / "latin")], "not UTF-8 text: byte 3"),
        "unknown prompt": ([*fine, "--prompt", "Ω"], "outside the vocabulary: 'Ω'"),
        "unwritable": ([*fine, "--out", str(tmp_path / "fine" / "run")], "Not a directory"),
        "used folder": ([*fine, "--out", str(tmp_path / "used")], "nothing was overwritten"),
        "no run": (["--sample", str(tmp_path / "none")], "is not a run folder of char_lm: it has"),
        "broken run": (["--sample", str(tmp_path / "broken")], "is not an intact run folder"),
        "unknown prompt of a run": (
            ["--sample", str(run), "--prompt", "Ω"],
            "outside the vocabulary: 'Ω'",
        ),
    }


def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, run, capsys):
    for name, (arguments, message) in bad_inputs(tmp_path, run).items():
        assert char_lm.main(arguments) == 2, name
        captured = capsys.readouterr().err
        assert captured.startswith("char_lm: "), name
        assert captured.count("\n") == 1, name
        assert message in captured, name
    assert (tmp_path / "used" / "keep").read_text() == "mine"
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["keep"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be finite and at least 1, got 0"),
        (["--hidden-size", "0"], "--hidden-size must be finite and at least 1"),
        (["--temperature", "-1"], "--temperature must be finite and at least 0"),
        (["--embedding-size", "-3"], "--embedding-size must be finite and at least 0, got -3"),
        (["--passage", "-5"], "--passage must be finite and at least 0, got -5"),
        (["--learning-rate", "nan"], "--learning-rate must be finite and at least 0, got nan"),
        (["--evaluate-every", "-1"], "--evaluate-every must be finite and at least 0"),
        (["--prompt", ""], "--prompt must not be empty"),
        (["--corpus", "war-and-peace"], "invalid choice"),
    ],
)
def test_bad_option_exits_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        char_lm.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_run_that_diverges_keeps_its_last_good_weights(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "run"
    arguments = ["--smoke", "--text", str(tmp_path / "text.txt"), "--out", str(out)]
    arguments += ["--optimizer", "sgd", "--learning-rate", "1e38", "--clip-norm", "0"]
    assert char_lm.main([*arguments, "--epochs", "10"]) == 1
    assert "not finite in the last" in capsys.readouterr().err
    assert (out / "weights.safetensors").exists()
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def test_run_folder_of_another_vocabulary_is_refused(tmp_path, run, capsys):
    for path in filter(pathlib.Path.is_file, run.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((run / "config.json").read_text())
    config["vocabulary"] = config["vocabulary"][1:] + "é"  # all shapes are the same
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert char_lm.main(["--sample", str(tmp_path), "--prompt", "the"]) == 2
    assert "weights have another vocabulary" in capsys.readouterr().err


def test_run_folder_of_another_model_is_refused(tmp_path, run, capsys):
    for path in filter(pathlib.Path.is_file, run.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 5}))
    assert char_lm.main(["--sample", str(tmp_path), "--prompt", "the"]) == 2
    assert "weights belong to another model than config.json" in capsys.readouterr().err


def test_streams_go_on_from_batch_to_batch_and_targets_are_next_tokens():
    tokens = np.arange(100)
    inputs, targets = data.streams(tokens, 3, 8)
    assert inputs.shape == (4, 8, 3)
    for stream in range(3):
        row = inputs[:, :, stream].ravel()
        np.testing.assert_array_equal(row, stream * 32 + np.arange(32))
        np.testing.assert_array_equal(targets[:, :, stream].ravel(), row + 1)


def test_state_starts_at_zero_once_an_epoch_or_once_for_all():
    inputs, targets = data.streams(np.arange(100), 3, 8)
    starts = [bool(start) for *_, start in data.epochs(inputs, targets, 2)]
    assert starts == [True, False, False, False] * 2
    starts = [bool(start) for *_, start in data.epochs(inputs, targets, 2, restart=False)]
    assert starts == [True] + [False] * 7


def test_text_survives_encoding():
    vocabulary = "".join(sorted(set(TEXT)))
    assert data.decode(data.encode(TEXT, vocabulary), vocabulary) == TEXT


def test_download_keeps_nothing_that_has_a_wrong_checksum(tmp_path):
    (tmp_path / "source").write_text("content")
    url = (tmp_path / "source").as_uri()
    target = tmp_path / "cache" / "file"
    with pytest.raises(data.DataError, match="wrong checksum; nothing was saved"):
        data.download(url, "0" * 64, target)
    assert not target.exists()
    right = hashlib.sha256(b"content").hexdigest()
    assert data.download(url, right, target).read_text() == "content"
    target.write_text("tampered")
    with pytest.raises(data.DataError, match="wrong checksum; remove it"):
        data.download(url, right, target)


def test_download_without_a_network_says_what_to_do(tmp_path):
    url = (tmp_path / "nothing-here").as_uri()
    with pytest.raises(data.DataError, match="when offline, pass a file with --text"):
        data.download(url, "0" * 64, tmp_path / "file")


def test_default_corpus_is_prose_that_comes_with_python():
    text = data.load_corpus("pydoc")
    assert len(text) > 300_000
    assert text.count(" the ") > 3000
