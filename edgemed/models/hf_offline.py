"""transformers and peft made quiet and kept off the network while a step uses them.

What they would warn about is checked by the step itself, which says it in one line; and a build
must not depend on a hub.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from edgemed.errors import need


@contextlib.contextmanager
def quiet_and_offline() -> Iterator[None]:
    """Neither transformers nor peft may reach a hub, print progress or warn about what is checked
    here anyway.
    """
    hub = need("huggingface_hub", "build")
    transformers_logging = need("transformers.utils.logging", "build")
    hub_offline = hub.constants.HF_HUB_OFFLINE
    progress_bar = transformers_logging.is_progress_bar_enabled()
    levels = {}
    for name in ("transformers", "peft", "accelerate"):
        logger = logging.getLogger(name)
        levels[logger] = logger.level
    hub.constants.HF_HUB_OFFLINE = True
    transformers_logging.disable_progress_bar()
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub.constants.HF_HUB_OFFLINE = hub_offline
        for logger, level in levels.items():
            logger.setLevel(level)
        if progress_bar:
            transformers_logging.enable_progress_bar()


def native_config(config: Mapping[str, Any]) -> Any:
    """transformers' config object for the content of a config.json."""
    # A copy, because config classes write into the mappings that they are given.
    content = copy.deepcopy(dict(config))
    return need("transformers", "build").AutoConfig.for_model(**content)
