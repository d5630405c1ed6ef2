"""Releases on S3 as it speaks: a server of that protocol (moto, in a process of its own) and s3fs, with real credentials to keep.

Both are optional: `pip install s3fs "moto[server]"`. TANDEM_TEST_S3 names the address of another server, MinIO for example.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from registry import artifacts as module
from registry.artifacts import Artifacts
from registry.release import Manifest, ReleaseFacts, create_release, verify_release
from registry.retention import delete
from registry.store import ReleaseStore
from tandem.core.errors import NotFoundError, UnavailableError

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("s3fs") is None or (importlib.util.find_spec("moto") is None and "TANDEM_TEST_S3" not in os.environ),
    reason='s3fs or a server is missing; `pip install s3fs "moto[server]"`, or name a server in TANDEM_TEST_S3',
)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server."""
    if "TANDEM_TEST_S3" in os.environ:
        yield os.environ["TANDEM_TEST_S3"]
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (tmp_path_factory.mktemp("s3") / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=2).close()
            break
        except OSError:
            time.sleep(0.3)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(timeout=30)


@pytest.fixture
def url(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket; credentials and address stand in the environment, where AWS's own tools look for them."""
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", os.environ.get("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", os.environ.get("AWS_SECRET_ACCESS_KEY", SECRET))
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"tandem-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}/team/releases"


def make(releases: Path, name: str) -> tuple[Path, Manifest]:
    source = releases.parent / f"{name}.json"
    source.write_text(f'["{name}"]')
    weights = releases.parent / "towers"
    weights.mkdir(exist_ok=True)
    (weights / "big.json").write_text("[" + "1," * 4_000_000 + "1]")  # above the 5 MiB where S3 clients go over to parts
    return releases / name, create_release(
        {"popular.json": source, "towers": weights}, releases / name, ReleaseFacts(created_at=datetime(2026, 11, 20, tzinfo=UTC))
    )


def test_from_one_machine_to_another_over_s3_and_gone_again(url: str, tmp_path: Path) -> None:
    releases = tmp_path / "releases"
    folder, manifest = make(releases, "r1")
    assert Artifacts(url, releases).upload(folder, manifest) is True
    assert Artifacts(url, releases).upload(folder, manifest) is False
    there = Artifacts(url, tmp_path / "elsewhere")
    assert verify_release(there.fetch("r1", manifest.content_hash), manifest.content_hash) == manifest
    store = ReleaseStore(f"sqlite:///{tmp_path}/tandem.db", releases)
    store.add(manifest, folder)
    delete(store, releases, "r1", artifacts=Artifacts(url, releases))
    assert there.names() == set()
    tables = (tmp_path / "tandem.db").read_bytes()
    assert SECRET.encode() not in tables
    assert url.encode() not in tables
    store.close()


def test_a_half_upload_to_s3_is_no_release(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, manifest = make(tmp_path / "releases", "r1")
    whole = module._put

    def put(fs: object, file: Path, place: str) -> None:
        if file.name == "manifest.json":
            raise OSError("killed")
        whole(fs, file, place)

    with monkeypatch.context() as cutting:
        cutting.setattr(module, "_put", put)
        with pytest.raises(UnavailableError, match="killed"):
            Artifacts(url, folder.parent).upload(folder, manifest)
    with pytest.raises(NotFoundError):
        Artifacts(url, tmp_path / "elsewhere").fetch("r1", manifest.content_hash)
    assert Artifacts(url, folder.parent).names() == {"r1"}
    assert Artifacts(url, folder.parent).upload(folder, manifest) is True
    assert Artifacts(url, tmp_path / "elsewhere").fetch("r1", manifest.content_hash).is_dir()


def test_a_bucket_that_is_not_there_is_told_without_secrets(url: str, tmp_path: Path) -> None:
    folder, manifest = make(tmp_path / "releases", "r1")
    with pytest.raises(UnavailableError, match=r"s3://no-such-bucket-anywhere/x failed") as caught:
        Artifacts("s3://no-such-bucket-anywhere/x", tmp_path).upload(folder, manifest)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    assert os.environ["AWS_ACCESS_KEY_ID"] not in str(caught.value)


def test_an_s3_server_that_is_away_is_told(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    before = time.monotonic()
    with pytest.raises(UnavailableError, match="check the address, the network and the credentials"):
        Artifacts(url, tmp_path / "elsewhere").fetch("r1", "0" * 64)
    assert time.monotonic() - before < 60
