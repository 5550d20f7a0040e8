"""GLM-4.5 to 4.7: routing as DeepSeek-V3, shared experts, half of each head rotated."""

from collections.abc import Mapping
from typing import Any

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.deepseek_routing import deepseek_router
from flexmoe.models.common.names import Names
from flexmoe.models.common.router import Routing


class Glm4Moe(Decoder):
    """GLM-4.5-Air, GLM-4.5, 4.6, 4.7 and every other Glm4Moe config."""

    names = Names()

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """Routing as in DeepSeek-V3."""
        return deepseek_router(config, self.arch.top_k, normalized=True)
