"""Text as its readers know it, from text that was spaced out into words.

WikiText comes in words: a space before every comma, `@-@` for a hyphen. GPT-2 never saw such
text. What is evaluated is often the text brought back, and what its loss is divided by, the
words of the text as it came.
"""

import itertools
import re

from gpt2_flax.data.sources import Piece

EN_DASH, HYPHEN, FRACTION_SLASH, APOSTROPHE = "\u2013", "\u2011", "\u2044", "\u2019"
PRIMES = "\u2032\u2033"  # of feet and inches, minutes and seconds
GLUED_LEFT = {*",.;:!?%)]}♭♯", *PRIMES, "..."}  # stand right behind the word before
GLUED_RIGHT = {*"([{$£€¥₹#°"}  # stand right before the word behind
GLUED_BOTH = {"/", "—", FRACTION_SLASH, HYPHEN}
SPLIT_SIGNS = {"@-@": "-", "@,@": ",", "@.@": "."}  # were inside a word or a number
ENDING = re.compile(rf"['{APOSTROPHE}][^\W\d_]")  # 's, 't, 're, and 'Brien of O'Brien
NUMBER = re.compile(r"[\d.,]*\d")


def wikitext(text: str) -> str:
    """WikiText's lines as running text. Line ends stay where they are.

    Only spaces go, and the @ around a sign that stood inside a word or a number. It undoes what
    can be undone: where a text had `US$ 3` or `US$3` nobody can tell any more.
    """
    return "\n".join(map(join_words, text.split("\n")))


def join_words(line: str) -> str:
    """The words of one line, with a space between two where a text would have one."""
    words = line.split()
    if len(words) > 2 and words[0] == words[-1] == "=":
        return join_heading(words)
    joined, glue, open_quotes = [], True, set()
    for before, word, behind in zip(
        itertools.chain([""], words), words, itertools.chain(words[1:], [""]), strict=False
    ):
        to_left, to_right = sides(before, word, behind, open_quotes)
        if not (glue or to_left):
            joined.append(" ")
        joined.append(SPLIT_SIGNS.get(word, word))
        glue = to_right
    return "".join(joined)


def sides(before: str, word: str, behind: str, open_quotes: set[str]) -> tuple[bool, bool]:
    """Whether a word stands without a space behind the one before it, and before the next.

    open_quotes: the quotation marks that are open; it is kept here.
    """
    if word in SPLIT_SIGNS or word in GLUED_BOTH:
        return True, True
    if word == EN_DASH:  # between two numbers it is a range, elsewhere a dash with spaces
        is_range = bool(NUMBER.fullmatch(before) and NUMBER.fullmatch(behind))
        return is_range, is_range
    if word == "'" and word not in open_quotes and before.endswith("s"):
        return True, False  # the genitive of a plural
    if word in ("'", '"'):
        closes = word in open_quotes
        (open_quotes.remove if closes else open_quotes.add)(word)
        return closes, not closes
    return word in GLUED_LEFT or bool(ENDING.match(word)), word in GLUED_RIGHT


def join_heading(words: list[str]) -> str:
    """`= = Early life = =` as `== Early life ==`."""
    level = next((n for n, word in enumerate(words) if word != "="), len(words))
    if 2 * level >= len(words) or words[-level:] != ["="] * level:
        return " ".join(words)
    title = join_words(" ".join(words[level:-level]))
    return f"{'=' * level} {title} {'=' * level}"


DETOKENIZERS = {"none": None, "wikitext": wikitext}


class Counted:
    """A source whose text is counted as it is, then detokenized.

    words: runs of anything but white space; lines: line ends; bytes: of UTF-8. All of what
    `pieces` has read so far, before `detokenize`; bytes_out: after it.
    """

    def __init__(self, source, detokenize=None):
        """detokenize: text of whole lines -> text; None to leave it as it is."""
        self.source, self.name, self.detokenize = source, source.name, detokenize
        self.words = self.lines = self.bytes = self.bytes_out = 0
        self.in_word = False

    def pieces(self, start: int, cuts):
        passed = self.counted(self.source.pieces(start, cuts))
        if self.detokenize is not None:
            passed = self.detokenized(passed, cuts)
        for piece in passed:
            self.bytes_out += len(piece.text.encode())
            yield piece

    def counted(self, pieces):
        for piece in pieces:
            text = piece.text
            self.bytes += len(text.encode())
            self.lines += text.count("\n")
            if text:
                self.words += len(text.split()) - (self.in_word and not text[0].isspace())
                self.in_word = not text[-1].isspace()
            self.in_word = self.in_word and not piece.ends_document
            yield piece

    def detokenized(self, pieces, cuts):
        """Pieces of the text that comes of whole lines."""
        held = ready = ""
        for piece in pieces:
            ends = piece.ends_document
            held += piece.text
            whole = len(held) if ends else held.rfind("\n") + 1
            ready, held = ready + self.detokenize(held[:whole]), held[whole:]
            while cut := cuts.first_cut(ready, 0, ends):
                yield Piece(ready[:cut], piece.start, ends and cut == len(ready), piece.done)
                ready = ready[cut:]
