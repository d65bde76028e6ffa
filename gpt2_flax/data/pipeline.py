"""The text of a run, from its settings: where it comes from, its tokenizer, its rows."""

import contextlib
import os
import pathlib

from tokenizers import Tokenizer as Learned

from gpt2_flax.config.train_config import TrainConfig, counts_epochs
from gpt2_flax.data import batches, files, sources, token_files, tokenizers
from gpt2_flax.data.sources import digest
from gpt2_flax.errors import UserError, say


def open_text(config: TrainConfig):
    """(training source, validation source or None); None also for files of ids."""
    return sources.open_sources(config, cache_folder(config))


def open_tokenizer(config, output_dir, train_source, continuing: bool) -> tokenizers.Tokenizer:
    """The run's own tokenizer where it has one already, else the one that was asked for."""
    if continuing and (output_dir / tokenizers.TOKENIZER_FILE).is_file():
        return tokenizers.load_saved(output_dir)
    if not config.tokenizer.startswith("bpe:"):
        return tokenizers.make_tokenizer(config.tokenizer, ())
    if train_source is None:
        raise UserError(
            f"tokenizer {config.tokenizer} is learned from text, and .bin files hold ids\n"
            "  name the --tokenizer that they were made with"
        )
    return learned_tokenizer(config, train_source)


def learned_tokenizer(config: TrainConfig, source) -> tokenizers.Tokenizer:
    """The tokenizer that `bpe:N` learns from a text, kept for the next time.

    Learning takes longer than anything else before the first step.
    """
    name = config.tokenizer
    kept = cache_folder(config) / f"{digest(source.key, name)}.tokenizer.json"
    with contextlib.suppress(Exception):  # missing or damaged; the library raises plain Exception
        return tokenizers.Tokenizer.of_fast(tokenizers.as_fast(Learned.from_file(str(kept))), name)
    say(f"learning {name.removeprefix('bpe:')} tokens from {source.name}")
    # A word cut in two once in a piece of text changes nothing to speak of here.
    cuts = tokenizers.make_tokenizer("bytes", ()).cuts
    texts = (piece.text for piece in source.pieces(0, cuts))
    tokenizer = tokenizers.make_tokenizer(name, texts)
    source.found.clear()  # it is counted when the text is tokenized
    with token_files.storage_errors(kept), token_files.temporary_beside(kept) as temporary:
        temporary.write_text(tokenizer.to_json(), "utf-8")
        os.replace(temporary, kept)
    return tokenizer


def open_rows(config, tokenizer, train_source, held_out_source):
    """(training rows, ids of the held-out text or None, what is known of the training text).

    A source is None where files of ids take its place.
    """
    folder = cache_folder(config)
    processes = config.tokenize_processes or len(os.sched_getaffinity(0))

    def ids_of(source, patterns, setting):
        if source is not None:
            return token_files.token_file(source, tokenizer, config.add_eos, folder, processes)
        paths = files.find_files(patterns, setting)
        return token_files.id_files(paths, tokenizer, folder)

    held_out, about = None, {}
    if config.streaming:
        rows = batches.StreamedRows(
            train_source, tokenizer, config.add_eos, config.block_size, config.seed,
            config.shuffle, config.shuffle_window,
        )  # fmt: skip
        if counts_epochs(config):
            about = rows.measure()
        else:
            rows.require_one()
    else:
        ids, about = ids_of(train_source, config.train_file, "train_file")
        if train_source is None and config.validation_share and not config.validation_file:
            ids, held_out = token_files.split_ids(ids, config.validation_share, tokenizer.eos_id)
            about["count"] = len(ids)
        rows = batches.StoredRows(ids, config.block_size, config.seed, config.shuffle)
    name = train_source.name if train_source is not None else ", ".join(config.train_file)
    if rows.count is not None:
        batches.check_length(rows, name)
    warn_of_text(about, name)
    if held_out_source is not None or config.validation_file:
        held_out, _ = ids_of(held_out_source, config.validation_file, "validation_file")
    if held_out is not None and len(held_out) < 2:
        raise UserError(
            f"the text held out for evaluation has {len(held_out)} tokens, too few for one loss\n"
            "  give a --validation_file, a larger --validation_share, or --validation_share 0"
        )
    return rows, held_out, about


def cache_folder(config: TrainConfig) -> pathlib.Path:
    from huggingface_hub.constants import HF_HOME

    if config.cache_dir:
        return pathlib.Path(config.cache_dir).expanduser()
    return pathlib.Path(HF_HOME) / "gpt2_flax"


def warn_of_stream(rows) -> None:
    """Say the same of a stream that was read only while it was trained on."""
    if rows.count is None:
        rows.note_found()
        warn_of_text({"found": rows.found}, f"{rows.source.name}, as far as it was read")


def warn_of_text(about: dict, name: str) -> None:
    """Say once what is odd in a text and was kept, replaced or left out."""
    notes = {
        "replaced": "bytes that are not UTF-8 became U+FFFD in {} places",
        "nul": "{} NUL characters are kept as they are",
        "crlf": "{} line ends are CRLF; the CR is kept as it is",
        "empty": "{} rows or lines without text are left out",
        "forced_cuts": "{} words were so long that they were cut: ids may differ there",
    }
    found = {"forced_cuts": about.get("forced_cuts", 0), **about.get("found", {})}
    for what, note in notes.items():
        if found.get(what):
            say(f"{name}: {note.format(f'{found[what]:,}')}")
