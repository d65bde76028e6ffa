"""Where files come from: directories, and a hub that answers, refuses, or is away."""

import base64
import concurrent.futures
import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from gpt2_flax.errors import MissingFileError, UserError
from gpt2_flax.pretrained.repository import Repository

ROOT = pathlib.Path(__file__).resolve().parents[2]
STAND_IN = ROOT.parent / "shared" / "hub" / "serve.py"
TOKEN = "hf_secretsecretsecret"
COMMIT, OTHER_COMMIT = "1" * 40, "2" * 40
FILES = {
    ("me/model", "main", "config.json"): b"main",
    ("me/model", "main", "deep/er/config.json"): b"deep",
    ("me/model", "v2", "config.json"): b"second",
    ("gpt2", "main", "config.json"): b"short id",
    ("me/private", "main", "config.json"): b"private",
}
# What a refusing hub says: (status, X-Error-Code).
REFUSALS = {
    "me/gone": (404, "RepoNotFound"),
    "me/hidden": (401, "RepoNotFound"),
    "me/gated": (403, "GatedRepo"),
    "me/forbidden": (403, ""),
    "me/broken": (500, ""),
}
# Seconds that the hub takes to answer for a file.
SLOW = {}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub that hf_hub_download asks: /OWNER/NAME/resolve/REVISION/FILE."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        if self.path == "/":
            return self.reply(200)
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, filename = rest.partition("/")
        self.server.asked.append((self.command, repository, filename))
        time.sleep(SLOW.get(repository, 0))
        if repository in REFUSALS:
            return self.reply(*REFUSALS[repository])
        if repository == "me/private" and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.reply(401, "RepoNotFound")
        if revision not in ("main", "v2"):
            return self.reply(404, "RevisionNotFound")
        data = FILES.get((repository, revision, filename))
        if data is None:
            return self.reply(404, "EntryNotFound")
        commit = COMMIT if revision == "main" else OTHER_COMMIT
        headers = {"ETag": f'"{data.hex()}"', "X-Repo-Commit": commit}
        return self.reply(200, headers=headers, data=data)

    do_GET = do_HEAD

    def reply(self, status, code="", headers=None, data=b""):
        self.send_response(status)
        headers = {"X-Repo-Commit": COMMIT} | (headers or {})
        if code:
            headers["X-Error-Code"] = code
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


# The hub's client takes its settings when it is imported: those set later have to count too.
CHILD = """
import json, os, socket, sys, time
import huggingface_hub
from huggingface_hub import hf_hub_download
os.environ["HF_ENDPOINT"] = sys.argv[1]
if "LATER" in os.environ:
    os.environ["HF_HUB_OFFLINE"] = os.environ["LATER"]
if "SLOW_NAMES" in os.environ:
    socket.getaddrinfo = lambda *args, **options: time.sleep(60)
from gpt2_flax.pretrained.repository import Repository
assert "jax" not in sys.modules and "torch" not in sys.modules
for name, options, method, filename in json.load(sys.stdin):
    began, kinds, where = time.perf_counter(), [], None
    try:
        place = Repository(name, **options)
        result = getattr(place, method)(filename)
        where = place.where
        if method == "get" and result is not None:
            result = result.read_text()
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        result = str(error)
        cause = error.__cause__ or error.__context__
        assert cause is None or not hasattr(cause, "request"), "it holds the token"
    print(json.dumps([result, kinds, where, time.perf_counter() - began]))
"""


def ask(url, home, *cases, **environment):
    """[(result or text of the error, its kinds, where, seconds)] of a fresh process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSF"))}
    kept = {k: v for k, v in kept.items() if not k.lower().endswith("_proxy")}
    process = subprocess.run(
        [sys.executable, "-c", CHILD, url],
        input=json.dumps(cases),
        env=kept | {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert TOKEN not in process.stdout + process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def get(name, filename="config.json", method="get", **options):
    return name, options, method, filename


def check_missing(outcome, *parts):
    text, kinds, _, seconds = outcome
    assert {"MissingFileError", "OSError", "ValueError"} <= set(kinds), outcome
    assert text.count("\n") <= 2
    for part in parts:
        assert part in text
    assert seconds < 15


@pytest.fixture(scope="module")
def warm(server, tmp_path_factory):
    """A cache that holds me/model's config.json of main."""
    home = tmp_path_factory.mktemp("warm")
    assert ask(server.url, home, get("me/model"))[0][0] == "main"
    return home


def test_a_hub_that_answers(server, tmp_path):
    cases = [
        (get("me/model"), "main"),
        (get("gpt2"), "short id"),
        (get("me/model", "absent.json"), None),
        (get("me/model", subfolder="deep/er"), "deep"),
        (get("me/model", subfolder="no"), None),
        (get("me/model", revision="v2"), "second"),
        (get("me/model", revision=None), "main"),
        (get("me/model", cache_dir=str(tmp_path / "own")), "main"),
        (get("me/private", token=TOKEN), "private"),
    ]
    outcomes = ask(server.url, tmp_path / "home", *[case for case, _ in cases])
    for (case, expected), (result, kinds, where, _) in zip(cases, outcomes, strict=True):
        assert (result, kinds, where) == (expected, [], case[0]), case
    assert list((tmp_path / "own").glob("models--me--model/snapshots/*/config.json"))


def test_has_fetches_nothing_and_force_download_fetches_anew(server, warm, tmp_path):
    del server.asked[:]
    cases = [get("gpt2", method="has"), get("gpt2", "absent", method="has")]
    assert [o[0] for o in ask(server.url, tmp_path, *cases)] == [True, False]
    assert {command for command, *_ in server.asked} == {"HEAD"}
    ask(server.url, warm, get("me/model"))
    assert {command for command, *_ in server.asked} == {"HEAD"}
    ask(server.url, warm, get("me/model", force_download=True))
    assert ("GET", "me/model", "config.json") in server.asked


def test_a_hub_that_refuses(server, tmp_path):
    names = [*REFUSALS, "me/private"]
    tokens = [{"token": TOKEN}] * len(REFUSALS) + [{"token": False}]
    outcomes = ask(
        server.url,
        tmp_path,
        *[get(name, **token) for name, token in zip(names, tokens, strict=True)],
        get("me/model", revision="v9"),
        get("me/model", token=f"{TOKEN}\n"),  # its fault is quoted by the HTTP library
    )
    no_such = ("has no such model or hides it", "check the spelling, or pass the token=")
    for outcome, name, parts in zip(
        outcomes,
        [*names, "me/model", "me/model"],
        [
            no_such,
            no_such,
            ("only to people let in", "ask for access"),
            ("answers with HTTP 403", "check token="),
            ("answers with HTTP 500", "try again later"),
            no_such,
            ("has no revision 'v9'", "check revision="),
            ("cannot be reached", "token="),
        ],
        strict=True,
    ):
        check_missing(outcome, f"model '{name}': config.json", server.url, str(ROOT), *parts)


@pytest.fixture
def silent():
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def nobody():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["nobody", "local_files_only", "HF_HUB_OFFLINE", "LATER"])
def test_without_a_hub_the_cache_is_all_there_is(server, warm, tmp_path, kind):
    url = nobody() if kind == "nobody" else server.url
    options = {"local_files_only": True} if kind == "local_files_only" else {}
    environment = {kind: "1"} if kind in ("HF_HUB_OFFLINE", "LATER") else {}
    del server.asked[:]
    found, absent, there, other = ask(
        url,
        warm,
        get("me/model", **options),
        get("me/model", "flax_model.msgpack", **options),
        get("me/model", method="has", **options),
        get("me/model", revision="v2", **options),
        **environment,
    )
    assert (found[0], absent[0], there[0]) == ("main", None, True)
    reason = {"nobody": f"the hub {url} cannot be reached", "LATER": "HF_HUB_OFFLINE"}.get(
        kind, kind
    )
    assert reason in found[2]
    check_missing(other, reason)
    (cold,) = ask(url, tmp_path, get("me/model", **options), **environment)
    check_missing(cold, "model 'me/model': config.json is not in the hub's cache, and", reason)
    assert server.asked == []


def test_a_hub_that_never_answers_is_not_waited_for(server, warm, silent, tmp_path, monkeypatch):
    """One that says nothing, or nothing about a file, or whose name is looked up for ever."""
    monkeypatch.setitem(SLOW, "me/model", 8)
    cases = [
        (url, home, names)
        for url, names in ((silent, {}), (server.url, {}), (silent, {"SLOW_NAMES": "1"}))
        for home in (warm, tmp_path)
    ]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        running = [pool.submit(ask, u, home, get("me/model"), **names) for u, home, names in cases]
    for (url, home, _), future in zip(cases, running, strict=True):
        ((text, kinds, where, seconds),) = future.result()
        reason = f"the hub {url} cannot be reached"
        if home == warm:
            assert (text, kinds) == ("main", []) and reason in where and seconds < 15
        else:
            check_missing((text, kinds, where, seconds), reason)


def test_with_a_hub_out_of_order_the_cache_is_used(server, warm, monkeypatch):
    monkeypatch.setitem(REFUSALS, "me/model", (500, ""))
    found, absent, forced = ask(
        server.url,
        warm,
        get("me/model"),
        get("me/model", "absent.json"),
        get("me/model", force_download=True),
    )
    assert (found[0], absent[0]) == ("main", None)
    assert "answers with HTTP 500" in found[2]
    check_missing(forced, "answers with HTTP 500")


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    ((text, kinds, *_),) = ask(
        server.url, tmp_path, get("me/model", cache_dir=str(tmp_path / "file"))
    )
    assert "UserError" in kinds
    assert "config.json was not fetched: the cache cannot be written: " in text
    assert "cache_dir=" in text


@pytest.mark.skipif(not STAND_IN.is_file(), reason="../shared/hub/serve.py is not here")
def test_the_stand_in_for_the_hub(tmp_path):
    url = nobody()
    port = url.rsplit(":", 1)[1]
    with subprocess.Popen(
        [sys.executable, STAND_IN, "--port", port], stdout=subprocess.PIPE, text=True
    ) as hub:
        try:
            assert hub.stdout.readline().startswith("serving")
            config, weights, gone = ask(
                url, tmp_path, get("gpt2"), get("gpt2", "model.safetensors"), get("no/such")
            )
        finally:
            hub.terminate()
    assert json.loads(config[0])["n_embd"] == 768
    assert weights[0] is None
    check_missing(gone, "has no such model")


# ---------------------------------------------------------------- directories


def test_a_directory_wins_over_the_hub(tmp_path, monkeypatch):
    (tmp_path / "gpt2" / "inner").mkdir(parents=True)
    (tmp_path / "gpt2" / "config.json").write_text("outer")
    (tmp_path / "gpt2" / "inner" / "config.json").write_text("inner")
    (tmp_path / "gpt2" / "link.json").symlink_to(tmp_path / "gpt2" / "config.json")
    (tmp_path / "gpt2" / "dangling.json").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    place = Repository("gpt2")
    assert (place.name, place.where, place.is_local) == ("gpt2", "gpt2", True)
    assert place.directory == pathlib.Path("gpt2")
    assert place.get("config.json").read_text() == "outer"
    assert place.get("link.json").read_text() == "outer"
    assert [place.get(name) for name in ("dangling.json", "absent", "inner")] == [None] * 3
    assert (place.has("config.json"), place.has("inner")) == (True, False)
    inner = Repository(tmp_path / "gpt2", subfolder="inner")
    assert inner.get("config.json").read_text() == "inner"
    assert inner.directory == tmp_path / "gpt2" / "inner"
    assert Repository("gpt2", subfolder="no").get("config.json") is None


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../config.json", "/etc/passwd", "a/b", "a\\b", "C:x", "a\0b"]
)
def test_filenames_never_lead_out(tmp_path, name):
    place = Repository(tmp_path)
    for method in (place.get, place.has, Repository("me/model").get):
        with pytest.raises(ValueError, match="is no plain name of a file"):
            method(name)


@pytest.mark.parametrize("name", ["..", "a/../..", "/etc", "a\\b", "a//b", "C:", "a\0b"])
def test_subfolders_never_lead_out(tmp_path, name):
    with pytest.raises(ValueError, match="is no relative path"):
        Repository(tmp_path, subfolder=name)


@pytest.mark.parametrize(
    "name", ["", "./out", "/no/where", "a/b/c", "a--b", "~/x", "a\nb", "x" * 999]
)
def test_a_name_of_nothing_says_where_was_looked(name):
    with pytest.raises(MissingFileError) as error:
        Repository(name)
    text = str(error.value)
    assert f"in {pathlib.Path.cwd()}, and it is no id of the hub's\n" in text
    assert text.count("\n") == 1 and len(text) < 600
    assert isinstance(error.value, OSError) and isinstance(error.value, UserError)
    assert error.value.exit_code == 2


def test_a_file_is_no_place(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(MissingFileError, match="is a file\n  pass the directory"):
        Repository(tmp_path / "model.safetensors")


def test_contradicting_options_are_refused():
    with pytest.raises(ValueError, match="contradict each other"):
        Repository("gpt2", force_download=True, local_files_only=True)


def test_the_token_is_in_no_text():
    place = Repository("gpt2", token=TOKEN)
    assert TOKEN not in f"{place} {place!r} {place.where} {place.name}"


PUSH = """
import json, sys, transformers
from gpt2_flax import FlaxGPT2LMHeadModel
config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=4, n_positions=5, vocab_size=7,
                                 bos_token_id=0, eos_token_id=0)
model = FlaxGPT2LMHeadModel(config)
model.push_to_hub("someone/tiny", token="hf_canary", commit_message="first", tags=["b", "a"])
model.save_pretrained(sys.argv[1], push_to_hub=True, token="hf_canary", repo_id="someone/other",
                      safe_serialization=False)
"""


class HubThatTakesUploads(http.server.BaseHTTPRequestHandler):
    """Notes what is asked of it in `server.asked`: (path, token, body)."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        url = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            name = json.loads(body)
            answer = {"url": f"{url}/{name['organization']}/{name['name']}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": file["path"], "uploadMode": "regular",
                                 "shouldIgnore": False} for file in files]}  # fmt: skip
        else:
            repository = self.path.split("/commit/")[0].removeprefix("/api/models/")
            answer = {"commitOid": "0" * 40, "commitUrl": f"{url}/{repository}/commit/0"}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.mark.slow
def test_a_model_is_pushed_to_the_hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubThatTakesUploads)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf_home"),
    }
    try:
        process = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path / "model")],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert process.returncode == 0, process.stderr
    assert {token for _, token, _ in server.asked} == {"Bearer hf_canary"}
    assert "hf_canary" not in process.stdout + process.stderr
    commits = {}
    for path, _, body in server.asked:
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                     for line in lines if line["key"] == "file"}  # fmt: skip
            commits[path] = lines[0]["value"]["summary"], files
    message, files = commits["/api/models/someone/tiny/commit/main"]
    assert message == "first"
    assert files.keys() == {
        "config.json", "generation_config.json", "model.safetensors", "README.md"
    }  # fmt: skip
    assert b"tags:\n- a\n- b\n" in files["README.md"]
    message, files = commits["/api/models/someone/other/commit/main"]
    assert message == "Upload model"
    assert "flax_model.msgpack" in files and "README.md" not in files
    assert b"hf_canary" not in b"".join(files.values())
