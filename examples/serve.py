"""Serve the network of a finished run over HTTP: what arrives within 2 ms is computed together.

    pip install fastapi uvicorn
    clicktrain export runs/NAME --format c            # for the default engine; the others: see ENGINES
    python examples/serve.py runs/NAME --workers 2

    curl --data-binary @image.png -H 'Content-Type: image/png' http://127.0.0.1:8000/predict
    {"class":3,"name":"cat","logits":[...],"batch":1}

The body is an image file, or with ``Content-Type: application/octet-stream`` pixels of uint8, [H, W, C].
Each worker is a process with a network of its own; ``batch`` in the answer is how many images were computed
together.
``GET /health`` says what is served. examples/load_test.py measures it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from safetensors import safe_open

Run = Callable[[np.ndarray], np.ndarray]
"""Normalized images [N, C, H, W] -> logits [N, K], for any N up to the largest batch."""

LARGEST_BODY = 16 * 2**20
MOST_PIXELS = 50_000_000


# ---------------------------------------------------------------- engines


def c_engine(run: Path, max_batch: int, threads: int) -> Run:
    """The folder of ``clicktrain export RUN --format c``: neither PyTorch nor clicktrain is imported."""
    return c_module(run).Network(max_batch=max_batch)


def c_module(run: Path) -> Any:
    """``model.py`` of the exported folder."""
    folder = there(run / "export-c", "clicktrain export RUN --format c")
    spec = importlib.util.spec_from_file_location("exported", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accelerated_engine(run: Path, max_batch: int, threads: int) -> Run:
    """`clicktrain.load` with sparse kernels, chosen for whole batches."""
    import clicktrain

    return in_torch(clicktrain.load(run, batch=max_batch), threads)


def torch_engine(run: Path, max_batch: int, threads: int) -> Run:
    """The plain PyTorch network, zeros in place."""
    import clicktrain

    return in_torch(clicktrain.load(run), threads)


def in_torch(network: Any, threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)

    @torch.inference_mode()
    def call(images: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(images)).numpy()

    return call


def onnxruntime_engine(run: Path, max_batch: int, threads: int) -> Run:
    import onnxruntime

    path = there(run / "export.onnx", "clicktrain export RUN --format onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def openvino_engine(run: Path, max_batch: int, threads: int) -> Run:
    """For any batch, in the precision that it chooses itself (bfloat16 where the processor has it)."""
    import openvino

    path = there(run / "export.xml", "clicktrain export RUN --format openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda images: np.array(request.infer([images])[0])


ENGINES: dict[str, Callable[[Path, int, int], Run]] = {
    "c": c_engine,
    "accelerate": accelerated_engine,
    "torch": torch_engine,
    "onnxruntime": onnxruntime_engine,
    "openvino": openvino_engine,
}


def there(path: Path, command: str) -> Path:
    if not path.exists():
        sys.exit(f"there is no {path}: make it with '{command.replace('RUN', str(path.parent))}'")
    return path


# ---------------------------------------------------------------- batches


class Waiting(NamedTuple):
    image: np.ndarray
    arrived: float
    answer: asyncio.Future[tuple[np.ndarray, int]]


class Batcher:
    """Collects images for ``wait`` seconds from the first one on and runs them together, in a thread."""

    def __init__(self, run: Run, max_batch: int, wait: float) -> None:
        self._run, self._max_batch, self._wait = run, max_batch, wait
        self._waiting: asyncio.Queue[Waiting] = asyncio.Queue(16 * max_batch)

    async def __call__(self, image: np.ndarray) -> tuple[np.ndarray, int]:
        """Logits of an image, and how many images were computed with it; QueueFull when too many wait."""
        loop = asyncio.get_running_loop()
        one = Waiting(image, loop.time(), loop.create_future())
        self._waiting.put_nowait(one)
        return await one.answer

    async def work(self) -> None:
        """Compute batches until it is stopped; while one is computed, the next one gathers."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            left = batch[0].arrived + self._wait - loop.time()
            if left > 0 and self._waiting.qsize() + 1 < self._max_batch:
                await asyncio.sleep(left)
            while len(batch) < self._max_batch and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            try:
                images = np.stack([one.image for one in batch])
                results = await loop.run_in_executor(None, self._run, images)
            except Exception as error:  # whoever asked hears of it; the others go on
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            for one, logits in zip(batch, results, strict=True):
                if not one.answer.done():  # its client has gone
                    one.answer.set_result((logits, len(batch)))


# ---------------------------------------------------------------- the application


def facts_of(run: Path) -> dict[str, Any]:
    """image_shape, classes, mean and std of a run."""
    with safe_open(there(run / "model.safetensors", "clicktrain train"), framework="numpy") as file:
        return json.loads(file.metadata()["clicktrain"])


def pixels_of(body: bytes, kind: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Pixels [H, W, C] of uint8; HTTPException for anything else."""
    c, h, w = shape
    if kind == "application/octet-stream":
        if len(body) != h * w * c:
            raise HTTPException(422, f"{h * w * c} bytes are needed, {h}x{w} pixels of {c}, got {len(body)}")
        return np.frombuffer(body, np.uint8).reshape(h, w, c)
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(body))
        if image.width * image.height > MOST_PIXELS:
            raise HTTPException(413, f"an image of {image.width}x{image.height} is too large")
        image = image.convert("L" if c == 1 else "RGB").resize((w, h), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError) as error:
        raise HTTPException(422, "the body is not an image that can be read") from error
    return np.asarray(image, np.uint8).reshape(h, w, c)


def create_app(run: Path, engine: str, max_batch: int, wait_ms: float, threads: int) -> FastAPI:
    facts = facts_of(run)
    shape = tuple(facts["image_shape"])
    mean, std = np.float32(facts["mean"]), np.float32(facts["std"])
    batcher = Batcher(ENGINES[engine](run, max_batch, threads), max_batch, wait_ms / 1000)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.work())
        yield
        worker.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"run": str(run), "engine": engine, "process": os.getpid(), "image_shape": shape}

    @app.post("/predict")
    async def predict(request: Request) -> JSONResponse:
        if int(request.headers.get("content-length") or 0) > LARGEST_BODY:
            raise HTTPException(413, "the body is too large")
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        pixels = pixels_of(await request.body(), kind, shape)
        image = np.moveaxis((pixels.astype(np.float32) / 255 - mean) / std, -1, 0)
        try:
            logits, batch = await batcher(image)
        except asyncio.QueueFull:
            raise HTTPException(503, "too many images are waiting: try again") from None
        best = int(logits.argmax())
        name = facts["classes"][best] if facts["classes"] else str(best)
        return JSONResponse({"class": best, "name": name, "logits": logits.tolist(), "batch": batch})

    return app


def worker_app() -> FastAPI:
    """What each worker process builds for itself."""
    settings = json.loads(os.environ["CLICKTRAIN_SERVE"])
    return create_app(Path(settings.pop("run")), **settings)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--engine", choices=list(ENGINES), default="c")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of a worker's engine; the engine c has one")
    parser.add_argument("--max-batch", type=int, default=32, help="images computed together, at most")
    parser.add_argument("--wait-ms", type=float, default=2.0, help="that the first image waits for others")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    if min(given.workers, given.threads, given.max_batch) < 1 or given.wait_ms < 0:
        parser.error("workers, threads and max-batch are at least 1, wait-ms is not negative")
    settings = {
        "run": str(given.run), "engine": given.engine, "max_batch": given.max_batch,
        "wait_ms": given.wait_ms, "threads": given.threads,
    }  # fmt: skip
    if given.engine == "c" and not (given.run / "export-c" / "libmodel.so").exists():
        c_module(given.run).build()  # once, and not by each worker
    os.environ["CLICKTRAIN_SERVE"] = json.dumps(settings)
    os.environ.setdefault("OMP_NUM_THREADS", str(given.threads))
    # By name, so that each worker imports this file and builds an application of its own.
    uvicorn.run(
        f"{Path(__file__).stem}:worker_app",
        factory=True,
        app_dir=str(Path(__file__).resolve().parent),
        host=given.host,
        port=given.port,
        workers=given.workers,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
