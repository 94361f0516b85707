"""What a run takes from the hub, brought onto this machine before its ranks wait for each other.

One rank of each node fetches; the others find it in the cache. A download may take hours, and a
collective in which somebody is waited for that long is given up (`trainer.timeout`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

from trainer.config import Config, ConfigError
from trainer.data.errors import first_line
from trainer.data.files import FILES, read_rows
from trainer.worlds import registry

DATA = {
    "sft": ("demonstrations",),
    "rm": ("pairs",),
    "ppo": ("prompts", "eval_prompts", "ood_prompts"),
    "metarm": ("pairs", "prompts", "eval_prompts", "ood_prompts"),
    "eval": ("eval_prompts", "ood_prompts"),
}
"""What each stage reads of section data."""

SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")


def fetch(config: Config, stages: Sequence[str]) -> None:
    """All models and data that have a name and no path. Without a network nothing: the check that
    follows tells, on every rank, what is not on this machine."""
    wanted = names(config, stages)
    if not wanted or not reachable():
        return
    for key, source in wanted.items():
        section, _, name = key.partition(".")
        if section == "data":
            next(read_rows(source, name, 1), None)
            continue
        try:
            _fetch_model(source)
        except Exception as error:  # the hub, the network, the disk: all raise their own
            problem = f"cannot be fetched: {first_line(error)}"
            raise ConfigError(problem, key, source) from None


def _fetch_model(source: str) -> None:
    from huggingface_hub import list_repo_files, snapshot_download

    # a repository may have the same weights in several formats
    kinds = {Path(name).suffix for name in list_repo_files(source)}
    weights = "*.safetensors" if ".safetensors" in kinds else "*.bin"
    snapshot_download(source, allow_patterns=[*SETTINGS, weights])


def names(config: Config, stages: Sequence[str]) -> dict[str, str]:
    """Setting -> name on the hub, of all models and of the data that these stages read."""
    models = {key: getattr(config.model, key) for key in ("policy", "reward", "reference")}
    if config.model.critic not in ("reward", "policy"):
        models["critic"] = config.model.critic
    read = dict.fromkeys(key for stage in stages for key in DATA[stage])
    sources = {f"model.{key}": source for key, source in models.items()}
    for key in read:
        several = config.data.sources(key)
        alone = isinstance(getattr(config.data, key), str)
        for i, each in enumerate(several):
            sources[f"data.{key}" if alone else f"data.{key}[{i}].source"] = each.source
    return {key: source for key, source in sources.items() if is_name(source)}


def is_name(source: str) -> bool:
    return (
        source != ""
        and not registry.is_world(source)
        and not source.endswith(FILES)
        and not is_path(source)
    )


def is_path(source: str) -> bool:
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1


def reachable() -> bool:
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if any(os.environ.get(name) for name in proxies):
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
