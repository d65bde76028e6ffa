"""What is imported, where that is for us to say: at the start of a script."""

import contextlib
import gc
import importlib.abc
import importlib.machinery
import os
import sys


def leave_out_torch() -> None:
    """Have transformers imported, whenever that is, as if PyTorch were not installed.

    Nothing here uses PyTorch, and where it is installed transformers imports it: 1.3 s, and
    0.19 GB. Others may still import it.
    """
    if "torch" not in sys.modules and "transformers" not in sys.modules:
        sys.meta_path.insert(0, TransformersWithoutTorch())


class TransformersWithoutTorch(importlib.abc.MetaPathFinder):
    """Finds transformers, until it is imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "transformers" or "torch" in sys.modules:
            return None
        find = importlib.machinery.PathFinder.find_spec
        spec = find(fullname, path)
        if spec is None or find("torch") is None:
            return spec
        load = spec.loader.exec_module

        def load_without_torch(module) -> None:
            sys.meta_path.remove(self)
            sys.modules["torch"] = None  # type: ignore[assignment]  # says that there is none
            try:
                load(module)
                # The module may have put another one into its place; it remembers the answer.
                sys.modules[fullname].utils.is_torch_available()
            finally:
                del sys.modules["torch"]

        spec.loader.exec_module = load_without_torch
        return spec


def quiet_transformers() -> None:
    """Have transformers say nothing but errors, and draw no progress bars, from now on."""
    if "transformers" in sys.modules:
        logs = sys.modules["transformers"].utils.logging
        logs.set_verbosity_error()
        logs.disable_progress_bar()
    else:  # it looks at these when it is imported
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@contextlib.contextmanager
def no_garbage():
    """Context in which Python doesn't look for garbage; nor does it, later, in what is made here.

    A start imports some 1,400 modules, and nearly all that they make is there to stay.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
