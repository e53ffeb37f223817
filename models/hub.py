"""The way to the Hugging Face hub, for encoders and VAEs given by name."""

import os
import socket
from urllib.parse import urlparse


def go_offline_if_unreachable() -> None:
    """Without a route to the hub, look in the local cache only: the client would retry for a minute otherwise."""
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return  # a proxy resolves names for us
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
