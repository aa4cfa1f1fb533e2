"""Names of icons as captions: what names a thing, what is left out, and that nothing held out slips through."""

from __future__ import annotations

import pytest

from drawings.names import IconNames, Nouns, singular, words_of

# Offset, lexicographer file, "n", number of words, words with an id each, number of pointers, pointers of four fields,
# then what is not read here.
DATA = """\
  1 This software and database is being provided under a licence
00000001 05 n 02 dog 0 domestic_dog 0 002 @ 00000099 n 0000 ~ 00000009 n 0000 | a pet
00000002 06 n 03 car 0 motorcar 0 automobile 0 000 | a vehicle
00000003 06 n 01 guitar 0 000 | an instrument
00000004 06 n 01 acoustic_guitar 0 000 | an instrument
00000005 04 n 01 swimming 0 000 | an act
00000006 20 n 01 cherry 0 000 | a fruit
00000007 06 n 01 cat 0 000 | a whip
00000008 05 n 01 cat 0 000 | a pet
00000009 05 n 01 hound 0 000 | a kind of dog
00000010 04 n 02 pick 0 choice 0 000 | an act
00000011 06 n 02 pick 0 pickaxe 0 000 | a tool
00000012 06 n 01 cross 0 000 | a sign
"""
INDEX = """\
  1 This software and database is being provided under a licence
dog n 1 2 @ ~ 1 1 00000001
hound n 1 0 1 1 00000009
car n 1 1 @ 1 1 00000002
automobile n 1 1 @ 1 1 00000002
motorcar n 1 1 @ 1 1 00000002
guitar n 1 1 @ 1 1 00000003
acoustic_guitar n 1 1 @ 1 1 00000004
swimming n 1 1 @ 1 1 00000005
cherry n 1 1 @ 1 1 00000006
cat n 2 1 @ 2 1 00000008 00000007
pick n 2 1 @ 2 1 00000010 00000011
pickaxe n 1 0 1 1 00000011
cross n 1 0 1 1 00000012
"""


@pytest.fixture(scope="module")
def nouns(tmp_path_factory) -> Nouns:
    folder = tmp_path_factory.mktemp("wordnet")
    (folder / "dict").mkdir()
    (folder / "dict" / "data.noun").write_text(DATA, encoding="utf-8")
    (folder / "dict" / "index.noun").write_text(INDEX, encoding="utf-8")
    return Nouns(folder)


def concept(code: str, label: str, split: str, *aliases: str) -> dict:
    return {"code": code, "label": label, "split": split, "aliases": list(aliases)}


@pytest.fixture(scope="module")
def names(nouns) -> IconNames:
    concepts = [
        concept("a", "cat", "train", "kitty"),
        concept("b", "dog", "held_out"),
        concept("c", "automobile", "held_out", "red car"),
        concept("d", "cherries", "train"),
        concept("e", "pick", "held_out"),
        concept("f", "latin cross", "held_out"),
        concept("g", "electric guitar", "held_out"),
    ]
    return IconNames(concepts, nouns)


def test_weights_sizes_and_numbers_are_no_part_of_a_name():
    assert words_of("acoustic-guitar-02-bold-duotone") == ["acoustic", "guitar"]
    assert words_of("cat2-outline") == ["cat"]


@pytest.mark.parametrize("name", ["arrow-left", "cat-off", "letter-a", "file-cat", "x", "24", "one-two-three-four"])
def test_interfaces_letters_and_long_names_are_no_captions(name):
    assert words_of(name) == []


def test_plurals_are_their_singulars():
    words = {"cats": "cat", "boxes": "box", "cherries": "cherry", "glass": "glass", "bus": "bus", "dishes": "dish"}
    assert {word: singular(word) for word in words} == words


def test_first_meaning_says_whether_a_noun_is_a_thing(nouns):
    assert nouns.is_thing(["guitar"])
    assert nouns.is_thing(["electric", "guitars"])
    assert not nouns.is_thing(["swimming"])
    assert not nouns.is_thing(["unheard"])
    assert nouns.knows(["acoustic", "guitar"])
    assert not nouns.knows(["electric", "guitar"])


def test_same_things_are_synonyms_of_all_meanings_with_a_look_and_direct_kinds(nouns):
    assert nouns.same_things("car") == {"car", "motorcar", "automobile"}
    assert nouns.same_things("dog") == {"dog", "domestic dog", "hound"}
    assert nouns.same_things("pick") == {"pick", "pickaxe"}  # the first meaning is an act
    assert nouns.same_things("swimming") == set()


def test_icon_of_a_trained_emoji_joins_it_and_another_thing_is_a_new_concept(names):
    assert names.find("cat-fill") == ("a", "cat")
    assert names.find("kitty") == ("a", "kitty")
    assert names.find("acoustic-guitars") == ("icon:acousticguitar", "acoustic guitar")
    assert names.find("swimming") is None


@pytest.mark.parametrize(
    "name",
    [
        "dog",
        "dogs-fill",
        "hot-dog",
        "dog-house",
        "domestic-dog",
        "hound",
        "pickaxe",
        "automobile",
        "motorcar",
        "car-red",
        "redcar",
    ],
)
def test_nothing_that_names_a_held_out_concept_passes(names, name):
    assert names.names_held_out(words_of(name))
    assert names.find(name) is None


def test_part_of_a_held_out_name_is_not_its_name(names):
    assert not names.names_held_out(["red", "cat"])


def test_new_concept_at_the_end_of_a_held_out_name_is_left_out_but_a_trained_one_stays(names):
    assert names.find("cross") is None
    assert names.find("guitar") is None
    assert names.find("cat") == ("a", "cat")
