"""One network in inference: this package's engines beside those that a user could take instead."""

from clicktrain.bench.inference.case import InferenceCase
from clicktrain.bench.inference.engines import ENGINES, Engine
from clicktrain.bench.inference.measure import InferenceRow, NotMeasured, bench_inference

__all__ = ["ENGINES", "Engine", "InferenceCase", "InferenceRow", "NotMeasured", "bench_inference"]
