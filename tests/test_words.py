"""eval.py, words: the language model against its definition and KenLM, the search against enumeration;
lexicons, submissions."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import refused

import eval as evaluation
from data import PHONEMES, SPEECH_WORDS, SpeechCorpus, phonemize

SIL = 40
NEUTRAL = {"acoustic_scale": 1.0, "blank_penalty": 0.0, "lm_weight": 1.0, "word_score": 0.0, "beam": 100}
SAID = "we see the boat,we see the coat,the boat,see the sea,we can see,the,the sea can see the boat we see"
SENTENCES = [sentence.split() for sentence in SAID.split(",")]


def ids(sounds: str) -> tuple[int, ...]:
    return tuple(PHONEMES.index(name) for name in sounds.split())


def frames(classes: str) -> np.ndarray:
    """Log-probabilities, a frame a class ("_": blank): 0.9 on it."""
    names = ["_", *PHONEMES[1:]]
    p = np.full((len(classes.split()), 41), 1e-4)
    for f, name in enumerate(classes.split()):
        p[f, names.index(name)] = 0.9
    return np.log(p / p.sum(1, keepdims=True)).astype(np.float32)


def arpa_of(path, sentences) -> str:
    evaluation.write_arpa(path, evaluation.witten_bell(sentences))
    return str(path)


def search_of(folder, lexicon: dict[str, str], sentences) -> evaluation.WordSearch:
    return evaluation.WordSearch(
        [(word, ids(sounds)) for word, sounds in lexicon.items()], arpa_of(folder / "lm.arpa", sentences)
    )


def by_definition(sentences, w: str, h: tuple[str, ...]) -> float:
    """Interpolated Witten-Bell probability of w after h, by counting anew at every call."""
    padded = [("<s>", *s, "</s>") for s in sentences]
    after = [s[i] for s in padded for i in range(max(1, len(h)), len(s)) if s[i - len(h) : i] == h]
    vocabulary = {w for s in sentences for w in s} | {"</s>", "<unk>"}
    below = by_definition(sentences, w, h[1:]) if h else 1 / len(vocabulary)
    return (after.count(w) + len(set(after)) * below) / (len(after) + len(set(after))) if after else below


def test_kenlm_reads_back_the_definition_and_every_context_sums_to_one(tmp_path):
    vocabulary = sorted({w for s in SENTENCES for w in s})
    lm, _, known = evaluation.load_lm(arpa_of(tmp_path / "lm.arpa", SENTENCES), vocabulary)
    assert known == len(vocabulary)
    contexts = [(), ("the",), ("we", "see"), ("coat", "boat"), ("boat", "coat", "the")]
    for sentence_start, context in itertools.product((True, False), contexts):
        state = lm.start(not sentence_start)
        for w in context:
            state, _ = lm.score(state, vocabulary.index(w))
        scores = [lm.score(state, i)[1] for i in range(len(vocabulary) + 1)] + [lm.finish(state)[1]]
        assert sum(10**score for score in scores) == pytest.approx(1, abs=2e-6), context
        history = (("<s>",) * sentence_start + context)[-2:]
        expected = [math.log10(by_definition(SENTENCES, w, history)) for w in (*vocabulary, "<unk>", "</s>")]
        assert scores == pytest.approx(expected, abs=1e-5), context


def test_lexicon_files(tmp_path):
    path = tmp_path / "lexicon.txt"
    text = "\ufeffSEA\tS IY1 # a place\n;;; comment\nread R EH D SIL\nread(2)  R IY1 D\n\nsea S IY\n"
    path.write_bytes(text.encode() + b"caf\xe9 K AH F EY\n")  # with a mark, and a line of another encoding
    expected = [("sea", ids("S IY")), ("read", ids("R EH D")), ("read", ids("R IY D"))]
    assert evaluation.read_lexicon(path) == [*expected, ("caf\ufffd", ids("K AH F EY"))]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("lexicon", "sea S IY\nsea S IY\nboat B OA T", "line 3: boat B OA T"),
        ("lexicon", "sea", "line 1"),
        ("lexicon", "# of\n", "no word"),
        ("lm", "garbage", ""),
        ("lm", None, ""),
    ],
)
def test_bad_lexicons_and_language_models_are_named(tmp_path, capfd, name, text, found):
    path = tmp_path / "given.txt"
    if text is not None:
        path.write_text(text)
    read = {"lexicon": evaluation.read_lexicon, "lm": lambda path: evaluation.load_lm(path, ["sea"])}[name]
    refused(lambda: read(path), capfd, path, found)


def test_the_training_lexicon_takes_pronunciations_from_the_labels():
    spoken = {
        "We read.": "W IY SIL R EH D SIL",
        "we read the music": "W IY SIL R IY D SIL DH AH SIL M Y UW Z IH K SIL",
        "very music": "V EH R IY SIL",  # do not fit: from data.phonemize
        "we": "SIL W IY SIL SIL",
    }
    expected = "we W IY,music M Y UW Z IH K,read R EH D,read R IY D,the DH AH,very V EH R IY"
    lexicon = evaluation.training_lexicon(spoken, [np.array(ids(sounds)) for sounds in spoken.values()])
    assert [" ".join([word, evaluation.spell(sounds)]) for word, sounds in lexicon] == expected.split(",")


@pytest.mark.parametrize("seed", range(2))
def test_the_search_finds_the_best_of_all_frame_strings(tmp_path, seed):
    lexicon = {"ba": "B AA", "bob": "B AA B", "bah": "B AA", "a": "AA"}
    text = ["ba a bob".split(), "a a ba".split(), "bob bah".split(), ["a"]]
    search = search_of(tmp_path, lexicon, text)
    rng, classes = np.random.default_rng(seed), [0, *ids("B AA SIL")]
    log_probs = np.full((8, 41), -60, np.float32)
    log_probs[:, classes] = np.log(rng.dirichlet([0.6] * 4, 8) + 1e-3)
    settings = {"acoustic_scale": 0.7, "blank_penalty": 0.4, "lm_weight": 0.8, "word_score": 0.3}
    settings["beam"] = 4000
    spelled = {}
    for word, sounds in lexicon.items():
        spelled.setdefault(ids(sounds), []).append(word)
    best = (-math.inf, None)
    for string in itertools.product(classes, repeat=8):
        tokens = [k for k, _ in itertools.groupby(string) if k]
        pieces = [tuple(piece) for is_sil, piece in itertools.groupby(tokens, SIL.__eq__) if not is_sil]
        if (tokens and tokens[-1] != SIL) or not all(piece in spelled for piece in pieces):
            continue
        acoustic = 0.7 * (sum(log_probs[f, k] for f, k in enumerate(string)) - 0.4 * string.count(0))
        for sentence in itertools.product(*(spelled[piece] for piece in pieces)):
            padded = ("<s>", *sentence, "</s>")
            grams = [(padded[i], padded[max(0, i - 2) : i]) for i in range(1, len(padded))]
            lm = -99.0
            if acoustic > best[0] - 3:
                lm = sum(math.log10(by_definition(text, *gram)) for gram in grams)
            best = max(best, (acoustic + 0.8 * lm + 0.3 * len(sentence), list(sentence)))
    assert search.decode(log_probs, settings) == best[1]


def test_more_homophones_than_the_trie_holds(tmp_path):
    names = [f"aa{letter}" for letter in "abcdefghi"]
    search = search_of(
        tmp_path, dict.fromkeys(names, "AA") | {"b": "B"}, [[name] * (k + 1) for k, name in enumerate(names)]
    )
    assert search.dropped == 3
    assert search.decode(frames("AA SIL"), NEUTRAL)[0] in names[3:]


BOOK = {"boot": "B UW T", "two": "T UW", "bookkeeper": "B UH K K IY P ER"}
SEE = {"see": "S IY", "the": "DH AH"}
HOMOPHONES = {"sea": "S IY", "see": "S IY", "we": "W IY", "the": "DH AH"}
DO = {"do": "D UW", "don't": "D UW SIL N T"}
SHIP = {"we": "W IY", "see": "S IY", "ship": "SH IH P"}


@pytest.mark.parametrize(
    ("lexicon", "text", "heard", "expected"),
    [
        (HOMOPHONES, "we see,the sea", "W IY SIL S IY SIL", "we see"),  # the language model decides
        (SEE, "see the", "SIL SIL S S _ IY SIL _ SIL SIL DH AH AH SIL _ _", "see the"),
        (SEE, "see", "_ _ _", ""),
        (BOOK, "boot two two,bookkeeper", "B UH K _ K IY P ER SIL", "bookkeeper"),
        (DO, "do don't,don't", "D UW SIL N T SIL", "don't"),  # silence inside a pronunciation
        (SHIP, "we see", "W IY SIL ZH OY ZH SIL S IY SIL", "we see"),  # a sound outside the lexicon
        (SHIP, "we see", "SH IH P SIL", "ship"),  # which the LM does not know
    ],
)
def test_words_by_hand(tmp_path, lexicon, text, heard, expected):
    search = search_of(tmp_path, lexicon, map(str.split, text.split(",")))
    assert search.decode(frames(heard), NEUTRAL) == expected.split()
    assert search.decode(np.zeros((0, 41), np.float32), NEUTRAL) == []
    assert search.known == len(set(text.replace(",", " ").split()) & lexicon.keys())


def test_search_refusals(capsys):
    refused(lambda: evaluation.witten_bell([]), capsys, "--lm")
    refused(lambda: evaluation.tune_words(lambda *_: [], [], [], NEUTRAL), capsys, "--tune")


# --- the whole ---

CLAUSE = "we you they he she", "found brought pushed sold heard lost", "the my your his her"
CLAUSE += ("boat book bridge cookie garden path song",)


def heard(labels: list[int], rng, confusion: float) -> np.ndarray:
    """Posteriors as of a decoder: two frames a phoneme and blanks between, with confident mistakes."""
    logits = rng.normal(0, 1.0, (3 * len(labels) + 1, 41))
    logits[::3, 0] += 5
    for k, label in enumerate(labels):
        wrong = int(rng.integers(1, 41)) if rng.random() < confusion else label
        logits[3 * k + 1 : 3 * k + 3, wrong] += 5
        logits[3 * k + 1 : 3 * k + 3, label] += 4
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[SpeechCorpus, list[np.ndarray]]:
    """160 trials, 100 to train on, 20 to validate, 20 to test, 20 unlabelled; and what was heard of each."""
    rng = np.random.default_rng(7)
    text = []
    for _ in range(160):
        clauses = CLAUSE * (2 if rng.random() < 0.4 else 1)
        text.append(" ".join(rng.choice(words.split()) for words in clauses))
    labels = [np.array(phonemize(sentence)) for sentence in text]
    log_probs = [heard(row.tolist(), rng, 0.25) for row in labels]
    part = np.array(["train"] * 120 + ["test"] * 20 + ["competition"] * 20)
    labelled, day = part != "competition", np.arange(160) % 3
    text = [sentence if known else "" for sentence, known in zip(text, labelled, strict=True)]
    labels = [row if known else row[:0] for row, known in zip(labels, labelled, strict=True)]
    about = {"channels": 256, "root": tmp_path_factory.mktemp("corpus"), "synthetic": True, "left_out": []}
    about |= {"days": ["t12.2022.04.28", "t12.2022.05.05", "t12.2022.06.01"]}
    about |= {"features": np.zeros((320, 256), np.float32), "offsets": np.arange(161) * 2}
    ids_of = [f"trial {i}" for i in range(160)]
    made = SpeechCorpus(day=day, block=day * 0, part=part, labels=labels, text=text, ids=ids_of, **about)
    return made, log_probs


def run_words(corpus, folder, *given: str) -> dict:
    """Of the test part, with these options."""
    parser = evaluation._parser("evaluate", "", "")
    evaluation.word_options(parser)
    parser.set_defaults(cache=str(folder), ckpt=[str(folder / "best.pt")])
    (made, heard), trials = corpus, np.arange(160)
    log_probs, args = dict(zip(trials, heard, strict=True)), parser.parse_args(given)
    return evaluation.words(log_probs, made, trials[120:140], args, trials[100:120], trials[:100])


def test_wer_is_far_under_the_phonemes_errors(corpus, tmp_path, capsys):
    figures = run_words(corpus, tmp_path, "--words")
    assert figures["wer"] < 0.1  # a quarter of the phonemes are heard wrong
    assert figures["wer_interval"][0] <= figures["wer"] <= figures["wer_interval"][1]
    assert figures["wer_counts"]["words"] == sum(len(text.split()) for text in corpus[0].text[120:140])
    assert figures["settings"]["blank_penalty"] == math.log(7)
    assert figures["settings"]["acoustic_scale"] == 0.5
    assert f"{figures['wer']:.4f} 95 %" in capsys.readouterr().out


@pytest.mark.slow
def test_nbest_lists_the_beam_and_its_best_string_is_the_oracle(corpus, tmp_path):
    path = tmp_path / "n.jsonl"
    figures = run_words(corpus, tmp_path, "--tune", "--nbest", "5", "--nbest-file", str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first = [line for line in lines if line["rank"] == 1]
    assert [line["text"] for line in first] == [" ".join(words) for words in figures["sentences"].values()]
    assert [line["trial"] for line in first] == corpus[0].ids[120:140]
    assert 20 < len(lines) <= 100
    weight, score = (figures["settings"][name] for name in ("lm_weight", "word_score"))
    for line in lines:
        total = line["acoustic"] + weight * line["lm"] + score * len(line["text"].split())
        assert line["total"] == pytest.approx(total, abs=1e-3)
    wrong = {}
    for line in lines:
        said = corpus[0].text[corpus[0].ids.index(line["trial"])].split()
        errors = evaluation.per_counts([said], [line["text"].split()])[0, :3].sum()
        wrong[line["trial"]] = min(errors, wrong.get(line["trial"], errors))
    words = figures["wer_counts"]["words"]
    assert figures["oracle_wer"] <= sum(wrong.values()) / words <= figures["wer"]
    untuned = run_words(corpus, tmp_path, "--words")
    assert figures["wer_untuned"] == untuned["wer"]


def test_tuning_takes_the_best_and_keeps_what_is_as_good():
    asked = []

    def decode(log_probs, settings):
        asked.append(settings)
        wrong = abs(settings["lm_weight"] - 5) + (settings["word_score"] != 1.5)
        return ["no"] * round(wrong) + ["yes"] * (100 - round(wrong))

    start = NEUTRAL | {"lm_weight": 2.0, "acoustic_scale": 0.31}
    settings, tuned = evaluation.tune_words(decode, [None], [["yes"] * 100], start)
    assert settings == start | {"lm_weight": 5.0, "word_score": 1.5}
    assert tuned == {"before": 0.04, "after": 0.0}
    assert len({tuple(s.values()) for s in asked}) == len(asked)  # nothing is searched twice


def test_given_lexicon_and_lm_and_words_outside_them(corpus, tmp_path):
    known = set(" ".join(CLAUSE).split()) - {"bridge"}
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text("".join(f"{word}\t{SPEECH_WORDS[word]}\n" for word in known))
    lm = arpa_of(tmp_path / "lm.arpa", [text.split() for text in corpus[0].text[:100]])
    given = ["--words", "--lexicon", str(lexicon), "--lm", lm]
    figures = run_words(corpus, tmp_path, *given)
    assert 0 < figures["wer"] < 0.2


def test_submissions_stand_in_the_competitions_order(corpus, tmp_path):
    indices = np.random.default_rng(0).permutation(np.arange(140, 160))
    sentences = [f"trial {i}" if i != 141 else "" for i in indices]
    expected = [f"trial {i}" if i != 141 else "" for day in range(3) for i in range(140, 160) if i % 3 == day]
    evaluation.write_submission(tmp_path / "out.txt", sentences, corpus[0], indices)
    assert (tmp_path / "out.txt").read_text() == "\n".join(expected) + "\n"
    evaluation.write_submission(tmp_path / "out.csv", sentences, corpus[0], indices)
    numbered = [f"{n},{text}" for n, text in enumerate(expected)]
    assert (tmp_path / "out.csv").read_text().splitlines() == ["id,text", *numbered]


def test_the_competition_part_of_24_has_1200_rows_of_15_days(corpus, tmp_path, capsys):
    real = replace(corpus[0], synthetic=False, days=[f"t12.2022.{k:02}.01" for k in range(24)])
    path, sentences = tmp_path / "out.txt", ["a"] * 20
    wrong = lambda: evaluation.write_submission(path, sentences, real, np.arange(140, 160))  # noqa: E731
    refused(wrong, capsys, path, "1200")
    evaluation.write_submission(path, sentences, real, np.arange(120, 140))  # a labelled part may be written
    assert path.read_text() == "a\n" * 20
