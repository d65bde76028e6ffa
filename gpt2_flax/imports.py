"""What is imported, where that is for us to say: at the start of a script."""

import sys


def leave_out_torch() -> None:
    """Import transformers as if PyTorch, which we never use, were not installed.

    Where it is, transformers imports it: 1.3 s, and 0.19 GB. Others may still import it.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    sys.modules["torch"] = None  # which says that there is none
    try:
        import transformers

        transformers.utils.is_torch_available()  # it remembers the answer
    finally:
        del sys.modules["torch"]
