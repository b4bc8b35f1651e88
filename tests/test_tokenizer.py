"""The tokenizer on a small vocabulary: files, words, padding, cutting, and what it refuses."""

import gzip
import importlib.util
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d4d_jax.models.tokenizer import load_tokenizer

WORDS = ("panda", "dancing", "rabbit", "red")
BYTES = 256
START, END = "<start_of_text>", "<end_of_text>"


def merges():
    """Pairs that build every word from its letters, from the left."""
    pairs = []
    for word in WORDS:
        letters = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(letters)):
            pair = ("".join(letters[:i]), letters[i])
            if pair not in pairs:
                pairs.append(pair)
    return pairs


def merge_text():
    return "\n".join(["#version: 0.2", *map(" ".join, merges())]) + "\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "bpe.txt.gz"
    path.write_bytes(gzip.compress(merge_text().encode()))
    return path


@pytest.fixture(scope="module")
def tokenize(file):
    return load_tokenizer(file, length=12)


def ids_of(*names):
    """By hand: printable bytes first, then the same at a word's end, merges, start and end."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): i for i, byte in enumerate(letters)}
    table |= {name + "</w>": BYTES + i for name, i in table.items()}
    table |= {"".join(pair): 2 * BYTES + i for i, pair in enumerate(merges())}
    last = 2 * BYTES + len(merges())
    table |= {START: last, END: last + 1}
    return [table[name] for name in names]


def test_words_between_start_and_end(tokenize):
    tokens = tokenize("A red  PANDA!")
    assert tokens.dtype == np.int32 and tokens.shape == (1, 12)
    wanted = ids_of(START, "a</w>", "red</w>", "panda</w>", "!</w>", END)
    assert tokens[0].tolist() == [*wanted, *[0] * 6]
    assert tokenize.decode(tokens[0]) == "a red panda !"


def test_unknown_words_fall_into_letters_and_digits_stand_alone(tokenize):
    assert tokenize("pan 42")[0, 1:5].tolist() == ids_of("pa", "n</w>", "4</w>", "2</w>")


def test_several_texts_and_none(tokenize):
    both = tokenize(["red", "rabbit dancing"])
    np.testing.assert_array_equal(both[1:], tokenize("rabbit dancing"))
    assert tokenize([]).shape == (0, 12)
    assert tokenize("")[0, :3].tolist() == [*ids_of(START, END), 0]


def test_a_long_text_is_cut_before_the_end(tokenize):
    tokens = tokenize("red " * 30)[0].tolist()
    assert tokens == [*ids_of(START), *ids_of("red</w>") * 10, *ids_of(END)]


def test_padding_with_the_end_of_the_text(file):
    tokens = load_tokenizer(file, length=6, pad="end")("red")[0].tolist()
    assert tokens == ids_of(START, "red</w>", END, END, END, END)


def test_texts_are_repaired_unless_asked_not_to_be(file, tokenize):
    plain = load_tokenizer(file, length=12, clean=False)
    np.testing.assert_array_equal(tokenize("red &amp;amp; “panda”"), tokenize('red & "panda"'))
    assert (plain("red &amp; panda") != tokenize("red &amp; panda")).any()
    np.testing.assert_array_equal(plain("caf\u0065\u0301"), plain("caf\u00e9"))


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_has_one_start_and_one_end(tokenize, text):
    tokens = tokenize(text)[0].tolist()
    start, end = ids_of(START, END)
    length = tokens.index(end)
    assert tokens[0] == start and tokens.count(start) == tokens.count(end) == 1
    assert tokens[length + 1 :] == [0] * (11 - length)


def test_every_kind_of_file_gives_the_same_ids(file, tokenize, tmp_path):
    text = "a red rabbit, dancing; pandas?"
    wanted = tokenize(text)
    vocabulary = tokenize.model.get_vocab()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text(merge_text())
    np.testing.assert_array_equal(load_tokenizer(tmp_path, length=12)(text), wanted)
    pair = load_tokenizer(tmp_path / "vocab.json", length=12)
    np.testing.assert_array_equal(pair(text), wanted)
    tokenize.model.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(load_tokenizer(tmp_path, length=12)(text), wanted)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in merges()]  # as older files have them
    (tmp_path / "old.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "old.json", length=12)(text), wanted)


def test_the_file_in_an_installed_package_is_found(file, tokenize, tmp_path, monkeypatch):
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "bpe_simple_vocab_16e6.txt.gz").write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    found = load_tokenizer(length=12)("a red panda")
    np.testing.assert_array_equal(found, tokenize("a red panda"))


def test_what_is_missing_is_named(file, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary file .*absent\.txt"):
        load_tokenizer(tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError, match=r"holds neither .* nor vocab"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps open_clip_torch"):
        load_tokenizer()
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"package ftfy: pip install 'd4d_jax\[text\]'"):
        load_tokenizer(file)
    assert load_tokenizer(file, clean=False)("red").shape == (1, 77)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="package tokenizers"):
        load_tokenizer(file, clean=False)


def test_what_does_not_fit_is_named(file, tmp_path):
    with pytest.raises(ValueError, match='"zero" or "end", not \'none\''):
        load_tokenizer(file, pad="none")
    with pytest.raises(ValueError, match="length is 1"):
        load_tokenizer(file, length=1)
    other = tmp_path / "vocab.json"
    other.write_text(json.dumps({"a": 0}))
    (tmp_path / "merges.txt").write_text(merge_text())
    with pytest.raises(ValueError, match="no vocabulary of CLIP: it has neither <start_of_text>"):
        load_tokenizer(other)
    other.write_text(json.dumps({"a": 0, START: 1, END: 2}))
    with pytest.raises(ValueError, match="merges do not fit the vocabulary"):
        load_tokenizer(other)
    for name, content in (
        ("broken.txt.gz", b"no archive"),
        ("broken.json", b"{"),
        ("list.json", b"[1]"),
        ("names.json", b'{"a": "b"}'),
        ("model.json", b'{"model": {}}'),
        ("three.txt", b"title\na b c\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a vocabulary of CLIP"):
            load_tokenizer(tmp_path / name)
