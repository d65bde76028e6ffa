"""README.md beside the final model: the card that the Hugging Face hub and people read."""

import hashlib
import pathlib
import re

import yaml

from gpt2_flax.config.train_config import DATASET_ALIASES, EMBEDDED_DATASET, TrainConfig
from gpt2_flax.filesystem import replace_file, storage_errors
from gpt2_flax.reporting import summary as words
from gpt2_flax.reporting.summary import Outcome

CARD_FILE = "README.md"
# Ends a card of ours, with the digest of what stands before it: a card that somebody has
# changed since is theirs.
SEAL = re.compile(r"<!-- written by gpt2_flax, sha256 ([0-9a-f]{64}) -->\n?\Z")


def write(outcome: Outcome, path) -> bool:
    """Write the card, unless there is one that somebody else wrote or changed.

    Returns whether it was written. Raises StorageError.
    """
    path = pathlib.Path(path)
    with storage_errors(path):
        if path.is_symlink() or (path.exists() and not is_ours(path)):
            return False
    replace_file(path, sealed(card(outcome)).encode())
    return True


def sealed(text: str) -> str:
    return f"{text}<!-- written by gpt2_flax, sha256 {digest(text)} -->\n"


def is_ours(path: pathlib.Path) -> bool:
    """Whether a file is a card as we wrote it."""
    if not path.is_file():
        return False
    text = path.read_bytes().decode("utf-8", errors="replace")
    seal = SEAL.search(text)
    return seal is not None and seal[1] == digest(text[: seal.start()])


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- the text


def card(outcome: Outcome) -> str:
    """Front matter for the hub, and Markdown."""
    name = pathlib.PurePath(outcome.output_dir).name or "model"
    parts = [
        f"---\n{yaml.safe_dump(front_matter(outcome.config), sort_keys=False)}---",
        f"# {in_line(name)}",
        "A GPT-2 language model, trained with gpt2_flax (JAX and Flax). This card was made by the"
        " trainer; it knows the run, and not what the model is meant for.",
        "## Architecture",
        f"GPT-2: {words.describe_model(outcome.model)}. Weights are float32, in PyTorch's layout"
        " (`model.safetensors`).",
        "## Data",
        in_line(outcome.about_text),
        "## Results",
        table(words.results(outcome)),
        "The losses are means over tokens of the tokenizer beside the model, so models with other"
        " tokenizers cannot be compared by them.",
        "## How to load it",
        "In PyTorch:",
        block(
            "from transformers import AutoTokenizer, GPT2LMHeadModel\n\n"
            'model = GPT2LMHeadModel.from_pretrained("path/to/this/directory")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
            "python",
        ),
        "In JAX:",
        block(
            "from gpt2_flax import FlaxGPT2LMHeadModel\n\n"
            'model = FlaxGPT2LMHeadModel.from_pretrained("path/to/this/directory")',
            "python",
        ),
        *sample(outcome.samples),
        "## Settings",
        block(
            yaml.safe_dump(changed(outcome.config), sort_keys=False, allow_unicode=True), "yaml"
        ),
        "All others have the trainer's defaults.",
        "## Environment",
        table(words.environment()),
        "## Limits and licence",
        "Nobody has looked at what this model says. No licence is stated: that is for whoever"
        " publishes it, and the terms of its text count.",
    ]
    return "\n\n".join(parts) + "\n\n"


def front_matter(config: TrainConfig) -> dict:
    """What the hub indexes. A dataset is named if it came from the hub."""
    about = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "jax", "flax", "gpt2_flax"],
    }
    dataset = DATASET_ALIASES.get(config.dataset, config.dataset)
    on_hub = not config.train_file and dataset != EMBEDDED_DATASET and is_hub_id(dataset)
    if on_hub:
        about["datasets"] = [dataset]
    if config.init_from and is_hub_id(config.init_from):
        about["base_model"] = config.init_from
    return about


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the hub's: not a path, nor a directory here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)) and (
        not pathlib.Path(name).exists()
    )


def changed(config: TrainConfig) -> dict:
    """The settings that are not the defaults; where the run lay is left out."""
    defaults = words.settings(TrainConfig())
    found = words.settings(config)
    return {k: v for k, v in found.items() if v != defaults[k] and k != "output_dir"}


def sample(samples: dict[int, str]) -> list[str]:
    if not samples:
        return []
    return ["## A sample", block(samples[max(samples)], "")]


def table(pairs: list[tuple[str, str]]) -> str:
    rows = [f"| {in_line(name)} | {in_line(value)} |" for name, value in pairs]
    return "\n".join(["| | |", "|---|---|", *rows])


def in_line(text: str) -> str:
    """A text as Markdown shows it, not as it might read it."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))


def block(text: str, language: str) -> str:
    """A code block, whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    end = "" if text.endswith("\n") else "\n"
    return f"{fence}{language}\n{text}{end}{fence}"
