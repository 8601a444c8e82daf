"""What processes exchange in a training step, and the time that takes over slow links: ``bench exchange``."""

from clicktrain.bench.exchange.measure import (
    ExchangeCase,
    ExchangeRow,
    bench_exchange,
    check_targets,
    sentences,
    to_json,
)

__all__ = ["ExchangeCase", "ExchangeRow", "bench_exchange", "check_targets", "sentences", "to_json"]
