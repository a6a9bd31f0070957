"Models and data sets that must be fetched, against a Hub on loopback: the real client, and every way in which it fails."
import io
import json
import os
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, qlora

TINY = ROOT / "qlora_nb" / "assets" / "tiny-mistral"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_testtoken"
# rows in each file of a configuration's split
SHARDS = {("faq", "train"): (60, 240), ("faq", "test"): (7,), ("tickets", "train"): (5,), ("tickets", "test"): (3,)}


def questions(config, split):
    return [f"{config} {split} {i}?" for i in range(sum(SHARDS[config, split]))]


def parent(path): return path.rpartition("/")[0]


def jsonl(rows): return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def data_set(kind, write):
    "Two configurations with two splits each; the card names their files and states their numbers of rows."
    files, configs, infos = {}, [], []
    for config in "faq", "tickets":
        paths, counts = [], []
        for split in "train", "test":
            rows = [{"question": q, "answer": f"An answer to {q}"} for q in questions(config, split)]
            for shard, size in enumerate(SHARDS[config, split]):
                first = sum(SHARDS[config, split][:shard])
                files[f"{config}/{split}-{shard}.{kind}"] = write(rows[first:first + size])
            paths.append({"split": split, "path": f"{config}/{split}-*.{kind}"})
            counts.append({"name": split, "num_examples": len(rows), "num_bytes": 0})
        configs.append({"config_name": config, "data_files": paths})
        infos.append({"config_name": config, "splits": counts})
    return {"README.md": f"---\n{json.dumps({'configs': configs, 'dataset_info': infos})}\n---\n".encode(), **files}


MODEL = {p.name: p.read_bytes() for p in sorted(TINY.iterdir())}
FAQ = data_set("jsonl", jsonl)
PARTIAL = {**FAQ, "faq/train-1.jsonl": FAQ["faq/train-1.jsonl"].rpartition(b'{"')[0]}  # without its last row
REPOS = {"org/tiny": MODEL, "org/gated": MODEL, "org/huge": MODEL, "org/faq": FAQ, "org/gated-faq": FAQ,
         "org/partial": PARTIAL, "org/parquet": data_set("parquet", parquet)}


class Hub(BaseHTTPRequestHandler):
    "As much of the Hub's interface as its clients use to look at a model or a data set and to fetch it."
    cuts = 0       # how often a connection breaks
    cut_after = 0  # bytes that are sent of a longer file before it does
    gone = ()      # files that are listed but can no longer be fetched

    def log_message(self, *args): self.server.asked.append(args[1])

    def reply(self, status, body=b"", sent=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[0] == "api"
        parts = parts[1 if api else 0:]
        parts = parts[1 if parts[:1] in (["models"], ["datasets"]) else 0:]
        name, rest = "/".join(parts[:2]), parts[2:]
        if "gated" in name and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(403, X_Error_Code="GatedRepo", X_Error_Message=f"Access to {name} is restricted")
        if name not in REPOS:
            return self.reply(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        return self.reply_api(name, rest) if api else self.reply_file(REPOS[name], "/".join(rest[2:]))

    def reply_api(self, name, rest):
        huge = 10**15 if name == "org/huge" else 0
        files = [{"rfilename": path, "size": len(body) + huge} for path, body in REPOS[name].items()]
        found = {"id": name, "sha": COMMIT, "siblings": files, "private": False, "gated": False, "tags": []}
        if rest[:1] == ["tree"]:
            folders = {parent(f["rfilename"]) for f in files} - {""}
            found = [{"path": f["rfilename"], "type": "file", "size": f["size"], "oid": "0" * 40} for f in files]
            found += [{"path": path, "type": "directory", "oid": "0" * 40} for path in sorted(folders)]
            found = [f for f in found if parent(f["path"]) == "/".join(rest[2:])]
        return self.reply(200, json.dumps(found).encode(), Content_Type="application/json")

    def reply_file(self, files, path):
        if path not in files or path in Hub.gone:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        body = files[path]
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = body[int(first):int(last) + 1 if last else None]
        headers = {"ETag": f'"{sha256(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        if part != body:
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
        cut = self.command == "GET" and Hub.cuts > 0 and len(part) > Hub.cut_after
        Hub.cuts -= cut
        return self.reply(200 if part == body else 206, part, Hub.cut_after if cut else None, **headers)


@pytest.fixture
def hub(tmp_path):
    "The environment of a process that sees this Hub and an empty cache."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.cuts, Hub.gone = 0, ()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
           "HF_TOKEN": "", "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()


def dry_run(model, env, folder):
    (folder / "rows.jsonl").write_text('{"question": "What?", "answer": "That."}\n{"question": "Why?", "answer": "So."}\n')
    return qlora("train", "--run", "run", f"model={model}", "data.path=rows.jsonl", "--dry-run", "--json", cwd=folder, env=env)


def train(env, folder, run):
    return qlora("train", "--run", run, "model=org/tiny", "data.path=rows.jsonl", "train.max_steps=1", "train.samples=0", cwd=folder, env=env)


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
    assert TOKEN.encode() not in b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())


def test_interrupted_download_goes_on(hub, tmp_path):
    Hub.cuts, Hub.cut_after = 99, 1_000_000
    assert dry_run("org/tiny", hub, tmp_path).returncode == 0  # which needs no weights, and fetches none
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    broken = train(hub, tmp_path, "run")
    *_, last = broken.stderr.splitlines()  # before it stand the client's own words on its attempts
    assert broken.returncode == 2 and last.startswith("qlora: ") and "run again to go on" in last, broken.stderr
    Hub.cuts = 0
    assert train(hub, tmp_path, "run").returncode == 0
    offline = train({**hub, "HF_HUB_OFFLINE": "1"}, tmp_path, "another")
    assert offline.returncode == 0, offline.stderr


def test_local_folder(tmp_path):
    done = dry_run(str(TINY), {}, tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["config"]["model"]["path"] == str(TINY), done.stderr


READ = """
import json, sys
from qlora_nb.data import read_records
from qlora_nb.vram_budget import InputError
for source in json.loads(sys.argv[1]):
    try: print(json.dumps([record.value["question"] for record in read_records(*source)]))
    except InputError as e: print(json.dumps(str(e)))
"""


def python(code, env, *args, **kwargs):
    "Run code in a process of its own, since the clients read the environment only once."
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, **kwargs)


def read(env, *sources):
    "For each (name, subset, split) its questions, or the words of its refusal, and what stands on stderr."
    done = python(READ, env, json.dumps(sources))
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def data(name, env, folder, *options):
    return qlora("data", name, "--subset", "faq", *options, "--out", "out", "--json", cwd=folder, env=env)


def test_rows_of_data_sets(hub):
    sources = [(name, *which) for name in ("org/faq", "org/parquet") for which in SHARDS]
    found, said = read(hub, *sources)
    assert found == [questions(*which) for _, *which in sources], said
    cached = b"".join(p.read_bytes() for p in Path(hub["HF_HOME"]).rglob("*") if p.is_file())
    assert b"tickets" in cached and b"tickets train" not in cached  # the card is there, no row is


def test_command_reads_a_gated_data_set_with_the_token(hub, tmp_path):
    done = data("org/gated-faq", hub, tmp_path, "--split", "test")
    assert done.returncode == 2 and "org/gated-faq is gated" in done.stderr and "HF_TOKEN" in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout, done.stderr
    done = data("org/gated-faq", {**hub, "HF_TOKEN": TOKEN}, tmp_path, "--split", "test")
    rows = [json.loads(line) for side in ("train", "eval") for line in (tmp_path / "out" / f"{side}.jsonl").open()]
    assert sorted(row["instruction"] for row in rows) == questions("faq", "test"), done.stderr
    assert json.loads(done.stdout)["counts"]["records"] == 7
    assert TOKEN.encode() not in b"".join(p.read_bytes() for p in (tmp_path / "out").iterdir())


def test_refusals_name_the_choices(hub):
    sources = ("org/faq", "faq", "dev"), ("org/faq", "french"), ("org/faq",), ("org/missing",)
    (split, subset, none, name), said = read(hub, *sources)
    assert "['train', 'test']" in split and "check data.subset and data.split" in split and not said
    assert "['faq', 'tickets']" in subset and "['faq', 'tickets']" in none and "check data.subset" in none
    assert "neither a file here nor a data set" in name and "check the name" in name


def test_without_the_hub_the_cache_or_one_line(hub):
    closed = "http://127.0.0.1:9"
    absent = {closed: {"HF_ENDPOINT": closed}, "HF_HUB_OFFLINE is set": {"HF_HUB_OFFLINE": "1"}}
    for why, change in absent.items():
        (refusal,), said = read({**hub, **change}, ("org/faq", "faq", "test"))
        assert f"the Hub cannot be reached ({why}" in refusal and "hf download org/faq" in refusal and not said
    python("import datasets; datasets.load_dataset('org/faq', 'faq')", hub, check=True)
    for change in absent.values():
        assert read({**hub, **change}, ("org/faq", "faq", "test"))[0] == [questions("faq", "test")]


def test_broken_stream_goes_on(hub):
    Hub.cuts, Hub.cut_after = 2, 10_000
    found, said = read(hub, ("org/faq", "faq"))
    assert Hub.cuts == 0 and found == [questions("faq", "train")], said


def test_stream_that_ends_early_is_refused(hub, tmp_path):
    Hub.gone = ("faq/train-1.parquet",)
    (partial, gone), _ = read(hub, ("org/partial", "faq"), ("org/parquet", "faq"))
    assert "breaks off after 299 rows" in partial and "its card states 300 in train" in partial
    assert "breaks off after 60 rows" in gone and "train-1.parquet" in gone
    done = data("org/partial", hub, tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("qlora: ") and done.stderr.count("\n") == 1, done.stderr
    assert not [*tmp_path.glob("out/train*"), *tmp_path.glob("out/eval*")]


@pytest.mark.slow
def test_stream_that_stays_broken_is_refused(hub):
    Hub.cuts, Hub.cut_after = 99, 10_000
    patience = "import datasets; datasets.config.STREAMING_READ_MAX_RETRIES = 1\n"  # of 20, half a minute each
    done = python(patience + READ, hub, '[["org/faq", "faq"]]')
    assert "breaks off after 60 rows" in done.stdout and "give the command again" in done.stdout, done.stderr
