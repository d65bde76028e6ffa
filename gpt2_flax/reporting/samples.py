"""samples.txt: how a model goes on with a fixed prompt, as training advances."""

import functools
import pathlib
import re
import unicodedata

from gpt2_flax.errors import UserError
from gpt2_flax.filesystem import replace_file
from gpt2_flax.model.architecture import as_gpt2_config

SAMPLES_FILE = "samples.txt"
TEMPERATURE, TOP_K = 0.8, 40
HEADING = re.compile(r"step ([0-9]{1,15})")
INDENT = "    "


class Sampler:
    """Continues the prompt with the parameters of a step. Compiled once.

    A sample is a function of the parameters, the seed and the step.
    """

    def __init__(self, model_config, dtype, tokenizer, prompt: str, n_tokens: int, seed: int):
        """prompt: empty for a text from its beginning. n_tokens: of the sample, at most.

        Raises UserError where the prompt leaves no position for a token.
        """
        self.model_config, self.dtype = model_config, dtype
        self.tokenizer, self.prompt, self.seed = tokenizer, prompt, seed
        n_prompt = len(tokenizer.encode(prompt)) if prompt else 1
        room = model_config.n_positions - n_prompt
        if room < 1:
            raise UserError(
                f"sample_prompt is {n_prompt} tokens long, and the model has"
                f" {model_config.n_positions} positions: there is none left for a sample\n"
                "  shorten --sample_prompt"
            )
        self.n_tokens = min(n_tokens, room)

    @functools.cached_property
    def model(self):
        """Made for the first sample, so that no start waits for transformers."""
        from gpt2_flax.pretrained.modeling import FlaxGPT2LMHeadModel

        config = as_gpt2_config(self.model_config)
        return FlaxGPT2LMHeadModel(config, dtype=self.dtype, _do_init=False)

    def sample(self, params, step: int) -> str:
        """The prompt and what follows it. params: on one device, or on the host."""
        from gpt2_flax.generation import generation

        text = generation.continue_text(
            self.model, self.tokenizer, self.prompt, self.n_tokens, TEMPERATURE, TOP_K, 1.0,
            self.seed, params=params, step=step,
        )  # fmt: skip
        return printable(text)


class SampleLog:
    """samples.txt: a line `step N` and, indented, the sample; every step once, in order."""

    def __init__(self, output_dir):
        self.path = pathlib.Path(output_dir) / SAMPLES_FILE

    def read(self) -> dict[int, str]:
        """step -> text. Lines that are neither a heading nor part of a sample are left out."""
        found: dict[int, list[str]] = {}
        step = None
        if self.path.exists():
            for line in self.path.read_text("utf-8", errors="replace").split("\n"):
                heading = HEADING.fullmatch(line)
                if heading:
                    step = int(heading[1])
                    found[step] = []
                elif step is not None and line.startswith(INDENT):
                    found[step].append(line.removeprefix(INDENT))
        return {step: "\n".join(lines) for step, lines in found.items()}

    def put(self, step: int, text: str) -> None:
        """Add a step's sample, or put it in the place of the one there. Raises StorageError."""
        self.replace(self.read() | {step: text})

    def forget_after(self, step: int) -> None:
        """Drop the samples after a step, which come again."""
        if self.path.exists():
            self.replace({n: text for n, text in self.read().items() if n <= step})

    def replace(self, samples: dict[int, str]) -> None:
        parts = []
        for step, text in sorted(samples.items()):
            body = "\n".join(INDENT + line for line in text.split("\n"))
            parts.append(f"step {step}\n{body}\n")
        replace_file(self.path, "\n".join(parts).encode())


def printable(text: str) -> str:
    """A text whose control characters are their pictures, but for ends of lines and tabs.

    A model of bytes may say anything: this keeps the file a text, and the terminal as it is.
    """
    text = text.replace("\r\n", "\n")
    return "".join(map(printable_character, text))


def printable_character(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs"):
        return character
    return chr(0x2400 + ord(character)) if character < " " else "\N{REPLACEMENT CHARACTER}"
