"""dots.llm1: routing as DeepSeek-V3, shared experts, heads are normed."""

from collections.abc import Mapping
from typing import Any

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.deepseek_routing import deepseek_router
from flexmoe.models.common.names import Names
from flexmoe.models.common.router import Routing


class Dots1(Decoder):
    """dots.llm1 and every other Dots1 config."""

    names = Names()

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """Routing as in DeepSeek-V3."""
        return deepseek_router(config, self.arch.top_k, normalized=False)
