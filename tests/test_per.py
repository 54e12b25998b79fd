"""eval.py on the decoder: greedy CTC, edit counts and error rates against plain programmes and hand cases; evaluation of checkpoints
on a corpus in memory."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
from data import PHONEMES, DataError, SpeechCorpus, speech_rules
from models import GRUDecoder, save_checkpoint

ORACLE = Path(__file__).parents[2] / "shared" / "reference" / "gru_decoder.npz"
SIZES = {"channels": 4, "days": 3, "hidden": 6, "layers": 1, "kernel": 6, "stride": 2, "smooth_taps": 5}
DAYS = ["t12.2022.05.01", "t12.2022.05.03", "t12.2022.06.01"]


# --- greedy CTC ------------------------------------------------------------------------------------------------------


def spelled(path: list[int]) -> np.ndarray:
    """Logits (1, F, 41) whose best class follows the path."""
    return np.eye(41, dtype=np.float32)[path][None]


@pytest.mark.parametrize(("path", "frames", "expected"), [
    ([1, 1, 0, 1, 2, 2, 0], 7, [1, 1, 2]),  # a blank parts equal neighbours, and is dropped only then
    ([0, 0, 0], 3, []), ([5, 5, 5], 3, [5]), ([0, 40, 40, 0], 4, [40]), ([3, 4, 4, 9], 3, [3, 4]), ([3, 4], 0, []),
])  # fmt: skip
def test_greedy_by_hand(path, frames, expected):
    assert evaluation.ctc_greedy(spelled(path), np.array([frames])) == [expected]
    assert evaluation.ctc_greedy(torch.tensor(spelled(path)), torch.tensor([frames])) == [expected]


def test_greedy_of_a_batch_reads_no_padding():
    logits = np.concatenate([spelled([1, 2, 0, 3]), spelled([0, 7, 7, 7])])
    assert evaluation.ctc_greedy(logits, [2, 4]) == [[1, 2], [7]]
    assert evaluation.ctc_greedy(np.zeros((2, 0, 41), np.float32), [0, 0]) == [[], []]


@pytest.mark.skipif(not ORACLE.is_file(), reason="reference numbers absent")
def test_greedy_equals_the_original():
    oracle = np.load(ORACLE)
    assert evaluation.ctc_greedy(oracle["decode/logits"][None], [60]) == [oracle["decode/greedy"].tolist()]
    for kind in ("bi", "uni"):
        for i in range(3):
            trial = f"{kind}/trial{i}/"
            for count in ("exact", "original"):
                frames = oracle[f"{trial}n_frames_{count}"].reshape(1)
                assert evaluation.ctc_greedy(oracle[f"{trial}logits"], frames) == [
                    oracle[f"{trial}greedy_{count}"].tolist()
                ]


# --- edit counts -----------------------------------------------------------------------------------------------------


def distance(a: list, b: list) -> int:
    """Levenshtein by the plain dynamic programme."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@pytest.mark.parametrize(("reference", "hypothesis", "expected"), [
    ([], [], (0, 0, 0)), ([], [1, 2], (0, 0, 2)), ([1, 2], [], (0, 2, 0)), ([1, 2, 3], [1, 2, 3], (0, 0, 0)),
    ([1, 2, 3], [1, 9, 3], (1, 0, 0)), ([1, 2, 3], [1, 3], (0, 1, 0)), ([1, 3], [1, 2, 3], (0, 0, 1)), ([1, 2, 3, 4], [2, 3, 9], (1, 1, 0)),
])  # fmt: skip
def test_edit_counts_by_hand(reference, hypothesis, expected):
    assert evaluation.edit_counts(reference, hypothesis) == expected
    assert evaluation.edit_counts(np.array(reference, np.int64), tuple(hypothesis)) == expected


def test_edit_counts_are_minimal():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = (rng.integers(1, rng.integers(3, 42), rng.integers(0, 30)).tolist() for _ in range(2))
        sub, dele, ins = evaluation.edit_counts(a, b)
        assert sub + dele + ins == distance(a, b)
        assert ins - dele == len(b) - len(a)
        assert min(sub, dele, ins) >= 0
        assert sub + dele <= len(a)


def test_error_rate_is_a_micro_average():
    counts = evaluation.per_counts([[1], [1, 2, 3, 4, 5, 6, 7, 8, 9]], [[2], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert counts.tolist() == [[1, 0, 0, 1], [0, 0, 0, 9]]
    assert evaluation.error_rate(counts) == 0.1
    assert evaluation.error_rate(evaluation.per_counts([[1]], [[2, 3, 4]])) == 3.0
    assert np.isnan(evaluation.error_rate(evaluation.per_counts([[]], [[1]])))
    assert np.isnan(evaluation.error_rate(evaluation.per_counts([], [])))
    with pytest.raises(ValueError, match="zip"):
        evaluation.per_counts([[1]], [])


def test_bootstrap_equals_a_plain_loop():
    rng = np.random.default_rng(1)
    counts = np.column_stack([rng.integers(0, 5, (25, 3)), rng.integers(1, 40, 25)])
    draws, rates = np.random.default_rng(7), []
    for drawn in draws.integers(25, size=(1000, 25)):
        rates.append(sum(sum(counts[i][:3]) for i in drawn) / sum(counts[i][3] for i in drawn))
    low, high = evaluation.trial_bootstrap(counts)
    assert (low, high) == pytest.approx(tuple(np.percentile(rates, [2.5, 97.5])), abs=1e-12)
    assert low < evaluation.error_rate(counts) < high
    assert np.isnan(evaluation.trial_bootstrap(counts[:1])).all()
    assert np.isnan(evaluation.trial_bootstrap(np.zeros((4, 4), int))).all()
    assert evaluation.trial_bootstrap(np.array([[1, 0, 0, 4]] * 9)) == (0.25, 0.25)


def test_scores_by_day_and_without_silence():
    refs, hyps = [[1, 2, 40], [3, 40], [4, 5, 6, 40]], [[1, 40], [3, 7], [4, 5, 6, 40, 8]]
    scores = evaluation.decoder_scores(refs, hyps, [0, 2, 2], ["mon", "tue", "wed"])
    assert {key: scores[key] for key in ("sub", "del", "ins", "labels", "trials")} == {
        "sub": 1,
        "del": 1,
        "ins": 1,
        "labels": 9,
        "trials": 3,
    }
    assert scores["per"] == pytest.approx(3 / 9)
    assert scores["per_without_sil"] == pytest.approx(3 / 6)  # [1,2]>[1], [3]>[3,7], [4,5,6]>[4,5,6,8]
    assert list(scores["by_day"]) == ["mon", "wed"]
    assert scores["by_day"]["wed"] == {
        "per": pytest.approx(2 / 6),
        "sub": 1,
        "del": 0,
        "ins": 1,
        "labels": 6,
        "trials": 2,
    }
    assert evaluation.substitutions(refs, hyps) == [["SIL", "B", 1]]


# --- a small corpus --------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(monkeypatch, tmp_path):
    """Three days of two blocks of four trials; one more trial a day in test and competition. Trial 2 is shorter than a window."""
    rng = np.random.default_rng(3)
    rows = [
        (day, block, part)
        for day in range(3)
        for block, part in [(1, "train")] * 4 + [(2, "train")] * 4 + [(3, "test"), (4, "competition")]
    ]
    lengths = rng.integers(40, 90, len(rows))
    lengths[2] = 5
    labels = [
        np.zeros(0, np.int64) if part == "competition" else rng.integers(1, 41, 6) for _, _, part in rows
    ]
    made = SpeechCorpus(
        features=rng.standard_normal((lengths.sum(), 4), np.float32), offsets=np.append(0, lengths.cumsum()),
        day=np.array([d for d, _, _ in rows]), block=np.array([b for _, b, _ in rows]), part=np.array([p for _, _, p in rows]), labels=labels,
        text=["the voice"] * len(rows), ids=[f"trial{i:02d}" for i in range(len(rows))], days=list(DAYS), channels=4, root=Path("memory"),
        synthetic=True, left_out=[], labelled=np.array([len(row) > 0 for row in labels]))  # fmt: skip
    monkeypatch.setattr(evaluation, "open_speech", lambda *a, **k: made)
    monkeypatch.setattr(evaluation, "synthetic_speech", lambda cache: "synthetic")
    monkeypatch.chdir(tmp_path)
    return made


def checkpoint(path: Path, seed: int = 7, sizes: dict | None = None, **changed) -> str:
    torch.manual_seed(seed)
    model = GRUDecoder(**{**SIZES, **(sizes or {})})
    torch.nn.init.normal_(model.fc_decoder_out.weight)  # random decisions instead of one class throughout
    about = {
        "days": DAYS,
        "channels": 4,
        "phonemes": list(PHONEMES),
        "rules": speech_rules(),
        "valid": "blocks",
        "synthetic": True,
        **changed,
    }
    rest = dict.fromkeys(("optimizer", "scheduler", "scaler", "ema", "rng", "git_sha", "best", "skipped"))
    save_checkpoint(
        path,
        {
            "task": "decoder",
            "model_args": model.model_args,
            "model": model.state_dict(),
            **rest,
            "step": 3,
            "epoch": 1,
            "args": {"seed": seed},
            "data": about,
        },
    )
    return str(path)


def alone(path: str, corpus, trial: int, day: int | None = None) -> np.ndarray:
    """Log-probabilities of one trial that never shared a batch."""
    model, _ = evaluation.load_checkpoint(path)
    x = torch.tensor(corpus.features[corpus.offsets[trial] : corpus.offsets[trial + 1]])[None]
    with torch.no_grad():
        logits, frames = model(
            x, torch.tensor([x.shape[1]]), torch.tensor([corpus.day[trial] if day is None else day])
        )
    return logits.log_softmax(-1)[0, : int(frames)].numpy()


CPU = torch.device("cpu")


def test_logits_come_in_the_order_given(corpus, tmp_path):
    path = checkpoint(tmp_path / "a.pt")
    model, _ = evaluation.load_checkpoint(path)
    trials = np.array([9, 2, 0, 17, 5])
    result = evaluation.speech_logits(model.train(), corpus, trials, np.arange(3), CPU, batch=2)
    assert model.training
    assert [row.shape for row in result] == [
        ((corpus.lengths[i] - 6) // 2 + 1 if i != 2 else 0, 41) for i in trials
    ]
    for row, i in zip(result, trials, strict=True):
        assert row.dtype == np.float32
        assert row == pytest.approx(alone(path, corpus, i), abs=1e-5)
    assert [row.shape for row in evaluation.speech_logits(model, corpus, [2], np.arange(3), CPU)] == [(0, 41)]
    assert evaluation.speech_logits(model, corpus, [], np.arange(3), CPU) == []


def test_validation_part_is_scored(corpus, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt")
    figures = evaluation.main(["--ckpt", path, "--device", "cpu", "--batch", "3"])
    trials = data.speech_parts(corpus, "blocks")["valid"]
    hyps = [
        evaluation.ctc_greedy(alone(path, corpus, i)[None], [len(alone(path, corpus, i))])[0] for i in trials
    ]
    errors = sum(distance(corpus.labels[i].tolist(), hyp) for i, hyp in zip(trials, hyps, strict=True))
    assert 0 < len(trials) < 24
    assert figures["per"] == pytest.approx(errors / (6 * len(trials)))
    assert figures["sub"] + figures["del"] + figures["ins"] == errors
    assert list(figures["by_day"]) == DAYS
    assert figures["interval"][0] <= figures["per"] <= figures["interval"][1]
    said = capsys.readouterr().out
    assert "SYNTHETIC" in said
    assert f"PER {figures['per']:.4f} 95 %" in said
    assert said.count("  reference  ") == 5


def test_test_part_and_short_trials(corpus, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt", valid="test")
    corpus.labels[8] = np.array([1, 1, 1] * 20)
    figures = evaluation.main(["--ckpt", path, "--part", "test", "--device", "cpu"])
    assert (figures["trials"], figures["labels"], figures["too_short"]) == (3, 72, 1)
    said = capsys.readouterr().out
    assert "its score there is no result" in said
    assert "1 trials have fewer frames" in said
    assert evaluation.main(["--ckpt", path, "--part", "valid", "--device", "cpu"])["per"] == figures["per"]


def test_checkpoints_average_their_probabilities(corpus, tmp_path, capsys):
    paths = [checkpoint(tmp_path / "a.pt", 7), checkpoint(tmp_path / "b.pt", 8, days=DAYS[::-1])]
    figures = evaluation.main(["--ckpt", *paths, "--part", "test", "--device", "cpu"])
    hyps = []
    for i in (8, 18, 28):
        each = [
            np.exp(alone(paths[0], corpus, i).astype(np.float64)),
            np.exp(alone(paths[1], corpus, i, 2 - corpus.day[i]).astype(np.float64)),
        ]
        hyps.append(evaluation.ctc_greedy(np.log(sum(each) / 2)[None], [len(each[0])])[0])
    errors = sum(distance(corpus.labels[i].tolist(), hyp) for i, hyp in zip((8, 18, 28), hyps, strict=True))
    assert figures["per"] == pytest.approx(errors / 18)
    assert "2 checkpoints, probabilities averaged, seeds [7, 8]" in capsys.readouterr().out


def test_mean_logits_are_log_probabilities(corpus, tmp_path):
    loaded = evaluation._load_models([checkpoint(tmp_path / f"{seed}.pt", seed) for seed in (1, 2, 3)])
    args = evaluation.argparse.Namespace(day=None, device=CPU, batch=4)
    for row in evaluation.mean_logits(loaded, corpus, np.array([0, 2, 8]), args):
        assert np.exp(row.astype(np.float64)).sum(-1) == pytest.approx(np.ones(len(row)), abs=1e-5)
        assert row.dtype == np.float32


def test_unknown_days_need_a_rule(corpus, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt", sizes={"days": 2}, days=DAYS[:2])
    assert "t12.2022.06.01: unknown to the model" in refusal(["--ckpt", path, "--part", "test"], capsys)
    for rule, layer in (("nearest", 1), ("mean", -1)):
        figures = evaluation.main(["--ckpt", path, "--part", "test", "--device", "cpu", "--day", rule])
        log_probs = alone(path, corpus, 28, layer)
        errors = distance(
            corpus.labels[28].tolist(), evaluation.ctc_greedy(log_probs[None], [len(log_probs)])[0]
        )
        assert figures["by_day"][DAYS[2]]["per"] == pytest.approx(errors / 6)
        said = {"nearest": "day layer of t12.2022.05.03", "mean": "the mean of all day layers"}[rule]
        assert f"session t12.2022.06.01: unknown to {path}; {said}" in capsys.readouterr().out
    corpus.part[28] = "train"  # a day of no trial asked for needs no layer
    assert evaluation.main(["--ckpt", path, "--part", "test", "--device", "cpu"])["trials"] == 2


def test_saved_results(corpus, tmp_path):
    path = checkpoint(tmp_path / "a.pt")
    figures = evaluation.main(
        [
            "--ckpt",
            path,
            "--save-results",
            "tiny",
            "--results-dir",
            "out",
            "--device",
            "cpu",
            "--csv",
            "t.csv",
        ]
    )
    saved = json.loads((tmp_path / "out/decoder_tiny_valid.json").read_text())
    assert {"command", "git_sha", "git_dirty", "hardware", "date", "checkpoints", "metrics"} <= saved.keys()
    assert (saved["task"], saved["part"], saved["synthetic"], saved["seeds"]) == (
        "decoder",
        "valid",
        True,
        [7],
    )
    assert saved["metrics"]["per"] == pytest.approx(figures["per"], abs=1e-6)
    assert saved["metrics"]["interval"] == pytest.approx(figures["interval"], abs=1e-6)
    with open("out/decoder_tiny_valid.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = evaluation.per_counts(
        [row["reference"].split() for row in rows], [row["hypothesis"].split() for row in rows]
    )
    assert evaluation.error_rate(counts) == pytest.approx(figures["per"])
    assert [[int(row[key]) for key in ("sub", "del", "ins", "labels")] for row in rows] == counts.tolist()
    assert rows[0]["trial"] in corpus.ids
    assert rows[0]["day"] == DAYS[0]
    assert Path("t.csv").read_text() == Path("out/decoder_tiny_valid.csv").read_text()


@pytest.fixture
def asked(monkeypatch) -> list:
    """What `words` was called with, instead of a search."""
    calls: list = []
    monkeypatch.setattr(evaluation, "words", lambda *args: calls.append(args) or {"wer": 0.5})
    return calls


def test_words_get_the_part_and_what_to_tune_on(corpus, asked, tmp_path):
    path = checkpoint(tmp_path / "a.pt")
    parts = data.speech_parts(corpus, "blocks")
    assert "words" not in evaluation.main(["--ckpt", path, "--device", "cpu"])
    figures = evaluation.main(["--ckpt", path, "--part", "test", "--device", "cpu", "--tune", "--beam", "9"])
    assert figures["words"] == {"wer": 0.5}
    log_probs, given, trials, args, valid, train = asked[0]
    assert given is corpus
    assert args.beam == 9
    assert trials.tolist() == parts["test"].tolist()
    assert train.tolist() == parts["train"].tolist()
    assert valid[1].tolist() == parts["valid"].tolist()
    for rows, numbers in ((log_probs, trials), valid):
        assert all(
            row == pytest.approx(alone(path, corpus, i), abs=1e-5)
            for row, i in zip(rows, numbers, strict=True)
        )
    evaluation.main(["--ckpt", path, "--device", "cpu", "--tune"])
    assert asked[1][4][0] is asked[1][0]  # tuned on the part itself: computed once
    evaluation.main(["--ckpt", path, "--device", "cpu", "--words"])
    assert asked[2][4] is None


def test_a_submission_needs_no_labels(corpus, asked, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt")
    figures = evaluation.main(
        ["--ckpt", path, "--part", "competition", "--device", "cpu", "--submission", "s.txt"]
    )
    assert figures == {"words": {"wer": 0.5}}
    assert asked[0][2].tolist() == [9, 19, 29]
    assert "PER" not in capsys.readouterr().out
    assert "needs them" in refusal(
        ["--ckpt", path, "--part", "competition", "--submission", "s.txt", "--csv", "t.csv"], capsys
    )
    assert len(asked) == 1


def test_part_of_a_part_without_labels(corpus, asked, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt")
    corpus.labelled[18] = False
    figures = evaluation.main(["--ckpt", path, "--part", "test", "--device", "cpu", "--submission", "s.txt"])
    assert (figures["trials"], figures["unlabelled"]) == (2, 1)
    assert asked[0][2].tolist() == [8, 18, 28]
    assert "1 more trials have no label" in capsys.readouterr().out


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        data.run_script("eval.py", lambda: evaluation.main([*argv, "--device", "cpu"]))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(("changed", "found"), [
    ({"sizes": {"stride": 3}}, "stride is 3"), ({"sizes": {"kernel": 8}}, "kernel is 8"), ({"valid": "test"}, "valid is 'test'"),
    ({"rules": "0"}, "label rules '0'"), ({"phonemes": list(PHONEMES[::-1])}, "phonemes or label rules"),
    ({"channels": 4, "synthetic": False}, "synthetic is False"),
])  # fmt: skip
def test_checkpoints_that_differ_are_not_averaged(corpus, tmp_path, capsys, changed, found):
    paths = [checkpoint(tmp_path / "a.pt"), checkpoint(tmp_path / "b.pt", **changed)]
    line = refusal(["--ckpt", *paths], capsys)
    assert found in line
    assert paths[1] in line


def test_unlabelled_parts_have_no_error_rate(corpus, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt")
    assert "--part competition: 3 trials" in refusal(["--ckpt", path, "--part", "competition"], capsys)
    corpus.labelled[corpus.part == "test"] = False
    assert "--part test: 3 trials" in refusal(["--ckpt", path, "--part", "test"], capsys)


def test_bad_command_lines_are_refused(corpus, tmp_path, capsys):
    path, real = checkpoint(tmp_path / "a.pt"), checkpoint(tmp_path / "b.pt", synthetic=False)
    assert "give --data DIR" in refusal(["--ckpt", real], capsys)
    corpus.channels = 5
    assert "5 channels" in refusal(["--ckpt", path], capsys)
    save_checkpoint(tmp_path / "c.pt", {**torch.load(path, weights_only=True), "data": {"days": DAYS}})
    assert "without data that name" in refusal(["--ckpt", str(tmp_path / "c.pt")], capsys)
    with pytest.raises(DataError, match="row name"):
        evaluation.main(["--ckpt", path, "--save-results", "A/B"])


def test_options_of_one_task_are_refused_for_the_other(corpus, tmp_path, capsys, monkeypatch):
    han = {"task": "han", "data": {}, "args": {}}
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda path: (None, han))
    monkeypatch.setattr(evaluation, "_load_fold_models", lambda loaded: ({}, {}))
    assert "--day: only for checkpoints of train_decoder.py" in refusal(
        ["--ckpt", "x.pt", "--day", "mean"], capsys
    )
    assert "--words, --beam: only for" in refusal(["--ckpt", "x.pt", "--beam", "7", "--words"], capsys)
    assert "--part competition: only for" in refusal(["--ckpt", "x.pt", "--part", "competition"], capsys)
    tasks = iter(["han", "decoder"])
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda path: (None, {**han, "task": next(tasks)}))
    assert "'decoder'; x.pt is of 'han'" in refusal(["--ckpt", "x.pt", "y.pt"], capsys)


# --- comparison ------------------------------------------------------------------------------------------------------


def transcripts_file(
    path: Path, hypotheses: list[list[int]], references: list[list[int]] | None = None
) -> str:
    rows = zip(references or [[1, 2, 3, 4]] * len(hypotheses), hypotheses, strict=True)
    path.write_text(
        "trial,day,reference,hypothesis,sub,del,ins,labels\n"
        + "".join(
            f"t{i},{DAYS[i % 2]},{evaluation.spell(ref)},{evaluation.spell(hyp)},0,0,0,0\n"
            for i, (ref, hyp) in enumerate(rows)
        )
    )
    return str(path)


def test_decoders_are_compared_by_trial(tmp_path, capsys):
    """Against a plain loop over draws of trials; B is worse wherever the two differ."""
    rng = np.random.default_rng(0)
    errors = [rng.random(20) < share for share in (0.2, 0.6)]
    errors[1] |= errors[0]
    paths = [
        transcripts_file(tmp_path / f"{side}.csv", [[1, 2, 3, 9 if wrong else 4] for wrong in e])
        for side, e in zip("ab", errors, strict=True)
    ]
    result = evaluation.main(["compare", "--a", paths[0], "--b", paths[1], "--draws", "400"])
    draws, values = np.random.default_rng(7), []
    for _ in range(400):
        drawn = draws.integers(20, size=20)
        values.append(sum(int(errors[0][i]) - int(errors[1][i]) for i in drawn) / 80)
    assert result["difference"] == pytest.approx((errors[0].sum() - errors[1].sum()) / 80)
    assert result["interval"] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=1e-12)
    assert result["p"] == pytest.approx(2 / 401)
    assert (result["trials"], result["a"]) == (20, errors[0].sum() / 80)
    said = capsys.readouterr().out
    assert result["verdict"] == said.splitlines()[-1]
    assert result["verdict"].startswith(
        f"A is better than B: phoneme error rate {result['a']:.4f} against {result['b']:.4f}"
    )
    for d in (0, 1):
        assert (
            f"{DAYS[d]:<24}{10:>8}{errors[0][d::2].sum() / 40:>9.4f}{errors[1][d::2].sum() / 40:>9.4f}"
            in said
        )
    assert (
        "A is worse than B"
        in evaluation.main(["compare", "--a", paths[1], "--b", paths[0], "--draws", "100"])["verdict"]
    )


def test_decoder_checkpoints_are_compared_as_they_are_scored(corpus, tmp_path, capsys):
    paths = [checkpoint(tmp_path / f"{seed}.pt", seed) for seed in (7, 8)]
    scored = [
        evaluation.main(["--ckpt", path, "--device", "cpu", "--csv", str(tmp_path / "rows.csv")])["per"]
        for path in paths
    ]
    result = evaluation.main(
        ["compare", "--a", *paths[:1], "--b", *paths[1:], "--device", "cpu", "--draws", "100"]
    )
    assert (result["a"], result["b"]) == pytest.approx(tuple(scored))
    mixed = evaluation.main(
        ["compare", "--a", paths[0], "--b", str(tmp_path / "rows.csv"), "--device", "cpu", "--draws", "100"]
    )
    assert (mixed["difference"], mixed["interval"]) == (result["difference"], result["interval"])
    assert "SYNTHETIC" in capsys.readouterr().out
    unknown = checkpoint(tmp_path / "c.pt", sizes={"days": 2}, days=DAYS[:2])
    assert "t12.2022.06.01: unknown to the model" in refusal(
        ["compare", "--a", paths[0], "--b", unknown, "--part", "test"], capsys
    )
    assert (
        evaluation.main(
            [
                "compare",
                "--a",
                paths[0],
                "--b",
                unknown,
                "--part",
                "test",
                "--device",
                "cpu",
                "--day",
                "mean",
                "--draws",
                "100",
            ]
        )["trials"]
        == 3
    )


def test_decoder_comparisons_that_mean_nothing_are_refused(corpus, tmp_path, capsys):
    a, one = (
        transcripts_file(tmp_path / "a.csv", [[1, 2], [3]]),
        transcripts_file(tmp_path / "one.csv", [[1, 2]]),
    )
    assert "1 labelled trials that both decoded" in refusal(["compare", "--a", a, "--b", one], capsys)
    other = transcripts_file(tmp_path / "other.csv", [[1, 2], [3]], [[1, 2, 3, 4], [1]])
    assert "the phonemes of 1 trials, such as t1, are not those" in refusal(
        ["compare", "--a", a, "--b", other], capsys
    )
    assert "--metric: only for checkpoints of train_han.py and pretrain_ast.py" in refusal(
        ["compare", "--a", a, "--b", a, "--metric", "r2"], capsys
    )
    assert "expected one CSV" in refusal(["compare", "--a", a, a, "--b", a], capsys)
    assert "No such file" in refusal(["compare", "--a", a, "--b", str(tmp_path / "none.csv")], capsys)
    ratings = tmp_path / "ratings.csv"
    ratings.write_text("name,part,fold\n")
    assert "one is a decoder's, the other rates performances" in refusal(
        ["compare", "--a", a, "--b", str(ratings)], capsys
    )
    assert "--day: only for checkpoints of train_decoder.py" in refusal(
        ["compare", "--a", str(ratings), "--b", str(ratings), "--day", "mean"], capsys
    )
    for text in (
        "trial,day,reference,hypothesis\nx,y,QQ,AA\nz,y,AA,AA\n",
        "trial,day\nx,y\n",
        "trial,day,reference,hypothesis\nx\n",
        'trial,day,reference,hypothesis\n"x',
    ):
        (tmp_path / "bad.csv").write_text(text)
        assert "bad.csv: " in refusal(["compare", "--a", a, "--b", str(tmp_path / "bad.csv")], capsys)


def test_few_trials_give_no_verdict(tmp_path):
    a, b = (
        transcripts_file(tmp_path / "a.csv", [[1, 2], [3]]),
        transcripts_file(tmp_path / "b.csv", [[1, 2, 3], [3, 4]]),
    )
    result = evaluation.main(["compare", "--a", a, "--b", b])
    assert result["difference"] == 0.25
    assert np.isnan(result["p"])
    assert (
        result["verdict"]
        == "A cannot be told from B: phoneme error rate +0.2500, but 2 trials are too few for a test."
    )
    a, b = (
        transcripts_file(tmp_path / f"{side}6.csv", [[1, 2, 3, last]] * 6)
        for side, last in (("a", 4), ("b", 5))
    )
    assert (
        "A is better than B" in evaluation.main(["compare", "--a", a, "--b", b, "--draws", "100"])["verdict"]
    )
