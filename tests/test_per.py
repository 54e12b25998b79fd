"""eval.py on the decoder: greedy CTC, edit counts and error rates against plain programmes and hand cases;
evaluation and comparison of checkpoints on a corpus in memory."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DAYS, oracle_tensors, refusal

import data
import eval as evaluation
from data import PHONEMES, speech_rules
from models import GRUDecoder, save_checkpoint

CPU = torch.device("cpu")
SIZES = {"channels": 4, "days": 3, "hidden": 6, "layers": 1, "kernel": 6, "stride": 2, "smooth_taps": 5}


def spelled(path: list[int]) -> np.ndarray:
    """Logits (1, F, 41) whose best class follows the path."""
    return np.eye(41, dtype=np.float32)[path][None]


def test_greedy_by_hand():
    """A blank parts equal neighbours, and is dropped only then; the second trial has three frames."""
    logits = np.concatenate(
        [spelled([1, 1, 0, 1, 2, 2, 0]), spelled([3, 4, 4, 9, 9, 9, 9]), spelled([0] * 7)]
    )
    expected = [[1, 1, 2], [3, 4], []]
    assert evaluation.ctc_greedy(logits, np.array([7, 3, 5])) == expected
    assert evaluation.ctc_greedy(torch.tensor(logits), torch.tensor([7, 3, 5])) == expected


def test_greedy_equals_the_original():
    oracle = oracle_tensors("gru_decoder.npz")
    assert evaluation.ctc_greedy(oracle["decode/logits"][None], [60]) == [oracle["decode/greedy"].tolist()]
    for trial in [f"{kind}/trial{i}/" for kind in ("bi", "uni") for i in range(3)]:
        for count in ("exact", "original"):
            frames = oracle[f"{trial}n_frames_{count}"].reshape(1)
            greedy = oracle[f"{trial}greedy_{count}"].tolist()
            assert evaluation.ctc_greedy(oracle[f"{trial}logits"], frames) == [greedy]


def distance(a: list, b: list) -> int:
    """Levenshtein by the plain dynamic programme."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def test_edit_counts_are_minimal():
    assert evaluation.edit_counts([1, 2, 3, 4], (2, 3, 9)) == (1, 1, 0)
    assert evaluation.edit_counts(np.array([1, 2]), []) == (0, 2, 0)
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = (rng.integers(1, rng.integers(3, 42), rng.integers(0, 30)).tolist() for _ in range(2))
        sub, dele, ins = evaluation.edit_counts(a, b)
        assert sub + dele + ins == distance(a, b)
        assert ins - dele == len(b) - len(a)


def test_error_rate_is_a_micro_average():
    counts = evaluation.per_counts([[1], [1, 2, 3, 4, 5, 6, 7, 8, 9]], [[2], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert counts.tolist() == [[1, 0, 0, 1], [0, 0, 0, 9]]
    assert evaluation.error_rate(counts) == 0.1
    assert np.isnan(evaluation.error_rate(evaluation.per_counts([[]], [[1]])))
    assert np.isnan(evaluation.trial_bootstrap(counts[:1])).all()


def test_scores_by_day_and_without_silence():
    refs, hyps = [[1, 2, 40], [3, 40], [4, 5, 6, 40]], [[1, 40], [3, 7], [4, 5, 6, 40, 8]]
    scores = evaluation.decoder_scores(refs, hyps, [0, 2, 2], ["mon", "tue", "wed"])
    days = scores.pop("by_day")
    without = scores.pop("per_without_sil")  # [1,2]>[1], [3]>[3,7], [4,5,6]>[4,5,6,8]
    assert scores == {"per": 3 / 9, "sub": 1, "del": 1, "ins": 1, "labels": 9, "trials": 3}
    assert without == 3 / 6
    assert list(days) == ["mon", "wed"]
    assert days["wed"] == {"per": 2 / 6, "sub": 1, "del": 0, "ins": 1, "labels": 6, "trials": 2}


def checkpoint(path: Path, seed: int = 7, sizes: dict | None = None, **changed) -> str:
    torch.manual_seed(seed)
    model = GRUDecoder(**{**SIZES, **(sizes or {})})
    torch.nn.init.normal_(model.fc_decoder_out.weight)  # random decisions instead of one class throughout
    about = {"days": DAYS, "channels": 4, "phonemes": list(PHONEMES), "rules": speech_rules()}
    about |= {"valid": "blocks", "synthetic": True, **changed}
    kept = {"task": "decoder", "model_args": model.model_args, "model": model.state_dict()}
    save_checkpoint(path, kept | {"args": {"seed": seed}, "data": about})
    return str(path)


def alone(path: str, speech, trial: int, day: int | None = None) -> np.ndarray:
    """Log-probabilities of one trial that never shared a batch."""
    model, _ = evaluation.load_checkpoint(path)
    x = torch.tensor(speech.features[speech.offsets[trial] : speech.offsets[trial + 1]])[None]
    days = torch.tensor([speech.day[trial] if day is None else day])
    with torch.no_grad():
        logits, frames = model(x, torch.tensor([x.shape[1]]), days)
    return logits.log_softmax(-1)[0, : int(frames)].numpy()


def errors_of(speech, trial: int, log_probs: np.ndarray) -> int:
    return distance(
        speech.labels[trial].tolist(), evaluation.ctc_greedy(log_probs[None], [len(log_probs)])[0]
    )


def run(*argv: str) -> dict:
    return evaluation.main([*argv, "--device", "cpu"])


def test_validation_part_is_scored(speech, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt")
    figures = run("--ckpt", path)
    trials = data.speech_parts(speech, "blocks")["valid"]
    errors = sum(errors_of(speech, i, alone(path, speech, i)) for i in trials)
    assert 0 < len(trials) < 24
    assert figures["per"] == pytest.approx(errors / (6 * len(trials)))
    assert figures["sub"] + figures["del"] + figures["ins"] == errors
    assert list(figures["by_day"]) == DAYS[:1]  # a tenth of 24 trials: a block of one day
    assert figures["interval"][0] <= figures["per"] <= figures["interval"][1]
    said = capsys.readouterr().out
    assert "SYNTHETIC" in said
    assert f"PER {figures['per']:.4f} 95 %" in said
    assert figures["too_short"] == (2 in trials)
    assert f"{figures['too_short']} trials are too short" in said


def test_test_part_that_chose_the_checkpoint(speech, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt", valid="test")
    figures = run("--ckpt", path, "--part", "test")
    assert (figures["trials"], figures["labels"]) == (3, 18)
    assert "its score there is no result" in capsys.readouterr().out
    assert run("--ckpt", path, "--part", "valid")["per"] == figures["per"]


def test_checkpoints_average_their_probabilities(speech, tmp_path, capsys):
    paths = [checkpoint(tmp_path / "a.pt", 7), checkpoint(tmp_path / "b.pt", 8, days=DAYS[::-1])]
    errors = 0
    for i in (8, 18, 28):
        each = [alone(paths[0], speech, i), alone(paths[1], speech, i, 2 - speech.day[i])]
        errors += errors_of(speech, i, np.log(np.exp(np.float64(each)).mean(0)))
    assert run("--ckpt", *paths, "--part", "test")["per"] == pytest.approx(errors / 18)
    assert "seeds [7, 8]" in capsys.readouterr().out


def test_unknown_days_need_a_rule(speech, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt", sizes={"days": 2}, days=DAYS[:2])
    assert DAYS[2] in refusal(["--ckpt", path, "--part", "test"], capsys)
    for rule, layer, said in (("nearest", 1, "'t12.2022.05.03'"), ("mean", -1, "'mean'")):
        figures = run("--ckpt", path, "--part", "test", "--day", rule)
        errors = errors_of(speech, 28, alone(path, speech, 28, layer))
        assert figures["by_day"][DAYS[2]]["per"] == pytest.approx(errors / 6)
        assert said in capsys.readouterr().out
    speech.part[28] = "train"  # a day of no trial asked for needs no layer
    assert run("--ckpt", path, "--part", "test")["trials"] == 2


def test_saved_results(speech, tmp_path):
    path = checkpoint(tmp_path / "a.pt")
    figures = run("--ckpt", path, "--save-results", "tiny", "--results-dir", "out", "--csv", "t.csv")
    saved = json.loads((tmp_path / "out/decoder_tiny_valid.json").read_text())
    assert {"command", "git_sha", "git_dirty", "hardware", "date", "metrics"} <= saved.keys()
    about = [saved[key] for key in ("task", "part", "synthetic", "seeds", "valid")]
    assert about == ["decoder", "valid", True, [7], "blocks"]
    assert saved["metrics"]["per"] == pytest.approx(figures["per"], abs=1e-6)
    assert saved["metrics"]["interval"] == pytest.approx(figures["interval"], abs=1e-6)
    with open("out/decoder_tiny_valid.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    spelt = [[row[side].split() for row in rows] for side in ("reference", "hypothesis")]
    counts = evaluation.per_counts(*spelt)
    assert evaluation.error_rate(counts) == pytest.approx(figures["per"])
    assert [[int(row[key]) for key in ("sub", "del", "ins", "labels")] for row in rows] == counts.tolist()
    assert (rows[0]["trial"] in speech.ids, rows[0]["day"]) == (True, DAYS[0])
    assert Path("t.csv").read_text() == Path("out/decoder_tiny_valid.csv").read_text()


@pytest.fixture
def asked(monkeypatch) -> list:
    """What `words` was called with, instead of a search."""
    calls: list = []
    found = lambda trials: {"wer": 0.5, "sentences": dict.fromkeys(trials, ["the", "voice"])}  # noqa: E731
    monkeypatch.setattr(evaluation, "words", lambda *args: calls.append(args) or found(args[2]))
    return calls


def test_words_get_the_part_and_what_to_tune_on(speech, asked, tmp_path):
    path = checkpoint(tmp_path / "a.pt")
    parts = data.speech_parts(speech, "blocks")
    assert "words" not in run("--ckpt", path)
    assert run("--ckpt", path, "--part", "test", "--tune", "--beam", "9")["words"] == {"wer": 0.5}
    log_probs, given, trials, args, valid, train = asked[0]
    assert given is speech
    assert args.beam == 9
    assert (trials.tolist(), train.tolist()) == (parts["test"].tolist(), parts["train"].tolist())
    assert valid.tolist() == parts["valid"].tolist()
    assert log_probs.keys() == {*trials, *valid}
    for i, row in log_probs.items():
        assert row == pytest.approx(alone(path, speech, i), abs=1e-5)
    run("--ckpt", path, "--tune")  # tuned on the part itself
    assert asked[1][0].keys() == set(asked[1][4])


def test_a_submission_needs_no_labels(speech, asked, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt")
    argv = ["--ckpt", path, "--part", "competition", "--submission", "s.txt"]
    assert run(*argv) == {"words": {"wer": 0.5}}
    assert asked[0][2].tolist() == [9, 19, 29]
    assert "PER" not in capsys.readouterr().out
    speech.labelled[18] = False
    figures = run(
        "--ckpt", path, "--part", "test", "--submission", "s.txt", "--logits", "out", "--csv", "w.csv"
    )
    assert figures["trials"] == 2
    assert asked[1][2].tolist() == [8, 18, 28]
    row = np.load(f"out/{speech.ids[18]}.npy")  # unlabelled ones too
    assert (row.dtype, row.shape[1]) == (np.float16, 41)
    assert row == pytest.approx(alone(path, speech, 18), abs=0.01)
    assert evaluation.read_predictions("w.csv")[speech.ids[8]][2:] == (["the", "voice"],) * 2


def test_bad_command_lines_are_refused(speech, tmp_path, capsys):
    path, real = checkpoint(tmp_path / "a.pt"), checkpoint(tmp_path / "b.pt", synthetic=False)
    bare = str(tmp_path / "c.pt")
    save_checkpoint(bare, {**torch.load(path, weights_only=True), "data": {"days": DAYS}})
    assert real in refusal(["--ckpt", real], capsys)
    other = checkpoint(tmp_path / "other.pt", valid="test")
    assert f"{other}: valid is " in refusal(["--ckpt", path, other], capsys)
    assert bare in refusal(["--ckpt", bare], capsys)
    assert "--part competition" in refusal(["--ckpt", path, "--part", "competition"], capsys)
    speech.channels = 5
    assert "memory: 5 channels" in refusal(["--ckpt", path], capsys)


def transcripts_file(path: Path, hypotheses: list, references: list | None = None) -> str:
    lines = ["trial,day,reference,hypothesis,sub,del,ins,labels"]
    for i, hyp in enumerate(hypotheses):
        ref = references[i] if references else [1, 2, 3, 4]
        lines.append(f"t{i},{DAYS[i % 2]},{evaluation.spell(ref)},{evaluation.spell(hyp)},0,0,0,0")
    path.write_text("\n".join([*lines, ""]))
    return str(path)


def test_decoders_are_compared_by_trial(tmp_path, capsys):
    """Against a plain loop over draws of trials; B is worse wherever the two differ."""
    rng = np.random.default_rng(0)
    errors = [rng.random(20) < share for share in (0.2, 0.6)]
    errors[1] |= errors[0]
    paths = []
    for side, wrong in zip("ab", errors, strict=True):
        hypotheses = [[1, 2, 3, 9 if w else 4] for w in wrong]
        paths.append(transcripts_file(tmp_path / f"{side}.csv", hypotheses))
    result = evaluation.main(["compare", "--a", paths[0], "--b", paths[1], "--draws", "400"])
    values = []
    for drawn in np.random.default_rng(7).integers(20, size=(400, 20)):
        values.append(sum(int(errors[0][i]) - int(errors[1][i]) for i in drawn) / 80)
    assert result["difference"] == pytest.approx((errors[0].sum() - errors[1].sum()) / 80)
    assert result["interval"] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=1e-12)
    assert result["p"] == pytest.approx(2 / 401)
    assert (result["items"], result["a"]) == (20, errors[0].sum() / 80)
    said = capsys.readouterr().out
    assert result["verdict"] == said.splitlines()[-1]
    assert "real data" not in said  # a CSV alone does not tell
    assert result["verdict"].startswith(f"A is better than B: phoneme error rate {result['difference']:.4f}")
    swapped = evaluation.main(["compare", "--a", paths[1], "--b", paths[0], "--draws", "100"])
    assert "A is worse than B" in swapped["verdict"]
    for side, said in (("a", "the boat"), ("b", "a boat")):
        rows = [f"t{i},d,AA,AA,the boat,{said}" for i in range(8)]
        head = "trial,day,reference,hypothesis,words_reference,words_hypothesis"
        (tmp_path / f"w{side}.csv").write_text("\ufeff" + "\n".join([head, *rows]))  # as a spreadsheet saves
    argv = ["compare", "--a", str(tmp_path / "wa.csv"), "--b", str(tmp_path / "wb.csv"), "--draws", "100"]
    result = evaluation.main(argv)
    assert (result["difference"], result["words"]["a"], result["words"]["b"]) == (0, 0, 0.5)


@pytest.mark.parametrize("b", ["one.csv", "other.csv", "a.csv a.csv", "symbol.csv", "short.csv"])
def test_decoder_comparisons_that_mean_nothing_are_refused(tmp_path, capsys, monkeypatch, b):
    monkeypatch.chdir(tmp_path)
    transcripts_file(tmp_path / "a.csv", [[1, 2], [3]])
    transcripts_file(tmp_path / "one.csv", [[1, 2]])
    transcripts_file(tmp_path / "other.csv", [[1, 2], [3]], [[1, 2, 3, 4], [1]])
    Path("symbol.csv").write_text("trial,day,reference,hypothesis\nx,y,AA,AA\nz,y,QQ,AA\n")
    Path("short.csv").write_text("trial,day,reference,hypothesis\nx\n")
    assert b.split()[0] in refusal(["compare", "--a", "a.csv", "--b", *b.split()], capsys)
