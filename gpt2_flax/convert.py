"""A checkpoint of a run -> a directory that PyTorch's transformers opens."""

import pathlib

import jax

from gpt2_flax import checkpoint
from gpt2_flax.data import tokenizers
from gpt2_flax.errors import CheckpointError, StorageError, UserError
from gpt2_flax.pretrained import FlaxGPT2LMHeadModel, make_config, param_shapes
from gpt2_flax.weights import WEIGHTS_FILE


def to_pytorch(source, output, step: int | None = None) -> int:
    """Write the model of a checkpoint, and the run's tokenizer, into `output`.

    source: a run directory, its checkpoints/, or one step of it. Returns the step.
    Raises CheckpointError where there is no such checkpoint, UserError where `output` holds
    another model.
    """
    directory = checkpoint.locate(source, step)
    output = pathlib.Path(output)
    if (output / WEIGHTS_FILE).exists() or (output / "config.yaml").exists():
        raise UserError(f"output {output} holds a model already\n  name another directory")
    try:
        config = make_config(checkpoint.read_meta(directory)["model"], str(directory))
        params = checkpoint.read_params(directory, param_shapes(config))
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever they please
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"checkpoint {directory} cannot be read: {reason}") from error
    run_dir = directory.parent.parent
    try:
        output.mkdir(parents=True, exist_ok=True)
        if (run_dir / tokenizers.TOKENIZER_FILE).is_file():
            tokenizers.load_tokenizer(str(run_dir)).save(output)
        model = FlaxGPT2LMHeadModel(config, params=jax.device_get(params))
        model.save_pretrained(output)
    except OSError as error:
        raise StorageError(f"cannot write into {output}: {error.strerror}") from error
    return int(directory.name)
