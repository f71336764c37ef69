"""The responses of an in-memory Hub: the endpoints that `huggingface_hub` calls to upload and download models."""

import base64
import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_rules import metadata_errors

TOKEN = "hf_planted0123456789"
USER = "ann"
LFS = (".safetensors", ".bin", ".pt", ".pth", ".png", ".model")


@dataclass
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: dict
    body: bytes

    def contents(self):
        """Everything it contains, with base64 decoded, without the header that must contain the token."""
        shown = {name: value for name, value in self.headers.items() if name.lower() != "authorization"}
        yield f"{self.method} {unquote(self.path)} {shown}".encode()
        yield self.body
        for found in re.finditer(rb'"(?:content|sample)": ?"([A-Za-z0-9+/=]+)"', self.body):
            yield base64.b64decode(found[1])


@dataclass
class Repo:
    """Commits as (id, message, files), oldest first; branches and tags are names of commits."""

    private: bool = False
    commits: list = field(default_factory=list)
    refs: dict = field(default_factory=dict)

    def commit(self, message, files, branch="main"):
        oid = hashlib.sha1(f"{message} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits.append((oid, message, files))
        self.refs[branch] = oid
        return oid

    def at(self, revision):
        """The id and files of a branch, tag or commit; None if there is none."""
        oid = self.refs.get(revision, revision)
        return next(((found, files) for found, _, files in self.commits if found == oid), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Any

    def log_message(self, *_):
        pass

    def _handle(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, dict(self.headers), body))
            fault = next((f for f in self.hub.faults if f.times and self._matches(f.pattern, body)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None:
            time.sleep(fault.delay)
            if fault.status is not None:
                return self._send(fault.status, {"error": "planted"})
            if not fault.delay:
                self.close_connection = True
                return self.connection.shutdown(2)
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                if self._allowed(found.groupdict().get("repo")):
                    with self.hub.lock:
                        answer(
                            self, body=body, query=query, **{k: unquote(v or "") for k, v in found.groupdict().items()}
                        )
                return None
        return self._send(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _matches(self, pattern, body):
        return re.search(pattern, f"{self.command} {self.path} {body[:300]}") is not None

    def _allowed(self, repo):
        """Whether the token is sufficient; if not, the error response has been sent."""
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {TOKEN}"):
            self._send(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
            return False
        reads = (
            self.command in ("GET", "HEAD") or self.path.endswith(("/validate-yaml",)) or "/paths-info/" in self.path
        )
        public = not repo or (repo in self.hub.repos and not self.hub.repos[repo].private)
        if authorization is None and not self.path.startswith(("/lfs/", "/cdn/")) and not (reads and public):
            self._send(401, {"error": "log in"}, {"X-Error-Code": "RepoNotFound"} if repo else {})
            return False
        return True

    def _send(self, status, content=b"", headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), "X-Request-Id": "0", **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _at(self, repo, revision):
        """The id and files; None if there are none, after sending an error response."""
        if repo not in self.hub.repos:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        found = self.hub.repos[repo].at(revision or "main")
        if found is None:
            self._send(404, {"error": f"Invalid rev {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return found

    # --- accounts and repositories -------------------------------------------------------------------------

    def whoami(self, **_):
        self._send(200, {"type": "user", "id": "1", "name": USER, "fullname": "Ann", "orgs": []})

    def create(self, body, **_):
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        status = 409 if name in self.hub.repos else 200
        if status == 200:
            self.hub.repos[name] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
            self.hub.repos[name].commit("initial commit", {".gitattributes": b""})
        self._send(status, {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "1"})

    def info(self, repo, revision="main", **_):
        if found := self._at(repo, revision):
            siblings = [{"rfilename": name} for name in sorted(found[1])]
            private = self.hub.repos[repo].private
            self._send(
                200, {"id": repo, "_id": "1", "sha": found[0], "private": private, "siblings": siblings, "tags": []}
            )

    def refs(self, repo, **_):
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in self.hub.repos[repo].refs.items()
        ]
        self._send(200, {"branches": branches, "tags": [], "converts": []})

    def branch(self, repo, name, body, **_):
        start = json.loads(body or b"{}").get("startingPoint")
        if name in self.hub.repos[repo].refs:
            self._send(409, {"error": "exists"})
        elif found := self._at(repo, start):
            self.hub.repos[repo].refs[name] = found[0]
            self._send(200, {})

    def history(self, repo, **_):
        commits = [
            {"id": oid, "title": message, "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
            for oid, message, _ in reversed(self.hub.repos[repo].commits)
        ]
        self._send(200, commits)

    # --- uploads -------------------------------------------------------------------------------------------

    def validate(self, body, **_):
        errors = metadata_errors(json.loads(body)["content"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._send(400 if errors else 200, {**answer, "error": "; ".join(errors)} if errors else answer)

    def preupload(self, repo, revision, body, **_):
        if found := self._at(repo, revision):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(file["path"], found[1].get(file["path"])),
                }
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})

    def batch(self, repo, body, **_):
        objects = []
        for wanted in json.loads(body)["objects"]:
            one = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                one["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
            objects.append(one)
        self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, oid, body, **_):
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(400, {"error": "another content"})
        else:
            self.hub.objects[oid] = body
            self._send(200)

    def commit(self, repo, revision, body, query, **_):
        if not (found := self._at(repo, revision)):
            return
        files, message = dict(found[1]), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if errors := metadata_errors(files.get("README.md", b"").decode()):
            return self._send(400, {"error": "; ".join(errors)})
        branch = "refs/pr/1" if query.get("create_pr") else revision
        oid = self.hub.repos[repo].commit(message, files, branch)
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        self._send(
            200, {"commitUrl": url, "commitOid": oid, "pullRequestUrl": f"{self.hub.endpoint}/{repo}/discussions/1"}
        )

    # --- downloads -----------------------------------------------------------------------------------------

    def tree(self, repo, revision, folder="", **_):
        if found := self._at(repo, revision):
            inside = {name: data for name, data in found[1].items() if name.startswith(folder)}
            self._send(200, [_described(name, data) for name, data in sorted(inside.items())])

    def paths_info(self, repo, revision, body, **_):
        if found := self._at(repo, revision):
            wanted = parse_qs(body.decode()).get("paths", [])
            self._send(200, [_described(name, found[1][name]) for name in wanted if name in found[1]])

    def resolve(self, repo, revision, name, **_):
        if not (found := self._at(repo, revision)):
            return
        headers = {"X-Repo-Commit": found[0]}
        if name not in found[1]:
            return self._send(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        data = found[1][name]
        if not name.endswith(LFS):
            return self._send(200, data, {**headers, "ETag": f'"{_blob_id(data)}"'})
        oid = hashlib.sha256(data).hexdigest()
        self.hub.objects[oid] = data
        # On another host, as with the Hub: the client must not send its token there.
        linked = {"X-Linked-Size": len(data), "X-Linked-ETag": f'"{oid}"'}
        return self._send(302, b"", {**headers, **linked, "Location": f"http://localhost:{self.hub.port}/cdn/{oid}"})

    def cdn(self, oid, **_):
        if self.headers.get("Authorization"):
            return self._send(400, {"error": "a token for another host"})
        data = self.hub.objects[oid]
        return self._send(200, data, {"ETag": f'"{oid}"', "Accept-Ranges": "none"})


def _blob_id(data):
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _oid(name, data):
    """The id by which a client sees that a file already exists."""
    if data is None:
        return None
    return hashlib.sha256(data).hexdigest() if name.endswith(LFS) else _blob_id(data)


def _described(name, data):
    one = {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}
    if name.endswith(LFS):
        one["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return one


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API, _REVISION = rf"/api/models/{_REPO}", r"(?P<revision>[^/]+)"
_ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("GET",), rf"{_API}/refs", Handler.refs),
    (("GET",), rf"{_API}/commits/{_REVISION}", Handler.history),
    (("GET",), rf"{_API}/tree/{_REVISION}(?:/(?P<folder>.*))?", Handler.tree),
    (("POST",), rf"{_API}/paths-info/{_REVISION}", Handler.paths_info),
    (("POST",), rf"{_API}/branch/(?P<name>.+)", Handler.branch),
    (("POST",), rf"{_API}/preupload/{_REVISION}", Handler.preupload),
    (("POST",), rf"{_API}/commit/{_REVISION}", Handler.commit),
    (("GET",), rf"{_API}/revision/{_REVISION}", Handler.info),
    (("GET",), _API, Handler.info),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/lfs/(?P<oid>\w+)", Handler.put),
    (("GET", "HEAD"), r"/cdn/(?P<oid>\w+)", Handler.cdn),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/{_REVISION}/(?P<name>.+)", Handler.resolve),
]
