"""FlaxGPT2LMHeadModel: a configuration and parameters around the linen module."""

import json
import pathlib

import flax.struct
import jax
import jax.numpy as jnp
import transformers

from gpt2_flax import generation, weights
from gpt2_flax.errors import UserError
from gpt2_flax.model import FlaxGPT2LMHeadModule, check_config

CONFIG_FILE = "config.json"


@flax.struct.dataclass
class CausalLMOutput:
    """logits: float32 (B, T, V)."""

    logits: jax.Array

    def __getitem__(self, key):
        return {0: self.logits, "logits": self.logits}[key]


class FlaxGPT2LMHeadModel:
    """GPT-2 with its language-model head, its parameters held beside it.

    config: a transformers.GPT2Config. seed: of the random weights. dtype: of the
    computation; parameters are float32. params: the weights, instead of random ones.
    Raises ValueError for a configuration that names no model.
    """

    def __init__(self, config, seed: int = 0, dtype=jnp.float32, params=None):
        check_config(config)
        self.config = config
        self.dtype = dtype
        self.module = FlaxGPT2LMHeadModule(config, dtype)
        self.params = self.init_weights(jax.random.key(seed)) if params is None else params

    def init_weights(self, key) -> dict:
        """A tree of random float32 parameters."""
        return jax.jit(self.module.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def param_shapes(self) -> dict:
        """The tree of the parameters' shapes and types; nothing is computed."""
        return param_shapes(self.config)

    def __call__(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        params=None,
        dropout_rng=None,
        train: bool = False,
    ) -> CausalLMOutput:
        """Logits of ids (B, T); attention_mask (B, T) is 1 for real tokens, 0 for padding.

        train needs a dropout_rng, and turns dropout on.
        """
        if train and dropout_rng is None:
            raise ValueError("train=True needs dropout_rng, a jax.random.key")
        logits = self.module.apply(
            {"params": self.params if params is None else params},
            jnp.asarray(input_ids, jnp.int32),
            attention_mask,
            position_ids,
            deterministic=not train,
            rngs={"dropout": dropout_rng} if train else None,
        )
        return CausalLMOutput(logits)

    def generate(self, prompt_ids, max_new_tokens: int, **options) -> jax.Array:
        """int32 (B, P + max_new_tokens): see `generation.generate` for the options."""
        return generation.generate(
            self.module, self.params, jnp.asarray(prompt_ids), max_new_tokens, **options
        )

    @classmethod
    def from_pretrained(cls, directory, dtype=jnp.float32) -> "FlaxGPT2LMHeadModel":
        """A model from a directory with config.json and model.safetensors in PyTorch's layout.

        Raises UserError where the directory holds none, or the two do not fit.
        """
        directory = pathlib.Path(directory)
        path = directory / weights.WEIGHTS_FILE
        if (directory / "checkpoints").is_dir() and not path.is_file():
            raise UserError(
                f"{directory} is a run that has not ended: it has no {weights.WEIGHTS_FILE}\n"
                "  end it, or convert a checkpoint: python scripts/convert.py to_pytorch"
                f" --checkpoint {directory} --output DIR"
            )
        config = read_config(directory)
        if not path.is_file():
            raise UserError(f"{directory} has no {weights.WEIGHTS_FILE}")
        try:
            params = weights.load_pytorch(directory, param_shapes(config))
        except ValueError as error:
            raise UserError(f"{directory}: {error}") from error
        return cls(config, dtype=dtype, params=jax.tree.map(jnp.asarray, params))

    def save_pretrained(self, directory, params=None) -> None:
        """Write config.json, generation_config.json and model.safetensors for PyTorch."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.config.architectures = ["GPT2LMHeadModel"]
        self.config.save_pretrained(directory)
        transformers.GenerationConfig(
            bos_token_id=self.config.bos_token_id, eos_token_id=self.config.eos_token_id
        ).save_pretrained(directory)
        weights.save_pytorch(self.params if params is None else params, directory)


def load_with_tokenizer(directory):
    """(model, tokenizer) of a directory that a run or an export has written."""
    from gpt2_flax.data.tokenizers import load_tokenizer

    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UserError(f"model {directory} is not a directory (looked in {pathlib.Path.cwd()})")
    return FlaxGPT2LMHeadModel.from_pretrained(directory), load_tokenizer(str(directory))


def param_shapes(config) -> dict:
    """The tree of a model's parameter shapes and types; nothing is computed."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    module = FlaxGPT2LMHeadModule(config)
    return jax.eval_shape(module.init, jax.random.key(0), ids)["params"]


def read_config(directory: pathlib.Path) -> transformers.GPT2Config:
    """The GPT2Config of a config.json, from the keys that GPT-2 has and no others."""
    path = directory / CONFIG_FILE
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return make_config(raw, str(path))


def make_config(raw: dict, where: str) -> transformers.GPT2Config:
    """A GPT2Config from a plain dictionary; keys that are not GPT-2's are left out."""
    if not isinstance(raw, dict):
        raise UserError(f"{where} is not a JSON object but a {type(raw).__name__}")
    model_type = raw.get("model_type", "gpt2")
    if model_type != "gpt2":
        raise UserError(f"{where} is for model_type {model_type!r}; this package reads gpt2")
    known = set(transformers.GPT2Config.__annotations__) - {"model_type"}
    try:
        config = transformers.GPT2Config(**{k: v for k, v in raw.items() if k in known})
        check_config(config)
    except Exception as error:  # the strict dataclass has errors of its own kind
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{where} names no GPT-2 that can be built: {reason}") from error
    return config
