"""A dataset's rows are documents, kept on disk or streamed; the hub is asked once."""

import errno
import itertools
import json
import os
import pathlib
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gpt2_flax import hub
from gpt2_flax.config.train_config import TrainConfig
from gpt2_flax.data import chunking, hub_datasets
from gpt2_flax.data.hub_datasets import SHARD, Rows, Stream, is_heading, open_dataset
from gpt2_flax.data.sources import open_sources
from gpt2_flax.data.tokenizers import make_tokenizer
from gpt2_flax.errors import StorageError, UserError
from tests.text_fixtures import check_restarts, documents, joined, refused

reachable = hub.reachable  # tests put others in its place
CUTS = make_tokenizer("bytes", ()).cuts

ARTICLES = [
    ["", " = Alpha = \n", "", " The first one . \n", " = = History = = \n", " x = y = z \n"],
    [" = Beta Gamma = \n", None, "", " = = = Deep = = = \n", " = \n", " = = \n"],
    [" = D = E = \n", " last \n", ""],
]
LINES = [line for article in ARTICLES for line in article]
TEXTS_OF_ARTICLES = ["".join(filter(None, article)) for article in ARTICLES]
WIKITEXT, STORIES = "Salesforce/wikitext wikitext-2-raw-v1", "someone/stories"
both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["kept", "streamed"])
every_format = pytest.mark.parametrize("ending", ["parquet", "jsonl"])


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    """Hugging Face's caches of a test stay in it, and it is the first to ask for the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "")  # may be set here: taken back at the end
    reachable.cache_clear()
    yield
    reachable.cache_clear()


@pytest.fixture(params=[1, 7, 64])
def piece_chars(request, monkeypatch):
    monkeypatch.setattr(chunking, "PIECE_CHARS", request.param)
    return request.param


@pytest.fixture
def few_at_once(monkeypatch):
    monkeypatch.setattr(hub_datasets, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(chunking, "PIECE_CHARS", 9)


def write_dataset(folder: pathlib.Path, ending: str = "parquet", column: str = "text", **splits):
    """A dataset in a directory: for each split, the texts of its shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, shards in splits.items():
        for n, texts in enumerate(shards):
            path = folder / f"{split}-{n:05d}-of-{len(shards):05d}.{ending}"
            rows = [{"n": n, column: text} for n, text in enumerate(texts)]
            if ending == "jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            else:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return folder


def open_parts(dataset, folder, **settings):
    return open_dataset(TrainConfig(dataset=str(dataset), **settings), folder / "cache")


def make_rows(texts: list, name: str = WIKITEXT) -> Rows:
    table = datasets.Dataset.from_dict({"n": [*range(len(texts))], "body": texts})
    return Rows(lambda: table, name, "body", table._fingerprint)


@pytest.fixture
def make_stream(tmp_path):
    """A function that makes a stream of the texts of some shards."""
    numbers = itertools.count()

    def make(*shards: list, name: str = WIKITEXT, n_rows=None) -> Stream:
        folder = write_dataset(tmp_path / f"stream {next(numbers)}", "jsonl", "body", train=shards)
        rows = datasets.load_dataset_builder(str(folder)).as_streaming_dataset(split="train")
        assert rows.num_shards == len(shards)
        return Stream(rows, name, "body", "key", n_rows, lambda error: error)

    return make


@pytest.fixture(params=[False, True], ids=["kept", "streamed"])
def make(request, make_stream):
    """Rows, or a stream of them."""
    return make_stream if request.param else make_rows


# ---------------------------------------------------------------- rows


def test_an_article_of_wikitext_is_a_document(piece_chars, make):
    source = make(LINES)
    assert documents(source, CUTS) == TEXTS_OF_ARTICLES
    assert source.found["empty"] == 0  # a blank line is a part of an article


def test_a_row_of_another_dataset_is_a_document(piece_chars, make):
    source = make(LINES, name=STORIES)
    assert documents(source, CUTS) == [line for line in LINES if line]
    assert source.found["empty"] == sum(not line for line in LINES) == 5


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (" = Title = \n", True), ("= A = B =\n", True), (" = 1 = ", True),
        (" = = Section = = \n", False), (" = = = Deeper = = = ", False), (" = \n", False),
        (" = = \n", False), (" x = y = \n", False), (" = x \n", False), ("", False),
        (None, False),
    ],
)  # fmt: skip
def test_a_title_is_told_from_a_section(line, expected):
    assert is_heading(line) is expected


@pytest.mark.parametrize("name", [WIKITEXT, STORIES])
def test_rows_can_be_read_on_from_any_piece(monkeypatch, name):
    """Over more rows than are fetched at once, some cut up, with a piece's row as its start."""
    monkeypatch.setattr(chunking, "PIECE_CHARS", 9)
    texts = LINES * 151
    texts[996:1003] = [None, "", None, " = End of a fetch = \n", "", None, "after it\n"]
    rows = make_rows(texts, name)
    pieces = list(rows.pieces(0, CUTS))
    assert joined(pieces) == "".join(filter(None, texts))
    assert len(texts) > 2000
    n = len(texts)
    for start in (0, 1, 5, 950, 995, 999, 1002, 1003, 1999, 2000, 2001, n - 1, n):
        rest = [piece for piece in pieces if piece.start >= start]
        assert list(rows.pieces(start, CUTS)) == rest
    shares = [piece.done for piece in pieces]
    assert shares == sorted(shares) and 0 < shares[0] < 0.01 and shares[-1] > 0.99


@pytest.mark.parametrize("name", [WIKITEXT, STORIES])
def test_a_stream_can_be_read_on_from_any_piece(few_at_once, make_stream, name):
    """Also in a later shard, in a shard without text, and over a document in two shards."""
    shards = [LINES, [], LINES[:3], ["", None], LINES * 2, [" rest of it \n"]]
    stream = make_stream(*shards, name=name)
    pieces = check_restarts(stream, CUTS, n_places=99)
    assert joined(pieces) == "".join(filter(None, itertools.chain(*shards)))
    assert {piece.start // SHARD for piece in pieces} == {0, 2, 4, 5}
    starts = [*dict.fromkeys(piece.start for piece in pieces)]
    assert starts == [
        SHARD * number + row
        for number, texts in enumerate(shards)
        for row, text in enumerate(texts)
        if text
    ]
    in_memory = make_rows([*itertools.chain(*shards)], name)
    assert [(p.text, p.ends_document) for p in pieces] == [
        (p.text, p.ends_document) for p in in_memory.pieces(0, CUTS)
    ]
    assert {piece.done for piece in pieces} == {None}


def test_keys_tell_rows_apart(make_stream):
    texts = ["one", "two"]
    parts = [
        make_rows(texts), make_rows([*texts, "three"]), *make_rows(texts).split(0.5),
        make_stream(texts), *make_stream(texts, n_rows=2).split(0.5),
        *make_stream(texts, n_rows=2).split(0.99),
    ]  # fmt: skip
    assert len({part.key for part in parts}) == len({part.fingerprint for part in parts}) == 9
    assert make_rows(texts).split(0.5)[1].key == parts[3].key


# ---------------------------------------------------------------- split


@pytest.mark.parametrize("share", [0.1, 0.5, 0.83, 0.001, 0.999])
def test_split_gives_the_rows_once_each(few_at_once, share):
    texts = [f"row {n}\n" for n in range(23)]
    whole = make_rows(texts, STORIES)
    train, held_out = whole.split(share)
    first, second = documents(train, CUTS), documents(held_out, CUTS)
    assert first + second == texts
    assert first and len(second) == min(22, round(23 * share + 0.49))
    for part in (train, held_out):
        assert check_restarts(part, CUTS, n_places=99)[-1].done == 1.0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.83, 0.001, 0.999])
def test_split_gives_the_rows_of_a_stream_once_each(few_at_once, make_stream, share):
    """The first ones are held out: they are known without reading the others."""
    texts = [f"row {n}\n" for n in range(23)]
    train, held_out = make_stream(texts[:9], texts[9:], name=STORIES, n_rows=23).split(share)
    first, second = documents(held_out, CUTS), documents(train, CUTS)
    assert first + second == texts
    assert len(first) == max(1, round(23 * share))
    for part in (train, held_out):
        check_restarts(part, CUTS, n_places=99)


@pytest.mark.parametrize(
    ("share", "n_articles"), [(0.4, 1), (0.6, 2), (0.62, 2), (0.7, 2), (0.85, 2)]
)
def test_rows_of_wikitext_are_split_between_articles(few_at_once, share, n_articles):
    """If that leaves half of the share or more: the second and third begin in rows 6 and 12."""
    train, held_out = make_rows(LINES).split(share)
    assert documents(train, CUTS) == TEXTS_OF_ARTICLES[: 3 - n_articles]
    assert documents(held_out, CUTS) == TEXTS_OF_ARTICLES[3 - n_articles :]


def test_headings_divide_wikitext_alone(few_at_once, make_stream):
    rows = make_rows(LINES, STORIES).split(0.4)
    stream = make_stream(LINES, name=STORIES, n_rows=len(LINES)).split(0.34)
    for parts, n_rows in ((rows, 9), (stream[::-1], 5)):
        got = [documents(part, CUTS) for part in parts]
        assert got == [[*filter(None, LINES[:n_rows])], [*filter(None, LINES[n_rows:])]]


def test_a_long_article_is_split(few_at_once, make_stream):
    """No other begins in the first half of the share."""
    lines = [" = One = \n", *(f" line {n} \n" for n in range(40))]
    train, held_out = make_rows([*lines, " = Two = \n"]).split(0.1)
    assert joined(train.pieces(0, CUTS)) == "".join(lines[:37])
    assert joined(held_out.pieces(0, CUTS)) == "".join([*lines[37:], " = Two = \n"])
    train, held_out = make_stream(lines, n_rows=41).split(0.5)
    assert joined(held_out.pieces(0, CUTS)) == "".join(lines[:30])
    assert joined(train.pieces(0, CUTS)) == "".join(lines[30:])


@pytest.mark.parametrize(("share", "n_articles"), [(0.1, 0), (0.3, 1), (0.4, 1), (0.6, 2)])
def test_a_stream_of_wikitext_is_split_between_articles(
    few_at_once, make_stream, share, n_articles
):
    """If that takes no more than half as much again."""
    train, held_out = make_stream(LINES[:7], LINES[7:], n_rows=len(LINES)).split(share)
    held, trained = documents(held_out, CUTS), documents(train, CUTS)
    assert "".join(held + trained) == "".join(TEXTS_OF_ARTICLES)
    if n_articles:
        assert held == TEXTS_OF_ARTICLES[:n_articles]
        assert trained == TEXTS_OF_ARTICLES[n_articles:]
    for part in (train, held_out):
        check_restarts(part, CUTS, n_places=99)


def test_a_single_row_is_trained_on():
    train, held_out = make_rows(["alone"], STORIES).split(0.5)
    assert documents(train, CUTS) == ["alone"] and documents(held_out, CUTS) == []


def test_a_stream_of_unknown_length_cannot_be_split(make_stream):
    with refused(
        r"^dataset someone/stories does not say how many rows it has, so no share of its stream"
        r" can be held out\n  give a --validation_file, or --validation_share 0$"
    ):
        make_stream(["one"], name=STORIES).split(0.1)


# ---------------------------------------------------------------- a dataset in a directory


@both_ways
@every_format
def test_a_directory_is_read_kept_or_streamed(tmp_path, few_at_once, streaming, ending):
    shards = [[f"{name}{n} a story" for n in range(size)] for name, size in [("a", 9), ("b", 5)]]
    folder = write_dataset(tmp_path / "stories", ending, train=shards, validation=[["v1"], ["v2"]])
    train, held_out = open_parts(folder, tmp_path, streaming=streaming)
    assert documents(train, CUTS) == [*itertools.chain(*shards)]
    assert documents(held_out, CUTS) == ["v1", "v2"]
    assert train.key != held_out.key and train.name == held_out.name == str(folder)
    check_restarts(train, CUTS, n_places=99)
    again = open_parts(folder, tmp_path, streaming=streaming)
    assert [part.key for part in again] == [train.key, held_out.key]
    assert not (tmp_path / "cache").exists()  # no note: it costs little to look again


@both_ways
def test_a_directory_of_wikitext_is_grouped_by_articles(tmp_path, streaming):
    folder = write_dataset(tmp_path / "wikitext", train=[LINES[:8], LINES[8:]])
    train, held_out = open_parts(folder, tmp_path, streaming=streaming)
    assert documents(train, CUTS) == TEXTS_OF_ARTICLES and held_out is None


@both_ways
@pytest.mark.parametrize(
    ("split", "expected", "has_validation"),
    [
        ("train", ["a", "b", "c", "d"], True),
        ("test", ["t"], True),
        ("validation", ["v"], False),
        ("train+test", ["a", "b", "c", "d", "t"], True),
        ("train+validation", ["a", "b", "c", "d", "v"], False),
        ("train[:50%]", ["a", "b"], True),
        ("train[3:]", ["d"], True),
    ],
)
def test_any_split_can_be_trained_on(tmp_path, streaming, split, expected, has_validation):
    folder = write_dataset(
        tmp_path / "stories", train=[["a", "b"], ["c", "d"]], validation=[["v"]], test=[["t"]]
    )
    settings = {"streaming": streaming, "dataset_split": split}
    if streaming and "[" in split:
        with refused(
            rf"^dataset \S*stories has no split {split.replace('[', '.')}: Bad split: .*\n"
            r"  set --dataset_split to one of: train, validation, test$"
        ):
            open_parts(folder, tmp_path, **settings)
        return
    train, held_out = open_parts(folder, tmp_path, **settings)
    assert documents(train, CUTS) == expected
    assert (held_out is not None) is has_validation
    other = open_parts(folder, tmp_path, **settings | {"dataset_split": "all"})
    assert other[0].key != train.key


@both_ways
def test_a_directory_that_was_changed_has_another_key(tmp_path, streaming):
    folder = tmp_path / "stories"
    keys = set()
    for text in ("one", "another"):
        write_dataset(folder, "jsonl", train=[[text]])
        train, _ = open_parts(folder, tmp_path, streaming=streaming)
        assert documents(train, CUTS) == [text]
        keys.add(train.key)
    assert len(keys) == 2


def test_a_directory_needs_no_hub(tmp_path, monkeypatch):
    def ask():
        raise AssertionError("the hub is asked")

    monkeypatch.setattr(hub, "reachable", ask)
    folder = write_dataset(tmp_path / "stories", train=[["a"]])
    assert documents(open_parts(folder, tmp_path)[0], CUTS) == ["a"]
    with refused(r"^dataset \S*stories has no column body"):
        open_parts(folder, tmp_path, text_column="body")


def test_a_share_is_held_out_where_a_dataset_has_no_validation_split(tmp_path, few_at_once):
    folder = write_dataset(tmp_path / "stories", train=[["a", "b"], ["c", "d"]])

    def texts(**settings):
        parts = open_sources(TrainConfig(dataset=str(folder), **settings), tmp_path)
        return [part and documents(part, CUTS) for part in parts]

    with refused(r"^dataset \S*stories does not say how many rows it has"):
        texts(streaming=True)
    assert texts(validation_share=0.25) == [["a", "b", "c"], ["d"]]
    assert texts(validation_share=0.0) == [["a", "b", "c", "d"], None]
    assert texts(streaming=True, validation_share=0.0) == [["a", "b", "c", "d"], None]
    # What a dataset's card says of it is known before it is read.
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  splits:\n  - name: train\n    num_examples: 4\n---\n"
    )
    assert texts(streaming=True, validation_share=0.5) == [["c", "d"], ["a", "b"]]
    (tmp_path / "v.txt").write_text("given")
    given = {"validation_file": (str(tmp_path / "v.txt"),)}
    assert texts(**given) == texts(streaming=True, **given) == [["a", "b", "c", "d"], ["given"]]


@both_ways
def test_a_share_is_no_choice_where_a_dataset_has_its_own_validation_split(tmp_path, streaming):
    folder = write_dataset(tmp_path / "stories", train=[["a"]], validation=[["v"]])

    def texts(**settings):
        config = TrainConfig(dataset=str(folder), streaming=streaming, **settings)
        return [part and documents(part, CUTS) for part in open_sources(config, tmp_path)]

    assert texts() == [["a"], ["v"]]
    assert texts(validation_share=0.0) == [["a"], None]
    with refused(
        r"^validation_share 0\.2 has no effect: \S*stories has a validation split of its own\n"
        r"  leave it out; 0 for no evaluation$"
    ):
        texts(validation_share=0.2)


@both_ways
@every_format
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"text_column": "body"},
            r" has no column body\n  set --text_column to one of n, text$",
        ),
        ({"dataset_split": "test"}, r" has no split test: .*\n.* to one of: train, validation$"),
        ({"text_column": "n"}, r"^column n of dataset \S*stories is no text but int64$"),
    ],
)
def test_what_a_directory_does_not_have_is_named(tmp_path, streaming, ending, settings, message):
    folder = write_dataset(tmp_path / "stories", ending, train=[["a"]], validation=[["v"]])
    with refused(message):
        open_parts(folder, tmp_path, streaming=streaming, **settings)


@pytest.mark.parametrize("content", [[["x"], ["y"]], [{"a": "x"}]])
@both_ways
def test_a_column_of_lists_or_objects_is_no_text(tmp_path, content, streaming):
    folder = write_dataset(tmp_path / "stories", train=[content])
    with refused(r"^column text of dataset \S*stories is no text but a list or object$"):
        open_parts(folder, tmp_path, streaming=streaming)


@pytest.mark.parametrize("split", ["train", "train[:0]"])
@pytest.mark.filterwarnings("ignore:.*train.csv:ResourceWarning")  # datasets 5.0 leaves it open
def test_an_empty_split_is_named(tmp_path, split):
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "train.csv").write_text("n,text\n" + "1,a\n" * ("[" in split))
    with refused(rf"^split {re.escape(split)} of dataset \S*stories is empty \(0 rows\)$"):
        open_parts(tmp_path / "stories", tmp_path, dataset_split=split)


@both_ways
def test_only_what_is_no_split_is_called_none(tmp_path, monkeypatch, streaming):
    """Arrow's errors are ValueErrors, too."""
    folder = write_dataset(tmp_path / "stories", train=[["a"]])
    method = "as_streaming_dataset" if streaming else "as_dataset"
    plain = getattr(datasets.DatasetBuilder, method)

    def fail(self, split=None, **settings):
        if split is None:
            return plain(self, **settings)
        raise pyarrow.ArrowInvalid("the file is too small")

    monkeypatch.setattr(datasets.DatasetBuilder, method, fail)
    with refused(r"^dataset \S*stories cannot be read: the file is too small$"):
        open_parts(folder, tmp_path, streaming=streaming)


def test_rows_that_cannot_be_read_any_more_are_named():
    class Damaged(list):
        def __getitem__(self, place):
            raise pyarrow.ArrowInvalid("the file is too small")

    rows = Rows(lambda: Damaged([1]), STORIES, "text", "key")
    with refused(
        r"^dataset someone/stories cannot be read: the file is too small\n"
        r"  remove it from Hugging Face's cache, and it is fetched again$"
    ):
        list(rows.pieces(0, CUTS))


@both_ways
def test_a_damaged_directory_is_named(tmp_path, streaming):
    folder = write_dataset(tmp_path / "stories", "jsonl", train=[["a"], ["b"]])
    (folder / "train-00001-of-00002.jsonl").write_text('{"n": 1, "te')
    with refused(r"^dataset \S*stories cannot be read: \S"):
        train, _ = open_parts(folder, tmp_path, streaming=streaming)
        list(train.pieces(0, CUTS))
    (tmp_path / "nothing").mkdir()
    with refused(r"^dataset \S*nothing cannot be read: .*(d|D)ata"):
        open_parts(tmp_path / "nothing", tmp_path, streaming=streaming)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"n": 1}, r"^dataset \S* has no column body\n  set --text_column to one of n$"),
        ({"body": 5}, r"^column body of dataset \S* is no text but int64$"),
        ({"body": ["x"]}, r"^column body of dataset \S* is no text but list$"),
    ],
)
def test_a_stream_that_does_not_tell_its_columns_is_checked_as_it_is_read(row, message):
    rows = datasets.IterableDataset.from_generator(lambda: iter([row]))
    assert rows.features is None
    with refused(message):
        list(Stream(rows, STORIES, "body", "key", None, None).pieces(0, CUTS))


def test_an_error_while_a_stream_is_read_is_told():
    def rows():
        yield {"text": "a"}
        raise ConnectionError("the hub went away")

    features = datasets.Features({"text": datasets.Value("string")})
    stream = datasets.IterableDataset.from_generator(rows, features)
    source = Stream(
        stream, STORIES, "text", "key", None, lambda error: UserError(f"told: {error}")
    )
    with refused("^told: the hub went away$"):
        list(source.pieces(0, CUTS))


# ---------------------------------------------------------------- the hub, made up


@pytest.fixture
def online(tmp_path, monkeypatch):
    """Directories in place of the hub's datasets, by name; `asked` lists who asked for one."""

    class Hub(dict):
        def hold(self, name, revision, **splits):
            place = tmp_path / "of the hub" / name.replace("/", "--")
            self[name] = write_dataset(place / revision, **splits)
            refs = tmp_path / "hub" / f"datasets--{name.replace('/', '--')}" / "refs"
            refs.mkdir(parents=True, exist_ok=True)
            (refs / "main").write_text(f"{revision}\n")

    online, load = Hub(), datasets.load_dataset_builder
    online.asked = []

    def load_dataset_builder(name, subset):
        online.asked.append((name, subset))
        if name not in online:
            raise ConnectionError(f"Couldn't reach {name}\nand a page more")
        return load(str(online[name]))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return online


def test_the_default_is_wikitext(online, tmp_path):
    online.hold("Salesforce/wikitext", "1", train=[LINES], validation=[["v\n"]])
    for settings in ({}, {"dataset": "Salesforce/wikitext"}, {"streaming": True}):
        train, held_out = open_sources(TrainConfig(**settings), tmp_path / "cache")
        assert documents(train, CUTS) == TEXTS_OF_ARTICLES
        assert documents(held_out, CUTS) == ["v\n"]
        assert train.name == WIKITEXT
    assert {*online.asked} == {("Salesforce/wikitext", "wikitext-2-raw-v1")}
    open_sources(TrainConfig(dataset_config="wikitext-103-raw-v1"), tmp_path / "cache")
    assert online.asked[-1] == ("Salesforce/wikitext", "wikitext-103-raw-v1")


def test_the_second_start_asks_neither_the_hub_nor_the_dataset(online, tmp_path, monkeypatch):
    online.hold(STORIES, "1", train=[["a"], ["b"]], validation=[["v"]])
    first = open_parts(STORIES, tmp_path)
    assert online.asked == [(STORIES, None)]
    assert [path.name.endswith(".dataset.json") for path in (tmp_path / "cache").iterdir()] == [
        True
    ]
    online.asked.clear()
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("the hub is asked"))
    second = open_parts(STORIES, tmp_path)
    assert [part.key for part in second] == [part.key for part in first]
    assert [part.name for part in second] == [STORIES] * 2
    assert open_sources(TrainConfig(dataset=STORIES), tmp_path / "cache")[0].key == first[0].key
    assert online.asked == []
    # The rows are there for whoever reads them, as without a token file.
    monkeypatch.setattr(hub, "reachable", lambda: True)
    assert [documents(part, CUTS) for part in second] == [["a", "b"], ["v"]]
    assert online.asked == [(STORIES, None)]


def test_another_revision_is_looked_at_again(online, tmp_path):
    online.hold(STORIES, "1", train=[["a"]])
    before, held_out = open_parts(STORIES, tmp_path)
    assert held_out is open_parts(STORIES, tmp_path)[1] is None and len(online.asked) == 1
    online.hold(STORIES, "2", train=[["a"], ["b"]], validation=[["v"]])
    after = open_parts(STORIES, tmp_path)
    assert [documents(part, CUTS) for part in after] == [["a", "b"], ["v"]]
    assert after[0].key != before.key
    assert len(online.asked) == 2 and len(list((tmp_path / "cache").iterdir())) == 1


def test_another_request_is_looked_at_by_itself(online, tmp_path, monkeypatch):
    online.hold(STORIES, "1", train=[["a"], ["b"]])
    open_parts(STORIES, tmp_path)
    open_parts(STORIES, tmp_path, dataset_split="train[:1]")
    open_parts(STORIES, tmp_path, dataset_config="other")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    open_parts(STORIES, tmp_path)
    assert len(online.asked) == 4


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "5", '{"revision": "1"}', "\ufffe"])
def test_a_note_that_cannot_be_used_is_made_anew(online, tmp_path, content):
    online.hold(STORIES, "1", train=[["a"]])
    first = open_parts(STORIES, tmp_path)[0]
    (note,) = (tmp_path / "cache").iterdir()
    note.write_text(content)
    assert open_parts(STORIES, tmp_path)[0].key == first.key
    open_parts(STORIES, tmp_path)
    assert len(online.asked) == 2
    note.write_bytes(b"\xff")
    open_parts(STORIES, tmp_path)
    assert len(online.asked) == 3


def test_a_place_where_no_note_can_be_kept_is_named(online, tmp_path):
    online.hold(STORIES, "1", train=[["a"]])
    (tmp_path / "cache").touch()
    with refused(
        r"^cannot write \S*/cache/\w+\.dataset\.json: (File exists|Not a directory)\n"
        r"  choose another place with --cache_dir, or make room there$",
        StorageError,
    ):
        open_parts(STORIES, tmp_path)


@both_ways
def test_a_hub_out_of_reach_is_named(online, tmp_path, streaming):
    with refused(
        r"^dataset a/none: the hub https://huggingface\.co cannot be reached and it is not in"
        r" the cache\n.*--train_file(?s:.*)quickstart"
    ):
        open_parts("a/none", tmp_path, streaming=streaming)
    assert os.environ["HF_DATASETS_OFFLINE"] == "1"
    assert not (tmp_path / "cache").exists()


def test_a_hub_that_answers_with_an_error_is_quoted(online, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: True)
    with refused(r"^dataset a/b \(c\): Couldn't reach a/b\n  ways on without the hub"):
        open_parts("a/b", tmp_path, dataset_config="c")
    assert os.environ["HF_DATASETS_OFFLINE"] == ""


def caused(error, cause):
    error.__cause__ = cause
    return error


Failed = datasets.exceptions.DatasetGenerationError


@pytest.mark.parametrize(
    ("error", "message", "kind"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"^dataset a/b cannot be kept in Hugging Face's cache: No space left on device\n"
            r"  make room there, or set HF_HOME to another place$",
            StorageError,
        ),
        (
            caused(Failed("An error"), OSError(errno.ENOSPC, "No space left on device")),
            r"^dataset a/b cannot be kept in Hugging Face's cache: No space left on device\n",
            StorageError,
        ),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            r"kept.*: Permission d",
            StorageError,
        ),
        (caused(Failed("An error"), ValueError("row 7\n")), r"^dataset a/b: row 7\n", UserError),
        (OSError(errno.ECONNREFUSED, "refused"), r"^dataset a/b: .*refused\n", UserError),
        (FileNotFoundError("no such dataset"), r"^dataset a/b: no such dataset\n", UserError),
    ],
)
def test_why_a_dataset_cannot_be_had_is_told(online, tmp_path, monkeypatch, error, message, kind):
    def fail(name, subset):
        raise error

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    for streaming in (False, True):
        with refused(message, kind):
            open_parts("a/b", tmp_path, streaming=streaming)
