"""Weights by URL: fetched once from a server on this machine, and kept only when sound."""

import functools
import hashlib
import http.server
import threading

import pytest
import torch
from safetensors.torch import save_file

from dinov3_mm.checkpoints import build_backbone, read_statistics
from dinov3_mm.checkpoints.locate import cache_path, local_path
from tests.checkpoints.test_opening import RunsCode
from tests.checkpoints.toys import assert_same_tensors, tensors_of, toy_backbone


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder served over http; torch hub's cache lies beside it. Requests are recorded."""
    (tmp_path / "www").mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield tmp_path / "www", f"http://127.0.0.1:{httpd.server_port}", requests
        httpd.shutdown()
        thread.join()


def put(folder, content, name="toy-{}.pth"):
    torch.save(content, folder / "plain.pth")
    digits = hashlib.sha256((folder / "plain.pth").read_bytes()).hexdigest()[:8]
    return (folder / "plain.pth").rename(folder / name.format(digits)).name


def cached_files(folder):
    return [entry for entry in (folder.parent / "hub").rglob("*") if entry.is_file()]


def test_a_file_is_fetched_once_and_loaded(server):
    folder, address, requests = server
    source = toy_backbone(1)
    name = put(folder, source.state_dict())
    for _ in range(2):
        backbone = build_backbone(f"{address}/{name}?Policy=signed&Key=1")
        assert_same_tensors(backbone.state_dict(), tensors_of(source))
    assert len(requests) == 1
    assert cached_files(folder) == [folder.parent / "hub" / "checkpoints" / name]


def test_equal_file_names_of_different_models_do_not_collide(server):
    folder, address, _ = server
    for model in ("small", "large"):
        (folder / model).mkdir()
        put(folder / model, {"model": model, "x": torch.ones(1)}, name="model.pth")
    paths = {local_path(f"{address}/{model}/model.pth") for model in ("small", "large")}
    assert len(paths) == 2 and all(path.name == "model.pth" for path in paths)


def test_an_address_tells_the_statistics(server):
    folder, address, _ = server
    place = "someone/dinov3-vitl16-pretrain-sat493m/resolve/main"
    (folder / place).mkdir(parents=True)
    save_file(toy_backbone(1).state_dict(), folder / place / "model.safetensors")
    assert read_statistics(f"{address}/{place}/model.safetensors").name == "SAT-493M"


def test_another_hash_is_refused_and_not_kept(server):
    folder, address, _ = server
    put(folder, toy_backbone(1).state_dict(), name="toy-00000000.pth")
    with pytest.raises(ValueError, match=r"refused: invalid hash value"):
        local_path(f"{address}/toy-00000000.pth")
    assert cached_files(folder) == []


def test_a_download_that_would_run_code_is_refused_and_not_kept(server, tmp_path):
    folder, address, _ = server
    name = put(folder, {"x": RunsCode(tmp_path / "executed")})
    with pytest.raises(ValueError, match="could run code"):
        build_backbone(f"{address}/{name}")
    assert not (tmp_path / "executed").exists()
    assert cached_files(folder) == []


def test_a_web_page_instead_of_weights_is_refused_and_not_kept(server):
    folder, address, _ = server
    (folder / "weights.pth").write_text("<html>Access denied</html>")
    with pytest.raises(ValueError, match="web page"):
        local_path(f"{address}/weights.pth")
    assert cached_files(folder) == []


def test_a_url_without_a_file_name_is_an_error():
    with pytest.raises(ValueError, match="names no file"):
        cache_path("https://example.org/")
