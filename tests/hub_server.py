"""A small Hugging Face Hub on loopback, for tests that run the real client libraries against it.

    with HubServer() as hub:
        hub.add_repo("me/data", "dataset", {"data/train.jsonl": b'{"text": "hello"}\\n'})
        hub.fail("GET /datasets/me/data/resolve/", nth=2, status=500)
        subprocess.run([sys.executable, "train.py"], env=hub.env(tmp_path, "hf_write"))
        assert hub.seen("POST .*/commit/main")[0].token == "hf_write"

Unsupported requests (Xet, multipart LFS, pull requests, search, settings) are answered with 501.
It is longer than 500 lines because it stands in for one program, from request to response.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin", ".pt", ".zip", ".gz", ".npz")
LFS_SIZE = 10_000_000  # bytes; from here on the Hub asks for LFS whatever the name
GITATTRIBUTES = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS_SUFFIXES)
# the settings that would let a test reach the real Hub, its caches or its token
CLIENT_SETTINGS = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")


@dataclass(frozen=True)
class Account:
    """The user of a token, and the token's permissions."""

    user: str
    role: str = "write"  # or "read"
    orgs: tuple[str, ...] = ()

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.user, *self.orgs)


@dataclass(frozen=True)
class Blob:
    """The content of one file, and whether it is stored as LFS."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def oid(self) -> str:
        """Git's blob id, by which a client recognises an unchanged file before uploading it."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def lfs_info(self) -> dict:
        """The "lfs" key of a listing; trees call the hash oid, infos sha256."""
        sizes = {"size": len(self.data), "pointerSize": 134}
        return {"lfs": sizes | {"oid": self.sha256, "sha256": self.sha256}} if self.lfs else {}


@dataclass(frozen=True)
class Commit:
    """A full set of files, with its author and message."""

    oid: str
    title: str
    message: str
    user: str
    date: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repository: commits, refs that point at them, and who has access."""

    id: str
    kind: str = "model"  # or "dataset", "space"
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)  # users with access besides the owner
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> commit id
    commits: dict[str, Commit] = field(default_factory=dict)  # oldest first

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def path(self) -> str:
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    def at(self, revision: str = "main") -> Commit:
        """The commit that a branch, tag, full ref or commit id names."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(
        self, files: dict[str, Blob], title: str, user: str, branch: str = "main", message: str = ""
    ) -> Commit:
        """Add a commit with exactly these files to a branch."""
        oid = secrets.token_hex(20)
        self.commits[oid] = Commit(oid, title, message, user, _now(), files)
        self.refs[f"refs/heads/{branch}"] = oid
        return self.commits[oid]


@dataclass
class Request:
    """One entry of the log; `status` stays None if the connection was reset."""

    method: str
    url: str = field(repr=False)  # as sent
    headers: dict[str, str] = field(repr=False)  # lower-case names
    body: bytes = field(repr=False)
    status: int | None = None

    @property
    def path(self) -> str:
        """The decoded path without the query."""
        return unquote(urlsplit(self.url).path)

    @property
    def parts(self) -> list[str]:
        """The decoded path segments; a branch name may contain an encoded slash."""
        return [unquote(part) for part in urlsplit(self.url).path.strip("/").split("/")]

    @property
    def query(self) -> dict[str, str]:
        return {key: values[0] for key, values in parse_qs(urlsplit(self.url).query).items()}

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    def matches(self, pattern: str) -> bool:
        return re.search(pattern, f"{self.method} {self.path}") is not None


@dataclass
class Fault:
    """The failure of the nth matching request and the `times - 1` matching ones after it.

    `delay` seconds pass before the answer, or after its first `truncate` bytes; a truncated answer
    ends with a closed connection. `body` replaces the answer's, and with `drip` so many seconds
    pass before each of its bytes, with `drip_headers` before each byte of the headers. `headers`
    are added to the answer's. A request answered with `status` or `reset` has no effect unless
    `applied`: then the commit or upload is done and only its answer is lost.
    """

    pattern: str  # regular expression, searched in "METHOD /path"
    nth: int = 1
    times: int = 1
    status: int | None = None
    reset: bool = False
    delay: float | None = None  # seconds
    truncate: int | None = None  # bytes of the body that are sent
    retry_after: int | None = None  # seconds, beside a status
    applied: bool = False
    body: bytes | None = None
    drip: float | None = None  # seconds
    drip_headers: float | None = None  # seconds
    headers: dict[str, str] = field(default_factory=dict)
    matched: int = 0  # requests so far

    def acts_on(self, request: Request) -> bool:
        if not request.matches(self.pattern):
            return False
        self.matched += 1
        return self.nth <= self.matched < self.nth + self.times


@dataclass
class Answer:
    """An HTTP response to send."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """An error in the Hub's words; the client chooses its exception class by X-Error-Code."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "", **body: str):
        super().__init__(message)
        self.answer = _json({"error": message, **body}, status)
        named = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.answer.headers |= {name: value for name, value in named.items() if value}


class HubServer:
    """The server and its repositories; a context manager that listens on a free loopback port."""

    def __init__(self):
        self.tokens = {
            "hf_write": Account("me", "write", ("lab",)),
            "hf_read": Account("me", "read", ("lab",)),
            "hf_other": Account("other"),
        }
        self.repos: dict[tuple[str, str], Repo] = {}  # (kind, id)
        self.lfs: dict[str, bytes] = {}  # sha256 -> content
        self.requests: list[Request] = []
        self.page_size = 1000  # entries of a tree listing, as on the Hub
        self.stopped = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._signature = secrets.token_hex(8)

    def start(self) -> "HubServer":
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # like the Hub's CDN another origin, so clients must not send it their token
        self.cdn = f"http://localhost:{self._server.server_port}/cdn"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def stop(self) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.drop_connections()
        self._thread.join()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def env(self, home, token: str | None = None) -> dict[str, str]:
        """The environment of a client process that can reach only this Hub."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(CLIENT_SETTINGS)}
        client = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        direct = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        who = {"HF_HUB_DISABLE_TELEMETRY": "1"} | ({"HF_TOKEN": token} if token else {})
        return inherited | client | direct | who

    def add_repo(
        self, repo_id: str, kind: str = "model", files: dict[str, bytes] | None = None, **access
    ) -> Repo:
        """Store a repository without a client; access is private, gated and readers of `Repo`."""
        repo = self.repos[kind, repo_id] = Repo(repo_id, kind, **access)
        first = {".gitattributes": Blob(GITATTRIBUTES.encode())}
        repo.commit(first, "initial commit", repo.owner)
        if files:
            blobs = {path: Blob(data, _wants_lfs(path, len(data))) for path, data in files.items()}
            self.lfs |= {blob.sha256: blob.data for blob in blobs.values() if blob.lfs}
            repo.commit(first | blobs, "Add files", repo.owner)
        return repo

    def files(self, repo_id: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """The files of a repository at a revision."""
        commit = self.repos[kind, repo_id].at(revision)
        return {path: blob.data for path, blob in commit.files.items()}

    def seen(self, pattern: str) -> list[Request]:
        """The logged requests whose "METHOD /path" matches the regular expression."""
        return [request for request in list(self.requests) if request.matches(pattern)]

    def fail(self, pattern: str, *args, **damage) -> Fault:
        """Schedule a `Fault`; requests are counted from now on."""
        fault = Fault(pattern, *args, **damage)
        with self._lock:
            self._faults.append(fault)
        return fault

    def due_fault(self, request: Request) -> Fault | None:
        """Count the request for every fault it matches, and return the first one that is due."""
        with self._lock:
            due = [fault for fault in self._faults if fault.acts_on(request)]
        return due[0] if due else None

    def answer(self, request: Request) -> Answer:
        try:
            with self._lock:
                return self._route(request, *request.parts)
        except Refused as refused:
            return refused.answer
        except Exception:
            # 501: the client would retry a 500 and hide the traceback for half a minute
            return _json({"error": traceback.format_exc()}, 501)

    def _route(self, request: Request, *parts: str) -> Answer:
        match [request.method, *parts]:
            case [_, "cdn", oid, *_]:
                return self._cdn(request, oid)
            case ["GET", "api", "whoami-v2"]:
                return self._whoami(request)
            case ["POST", "api", "validate-yaml"]:
                return _json({"errors": [], "warnings": []})
            case ["POST", "api", "repos", "create"]:
                return self._create_repo(request)
            case [_, "api", "models" | "datasets" | "spaces" as kinds, owner, name, *rest]:
                return self._route_api(request, (kinds[:-1], f"{owner}/{name}"), rest)
            case [_, "api", "models" | "datasets", _]:
                raise Refused(404, "Repository not found", "RepoNotFound")
            case [_, "datasets" | "spaces" as kinds, owner, name, *rest]:
                return self._route_git(request, (kinds[:-1], f"{owner}/{name}"), rest)
            case [_, owner, name, *rest]:
                return self._route_git(request, ("model", f"{owner}/{name}"), rest)
        raise _unspoken(request)

    def _route_git(self, request: Request, key: tuple[str, str], rest: list[str]) -> Answer:
        kind, repo_id = key
        match [request.method, *rest]:
            case ["GET" | "HEAD", "resolve", revision, *path]:
                repo = self._repo(request, key, content=True)
                return self._resolve(request, repo.at(revision), "/".join(path))
            case ["POST", "info", "lfs", "objects", "batch"]:
                key = (kind, repo_id.removesuffix(".git"))
                return self._lfs_batch(self._repo(request, key, write=True), request)
            case ["POST", "info", "lfs", "objects", "verify"]:
                wish = json.loads(request.body)
                if len(self.lfs.get(wish["oid"], b"")) != wish["size"]:
                    raise Refused(404, "Object not found")
                return _json({})
        raise _unspoken(request)

    def _route_api(self, request: Request, key: tuple[str, str], rest: list[str]) -> Answer:
        if "create_pr" in request.query:
            raise _unspoken(request)
        read_only = request.method == "GET" or rest[:1] == ["paths-info"]
        write = not read_only or rest == ["auth-check", "write"]
        repo = self._repo(request, key, content=rest[:1] == ["auth-check"], write=write)
        match [request.method, *rest]:
            case ["GET"]:
                return self._info(request, repo, repo.at())
            case ["GET", "revision", revision]:
                return self._info(request, repo, repo.at(revision))
            case ["GET", "auth-check", *_]:
                return _json({})
            case ["GET", "tree", revision, *folder]:
                return self._tree(request, repo.at(revision), "/".join(folder))
            case ["POST", "paths-info", revision]:
                wanted = parse_qs(request.body.decode())["paths"]
                entries = _entries(repo.at(revision).files, "", recursive=True)
                return _json([entry for entry in entries if entry["path"] in wanted])
            case ["GET", "refs"]:
                branches, tags = _ref_entries(repo, "heads"), _ref_entries(repo, "tags")
                empty = {"converts": [], "pullRequests": []}
                return _json({"branches": branches, "tags": tags, **empty})
            case ["POST", "branch", branch]:
                start = json.loads(request.body).get("startingPoint", "main")
                return _new_ref(repo, f"refs/heads/{branch}", start)
            case ["POST", "tag", revision]:
                return _new_ref(repo, f"refs/tags/{json.loads(request.body)['tag']}", revision)
            case ["DELETE", "branch", branch]:
                repo.at(f"refs/heads/{branch}")
                del repo.refs[f"refs/heads/{branch}"]
                return _json({})
            case ["POST", "preupload", revision]:
                return _upload_modes(request, repo.at(revision))
            case ["POST", "commit", branch]:
                return self._commit(request, repo, branch)
        raise _unspoken(request)

    def _account(self, request: Request) -> Account | None:
        if request.token is not None and request.token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens.get(request.token)

    def _repo(self, request: Request, key: tuple[str, str], *, content=False, write=False) -> Repo:
        """The repository, if this token may see it, read its files (content) or change it."""
        account, repo = self._account(request), self.repos.get(key)
        member = repo and account and repo.owner in account.namespaces
        reader = member or (repo and account and account.user in repo.readers)
        # To a stranger a private repository looks like a missing one. The client takes a bare 401
        # for a missing repository under https:// alone, so the code is always sent.
        if repo is None or (repo.private and not reader) or (write and account is None):
            message = "Repository not found" if account else "Invalid username or password."
            raise Refused(404 if account else 401, message, "RepoNotFound")
        if content and repo.gated and not reader:
            message = f"Access to {repo.kind} {repo.id} is restricted."
            raise Refused(403 if account else 401, message, "GatedRepo")
        if write and not (member and account.role == "write"):
            message = "Forbidden: you must use a write token to upload to a repository."
            raise Refused(403, message)
        return repo

    def _whoami(self, request: Request) -> Answer:
        account = self._account(request)
        if account is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in account.orgs]
        token = {"displayName": "test", "role": account.role, "createdAt": _now()}
        user = {"type": "user", "id": account.user, "name": account.user, "orgs": orgs}
        return _json(user | {"auth": {"type": "access_token", "accessToken": token}})

    def _create_repo(self, request: Request) -> Answer:
        account, wish = self._account(request), json.loads(request.body)
        if account is None:
            raise Refused(401, "Invalid username or password.")
        kind, owner = wish.get("type") or "model", wish.get("organization") or account.user
        if account.role != "write" or owner not in account.namespaces:
            message = f'You don\'t have the rights to create a {kind} under the namespace "{owner}"'
            raise Refused(403, message)
        repo = self.repos.get((kind, f"{owner}/{wish['name']}"))
        if repo:  # exist_ok=True reads the url out of this error
            message = f"You already created this {kind} repo"
            raise Refused(409, message, url=f"{self.endpoint}/{repo.path}")
        private = wish.get("visibility") == "private"
        repo = self.add_repo(f"{owner}/{wish['name']}", kind, private=private)
        return _json({"url": f"{self.endpoint}/{repo.path}", "name": repo.id})

    def _info(self, request: Request, repo: Repo, commit: Commit) -> Answer:
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in request.query:
            for sibling in siblings:
                blob = commit.files[sibling["rfilename"]]
                sibling |= {"size": len(blob.data), "blobId": blob.oid} | blob.lfs_info
        state = {"private": repo.private, "gated": "auto" if repo.gated else False, "tags": []}
        names = {"id": repo.id, "author": repo.owner, "sha": commit.oid}
        names |= _card(commit.files.get("README.md"))
        return _json(names | state | {"lastModified": commit.date, "siblings": siblings})

    def _tree(self, request: Request, commit: Commit, folder: str) -> Answer:
        recursive = request.query.get("recursive", "").lower() in ("true", "1")
        entries = list(_entries(commit.files, folder, recursive))
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound", commit.oid)
        start = int(request.query.get("cursor", 0))
        page = _json(entries[start : start + self.page_size])
        if start + self.page_size < len(entries):
            address = f"{self.endpoint}{urlsplit(request.url).path}?recursive={recursive}"
            page.headers["Link"] = f'<{address}&cursor={start + self.page_size}>; rel="next"'
        return page

    def _commit(self, request: Request, repo: Repo, branch: str) -> Answer:
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        head, header = repo.at(f"refs/heads/{branch}"), header["value"]
        if header.get("parentCommit", head.oid) != head.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile" and value["oid"] in self.lfs:
                files[value["path"]] = Blob(self.lfs[value["oid"]], lfs=True)
            elif key == "lfsFile":
                raise Refused(400, f"{value['path']} points to an LFS object never uploaded")
            else:
                _delete(files, value["path"], folder=key == "deletedFolder")
        user = self.tokens[request.token].user
        oid = repo.commit(files, header["summary"], user, branch, header["description"]).oid
        url = f"{self.endpoint}/{repo.path}/commit/{oid}"
        return _json({"success": True, "commitOid": oid, "commitUrl": url})

    def _lfs_batch(self, repo: Repo, request: Request) -> Answer:
        verify = {"href": f"{self.endpoint}/{repo.path}.git/info/lfs/objects/verify"}
        objects = [{**wanted} for wanted in json.loads(request.body)["objects"]]
        for wanted in objects:
            if wanted["oid"] not in self.lfs:  # without actions the client skips the upload
                upload = {"href": f"{self.cdn}/{wanted['oid']}?signature={self._signature}"}
                wanted["actions"] = {"upload": upload, "verify": verify}
        return _json({"transfer": "basic", "objects": objects})

    def _cdn(self, request: Request, oid: str) -> Answer:
        if request.query.get("signature") != self._signature:
            raise Refused(403, "Unsigned url")
        if request.method != "PUT":
            return _content(request, self.lfs[oid], oid)
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refused(400, "The content does not have the announced sha256")
        self.lfs[oid] = request.body
        return Answer(headers={"ETag": f'"{oid}"'})

    def _resolve(self, request: Request, commit: Commit, path: str) -> Answer:
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", commit.oid)
        blob = commit.files[path]
        if blob.lfs:
            # the file's name is part of the address, so that a fault can name it
            address = f"{self.cdn}/{blob.sha256}/{quote(path)}?signature={self._signature}"
            linked = {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.sha256}"'}
            answer = Answer(302, headers={"Location": address} | linked)
        else:
            answer = _content(request, blob.data, blob.oid)
        answer.headers["X-Repo-Commit"] = commit.oid
        return answer


def _json(content, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def _card(readme: Blob | None) -> dict:
    """The "cardData" of an info: the front matter of a README."""
    above = re.match(rb"---\n(.*?)\n---\n", readme.data, re.DOTALL) if readme else None
    return {"cardData": yaml.safe_load(above[1])} if above else {}


def _unspoken(request: Request) -> Refused:
    return Refused(501, f"tests/hub_server.py does not speak {request.method} {request.path}")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _wants_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size >= LFS_SIZE


def _upload_modes(request: Request, commit: Commit) -> Answer:
    """For each file of a preupload: regular or LFS, and the id of the current one at its path."""
    answers = []
    for file in json.loads(request.body)["files"]:
        mode = "lfs" if _wants_lfs(file["path"], file["size"]) else "regular"
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        if blob := commit.files.get(file["path"]):  # the client leaves out what has the same id
            answers[-1]["oid"] = blob.sha256 if blob.lfs else blob.oid
    return _json({"files": answers})


def _delete(files: dict[str, Blob], path: str, folder: bool) -> None:
    prefix = path.rstrip("/") + "/"
    gone = [file for file in files if (file.startswith(prefix) if folder else file == path)]
    if not gone:
        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    for file in gone:
        del files[file]


def _entries(files: dict[str, Blob], folder: str, recursive: bool) -> Iterator[dict]:
    """The tree listing of a folder, folders before the files in them."""
    prefix, known = f"{folder}/" if folder else "", set()
    for path in sorted(path for path in files if path.startswith(prefix)):
        parents = path[len(prefix) :].split("/")[:-1]
        shown = parents if recursive else parents[:1]
        for directory in (prefix + "/".join(parents[: n + 1]) for n in range(len(shown))):
            if directory not in known:
                known.add(directory)
                oid = hashlib.sha1(directory.encode()).hexdigest()
                yield {"type": "directory", "oid": oid, "size": 0, "path": directory}
        if recursive or not parents:
            blob = files[path]
            entry = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
            yield entry | blob.lfs_info


def _ref_entries(repo: Repo, kind: str) -> list[dict]:
    prefix = f"refs/{kind}/"
    return [
        {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
        for ref, oid in repo.refs.items()
        if ref.startswith(prefix)
    ]


def _new_ref(repo: Repo, ref: str, revision: str) -> Answer:
    if ref in repo.refs:
        raise Refused(409, f"Reference {ref} already exists")
    repo.refs[ref] = repo.at(revision).oid
    return _json({})


def _content(request: Request, data: bytes, etag: str) -> Answer:
    """The file, or the requested range of it."""
    headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not asked:
        return Answer(200, data, headers)
    first, last = asked.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= len(data):
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
    where = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
    return Answer(206, data[start:end], headers | where)


class _Server(ThreadingHTTPServer):
    """Knows its open connections, so that a stopped Hub is also gone for a client that kept one."""

    hub: HubServer
    daemon_threads = True

    def __init__(self, *args):
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def drop_connections(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):  # closed in the meantime
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        """Silent: clients that time out or give up are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    """Reads one request, lets a fault act, sends the answer."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's ACK

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_) -> None:
        """Silent: the log is `HubServer.requests`."""

    def respond(self) -> None:
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        request = Request(self.command, self.path, headers, body)
        hub.requests.append(request)
        fault = hub.due_fault(request) or Fault("")
        if fault.truncate is None:
            hub.stopped.wait(fault.delay or 0)
        answer = Answer()
        if fault.applied or not (fault.reset or fault.status):
            answer = hub.answer(request)
        if fault.reset:
            return self._reset()
        if fault.status:
            answer = _json({"error": f"Fault on demand: {fault.status}"}, fault.status)
            if fault.retry_after is not None:
                answer.headers["Retry-After"] = str(fault.retry_after)
        if fault.body is not None:
            answer.body = fault.body
        request.status = answer.status  # before sending: the test may look at once
        self._send(answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond

    def _send(self, answer: Answer, fault: Fault) -> None:
        self.send_response(answer.status)
        for name, value in (answer.headers | fault.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        if fault.drip_headers is not None:
            lines, self._headers_buffer = b"".join(self._headers_buffer), []
            for byte in lines:
                if self.server.hub.stopped.wait(fault.drip_headers):
                    return
                self.wfile.write(bytes([byte]))
        self.end_headers()
        if self.command != "HEAD" and fault.drip is None:
            self.wfile.write(answer.body[: fault.truncate])
        for byte in answer.body if fault.drip is not None else b"":
            if self.server.hub.stopped.wait(fault.drip):
                break
            self.wfile.write(bytes([byte]))
        if fault.truncate is not None:
            self.server.hub.stopped.wait(fault.delay or 0)
            self.close_connection = True

    def _reset(self) -> None:
        """Close without lingering, which TCP tells the client as a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
