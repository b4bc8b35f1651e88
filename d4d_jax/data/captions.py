"""Captions: from the names of an asset and of its animation, from a Cap3D table, or the user's own.

`describe("ShibaInu", "AnimalArmature|Gallop")` is "a shiba inu galloping": nothing is looked at.
Other sentences come from a table of two columns (`read_table`) or from a function of the user's
(`Captioner`).
"""

import csv
import os
import re
from pathlib import Path
from typing import Protocol

from d4d_jax.typing import Frames

#: Verbs that animations are called by, whose -ing forms follow the rules of `_ing`.
_VERBS = frozenset(
    "walk run gallop trot jump hop leap crawl climb swim fly hover glide flap float dive sit stand"
    " sleep rest eat drink graze bite chew chase attack punch kick shoot throw slash stab cast"
    " block dodge roll spin turn dance wave clap cheer nod point pick push pull lift carry dig talk"
    " sing shout bark roar howl laugh cry think look sneak slither crouch fall land bounce shake"
    " swing stomp charge taunt spawn breathe blink die idle march skate ride drive"
    " open close".split()
)
#: Nouns that stand for a verb.
_NOUNS = {"death": "dying", "flight": "flying", "fight": "fighting", "salute": "saluting"}
#: Words that may follow a verb without hurting the sentence.
_MANNERS = frozenset(
    "fast slow slowly quickly normal left right forward forwards backward backwards back up down"
    " high low long short away around impulse".split()
)
#: Words that say nothing about what is seen.
_EMPTY = frozenset(
    "armature rig skeleton action animation anim clip take mixamo com layer base scene loop looped"
    " transformed low poly lowpoly rigged animated model mesh glb gltf fbx final copy default"
    " inplace place in".split()
)


class Captioner(Protocol):
    """What `--captioner=package.module:function` names."""

    def __call__(self, *, asset: str, action: str, caption: str, frames: Frames) -> str:
        """The caption of one clip.

        Args:
            asset: path of the asset's file.
            action: name of the animation in it.
            caption: the caption by the template or the table.
            frames: (t, h, w, 3) in [0, 1] on white: the front view, or else the dynamic orbit.
        """
        ...


def describe(asset: str, action: str) -> str:
    """A caption from the name of an asset and that of one of its animations.

    Args:
        asset: file name without its suffix, as "Enemy_Flying-transformed". A hexadecimal id, as
            Objaverse uses them, is "an object".
        action: as "AnimalArmature|Walk" or "Walking_A".
    """
    names = _words(asset)
    if re.fullmatch(r"[0-9a-fA-F-]{16,}", asset) or not names:
        names = ["object"]
    subject = f"{_article(names[0])} {' '.join(names)}"
    words = _words(action.rsplit("|", 1)[-1])
    doing = [word for word in words if word not in names] or words
    if not doing:
        return f"{subject}, moving"
    first, rest = doing[0], doing[1:]
    if set(rest) <= _MANNERS and (first in _NOUNS or first in _VERBS or first.endswith("ing")):
        return f"{subject} {' '.join([_ing(first), *rest])}"
    return f"{subject}, {' '.join(doing)}"


def _words(name: str) -> list[str]:
    """The words of a name in CamelCase or snake_case, lower case, without numbers and rig terms."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", name)]
    return [word for word in words if word not in _EMPTY and (len(word) > 1 or not word.isascii())]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" and not word.startswith(("uni", "use", "eu")) else "a"


def _ing(word: str) -> str:
    """`walk` -> `walking`, `dive` -> `diving`, `run` -> `running`, `die` -> `dying`."""
    if word in _NOUNS:
        return _NOUNS[word]
    if word.endswith("ing") and word not in _VERBS:
        return word
    if word.endswith("ie"):
        return f"{word[:-2]}ying"
    if word.endswith("e"):
        return f"{word[:-1]}ing"
    short = re.fullmatch(r"[^aeiou]*[aeiou][bdgmnprt]", word)
    return f"{word}{word[-1] if short else ''}ing"


def read_table(path: str | os.PathLike) -> dict[str, str]:
    """Reads captions as Cap3D publishes them: two columns without heading, uid and caption.

    Returns:
        The captions by uid; later rows replace earlier ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text in UTF-8, or a row has not two columns.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no table of captions {os.fspath(path)!r}.")
    captions = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            for row in filter(None, csv.reader(stream)):
                if len(row) != 2:
                    raise ValueError(f"a row has {len(row)} columns instead of 2: {row!r}")
                captions[row[0].strip()] = " ".join(row[1].split())
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{os.fspath(path)!r} is no table of captions: {error}.") from error
    return captions
