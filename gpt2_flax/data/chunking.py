"""Where a text may be cut so that the ids of its pieces, joined, are the ids of the text.

Byte-level BPE first splits a text into parts by the kinds of its characters: a word or a number
or a run of signs, each with at most one space before it, and white space. Then it joins bytes
inside each part. So a text can be cut wherever a part is sure to end, and inside a part between
two bytes that no token holds side by side. For any other tokenizer a cut is tried out: at a space
between two words, where the text on both sides gives the same ids cut and whole.
"""

import functools
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator

import numpy as np

PIECE_CHARS = 64 * 1024
# A text without a safe place is cut all the same, at the cost of about one token pair a cut.
LONGEST_PIECE_CHARS = 4 * 1024 * 1024
# How much text a trial takes on either side of a cut, and how many a stretch of text has.
TRIAL_CHARS = 200
TRIALS = 16
STRETCH_CHARS = 64 * 1024

# What is sure about a character, in any version of Unicode. Several may hold, or none.
SPACE = 1  # one of " \t\r\n"
SOLID = 2  # no white space
LETTER = 4
NUMBER = 8
SIGN = 16  # neither letter nor number; white space, too
APOSTROPHE = 32


class Cuts:
    """Chooses where to cut the texts of one tokenizer.

    forced: how many pieces ended at the longest length, because no place was known to be safe.

    A subclass has `place`, and `reach`: on how many characters behind a place it depends.
    """

    reach: int

    def __init__(self):
        self.forced = 0
        # The beginning of a text without a safe place up to a length: it comes again and again,
        # each time with more text behind it.
        self.hopeless = ("", 0)

    def first_cut(self, text: str, at: int, ends: bool) -> int:
        """Where the piece that begins at `at` ends; 0 where only more text can tell.

        A function of nothing but the text from `at` on, so that reading from the start of any
        piece gives the same pieces again. ends: whether `text` is all there is.
        """
        left = len(text) - at
        if left <= PIECE_CHARS:
            return len(text) if ends else 0
        head, begin = self.hopeless
        begin = begin if text.startswith(head, at) else 0
        while begin < LONGEST_PIECE_CHARS:
            end = min(max(PIECE_CHARS, 2 * begin), LONGEST_PIECE_CHARS)
            if left < end + self.reach and not ends:
                self.hopeless = (text[at : at + begin + self.reach], begin)
                return 0
            place = self.place(text[at : at + end + self.reach], begin, end)
            if not place and left <= end:
                place = left
            if place:
                self.hopeless = ("", 0)
                return at + place
            begin = end
        self.hopeless = ("", 0)
        self.forced += 1
        return at + self.forced_place(text[at : at + LONGEST_PIECE_CHARS])

    def place(self, head: str, begin: int, end: int) -> int:
        """A safe place in (begin, end] of a text that goes on like `head`; 0 if there is none.

        The last one where begin is 0, else the first, so that pieces are near PIECE_CHARS.
        """
        raise NotImplementedError

    def forced_place(self, head: str) -> int:
        """Where to cut a text that goes on behind `head` and has no safe place in it."""
        return len(head)


class ByteLevelCuts(Cuts):
    """For a tokenizer that `is_byte_level` accepts.

    added: the tokens that are found in a text before it is split. apart: 256 x 256 bool, whether
    no token holds one byte and then the other.
    """

    def __init__(self, added: list[str], apart: np.ndarray):
        super().__init__()
        self.added, self.apart = added, apart
        self.reach = max(map(len, added), default=1)

    def place(self, head: str, begin: int, end: int) -> int:
        if not begin:
            for first in (max(0, end - 256), 0):  # most texts have a space at once
                kinds = kinds_of(head[first : end + 1])
                found = np.flatnonzero(before_space(kinds[:-1], kinds[1:]))
                if len(found):
                    return first + 1 + int(found[-1])
            return self.outside_added(head, self.places(head, 0, end)[::-1])
        for first in range(begin, end, STRETCH_CHARS):
            found = self.places(head, first, min(end, first + STRETCH_CHARS))
            if place := self.outside_added(head, found):
                return place
        return 0

    def places(self, head: str, begin: int, end: int) -> np.ndarray:
        """The safe places in (begin, end], and those that only an added token makes unsafe."""
        start = max(0, begin - 1)  # the character before the one before a place counts
        found = start + 1 + np.flatnonzero(self.are_safe(head[start : end + 1]))
        return found[found > begin]

    def are_safe(self, text: str) -> np.ndarray:
        """Whether a text may be cut behind each of its characters but the last."""
        kinds = kinds_of(text)
        left, right = kinds[:-1], kinds[1:]
        utf8 = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        starts = np.flatnonzero((utf8 & 0xC0) != 0x80)[1:]
        # Cut here, a part must still begin and end as it does whole. White space ends by what
        # follows it, and an apostrophe takes along s, t, re ... but only from where a part begins.
        inside = ((left & SOLID) != 0) & (((left | right) & APOSTROPHE) == 0)
        inside[1:] &= (left[:-1] & APOSTROPHE) == 0
        inside &= self.apart[utf8[starts - 1], utf8[starts]]
        return inside | before_space(left, right) | between_kinds(left, right)

    def outside_added(self, head: str, places: Iterable[int]) -> int:
        """The first of the places that is not inside an added token; 0 if there is none."""
        for place in map(int, places):
            spans = ((t, max(0, place - len(t) + 1), place + len(t) - 1) for t in self.added)
            if all(head.find(*span) < 0 for span in spans):
                return place
        return 0


def before_space(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether one part ends and another begins because of a space."""
    return ((left & SOLID) != 0) & ((right & SPACE) != 0)


def between_kinds(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether one part ends and another begins because of the kinds of two characters."""
    after_letter = ((left & LETTER) != 0) & ((right & (NUMBER | SIGN)) != 0)
    after_number = ((left & NUMBER) != 0) & ((right & (LETTER | SIGN)) != 0)
    # An apostrophe may belong to the letters behind it.
    after_sign = (left & (SIGN | SOLID | APOSTROPHE)) == SIGN | SOLID
    return after_letter | after_number | (after_sign & ((right & (LETTER | NUMBER)) != 0))


def kinds_of(text: str) -> np.ndarray:
    """What is sure about each character: sums of SPACE, SOLID, LETTER ..."""
    return kinds_of_characters()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")]


@functools.cache
def kinds_of_characters() -> np.ndarray:
    """What is sure about each code point, one byte each.

    The tokenizers library has a Unicode table of its own, of another version than Python's. What
    Python's newest and oldest table agree on is taken to be what every version says.
    """
    known = 0x30000  # beyond it the oldest table has no letters
    characters = "".join(map(chr, range(known)))
    new, old = (
        np.frombuffer("".join(map(table.category, characters)).encode(), np.uint8).reshape(-1, 2)
        for table in (unicodedata, unicodedata.ucd_3_2_0)
    )

    def majors(categories, kinds):
        return np.isin(categories[:, 0], [*kinds.encode()])

    def always(kinds):
        return majors(new, kinds) & majors(old, kinds)

    kinds = np.zeros(0x110000, np.uint8)
    added_since = (old == [*b"Cn"]).all(axis=1)
    # No version has made white space of what another calls one of these.
    solid = majors(new, "LMNPS") & (majors(old, "LMNPS") | added_since)
    kinds[:known][solid] |= SOLID
    kinds[:known][always("L")] |= LETTER
    kinds[:known][always("N")] |= NUMBER
    kinds[:known][always("MPSZ")] |= SIGN
    kinds[[*b" \t\r\n"]] = SPACE | SIGN
    kinds[ord("'")] |= APOSTROPHE
    return kinds


class VerifiedCuts(Cuts):
    """For any tokenizer. encode: a text's ids, without special tokens added."""

    def __init__(self, encode: Callable[[str], Iterable[int]]):
        super().__init__()
        self.encode = encode
        self.reach = TRIAL_CHARS
        # One that puts something before every text never gives the same ids.
        sample = "the words before a cut and the words after it"
        self.ever_holds = self.holds(sample, sample.index(" and"))

    def place(self, head: str, begin: int, end: int) -> int:
        if not self.ever_holds:
            return 0
        places = itertools.islice(between_words(head, begin, end), TRIALS)
        return next((place for place in places if self.holds(head, place)), 0)

    def holds(self, text: str, place: int) -> bool:
        """Whether a cut changes no id of the text around it."""
        left = text[max(0, place - TRIAL_CHARS) : place]
        right = text[place : place + TRIAL_CHARS]
        return [*self.encode(left + right)] == [*self.encode(left), *self.encode(right)]

    def forced_place(self, head: str) -> int:
        return next(between_words(head, 0, len(head) - 1), len(head))


def between_words(head: str, begin: int, end: int) -> Iterator[int]:
    """Single spaces between words in (begin, end]: from the last on where begin is 0."""
    at = begin if begin else end + 1
    while True:
        at = head.find(" ", at + 1, end + 1) if begin else head.rfind(" ", 1, at)
        if at < 0:
            return
        if head[at - 1].isalnum() and head[at + 1 : at + 2].isalpha():
            yield at


def make_cuts(tokenizer) -> Cuts:
    """The cuts for a `Tokenizer`."""
    description = json.loads(tokenizer.to_json())
    if not is_byte_level(description):
        return VerifiedCuts(tokenizer.encode)
    added = [token["content"] for token in description["added_tokens"]]
    return ByteLevelCuts(added, never_side_by_side(description["model"]["vocab"]))


def cut_up(text: str, cuts: Cuts) -> Iterator[str]:
    """A text as pieces."""
    at = 0
    while at < len(text):
        end = cuts.first_cut(text, at, ends=True)
        yield text[at:end]
        at = end


def is_byte_level(description: dict) -> bool:
    """Whether a tokenizer splits texts and joins bytes by GPT-2's rules. description: its JSON."""
    model, splitter = description["model"], description["pre_tokenizer"] or {}
    rules = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
             "ignore_merges")  # fmt: skip
    return (
        not any(description[stage] for stage in ("truncation", "padding", "normalizer"))
        and splitter.get("type") == "ByteLevel"
        and splitter["use_regex"]
        and not splitter["add_prefix_space"]
        and model["type"] == "BPE"
        and not any(model.get(rule) for rule in rules)
        # A byte that is no token would be left out, or become one with its neighbours.
        and model["vocab"].keys() >= {*bytes_to_characters()}
        and all(map(stands_alone, description["added_tokens"]))
    )


def stands_alone(token: dict) -> bool:
    """Whether an added token is found in a text wherever it stands, and takes no space along."""
    takes_more = token["single_word"] or token["lstrip"] or token["rstrip"]
    return not takes_more and token["content"].split() == [token["content"]]


def never_side_by_side(vocabulary: Iterable[str]) -> np.ndarray:
    """256 x 256 bool: whether no token holds one byte and then the other."""
    text = "\n".join(vocabulary)  # no byte is written as a line feed
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    none = 256
    byte_of = np.full(0x110000, none, np.int16)
    byte_of[[*map(ord, bytes_to_characters())]] = np.arange(256)
    in_text = byte_of[codes]
    never = np.ones((257, 257), bool)
    never[in_text[:-1], in_text[1:]] = False
    return never[:none, :none]


@functools.cache
def bytes_to_characters() -> tuple[str, ...]:
    """GPT-2's printable stand-in for each byte: itself where it is printable Latin-1."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    stand_in = {byte: 256 + n for n, byte in enumerate(others)}
    return tuple(chr(stand_in.get(byte, byte)) for byte in range(256))
