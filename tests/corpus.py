"""Text that a tokenizer meets, and text that breaks one: the corpus of the tokenizer tests, deterministic by seed.

`captions` is what people write under pictures; the other families are listed in `FAMILIES`. Each line is made up here.
"""

# ruff: noqa: SIM905  (words are easier to read in a sentence than in a list of literals)
from __future__ import annotations

import random
import string
import unicodedata
from collections.abc import Callable

ADJECTIVES = "small big red dark-green wooden old shiny empty crowded blurry hand-drawn snowy golden striped".split()
NOUNS = (
    "cat dog tabby bicycle kitchen mountain lighthouse teapot keyboard violin bridge strawberry umbrella child market "
    "astronaut giraffe typewriter sunflower railway harbour sandwich balloon library staircase traffic-light"
).split()
VERBS = "sits on|stands beside|flies over|is reflected in|leans against|looks at|hides behind|runs past".split("|")
FRAMES = ("a photo of {}.", "This is a photo of {}.", "itap of {}.", "a bad photo of the {}!", "{}", "2 of {} (#1)")
ACCENTED = (
    "café crème brûlée naïve façade Ångström Müßiggang straße jalapeño señorita São João Łódź Škoda Đorđe Şımarık "
    "İSTANBUL ışık Ærøskøbing œuvre Čeština Việt Nam tiếng piñata coöperate ΟΔΥΣΣΕΥΣ ΣΑΣ. Σ' ὈΔΥΣΣΕΎΣ мышь Ёлка їжак"
).split()
CJK = "一只猫坐在垫子上|富士山の写真。|東京タワー|고양이가 창가에 앉아 있다|ｶﾀｶﾅ ＦＵＬＬ！|《红楼梦》、第一回|が が ぱ"
ARABIC = "قطة صغيرة على السجادة|صورة لجبل، ثلج؟|مَدْرَسَةٌ|کتابخانهٔ ملی|ﷺ ﻻ لا|חתול על מחצלת|बिल्ली चटाई पर|แมวบนเสื่อ"
EMOJI = "😀 👍🏽 👩‍🚀 👨‍👩‍👧‍👦 🇩🇪🇫🇷 ❤️ ☕︎ 🏳️‍🌈 #️⃣ ✨✨✨ ♥".split()
# Everything that `str.split`, the regex `\s` or SentencePiece's normalizer may take for white space, or drop.
SPACES = [chr(c) for c in (9, 10, 11, 12, 13, 28, 29, 30, 31, 32, 0x85, 0xA0, 0x1680, 0x180E, 0x2028, 0x2029, 0x202F)]
SPACES += [chr(c) for c in (*range(0x2000, 0x200E), 0x205F, 0x2060, 0x3000, 0xFEFF, 0x2581)]
CONTROLS = [chr(c) for c in (*range(32), *range(0x7F, 0xA0), 0xAD, 0x200E, 0x202E, 0x2066, 0xFFFD, 0xFFFC, 0xE0001)]
SPECIALS = ["</s>", "<unk>", "<pad>", "<s>", "</S>", "< /s>", "＜／ｓ＞", "<0x41>", "▁", "{}", "<extra_id_0>"]
LETTERS = [chr(c) for c in range(0x20, 0x30000) if unicodedata.category(chr(c)) not in ("Cs", "Cn")]
MARKS = [c for c in LETTERS if unicodedata.category(c).startswith("M")]


def captions(rng: random.Random) -> str:
    """One caption in plain English."""
    one, other = (f"{rng.choice('a the my'.split())} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
    subject = rng.choice((one, f"{one} {rng.choice(VERBS)} {other}", f"{one} and {other}", rng.choice(NOUNS)))
    text = rng.choice(FRAMES).format(subject)
    return rng.choice((str, str, str.title, str.upper))(text)


def words(rng: random.Random) -> str:
    """Words that no dictionary has, numbers, addresses."""
    syllable = [c + v for c in "bdfghklmnprstvwz" for v in "aeiou"]
    made = ["".join(rng.choices(syllable, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 8))]
    made.insert(
        rng.randint(0, len(made)), rng.choice((str(rng.randint(0, 10**6)), "3.14%", "a@b.org", "o'clock", "x²"))
    )
    return " ".join(made)


def accents(rng: random.Random) -> str:
    """Latin with marks, Greek, Cyrillic; composed and decomposed."""
    text = " ".join(rng.choices(ACCENTED, k=rng.randint(1, 6)))
    return unicodedata.normalize(rng.choice(("NFC", "NFD", "NFKC", "NFKD")), text)


def scripts(rng: random.Random) -> str:
    """Chinese, Japanese, Korean, Arabic, Hebrew, Devanagari and Thai between English words."""
    parts = rng.choices((CJK + "|" + ARABIC).split("|") + NOUNS, k=rng.randint(1, 4))
    return unicodedata.normalize(rng.choice(("NFC", "NFD")), rng.choice(("", " ", "\u3000")).join(parts))


def emoji(rng: random.Random) -> str:
    """Emoji, alone and stuck to words, with skin tones, joiners and flags."""
    return rng.choice(("", " ")).join(rng.choices(EMOJI + NOUNS, k=rng.randint(1, 6)))


def controls(rng: random.Random) -> str:
    """Control and format characters within words."""
    return "".join(rng.choice(NOUNS) + rng.choice(CONTROLS) for _ in range(rng.randint(1, 4)))


def spaces(rng: random.Random) -> str:
    """Runs of white space of every kind, also at both ends."""
    run = ["".join(rng.choices(SPACES, k=rng.randint(0, 4))) for _ in range(rng.randint(1, 4))]
    return rng.choice(NOUNS).join(run) + rng.choice(("", rng.choice(NOUNS)))


def punctuation(rng: random.Random) -> str:
    """Nothing but punctuation, ASCII or not."""
    return "".join(rng.choices(string.punctuation + "…“”«»¿¡—–。、！？·‧⁈", k=rng.randint(1, 12)))


def repeats(rng: random.Random) -> str:
    """Runs that can be cut in many equally likely ways."""
    unit = rng.choice(("a", "ab", "ha", "aba", "o", "no", "z", "zZ", "lol", "é", "猫", "1", "0.", "😀"))
    return f"{rng.choice(NOUNS)} s{unit * rng.randint(2, 40)}" + rng.choice(("", " ", f" {unit * rng.randint(2, 9)}"))


def long(rng: random.Random) -> str:
    """Longer than any model's text length."""
    family = rng.choice((captions, words, accents, scripts))
    return " ".join(family(rng) for _ in range(rng.randint(20, 60)))


def special_tokens(rng: random.Random) -> str:
    """Special tokens, and what only looks like one, inside text."""
    parts = [rng.choice((captions, accents, spaces))(rng) if rng.random() < 0.6 else rng.choice(SPECIALS)]
    parts += rng.choices([*SPECIALS, *NOUNS, " ", "  ", "!"], k=rng.randint(1, 4))
    rng.shuffle(parts)
    return rng.choice(("", " ", "\n")).join(parts)


def unicode(rng: random.Random) -> str:
    """Characters drawn from all of Unicode, some under piles of combining marks."""
    return "".join(
        rng.choice(LETTERS) + (rng.choice(MARKS) * rng.randint(1, 3) if rng.random() < 0.2 else "")
        for _ in range(rng.randint(1, 12))
    )


def empty(rng: random.Random) -> str:
    """Nothing, or nothing that is left after cleaning."""
    return rng.choice(("", " ", "\t\n", "...", "\u200b", "\x00", "!?", "▁", " ▁ "))


# The family of lines and its share of the corpus.
FAMILIES: dict[Callable[[random.Random], str], int] = {
    captions: 30, words: 10, accents: 10, scripts: 10, emoji: 5, controls: 5, spaces: 6, punctuation: 3,
    repeats: 6, long: 2, special_tokens: 6, unicode: 6, empty: 1,
}  # fmt: skip


def corpus(lines: int = 20_000, seed: int = 0) -> list[str]:
    """Returns `lines` texts of all families: for one seed, always the same, and a longer corpus begins as a shorter."""
    rng = random.Random(seed)
    families, weights = list(FAMILIES), list(FAMILIES.values())
    return [rng.choices(families, weights)[0](rng) for _ in range(lines)]
