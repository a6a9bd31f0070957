"Models that must be fetched, against a Hub on loopback: the real client, and every way in which it fails."
import json
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, qlora

TINY = ROOT / "qlora_nb" / "assets" / "tiny-mistral"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_testtoken"


class Hub(BaseHTTPRequestHandler):
    "As much of the Hub's interface as its client uses to look at a model and download it."
    cut_after = None  # bytes of the weights that are sent before the connection breaks

    def log_message(self, *args): self.server.asked.append(args[1])

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name == "org/gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access to model org/gated is restricted")
        if name not in ("org/tiny", "org/gated", "org/huge"):
            return self.reply(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if parts[0] == "api":
            huge = 10**15 if name == "org/huge" else 0
            files = [{"rfilename": p.name, "size": p.stat().st_size + huge} for p in sorted(TINY.iterdir())]
            tree = [{"type": "file", "path": f["rfilename"], "size": f["size"], "oid": "0" * 40} for f in files]
            info = {"id": name, "sha": COMMIT, "siblings": files, "private": False, "gated": False, "tags": []}
            return self.reply(200, json.dumps(tree if "tree" in parts else info).encode(), Content_Type="application/json")
        body = (TINY / parts[-1]).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        tag = {"ETag": f'"{sha256(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        if self.command == "GET" and parts[-1] == "model.safetensors" and Hub.cut_after is not None:
            self.send_response(200)
            for key, value in {"Content-Length": len(body), **tag}.items():
                self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(body[:Hub.cut_after])
            self.close_connection = True
            return None
        partial = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        return self.reply(206 if start else 200, body[start:], **tag, **partial)


@pytest.fixture
def hub(tmp_path):
    "The environment of a process that sees this Hub and an empty cache."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.cut_after = None
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
           "HF_TOKEN": "", "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()


def dry_run(model, env, folder):
    (folder / "rows.jsonl").write_text('{"question": "What?", "answer": "That."}\n{"question": "Why?", "answer": "So."}\n')
    return qlora("train", "--run", "run", f"model={model}", "data.path=rows.jsonl", "--dry-run", "--json", cwd=folder, env=env)


@pytest.mark.parametrize("model, fix", [("org/gated", "set HF_TOKEN"), ("org/missing", "check the name"),
                                        ("org/huge", "make room or set HF_HOME")])
def test_refusals_are_one_line(hub, tmp_path, model, fix):
    done = dry_run(model, hub, tmp_path)
    assert done.returncode == 2 and fix in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_unreachable_is_one_line(hub, tmp_path):
    done = dry_run("org/tiny", {**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}, tmp_path)
    assert done.returncode == 2 and "hf download org/tiny" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_token_opens_a_gated_model(hub, tmp_path):
    done = dry_run("org/gated", {**hub, "HF_TOKEN": TOKEN}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in "".join(p.read_text() for p in (tmp_path / "run").rglob("*") if p.is_file())


def test_interrupted_download_goes_on(hub, tmp_path):
    Hub.cut_after = 1_000_000
    broken = dry_run("org/tiny", hub, tmp_path)
    *_, last = broken.stderr.splitlines()  # before it stand the client's own words on its attempts
    assert broken.returncode == 2 and last.startswith("qlora: ") and "run again to go on" in last, broken.stderr
    Hub.cut_after = None
    assert dry_run("org/tiny", hub, tmp_path).returncode == 0
    offline = dry_run("org/tiny", {**hub, "HF_HUB_OFFLINE": "1"}, tmp_path)
    assert offline.returncode == 0, offline.stderr


def test_local_folder(tmp_path):
    done = dry_run(str(TINY), {}, tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["config"]["model"]["path"] == str(TINY), done.stderr
