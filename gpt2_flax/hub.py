"""The Hugging Face hub: whether it can be reached, and what to say when it can't."""

import functools
import http.client
import os
import pathlib
import ssl
import threading
import urllib.error
import urllib.request

from gpt2_flax.command_names import typed
from gpt2_flax.errors import UserError

DEFAULT_ENDPOINT = "https://huggingface.co"
PATIENCE_SECONDS = 5


@functools.cache
def reachable() -> bool:
    """Whether the hub may be asked and answers; tried once.

    Left alone its clients retry in silence for 20 to 50 seconds where it does not.
    """
    return not is_offline() and answers(endpoint())


def is_offline() -> bool:
    """Whether the user forbids to ask the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def cached_revision(dataset: str) -> str | None:
    """The commit of a hub dataset that Hugging Face's cache holds; no connection is made."""
    from huggingface_hub.constants import HF_HUB_CACHE

    name = f"datasets--{dataset.replace('/', '--')}"
    try:
        return pathlib.Path(HF_HUB_CACHE, name, "refs", "main").read_text("utf-8").strip()
    except (OSError, ValueError):
        return None


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT


def answers(url: str) -> bool:
    """Whether an HTTP request to `url` is answered, be it by an error, in the time it has.

    That a connection opens is not enough: a proxy or a firewall can accept and stay silent.
    """
    proxies = urllib.request.getproxies()
    if "all" in proxies and url.split(":")[0] not in proxies:
        return True  # the hub's clients go through ALL_PROXY; urllib cannot
    answered = threading.Event()

    def ask():
        try:
            opener = urllib.request.build_opener()  # urlopen would keep the first proxies
            request = urllib.request.Request(url, method="HEAD")
            opener.open(request, timeout=PATIENCE_SECONDS).close()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (502, 503, 504):  # a gateway's word for nobody behind it
                return
        except urllib.error.URLError as error:
            # The hub's clients bring certificates that this Python may lack.
            if not isinstance(error.reason, ssl.SSLCertVerificationError):
                return
        except (OSError, ValueError, http.client.HTTPException):  # ValueError: not an address
            return
        answered.set()

    # A thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    return answered.is_set()


def hub_error(what: str, error: BaseException) -> UserError:
    """The error for something that could not be had from the hub, with the ways on."""
    if not reachable():
        reason = f"the hub {endpoint()} cannot be reached and it is not in the cache"
    else:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return UserError(
        f"{what}: {reason}\n"
        "  ways on without the hub: --train_file FILE with --tokenizer bpe:8192, bytes or a"
        " local directory,\n"
        f"  or the quickstart: {typed('train')} --config quickstart"
    )
