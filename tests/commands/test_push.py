"""Pushing an export to a stand-in of the hub: what arrives, what never does, and what goes wrong told in one line."""

import base64
import hashlib
import http.server
import json
import pathlib
import re
import threading

import huggingface_hub
import huggingface_hub.constants
import pytest
from command import call

SECRET = "hf_" + "Token0" * 6


class Hub(http.server.ThreadingHTTPServer):
    """The calls of the hub's API that an upload takes; keeps what it is sent. `refuses`: a status for all writing."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.private, self.blobs, self.refuses, self.seen = {}, {}, {}, None, []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def say(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {SECRET}"
            return self.say({"name": "me", "type": "user"} if known else {"error": "who?"}, 200 if known else 401)
        name = path.removeprefix("/api/models/").removesuffix("/revision/main")
        name = name.partition("/tree/")[0]
        if name not in self.server.files:
            return self.say({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        files = self.server.files[name]
        if "/tree/" in path:
            return self.say([{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in files.items()])
        card = huggingface_hub.ModelCard(files.get("README.md", b"---\n---\n").decode())
        return self.say({
            "id": name, "private": self.server.private[name], "sha": "1" * 40, "tags": card.data.tags or [],
            "siblings": [{"rfilename": file} for file in files],
        })  # fmt: skip

    def do_PUT(self):
        self.server.blobs[self.path.rsplit("/", 1)[-1]] = self.body()
        self.say({})

    def do_POST(self):
        body, path = self.body(), self.path
        self.server.seen.append(path)
        if self.server.refuses:
            return self.say({"error": "no"}, self.server.refuses)
        if path == "/api/validate-yaml":
            assert json.loads(body)["repoType"] == "model"
            return self.say({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in self.server.files:
                return self.say({"error": "there", "url": f"{self.server.address}/{name}"}, 409)
            self.server.files[name] = {".gitattributes": b""}
            self.server.private[name] = asked.get("private", asked.get("visibility") == "private")
            return self.say({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            large = (".safetensors",)
            return self.say({
                "files": [
                    {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                     "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
            })  # fmt: skip
        if path.endswith("/info/lfs/objects/batch"):
            return self.say({
                "transfer": "basic",
                "objects": [
                    {"oid": o["oid"], "size": o["size"], "authenticated": True,
                     "actions": {"upload": {"href": f"{self.server.address}/blobs/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
            })  # fmt: skip
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            files = self.server.files[found[1]]
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    data = self.server.blobs[value["oid"]]
                    assert hashlib.sha256(data).hexdigest() == value["oid"]
                    files[value["path"]] = data
                elif entry["key"] == "deletedFile":
                    del files[value["path"]]
            return self.say({"commitUrl": f"{self.server.address}/{found[1]}/commit/1", "commitOid": "1" * 40,
                             "hookOutput": ""})  # fmt: skip
        return self.say({"error": path}, 404)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in, to which the hub's client of this process talks."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_push_and_a_second_one(hub, tiny_run, tmp_path):
    workdir, _, cache = tiny_run
    code, out, err = call(cache, "export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--push=me/pair")
    assert code == 0, err
    assert SECRET not in out + err
    assert out.splitlines()[1:] == [f"{hub.address}/me/pair-retriever", f"{hub.address}/me/pair-generator"]
    assert hub.private == {"me/pair-retriever": True, "me/pair-generator": True}
    for role in ("retriever", "generator"):
        folder = tmp_path / "out" / role
        here = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        there = {name: data for name, data in hub.files[f"me/pair-{role}"].items() if name != ".gitattributes"}
        assert there == here and "model.safetensors" in there
    card = hub.files["me/pair-generator"]["README.md"].decode()
    assert "AutoTokenizer.from_pretrained('me/pair-generator')" in card and "`me/pair-retriever`" in card
    sent = b"".join(data for files in hub.files.values() for data in files.values())
    assert b"rows.csv" not in sent and str(pathlib.Path(workdir)).encode() not in sent
    hub.files["me/pair-retriever"]["old.bin"] = b"old"
    flags = (f"--workdir={workdir}", f"--out={tmp_path / 'again'}", "--push=me/pair", "--public")
    assert call(cache, "export", *flags)[0] == 0
    assert "old.bin" not in hub.files["me/pair-retriever"], "the models of this export alone"
    assert hub.private["me/pair-retriever"], "what is private stays so"


def test_what_goes_wrong(hub, tiny_run, tmp_path, monkeypatch):
    workdir, _, cache = tiny_run
    hub.files["me/taken-generator"], hub.private["me/taken-generator"] = {"README.md": b"---\ntags:\n- x\n---\n"}, False

    def pushed(name="me/pair", to="out"):
        code, out, err = call(cache, "export", f"--workdir={workdir}", f"--out={tmp_path / to}", f"--push={name}")
        assert code == 2 and len(err.splitlines()) == 1 and SECRET not in out + err and "Traceback" not in err
        return err

    assert "me/taken-generator is there already and was not made by rag_jax" in pushed("me/taken")
    assert "is no name of the hub" in pushed("a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Wrong00" * 5)
    assert "may not write there" in pushed()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    assert "log in with `hf auth login`" in pushed()
    assert not (tmp_path / "out").exists() and hub.seen == [], "before anything is exported"
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.refuses = 403
    refused = pushed()
    assert "status 403" in refused and f"the export in {tmp_path / 'out'} is complete" in refused
    assert (tmp_path / "out" / "generator" / "model.safetensors").is_file()
    code, _, err = call(cache, "export", f"--workdir={workdir}", f"--out={tmp_path / 'new'}", "--public")
    assert code == 2 and "--public: goes with --push" in err
    hub.shutdown()
    hub.server_close()
    assert "cannot be reached" in pushed(to="third")
