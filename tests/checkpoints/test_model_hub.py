"""Weights by hub name: from the hub's cache, from a hub on this machine, or not at all."""

import hashlib
import http.server
import json
import socket
import threading

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from dinov3_mm.checkpoints import build_backbone, load_weights, read_statistics, to_hf
from dinov3_mm.checkpoints.locate import local_path, parse_hub_name
from tests.checkpoints.toys import assert_same_tensors, tensors_of, toy_backbone

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "facebook/dinov3-vits16-pretrain-sat493m"


@pytest.fixture
def source():
    """A backbone that comes back from Hugging Face's layout to the bit."""
    backbone = toy_backbone(1)
    with torch.no_grad():
        for block in backbone.blocks:
            block.attn.qkv.bias.mul_(block.attn.qkv.bias_mask)
    return backbone


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, offline."""
    folder = tmp_path / "hf"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_repository(folder, source, shards=False):
    """What a hub repository of ours would hold, with a pickle and other things beside it."""
    folder.mkdir(parents=True)
    tensors = to_hf(source.state_dict())
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    statistics = {"image_mean": [0.430, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    (folder / "README.md").write_text("a model card")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that must not be fetched")
    names = sorted(tensors)
    parts = {"model.safetensors": names}
    if shards:
        half = len(names) // 2
        parts = {"model-1-of-2.safetensors": names[:half], "model-2-of-2.safetensors": names[half:]}
        index = {name: file for file, part in parts.items() for name in part}
        index_file = folder / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"weight_map": index}))
    for file, part in parts.items():
        save_file({name: tensors[name].clone() for name in part}, folder / file)
    return folder


def write_cache(cache, source, **options):
    """A repository as huggingface_hub keeps it; returns the folder of its files."""
    repository = cache / f"models--{REPO.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return write_repository(repository / "snapshots" / COMMIT, source, **options)


class Hub:
    """Answers of the hub's interface for one repository; records what is asked for."""

    def __init__(self, folder, gated=False):
        self.folder, self.gated, self.asked = folder, gated, []

    def answer(self, path):
        """Status, headers and body."""
        self.asked.append(path)
        files = sorted(entry.name for entry in self.folder.iterdir())
        if path.startswith(f"/api/models/{REPO}/revision/"):
            if not path.endswith(("/main", "/v1")):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            siblings = [{"rfilename": name} for name in files]
            return 200, {}, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
        if path.startswith(f"/api/models/{REPO}/tree/"):
            sizes = {name: (self.folder / name).stat().st_size for name in files}
            tree = [
                {"type": "file", "path": name, "size": size, "oid": name}
                for name, size in sizes.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        prefix = f"/{REPO}/resolve/{COMMIT}/"
        if path.startswith(prefix):
            if self.gated:
                return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"}, b""
            body = (self.folder / path.removeprefix(prefix)).read_bytes()
            digest = hashlib.sha256(body).hexdigest()
            return 200, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}, body
        return 401, {"X-Error-Code": "RepoNotFound"}, b""


@pytest.fixture
def hub(tmp_path, cache, source, monkeypatch):
    """A hub on this machine that holds :data:`REPO`."""
    hub = Hub(write_repository(tmp_path / "www", source))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = hub.answer(self.path.partition("?")[0])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (REPO, (REPO, None)),
        (
            "timm/vit_small_patch16_dinov3.lvd1689m",
            ("timm/vit_small_patch16_dinov3.lvd1689m", None),
        ),
        (f"hf-hub:{REPO}@v1", (REPO, "v1")),
        (f"{REPO}@refs/pr/1", (REPO, "refs/pr/1")),
        ("hf-hub:me/toy.pth", ("me/toy.pth", None)),
        ("work_dirs/weights.pth", None),
        ("work_dirs/run/weights", None),
        ("/a/b", None),
        ("./b", None),
        ("../b", None),
        ("~/b", None),
        ("dinov3_vits16", None),
        ("a/b@", None),
    ],
)
def test_hub_names_are_told_from_paths(text, expected):
    assert parse_hub_name(text) == expected


def test_a_path_object_is_never_a_hub_name(tmp_path):
    assert parse_hub_name(tmp_path / "a" / "b") is None


@pytest.mark.parametrize("shards", [False, True])
def test_a_cached_repository_needs_no_network(shards, cache, source, no_network, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    folder = write_cache(cache, source, shards=shards)
    for name in (REPO, f"hf-hub:{REPO}", f"{REPO}@{COMMIT}"):
        assert local_path(name) == folder
    state = build_backbone(REPO, periods="exact").state_dict()
    assert_same_tensors(state, tensors_of(source))
    assert read_statistics(REPO).name == "SAT-493M"


def test_files_on_this_machine_need_no_network(cache, source, no_network, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "checkpoints" / "toy-01234567.pth"
    cached.parent.mkdir(parents=True)
    torch.save(source.state_dict(), cached)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    torch.save(source.state_dict(), tmp_path / "owner" / "weights")
    monkeypatch.chdir(tmp_path)
    for weights in ("https://example.org/files/toy-01234567.pth", cached, "owner/weights"):
        assert_same_tensors(load_weights(weights).state_dict, tensors_of(source))
    # What exists here wins over a hub name, even if it holds nothing.
    with pytest.raises(FileNotFoundError, match="no weights in the folder owner/name"):
        load_weights("owner/name")


def test_offline_and_not_cached_names_both_possibilities(cache, no_network):
    with pytest.raises(FileNotFoundError) as error:
        build_backbone("owner/name")
    message = str(error.value)
    assert "no local file or folder owner/name" in message
    assert "hub repository of that name is not in the cache" in message
    assert "HF_HUB_OFFLINE" in message


def test_a_repository_is_fetched_once_without_pickles(hub, source):
    for _ in range(2):
        state = build_backbone(REPO, periods="exact").state_dict()
        assert_same_tensors(state, tensors_of(source))
    fetched = {entry.name for entry in local_path(REPO).iterdir()}
    assert fetched == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert sum(path.endswith("/revision/main") for path in hub.asked) == 1
    assert not any("pytorch_model.bin" in path for path in hub.asked)


def test_an_incomplete_cache_is_completed(hub, cache, source):
    folder = write_cache(cache, source, shards=False)
    (folder / "model.safetensors").unlink()
    assert_same_tensors(build_backbone(REPO, periods="exact").state_dict(), tensors_of(source))


def test_a_gated_repository_says_how_to_get_in(hub):
    hub.gated = True
    message = (
        rf"{REPO} is gated: accept its licence on https://huggingface.co/{REPO}.*hf auth login"
    )
    with pytest.raises(PermissionError, match=message):
        build_backbone(REPO)


def test_unknown_repositories_and_revisions_are_named(hub):
    with pytest.raises(FileNotFoundError, match="owner/name is neither a local file or folder nor"):
        build_backbone("owner/name")
    with pytest.raises(FileNotFoundError, match=f"{REPO} has no such revision: {REPO}@v7"):
        build_backbone(f"{REPO}@v7")


def test_a_repository_of_pickles_only_is_refused(hub):
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in the folder .*expected model.safet"):
        build_backbone(REPO)
