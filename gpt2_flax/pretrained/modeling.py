"""FlaxGPT2Model and FlaxGPT2LMHeadModel: a configuration and parameters around the module.

The classes of transformers 4, with their arguments in their order. What behaves differently
is listed in docs/migrating.md.
"""

import dataclasses
import functools
import logging
import os
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_flax.distributed import memory
from gpt2_flax.errors import MissingFileError, UserError
from gpt2_flax.generation import generation
from gpt2_flax.model import initialization
from gpt2_flax.model.gpt2 import (
    FlaxGPT2LMHeadModule,
    FlaxGPT2Module,
    check_config,
    empty_cache,
)
from gpt2_flax.pretrained import weights
from gpt2_flax.pretrained.config_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    GENERATION_KEYS,
    is_config_key,
    make_config,
    read_generation_config,
    read_json,
    write_configs,
)
from gpt2_flax.pretrained.repository import Repository, upload

log = logging.getLogger("gpt2_flax")


class FlaxGPT2PreTrainedModel:
    """What the two models share. See FlaxGPT2LMHeadModel."""

    config_class = transformers.GPT2Config
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    module_class: Any = None
    _auto_class: str | None = None
    _missing_keys: frozenset | set = frozenset()

    def __init__(
        self,
        config: transformers.GPT2Config,
        input_shape: tuple = (1, 1),
        seed: int = 0,
        dtype: jax.typing.DTypeLike = jnp.float32,
        _do_init: bool = True,
        *,
        params: dict | None = None,
        **kwargs,
    ):
        """config: whose values are checked. input_shape: of the ids that weights are made with.

        seed: of the random weights. dtype: of the computation; parameters are float32.
        _do_init=False: hold no weights; they are passed to each call. params: weights to hold
        instead of random ones. kwargs: fields of the module, hf_flax_compat and
        gradient_checkpointing. Raises ValueError for a configuration that names no model.
        """
        if config is None:
            raise ValueError("config cannot be None; give a transformers.GPT2Config")
        if not isinstance(config, transformers.GPT2Config):
            raise ValueError(
                f"config must be a transformers.GPT2Config, got {type(config).__name__}"
            )
        check_config(config)
        self._config = config
        self.dtype = jnp.dtype(dtype) if isinstance(dtype, str) else dtype
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        self._module = self.module_class(config, dtype=self.dtype, **kwargs)
        self.key = jax.random.PRNGKey(seed)
        self.input_shape = input_shape
        self.generation_config = None
        if self.can_generate():
            self.generation_config = transformers.GenerationConfig.from_model_config(config)
        self._is_initialized = _do_init
        self._set_shapes()
        if _do_init:
            self.params = self.init_weights(self.key, input_shape) if params is None else params

    # ------------------------------------------------------------ state

    @classmethod
    def _from_config(cls, config, **kwargs):
        return cls(config, **kwargs)

    @property
    def framework(self) -> str:
        return "flax"

    @property
    def config(self) -> transformers.GPT2Config:
        return self._config

    @property
    def module(self):
        return self._module

    @property
    def params(self) -> dict:
        """The tree of parameters. Raises ValueError for a model made with _do_init=False."""
        self._require_init("read")
        return self._params

    @params.setter
    def params(self, params) -> None:
        self._require_init("set")
        params = unfreeze(params) if isinstance(params, FrozenDict) else params
        missing = self.required_params - flatten_dict(params).keys()
        if missing:
            names = sorted("/".join(path) for path in missing)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"params lacks {', '.join(names[:5])}{more}")
        self._params = params

    def _require_init(self, verb: str) -> None:
        if not self._is_initialized:
            raise ValueError(
                f"params cannot be {verb}: the model was made with _do_init=False and holds none."
                " Keep the tree that init_weights or from_pretrained returned, and pass it to"
                " each call as params"
            )

    @property
    def required_params(self) -> set:
        """Paths of all parameters, as tuples of strings."""
        return self._required_params

    @property
    def params_shape_tree(self) -> dict:
        """The tree of the parameters' shapes and types."""
        return self._params_shape_tree

    def _set_shapes(self) -> None:
        if type(self.module) in initialization.OURS:
            self._params_shape_tree = initialization.parameter_shapes(self.module)
        else:
            self._params_shape_tree = jax.eval_shape(self._init_module, self.key)
        self._required_params = set(flatten_dict(self._params_shape_tree))

    def _init_module(self, rng):
        params_rng, dropout_rng = jax.random.split(rng)
        ids = jnp.zeros(self.input_shape, jnp.int32)
        return self.module.init({"params": params_rng, "dropout": dropout_rng}, ids)["params"]

    def init_weights(self, rng, input_shape: tuple = (1, 1), params: dict | None = None) -> dict:
        """A tree of random float32 parameters, drawn from the key `rng`.

        params: a tree that is returned with only what from_pretrained did not find in its
        file (`_missing_keys`) filled in. input_shape has no influence; it is the original's.
        """
        del input_shape
        if type(self.module) in initialization.OURS:
            params_rng, _ = jax.random.split(rng)
            random_params = initialization.draw_parameters(self.module, params_rng)
        else:
            random_params = jax.jit(self._init_module)(rng)
        if params is None:
            return random_params
        drawn, given = flatten_dict(random_params), flatten_dict(unfreeze(params))
        given |= {path: drawn[path] for path in self._missing_keys}
        self._missing_keys = frozenset()
        return unflatten_dict(given)

    def init_cache(self, batch_size: int, max_length: int) -> dict:
        """An empty cache of max_length positions for batch_size rows, to be past_key_values."""
        has_head = self.module_class is FlaxGPT2LMHeadModule
        return empty_cache(self.config, batch_size, max_length, self.dtype, has_head)

    def enable_gradient_checkpointing(self) -> None:
        """From now on compute each block's activations again in the backward pass.

        That takes less memory and more time. Forward-mode derivatives (jax.jvp) and flax's
        capture_intermediates do not reach into the blocks then.
        """
        self._module = self.module.clone(gradient_checkpointing=True)

    def to_bf16(self, params, mask=None) -> dict:
        """A new tree with floating-point leaves as bfloat16; mask: those that are True in it."""
        return cast_floating(params, jnp.bfloat16, mask)

    def to_fp16(self, params, mask=None) -> dict:
        """A new tree with floating-point leaves as float16; mask: those that are True in it."""
        return cast_floating(params, jnp.float16, mask)

    def to_fp32(self, params, mask=None) -> dict:
        """A new tree with floating-point leaves as float32; mask: those that are True in it."""
        return cast_floating(params, jnp.float32, mask)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *,
        params: dict | None = None,
    ) -> dict:
        """Change the vocabulary's size; return the new tree of parameters.

        The first rows stay as they are. New rows are the mean of the old ones, so that a trained
        model does not prefer them; so it is with the columns of an untied head. The model holds
        the new tree, unless it was made with _do_init=False: then params is needed.
        Raises ValueError for a size below 1.
        """
        wanted = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if pad_to_multiple_of < 1:
                raise ValueError(f"pad_to_multiple_of must be 1 or more, got {pad_to_multiple_of}")
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted < 1:
            raise ValueError(f"new_num_tokens must be 1 or more, got {new_num_tokens}")
        leaves = flatten_dict(unfreeze(self.params if params is None else params))
        for path, axis in ((("wte", "embedding"), 0), (("lm_head", "kernel"), 1)):
            for name in [name for name in leaves if name[-2:] == path]:
                leaves[name] = resize(leaves[name], wanted, axis)
        self.config.vocab_size = wanted
        self._set_shapes()
        resized = unflatten_dict(leaves)
        if self._is_initialized:
            self.params = resized
        return resized

    # ------------------------------------------------------------ call

    def __call__(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        params: dict | None = None,
        past_key_values: dict | None = None,
        dropout_rng=None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        """Logits, or the last hidden states, of ids (B, T).

        attention_mask: (B, T), 1 or True for real tokens; with past_key_values as long as that
        cache. position_ids: int (B, T) or (1, T), counted from 0 by default.
        encoder_hidden_states, encoder_attention_mask: (B, S, D) and (B, S), for cross-attention.
        params: other weights than the model's own. past_key_values: from init_cache or an
        earlier call, then position_ids are needed. train: turn dropout on, with the key
        dropout_rng.
        Returns an output of gpt2_flax.model.outputs, or with return_dict=False a tuple, the cache
        at index 1. Raises ValueError for ids, positions and shapes that do not fit.
        """
        input_ids = check_input(self.config, input_ids, position_ids, past_key_values)
        check_shapes(
            self.config, input_ids.shape, attention_mask, position_ids, encoder_hidden_states,
            encoder_attention_mask, past_key_values,
        )  # fmt: skip
        config = self.config
        if train and dropout_rng is None and has_dropout(config):
            raise ValueError("train=True needs dropout_rng, a jax.random.key")
        variables = {"params": self.params if params is None else params}
        if past_key_values:
            variables["cache"] = past_key_values
        returned = self.module.apply(
            variables,
            input_ids,
            attention_mask if attention_mask is None else jnp.asarray(attention_mask),
            position_ids if position_ids is None else jnp.asarray(position_ids, jnp.int32),
            encoder_hidden_states,
            encoder_attention_mask,
            not train,
            False,
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
            mutable=["cache"] if past_key_values else False,
        )
        output, cache = returned if past_key_values else (returned, None)
        if cache is not None:
            output = output.replace(past_key_values=unfreeze(cache["cache"]))
        wants_dict = config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    # ------------------------------------------------------------ generate

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the model has a head to generate with."""
        return cls.module_class is FlaxGPT2LMHeadModule

    def generate(
        self,
        input_ids,
        generation_config: transformers.GenerationConfig | None = None,
        prng_key=None,
        trace: bool = True,
        params: dict | None = None,
        logits_processor=None,
        **kwargs,
    ):
        """Continue prompts (B, P); see generation.generate."""
        return generation.generate(
            self, input_ids, generation_config, prng_key, trace, params, logits_processor, **kwargs
        )

    def prepare_inputs_for_generation(self, input_ids, max_length, attention_mask=None) -> dict:
        """Keyword arguments of the first call for prompts (B, P): an empty cache, the mask
        extended by ones to max_length, positions that do not count what is masked."""
        batch_size, length = input_ids.shape
        mask = jnp.ones((batch_size, max_length), jnp.int32)
        if attention_mask is None:
            positions = jnp.broadcast_to(jnp.arange(length)[None, :], (batch_size, length))
        else:
            attention_mask = jnp.asarray(attention_mask).astype(jnp.int32)
            positions = jnp.maximum(attention_mask.cumsum(axis=-1) - 1, 0)
            mask = jax.lax.dynamic_update_slice(mask, attention_mask, (0, 0))
        return {
            "past_key_values": self.init_cache(batch_size, max_length),
            "attention_mask": mask,
            "position_ids": positions,
        }

    def update_inputs_for_generation(self, model_outputs, model_kwargs: dict) -> dict:
        """Keyword arguments of the next call, from those of the last and what it returned."""
        model_kwargs["past_key_values"] = model_outputs.past_key_values
        model_kwargs["position_ids"] = model_kwargs["position_ids"][:, -1:] + 1
        return model_kwargs

    # ------------------------------------------------------------ files

    @classmethod
    def load_flax_weights(cls, resolved_archive_file) -> dict:
        """The tree of parameters in a flax_model.msgpack or a model.safetensors."""
        return cls.load_flax_sharded_weights([resolved_archive_file])

    @classmethod
    def load_flax_sharded_weights(cls, shard_files) -> dict:
        """The tree of parameters in the shards of a flax_model.msgpack or model.safetensors."""
        leaves = {}
        for file in map(pathlib.Path, shard_files):
            leaves |= weights.read(only(file), str(file))
        return unflatten_dict(leaves)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        dtype: jax.typing.DTypeLike = jnp.float32,
        *model_args,
        config=None,
        cache_dir=None,
        ignore_mismatched_sizes: bool = False,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        **kwargs,
    ):
        """A model from a directory, a weights file in it, a run of this project, or the hub.

        Read, the first that is there: flax_model.msgpack, model.safetensors in PyTorch's or
        Flax's layout, each whole or in shards; else the newest checkpoint of a run directory.
        dtype: of the computation; the parameters keep the file's. config: a GPT2Config, or where
        its config.json is. ignore_mismatched_sizes: draw weights of another shape anew.
        kwargs: from_pt=True passes over msgpack files; subfolder; _do_init=False returns
        (model, params), both parts usable in jit; settings of the configuration, or of
        generation, that win over the files'; arguments of the constructor.

        Weights that are missing, or left over, are named in one warning. Raises ValueError for
        files that cannot be read or do not fit (MissingFileError, also an OSError, where they
        are not there), TypeError for an unknown keyword.
        """
        if pretrained_model_name_or_path is None:
            raise ValueError("name a directory or a model on the hub, got None")
        from_pt = kwargs.pop("from_pt", False)
        do_init = kwargs.pop("_do_init", True)
        subfolder = kwargs.pop("subfolder", "")
        token = kwargs.pop("use_auth_token", None) or token
        for name in ("proxies", "resume_download", "trust_remote_code", "mirror"):
            kwargs.pop(name, None)  # the original's; the hub's client has no use for them
        for name in (
            "_from_pipeline",
            "_from_auto",
            "_commit_hash",
            "adapter_kwargs",
            "_fast_init",
        ):
            kwargs.pop(name, None)
        place = functools.partial(
            Repository, revision=revision, token=token, cache_dir=cache_dir,
            local_files_only=local_files_only, force_download=force_download,
        )  # fmt: skip
        where = str(pretrained_model_name_or_path)
        if os.path.isfile(where):
            get, has = only(pathlib.Path(where)), None
            beside = place(str(pathlib.Path(where).absolute().parent))
        else:
            beside = place(where, subfolder=subfolder)
            get, has = beside.get, beside.has
        checkpoint_step = find_checkpoint(beside)
        decoding = {k: kwargs.pop(k) for k in list(kwargs) if is_only_generation(k)}
        if not isinstance(config, transformers.GPT2Config):
            overrides = {k: kwargs.pop(k) for k in list(kwargs) if is_config_key(k)}
            if config is not None and os.path.isfile(config):
                config = make_config(read_json(pathlib.Path(config)), str(config), **overrides)
            elif config is not None:
                config = read_config(place(str(config)), **overrides)
            else:
                config = read_config(beside, checkpoint_step, **overrides)
        fields = {"seed", "input_shape", *(f.name for f in dataclasses.fields(cls.module_class))}
        unknown = sorted(kwargs.keys() - fields)
        if unknown:
            raise TypeError(
                f"from_pretrained got unknown arguments {', '.join(unknown)}: settings neither of"
                f" GPT2Config, nor of generation, nor of {cls.__name__}"
            )
        options = {"dtype": dtype, "_do_init": False, **kwargs}
        # Made before the weights are read, which takes long: it checks the arguments.
        model = cls(config, *model_args, **options)
        if checkpoint_step is None:
            leaves = weights.read(get, where if has is None else beside.where, from_pt, has)
            leaves, config = weights.settle_head(leaves, config, where, cls.can_generate())
            if config is not model.config:
                model = cls(config, *model_args, **options)
        else:
            leaves = read_checkpoint(checkpoint_step, config)
        model._is_initialized = do_init
        fit = weights.fit(leaves, model.params_shape_tree, where, ignore_mismatched_sizes)
        params = model._complete(fit, where, do_init)
        model._load_generation_config(beside, decoding)
        if do_init:
            model.params = params
            return model
        return model, params

    def _complete(self, fit, where: str, do_init: bool) -> dict:
        """The parameters of a file, what it lacks drawn anew, as arrays of JAX."""
        name = type(self).__name__
        fate = "are drawn anew" if do_init else "are not in params; init_weights adds them"
        lists = {
            f"lacks weights, which {fate}": sorted(map("/".join, fit.missing)),
            "has weights of another shape, which are drawn anew": [
                f"{'/'.join(path)} {found} instead of {expected}"
                for path, found, expected in fit.mismatched
            ],
            "has weights that are not used": sorted(map("/".join, fit.unexpected)),
        }
        for what, names in lists.items():
            if names:
                log.warning("%s: for %s it %s: %s", where, name, what, ", ".join(names))
        types = {str(leaf.dtype) for leaf in fit.leaves.values()} - {"float32"}
        if types:
            log.warning(
                "%s: weights of %s are %s, and stay so; to_fp32(params) makes them float32",
                where, name, ", ".join(sorted(types)),
            )  # fmt: skip
        device = None if do_init else jax.local_devices(backend="cpu")[0]
        leaves = {path: jax.device_put(leaf, device) for path, leaf in fit.leaves.items()}
        absent = set(fit.missing)
        redrawn = {path for path, _, _ in fit.mismatched}
        if redrawn or (absent and do_init):
            check_room(self.params_shape_tree, where)
            drawn = flatten_dict(self.init_weights(self.key, self.input_shape))
            leaves |= {p: drawn[p] for p in redrawn | (absent if do_init else set())}
        self._missing_keys = frozenset() if do_init else frozenset(absent)
        return unflatten_dict(leaves)

    def _load_generation_config(self, place, settings: dict) -> None:
        if not self.can_generate():
            return
        path = place.get(GENERATION_FILE)
        if path is not None:
            self.generation_config = read_generation_config(path)
        if settings:
            assert self.generation_config is not None  # as can_generate() says
            self.generation_config.update(**settings)

    def save_pretrained(
        self,
        save_directory,
        params: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "10GB",
        token: str | bool | None = None,
        safe_serialization: bool = True,
        **kwargs,
    ) -> None:
        """Write config.json, generation_config.json and the weights into a directory.

        params: weights to write instead of the model's own. safe_serialization=True writes
        model.safetensors as PyTorch has it; False writes flax_model.msgpack, as transformers 4
        did. Above max_shard_size bytes (or "200MB") there are shards and an index. Weights of
        an earlier save into the directory are removed, once the new ones stand. push_to_hub
        uploads the directory, with kwargs of `push_to_hub`: repo_id, by default the directory's
        name, commit_message, private, create_pr, revision.
        Raises ValueError for a path that is a file, OSError where nothing can be written.
        """
        directory = pathlib.Path(save_directory)
        if directory.is_file():
            raise ValueError(f"save_directory {directory} is a file; name a directory")
        token = kwargs.pop("use_auth_token", None) or token
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained got unknown arguments {sorted(kwargs)}")
        params = self.params if params is None else params
        if not self.required_params & flatten_dict(unfreeze(params)).keys():
            raise ValueError(
                f"params holds none of {type(self).__name__}'s parameters, but {list(params)[:3]}"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [type(self).__name__.removeprefix("Flax")]
        write_configs(self.config, self.generation_config, directory)
        weights.save(
            params,
            directory,
            safe_serialization=safe_serialization,
            max_shard_size=max_shard_size,
        )
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", directory.absolute().name)
            upload(directory, repo_id, token, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        use_temp_dir: bool | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        max_shard_size: int | str = "10GB",
        create_pr: bool = False,
        safe_serialization: bool = True,
        revision: str | None = None,
        commit_description: str | None = None,
        tags: list[str] | None = None,
        *,
        params: dict | None = None,
    ):
        """Upload the model to a repository of the hub, which is made if need be.

        use_temp_dir: None or True; what is uploaded is written into a temporary directory.
        tags: added to those of the model card. params: weights to upload instead of the
        model's own. The rest is huggingface_hub's. Returns its CommitInfo.
        """
        if use_temp_dir is False:
            raise ValueError(
                "use_temp_dir=False is not supported;"
                " use save_pretrained(directory, push_to_hub=True)"
            )
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(
                directory, params, max_shard_size=max_shard_size,
                safe_serialization=safe_serialization,
            )  # fmt: skip
            return upload(
                directory, repo_id, token, commit_message=commit_message, private=private,
                create_pr=create_pr, revision=revision, commit_description=commit_description,
                tags=tags,
            )  # fmt: skip

    @classmethod
    def register_for_auto_class(cls, auto_class="FlaxAutoModel") -> None:
        """Note the name of an auto class, as the original did; nothing here reads it."""
        cls._auto_class = auto_class if isinstance(auto_class, str) else auto_class.__name__


class FlaxGPT2Model(FlaxGPT2PreTrainedModel):
    """GPT-2 without a head: ids -> the states after the last LayerNorm."""

    module_class = FlaxGPT2Module


class FlaxGPT2LMHeadModel(FlaxGPT2PreTrainedModel):
    """GPT-2 with its language-model head, its parameters held beside it."""

    module_class = FlaxGPT2LMHeadModule


# ---------------------------------------------------------------- parameters


def param_shapes(config) -> dict:
    """The tree of a model's parameter shapes and types; nothing is computed."""
    return initialization.parameter_shapes(FlaxGPT2LMHeadModule(config))


def check_room(shapes: dict, where: str) -> None:
    """Raise UserError for a model too large for this machine, before it is drawn."""
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    if n_bytes > memory.host_bytes():
        raise UserError(
            f"{where} lacks weights, and to draw a model of its size would take"
            f" {n_bytes / 1e9:,.0f} GB of memory\n  is its config.json the right one?"
        )


def cast_floating(params, dtype, mask=None) -> dict:
    """Floating-point leaves as `dtype`: all, or those whose leaf in the tree `mask` is True."""

    def cast(leaf, chosen=True):
        if chosen and jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return jnp.asarray(leaf, dtype)
        return leaf

    if mask is None:
        return jax.tree.map(cast, params)
    alike = freeze if isinstance(params, FrozenDict) else unfreeze
    return jax.tree.map(cast, params, alike(mask))


def resize(leaf, size: int, axis: int):
    """Cut off, or add means of what is there, along an axis."""
    leaf = jnp.asarray(leaf)
    kept = jax.lax.slice_in_dim(leaf, 0, min(size, leaf.shape[axis]), axis=axis)
    n_new = size - kept.shape[axis]
    if n_new == 0:
        return kept
    mean = leaf.mean(axis, dtype=jnp.float32, keepdims=True).astype(leaf.dtype)
    return jnp.concatenate([kept, jnp.repeat(mean, n_new, axis)], axis)


# ---------------------------------------------------------------- input


def has_dropout(config) -> bool:
    return any((config.resid_pdrop, config.embd_pdrop, config.attn_pdrop))


def check_input(config, input_ids, position_ids, past_key_values):
    """The ids as int32 (B, T). Raises ValueError for what would come out as NaN or clamped.

    Values are looked at where they are at hand: not under jit, nor on other hosts.
    """
    input_ids = as_ids(input_ids, "input_ids")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (batch, length), got {input_ids.shape}")
    length = input_ids.shape[1]
    if position_ids is None:
        if past_key_values is not None:
            raise ValueError("past_key_values need position_ids beside them, (batch, length)")
        if length > config.n_positions:
            raise ValueError(
                f"input_ids are {length} long; the model has {config.n_positions} positions"
            )
    else:
        position_ids = as_ids(position_ids, "position_ids")
        check_range(position_ids, config.n_positions, "position_ids", "n_positions")
    check_range(input_ids, config.vocab_size, "input_ids", "vocab_size")
    for path, leaf in flatten_dict(past_key_values or {}).items():
        if path[-1] == "cache_index" and is_at_hand(leaf):
            room = flatten_dict(past_key_values)[(*path[:-1], "cached_key")].shape[1]
            if int(leaf) + length > room:
                raise ValueError(
                    f"past_key_values has room for {room} positions, {int(leaf)} of them taken;"
                    f" {length} more do not fit"
                )
            break
    return jnp.asarray(input_ids, jnp.int32)


def check_shapes(config, shape, mask, positions, encoder, encoder_mask, cache) -> None:
    """Raise ValueError that names the argument whose shape does not go with ids of `shape`."""

    def require(name, array, *allowed, why):
        if array is not None and np.shape(array) not in allowed:
            raise ValueError(f"{name} must have shape {allowed[0]}, {why}, got {np.shape(array)}")

    B, T = shape
    length, why = T, "that of input_ids"
    for path, leaf in flatten_dict(cache or {}).items():
        if path[-1] == "cached_key":
            length, why = leaf.shape[1], "as long as the cache in past_key_values"
            if leaf.shape[0] != B:
                raise ValueError(f"past_key_values is of {leaf.shape[0]} rows, input_ids of {B}")
            break
    # One column for a single new id is spread over the cache, as the original did.
    spread = [(B, 1)] if T == 1 else []
    require("attention_mask", mask, (B, length), *spread, why=why)
    require("position_ids", positions, (B, T), (1, T), why="that of input_ids")
    if encoder is not None:
        source = np.shape(encoder)
        if len(source) != 3 or (source[0], source[2]) != (B, config.n_embd):
            raise ValueError(
                f"encoder_hidden_states must have shape ({B}, length, {config.n_embd}),"
                f" got {source}"
            )
        require(
            "encoder_attention_mask", encoder_mask, source[:2],
            why="that of encoder_hidden_states",
        )  # fmt: skip


def as_ids(values, name: str):
    """`values` as an array. Raises ValueError where they are no integers."""
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {values.dtype}")
    return values


def is_at_hand(array) -> bool:
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def check_range(values, limit: int, name: str, setting: str) -> None:
    if not is_at_hand(values) or values.size == 0:
        return
    values = np.asarray(values)
    low, high = values.min(), values.max()
    if low < 0 or high >= limit:
        raise ValueError(
            f"{name} must be 0 to {limit - 1} ({setting} is {limit}),"
            f" got {low if low < 0 else high}"
        )


# ---------------------------------------------------------------- files


def only(file: pathlib.Path):
    """A look-up by canonical file name that finds one file, whatever it is called."""
    suffixes = {".msgpack": weights.MSGPACK.file, ".safetensors": weights.SAFETENSORS.file}
    if file.suffix not in suffixes:
        raise UserError(
            f"{file} is neither a .msgpack nor a .safetensors file\n"
            "  a .bin is a pickle and never read; name its directory to see how to convert it"
        )
    return lambda name: file if name == suffixes[file.suffix] else None


def find_checkpoint(place) -> pathlib.Path | None:
    """The newest checkpoint of a local run directory that has no final weights, or the one
    that the place itself is."""
    from gpt2_flax.pretrained import orbax_files  # Orbax is slow to import, and rarely needed here

    directory = place.directory
    layouts = (weights.MSGPACK, weights.SAFETENSORS)
    if directory is None or any(
        place.has(n) for layout in layouts for n in (layout.file, layout.index)
    ):
        return None
    is_run = orbax_files.is_run(directory)
    return orbax_files.locate(directory, None) if is_run else None


def read_checkpoint(directory: pathlib.Path, config) -> dict:
    """Flat parameters of one checkpoint of a run. Raises CheckpointError where it is damaged."""
    from gpt2_flax.pretrained import orbax_files

    with orbax_files.read_errors(directory):
        return flatten_dict(orbax_files.read_params(directory, param_shapes(config)))


def read_config(place, checkpoint_step=None, **overrides) -> transformers.GPT2Config:
    """The GPT2Config of a place's config.json, or of a run's checkpoint."""
    if checkpoint_step is not None:
        from gpt2_flax.pretrained import orbax_files

        with orbax_files.read_errors(checkpoint_step):
            raw = orbax_files.read_meta(checkpoint_step)["model"]
        return make_config(raw, str(checkpoint_step), **overrides)
    path = place.get(CONFIG_FILE)
    if path is None:
        raise MissingFileError(
            f"{place.where} has no {CONFIG_FILE}\n"
            "  name the directory of a model, a run of scripts/train.py, or a model on the hub"
        )
    return make_config(read_json(path), str(path), **overrides)


def is_only_generation(name: str) -> bool:
    return name in GENERATION_KEYS and not is_config_key(name)


def load_with_tokenizer(directory):
    """(model, tokenizer) of a directory that a run or an export has written."""
    from gpt2_flax.data.tokenizers import load_tokenizer

    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UserError(f"model {directory} is not a directory (looked in {pathlib.Path.cwd()})")
    return FlaxGPT2LMHeadModel.from_pretrained(directory), load_tokenizer(str(directory))
