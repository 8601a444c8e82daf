"""The example server answers correctly, whoever asks with it, and refuses what is no image."""

from __future__ import annotations

import http.client
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clicktrain.cli import main
from clicktrain.deploy.c_folder import load_module

torch.set_num_threads(1)
MISSING = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed"),
    pytest.mark.long,
]
DATA = "synthetic:classes=3,size=8,channels=1,train=32,val=8"
CLIENTS = 50


@pytest.fixture(scope="module")
def load_test(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("load_test", repository / "examples" / "load_test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "net"
    line = ["train", "--model", "resnet8", "--width", "0.5", "--data", DATA, "--batch-size", "16"]
    more = ["--epochs", "1", "--method", "nm", "--threads", "1", "--no-report", "--out", str(folder)]
    assert main([*line, *more]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", "cc -O0")  # compiles fast
        if shutil.which("cc"):
            assert main(["export", str(folder), "--format", "c"]) == 0
            load_module(folder / "export-c" / "model.py").build()
    return folder


@pytest.fixture(scope="module")
def server(run: Path, load_test: ModuleType) -> Iterator[Any]:
    engine = "c" if (run / "export-c").exists() else "torch"
    with load_test.Server(run, engine, ["--workers", "2", "--wait-ms", "5", "--max-batch", "8"]) as one:
        reason = one.wait()
        assert reason is None, reason
        yield one


def ask(port: int, body: bytes, kind: str = "application/octet-stream") -> dict[str, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_fifty_clients_at_once_get_their_own_answers(run: Path, server: Any, load_test: ModuleType) -> None:
    bodies, logits = load_test.images_and_logits(run)

    def client(number: int) -> list[dict[str, Any]]:
        return [ask(server.port, bodies[(number + step) % len(bodies)]) for step in range(4)]

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(client, range(CLIENTS)))
    together = set()
    for number, of_one in enumerate(answers):
        for step, answer in enumerate(of_one):
            expected = logits[(number + step) % len(bodies)]
            np.testing.assert_allclose(answer["logits"], expected, rtol=1e-3, atol=1e-3)
            assert answer["class"] == int(np.argmax(answer["logits"]))
            together.add(answer["batch"])
    assert 1 < max(together) <= 8


def test_an_image_file_is_scaled_and_what_is_none_is_refused(
    run: Path, server: Any, load_test: ModuleType
) -> None:
    bodies, logits = load_test.images_and_logits(run)
    file = io.BytesIO()
    Image.fromarray(np.frombuffer(bodies[0], np.uint8).reshape(8, 8)).save(file, "png")
    answer = ask(server.port, file.getvalue(), "image/png")
    np.testing.assert_allclose(answer["logits"], logits[0], rtol=1e-3, atol=1e-3)
    Image.new("RGB", (20, 30)).save(file := io.BytesIO(), "jpeg")
    assert len(ask(server.port, file.getvalue(), "image/jpeg")["logits"]) == 3
    for body, kind in ((b"123", "application/octet-stream"), (b"nothing", "image/png")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(server.port, body, kind)
        assert refused.value.code == 422
        refused.value.close()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Length", str(17 * 2**20))
    connection.endheaders()
    with connection.getresponse() as answered:
        assert answered.status == 413  # before the body is sent
    connection.close()
    assert ask(server.port, bodies[1])["class"] == int(logits[1].argmax())


def test_the_load_test_measures_what_is_there(run: Path, repository: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, str(repository / "examples" / "load_test.py"), str(run),
        "--engines", "torch", "onnxruntime", "--clients", "1", "4", "--requests", "20", "--max-batch", "4",
        "--json", str(tmp_path / "rows.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "onnxruntime  not measured: there is no" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["engine"], row["clients"]) for row in rows] == [("torch", 1), ("torch", 4)]
    assert all(row["requests_per_second"] > 0 and row["p50_ms"] <= row["p99_ms"] for row in rows)
