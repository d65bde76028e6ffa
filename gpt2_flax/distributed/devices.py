"""The devices that a step is compiled for: those of this run, or TPUs that are not there.

Only a dry run imagines devices: programs can be compiled for them, and not run.
"""

import os

import jax

from gpt2_flax.errors import UserError

# A TPU's compiler asks the network which TPU this is, and is alone on a machine, without these.
QUIET_COMPILER = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
_imagined: list[jax.Device] = []


def imagined() -> list[jax.Device]:
    """Those that are not there; none but in a dry run that names them."""
    return list(_imagined)


def everywhere() -> list[jax.Device]:
    """Those of all processes."""
    return _imagined or jax.devices()


def here() -> list[jax.Device]:
    """Those of this process."""
    return _imagined or jax.local_devices()


def count() -> int:
    return len(everywhere())


def platform() -> str:
    """cpu, gpu or tpu."""
    return _imagined[0].platform if _imagined else jax.default_backend()


def imagine(topology: str) -> None:
    """From now on compile for TPUs such as v5e:2x4. Raises UserError where that can't be done."""
    jax.config.update("jax_platforms", "cpu")  # where the arrays of this process are
    for name, value in QUIET_COMPILER.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # Two cores of a chip are one device to JAX, where the chip has two.
    whole_chips = {"chip_config_name": "megacore"} if topology.startswith(("v4", "v5p")) else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **whole_chips
        ).devices
    except Exception as error:  # whatever the plugin raises
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:160]
        raise UserError(
            f"topology {topology}: the TPU compiler cannot be had: {reason}\n"
            "  pip install libtpu, and name a slice as in v5e:2x4, v4:2x2x2 or v6e:4x4"
        ) from error
    _imagined[:] = found


def forget_imagined() -> None:
    _imagined.clear()
