"""What a server is asked to be, checked before anything is opened."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from flexmoe.batch.options import RunOptions
from flexmoe.errors import UsageError
from flexmoe.serving.limits import Limits, is_loopback
from policies.common.checks import check_number
from policies.common.directories import resolved
from policies.common.option_names import option

#: Fewer characters are guessed.
_LEAST_KEY_CHARACTERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """One server.

    Args:
        models: checkpoint directories. Each is served by the last part of its name.
        run: how models run: policy, budgets, device and dtype; its files and its model are replaced.
        host, port: where it listens; port 0 takes a free one.
        api_key: what clients have to give; required for a host that is not this machine's loopback.
        data_dir: where files, batches and the database are kept.
        limits: what it takes.
        checkpoint_interval_s: seconds between two writes of the tokens of a batch's rows in flight.
        least_turn_s: seconds that a model stays loaded at least, once others wait.

    Raises:
        UsageError: a value that cannot be used.
    """

    models: tuple[Path, ...]
    run: RunOptions
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    data_dir: Path = Path("~/.local/share/flexmoe/server")
    limits: Limits = field(default_factory=Limits)
    checkpoint_interval_s: float = 60.0
    least_turn_s: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_dir", resolved(self.data_dir))
        if not self.models:
            raise UsageError(f"no model is given; name a checkpoint directory or more with {option('models')}")
        names = [path.name for path in map(resolved, self.models)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"two models are called {twice!r}, by which clients ask for them; rename a directory")
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"{option('port')} is {self.port}; give one from 0 to 65535")
        check_number(option("checkpoint_interval_s"), self.checkpoint_interval_s, zero=True)
        check_number(option("least_turn_s"), self.least_turn_s, zero=True)
        self._check_key()

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine reach it."""
        return is_loopback(self.host)

    def run_options(self, model: Path) -> RunOptions:
        """How a model runs."""
        return replace(self.run, model=str(resolved(model)), checkpoint_interval_s=self.checkpoint_interval_s)

    def _check_key(self) -> None:
        if self.api_key is None:
            if not self.is_loopback:
                raise UsageError(
                    f"{option('host')} is {self.host}, which other machines reach; give a key with {option('api_key')}, or "
                    "listen on 127.0.0.1"
                )
        elif len(self.api_key) < _LEAST_KEY_CHARACTERS or not self.api_key.isascii() or not self.api_key.isprintable():
            raise UsageError(
                f"{option('api_key')} has to have {_LEAST_KEY_CHARACTERS} printable ASCII characters or more; make one with "
                "`openssl rand -hex 24`"
            )
