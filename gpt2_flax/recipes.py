"""The recipes of configs/, which `--config NAME` finds from anywhere."""

import pathlib


def folder() -> pathlib.Path:
    """In an installed package they lie within it, in a checkout beside it."""
    here = pathlib.Path(__file__).resolve().parent
    inside = here / "configs"
    return inside if inside.is_dir() else here.parent / "configs"


def names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(config: str) -> str:
    """The path of what --config names: a file that exists, else a recipe, else as it stands."""
    if pathlib.Path(config).exists() or config not in names():
        return config
    return str(folder() / f"{config}.yaml")
