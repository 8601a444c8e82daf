"""What several processes of one training agree on, and what they exchange."""

from clicktrain.comm.collectives import Exchange, add_exchange, counted
from clicktrain.comm.kept_exchange import ExchangedMasks, KeptExchange, masked_allreduce_hook

__all__ = ["Exchange", "ExchangedMasks", "KeptExchange", "add_exchange", "counted", "masked_allreduce_hook"]
