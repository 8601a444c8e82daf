"""What exchanging gradients would cost on many GPUs: a model of links, rings and overlap. Free of torch."""

from clicktrain.cluster.fit import Fit, MeasuredRow, fit_links, read_rows
from clicktrain.cluster.links import LINKS, Cluster, Level, Link, parse_link
from clicktrain.cluster.overlap import Iteration, iterate, split_into_buckets
from clicktrain.cluster.projection import EpochCost, Exchanged, Projection, project
from clicktrain.cluster.ring import allreduce_seconds, sent_bytes

__all__ = [
    "LINKS",
    "Cluster",
    "EpochCost",
    "Exchanged",
    "Fit",
    "Iteration",
    "Level",
    "Link",
    "MeasuredRow",
    "Projection",
    "allreduce_seconds",
    "fit_links",
    "iterate",
    "parse_link",
    "project",
    "read_rows",
    "sent_bytes",
    "split_into_buckets",
]
