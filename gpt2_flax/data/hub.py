"""The Hugging Face hub: whether it can be reached, and what to say when it can't."""

import os
import socket
import threading
import urllib.parse
import urllib.request

from gpt2_flax.config import EMBEDDED_DATASET
from gpt2_flax.errors import UserError

DEFAULT_ENDPOINT = "https://huggingface.co"
PATIENCE_SECONDS = 6


def needs_hub(config) -> bool:
    """Whether the run's text or tokenizer comes from the hub."""
    own_text = bool(config.train_file) or config.dataset == EMBEDDED_DATASET
    own_tokenizer = (
        config.tokenizer == "bytes"
        or config.tokenizer.startswith("bpe:")
        or os.path.isdir(config.tokenizer)
    )
    return not (own_text and own_tokenizer)


def go_offline_if_unreachable() -> None:
    """Let the hub's clients use their caches at once where the hub does not answer.

    Left alone they retry in silence for 20 to 50 seconds. Has an effect only before
    huggingface_hub is first imported: it reads the variable then.
    """
    if not os.environ.get("HF_HUB_OFFLINE") and not answers(endpoint()):
        os.environ["HF_HUB_OFFLINE"] = "1"


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT


def answers(url: str) -> bool:
    """Whether a connection to the host of `url`, or to the proxy for it, can be opened."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urllib.parse.urlsplit(proxy)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connected = threading.Event()

    def connect():
        try:
            socket.create_connection((parts.hostname, port), PATIENCE_SECONDS).close()
        except OSError:
            return
        connected.set()

    # A thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    return connected.is_set()


def hub_error(what: str, error: Exception) -> UserError:
    """The error for something that could not be had from the hub, with the ways on."""
    if os.environ.get("HF_HUB_OFFLINE"):
        reason = f"the hub {endpoint()} cannot be reached and it is not in the cache"
    else:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return UserError(
        f"{what}: {reason}\n"
        "  ways on without the hub: --train_file FILE with --tokenizer bpe:8192, bytes or a"
        " local directory,\n"
        "  or the quickstart: python scripts/train.py --config configs/quickstart.yaml"
    )
