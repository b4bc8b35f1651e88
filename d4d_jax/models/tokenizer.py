"""Captions to the token ids of CLIP, by the library `tokenizers`.

    tokenize = load_tokenizer()            # the vocabulary in an installed open_clip_torch
    tokens = tokenize(["a panda dancing, 3d asset", ""])    # (2, 77) int32

The vocabulary is a file of the user: OpenAI's bpe_simple_vocab_16e6.txt.gz (which also comes in the
wheel of open_clip_torch, of which nothing is imported), the pair vocab.json and merges.txt of a
checkpoint in the layout of transformers, or its tokenizer.json.
"""

import dataclasses
import gzip
import html
import importlib.util
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2  # of the file's 262 145 lines, those that CLIP uses
#: Start and end of a text, by the names that vocabularies give them.
_SPECIAL = (("<start_of_text>", "<end_of_text>"), ("<|startoftext|>", "<|endoftext|>"))
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Maps texts to ids: start of text, the text, end of text, padding.

    Attributes:
        model: a `tokenizers.Tokenizer` that adds start and end, cuts and pads.
        clean: whether texts are repaired with ftfy and freed of HTML entities first.
    """

    model: Any
    clean: bool = True

    def __call__(self, texts: str | Sequence[str]) -> Int[np.ndarray, "b n"]:
        """Token ids of one text or several."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if self.clean:
            texts = [_clean(text) for text in texts]
        length = self.model.truncation["max_length"]
        ids = [encoding.ids for encoding in self.model.encode_batch(texts)]
        return np.array(ids, np.int32).reshape(len(texts), length)

    def decode(self, tokens: Int[np.ndarray, "n"]) -> str:
        """The text of ids, lower-case; what follows its end is left out."""
        end = next(self.model.token_to_id(e) for _, e in _SPECIAL if self.model.token_to_id(e))
        ids = np.asarray(tokens).tolist()
        return self.model.decode(ids[: ids.index(end)] if end in ids else ids).strip()


def load_tokenizer(
    path: str | os.PathLike[str] | None = None,
    *,
    length: int = 77,
    pad: str = "zero",
    clean: bool = True,
) -> Tokenizer:
    """CLIP's tokenizer with the vocabulary of a file.

    Args:
        path: bpe_simple_vocab_16e6.txt.gz, a tokenizer.json, or a folder that holds tokenizer.json
            or vocab.json and merges.txt. By default the file in an installed open_clip_torch.
        length: tokens of a text. A longer one is cut, and its last token is the end of text.
        pad: "zero" pads with 0, as OpenCLIP and so VideoMV; "end" with the end of text, as the
            tokenizer of OpenAI's checkpoints in transformers.
        clean: whether texts are repaired with ftfy and freed of HTML entities first, as OpenCLIP
            does; without it they are brought to Unicode's form C only, as the fast tokenizer of
            transformers does.

    Raises:
        ImportError: tokenizers or ftfy is not installed.
        FileNotFoundError: there is no such file, or none was named and there is none to be found.
        ValueError: the file is no vocabulary of CLIP, or a bad `pad` or `length`.
    """
    if pad not in ("zero", "end"):
        raise ValueError(f'pad is "zero" or "end", not {pad!r}.')
    if length < 2:
        raise ValueError(
            f"A text has at least 2 tokens, its start and its end; length is {length}."
        )
    try:
        import tokenizers  # noqa: F401

        if clean:
            import ftfy  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Tokenizing text needs the package {error.name}: pip install 'd4d_jax[text]'."
        ) from error
    vocabulary, merges = _read_vocabulary(_packaged() if path is None else pathlib.Path(path))
    specials = next((pair for pair in _SPECIAL if vocabulary.keys() >= set(pair)), None)
    if specials is None:
        raise ValueError(
            f"{path} is no vocabulary of CLIP: it has neither {' and '.join(_SPECIAL[0])} nor"
            f" {' and '.join(_SPECIAL[1])}."
        )
    model = _byte_pair_model(vocabulary, merges, specials)
    model.enable_truncation(length)
    model.enable_padding(length=length, pad_id=vocabulary[specials[1]] if pad == "end" else 0)
    return Tokenizer(model, clean)


def _byte_pair_model(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], specials: tuple[str, str]
) -> Any:
    """A `tokenizers.Tokenizer`: lower-case words of letters, single digits, runs of the rest."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    start, end = specials
    try:
        pieces = BPE(vocabulary, merges, unk_token=end, end_of_word_suffix="</w>")
    except Exception as error:  # the library's own are of no narrower class
        raise ValueError(f"The merges do not fit the vocabulary: {error}") from error
    model: Any = Tokenizer(pieces)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    model.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    # The mark of a word's end has no bytes: it becomes a space before the bytes are joined.
    model.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])
    model.add_special_tokens([start, end])
    model.post_processor = processors.TemplateProcessing(
        single=[start, "$A", end], special_tokens=[(name, vocabulary[name]) for name in specials]
    )
    return model


def _read_vocabulary(path: pathlib.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids of all tokens, and the merges in their order."""
    if path.is_dir():
        whole, parts = path / "tokenizer.json", [path / "vocab.json", path / "merges.txt"]
        if not whole.is_file() and not all(part.is_file() for part in parts):
            raise FileNotFoundError(
                f"{path} holds neither tokenizer.json nor vocab.json and merges.txt."
            )
        path = whole if whole.is_file() else parts[0]
    if not path.is_file():
        raise FileNotFoundError(f"There is no vocabulary file {path}.")
    try:
        if path.suffix != ".json":
            return _from_merges(_read_merges(path))
        content = json.loads(path.read_text(encoding="utf-8"))
        if "model" in content:
            merges = content["model"]["merges"]
            pairs: Any = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
            content = content["model"]["vocab"]
        else:
            pairs = _read_merges(path.with_name("merges.txt"))
        if not all(isinstance(i, int) for i in content.values()):
            raise ValueError("it is no table of token ids.")
        return content, pairs
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a vocabulary of CLIP: {error}") from error


def _read_merges(path: pathlib.Path) -> list[tuple[str, str]]:
    """The pairs of a file with a title line; only as many as CLIP uses of OpenAI's longer one."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    pairs: Any = [tuple(line.split()) for line in text.split("\n")[1 : _MERGES + 1] if line]
    if not all(len(pair) == 2 for pair in pairs):
        raise ValueError("a line is not a pair of tokens.")
    return pairs


def _from_merges(merges: list[tuple[str, str]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Numbers bytes, bytes that end a word, merged pairs and the special tokens, in this order."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())  # printable bytes as they are come first
    names = [*letters, *(c + "</w>" for c in letters), *map("".join, merges), *_SPECIAL[0]]
    return {name: i for i, name in enumerate(names)}, merges


def _packaged() -> pathlib.Path:
    """The file in an installed open_clip_torch, found without importing it."""
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (pathlib.Path(folder) / _FILE).is_file():
            return pathlib.Path(folder) / _FILE
    raise FileNotFoundError(
        f"The tokenizer needs CLIP's vocabulary: pass a file ({_FILE}, tokenizer.json, or a folder"
        " with vocab.json and merges.txt), or pip install --no-deps open_clip_torch, of which only"
        " that file is read."
    )


def _clean(text: str) -> str:
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()
