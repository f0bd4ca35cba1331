"""Time and rate of a long pass."""

import time

from kd_jax.parallel.processes import say

_TOLD_SECONDS = 10.0


class Progress:
    """Measures a pass batch by batch, and prints what is done, the rate and the time left."""

    def __init__(self, name: str, total: int, unit: str, done: int) -> None:
        """Takes how many units there are, and how many were done before."""
        self.name, self.total, self.unit = name, total, unit
        self.done = self.first_done = done
        self.tokens = self.first_tokens = 0
        self.begun = self.last = self.told = time.monotonic()
        self.first: float | None = None
        """End of the first batch, which compiles."""
        if done:
            say(f"{name}: {done:,} of {total:,} {unit} are there")

    @property
    def seconds(self) -> float:
        return self.last - self.begun

    @property
    def warm_tokens(self) -> int:
        """Tokens of all batches but the first."""
        return self.tokens - self.first_tokens

    @property
    def warm_seconds(self) -> float:
        return 0.0 if self.first is None else self.last - self.first

    def batch(self, done: int, tokens: int) -> None:
        """Takes the units that are done, and the tokens of the batch that ended."""
        self.done, self.last = done, time.monotonic()
        self.tokens += tokens
        if self.first is None:
            self.first, self.first_done, self.first_tokens = self.last, done, tokens
            self.told = self.last
        elif self.last - self.told > _TOLD_SECONDS:
            self.told = self.last
            rate = self.warm_tokens / self.warm_seconds
            left = (self.total - done) * self.warm_seconds / (done - self.first_done)
            say(
                f"{self.name}: {done:,} of {self.total:,} {self.unit}, {rate:,.0f} tokens/s, "
                f"{left / 60:,.1f} min left"
            )
