"""The few Hugging Face Hub endpoints that `kernels` uses, served on the loopback interface.

    GET  /api/kernels/<repo>/refs                     branches: `v1` is version 1
    GET  /api/kernels/<repo>/tree/<revision>[/<path>] one level, or ?recursive=true
    GET  /api/kernels/<repo>[/revision/<revision>]    revision info
    HEAD, GET /kernels/<repo>/resolve/<revision>/<path>
    GET  /api/organizations/<name>/overview           an organisation, trusted or not

At first the branches `main` and `v1` hold a directory's build variants and nothing else; `upload` commits as
kernel-builder does. Faults: `rename` serves a variant under another name, `truncate` cuts a file short. A closed server
refuses connections.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class HubServer:
    """Serve `build_dir` as the kernel repository `repo_id`, branches `main` and `v1`.

    `rename` maps variant names to the names served instead. `truncate` is
    ``None``, or ``(suffix, how)`` for files whose path ends in `suffix`: with
    ``"dropped"`` the response announces the whole file and the connection
    closes half-way through, with ``"short"`` the response is complete but
    holds only half of the file. It may be reset while the server runs.
    `requests` lists what was asked: (method, path, status).
    """

    def __init__(self, repo_id, build_dir=None, *, rename=None, truncate=None, trusted=False):
        self.repo_id = repo_id
        self.truncate = truncate
        self.trusted = trusted
        self.requests = []
        self.branches = {}
        if build_dir is not None:
            files = _variants(build_dir, rename or {})
            self.branches = {"main": files, "v1": files}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        """Stop listening: from here on connections are refused."""
        self._http.shutdown()
        self._http.server_close()

    def upload(self, kernel_dir, build_dir, version):
        """What `kernel-builder upload` commits: the filled card to `main` as README.md; to the version's branch the
        variants, each in place of the one of its name, and the `benchmark*.py` of `benchmarks/`."""
        card = Path(build_dir) / "CARD.md"
        self.branches.setdefault("main", {})
        if card.is_file():
            self.branches["main"]["README.md"] = card.read_bytes()
        variants = _variants(build_dir, {})
        replaced = tuple({"/".join(name.split("/")[:2]) + "/" for name in variants})
        benchmarks = {
            f"benchmarks/{p.name}": p.read_bytes() for p in (Path(kernel_dir) / "benchmarks").glob("benchmark*.py")
        }
        kept = self.branches.get(f"v{version}", {}).items()
        kept = {name: data for name, data in kept if not name.startswith((*replaced, "benchmarks/benchmark"))}
        self.branches[f"v{version}"] = kept | variants | benchmarks

    def commit_of(self, branch):
        digest = hashlib.sha1(branch.encode())
        for name, data in sorted(self.branches[branch].items()):
            digest.update(name.encode() + b"\0" + data)
        return digest.hexdigest()

    def branch_of(self, revision):
        """The branch that a name, a ref or a commit stands for; None where there is none."""
        for branch in self.branches:
            if revision in (branch, f"refs/heads/{branch}", self.commit_of(branch)):
                return branch
        return None

    @property
    def files(self):
        """What version 1 consists of."""
        return self.branches["v1"]

    @property
    def commit(self):
        return self.commit_of("v1")

    def downloaded(self):
        """Repository paths of the files whose content was sent."""
        prefix = f"/kernels/{self.repo_id}/resolve/"
        return {
            path[len(prefix) :].split("/", 1)[1]
            for method, path, status in self.requests
            if method == "GET" and path.startswith(prefix) and status == 200
        }

    def tree(self, branch, folder, recursive):
        """Entries of `folder` as the Hub lists them, or ``None`` if there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, data in self.branches[branch].items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "path": name, "oid": _oid(name.encode()), "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = {"type": "file", "path": path, "oid": _oid(data), "size": len(data)}
        return list(entries.values()) or None


def _variants(build_dir, rename):
    """Repository path and content of every file of every variant, without bytecode."""
    files = {}
    for path in sorted(Path(build_dir).rglob("*")):
        variant, *rest = path.relative_to(build_dir).parts
        if rest and path.is_file() and "__pycache__" not in rest:
            files["/".join(["build", rename.get(variant, variant), *rest])] = path.read_bytes()
    return files


def _oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server.hub
        url = urlsplit(self.path)
        path = unquote(url.path)
        api, files = f"/api/kernels/{hub.repo_id}", f"/kernels/{hub.repo_id}/resolve/"
        if path.startswith("/api/organizations/"):
            name = path.split("/")[3]
            org = {"name": name, "fullname": name, "avatarUrl": "", "type": "org"}
            return self._json(org | {"trustedKernelPublisher": True} if hub.trusted else org)
        if path == f"{api}/refs":
            refs = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": hub.commit_of(name)}
                for name in hub.branches
            ]
            return self._json({"branches": refs, "converts": [], "tags": []})
        if path == api:
            return self._info("main", "", {})
        for prefix, answer in (
            (f"{api}/revision/", self._info),
            (f"{api}/tree/", self._tree),
            (files, self._file),
        ):
            if path.startswith(prefix):
                rest = path[len(prefix) :].split("/")
                for parts in (1, 3):  # a branch or commit, refs/heads/<branch>
                    branch = hub.branch_of("/".join(rest[:parts]))
                    if branch is not None:
                        return answer(branch, "/".join(rest[parts:]), parse_qs(url.query))
                return self._missing("RevisionNotFound")
        return self._missing("RepoNotFound")

    do_HEAD = do_GET

    def _info(self, branch, _rest, _query):
        hub = self.server.hub
        files = [{"rfilename": name} for name in hub.branches[branch]]
        self._json({"id": hub.repo_id, "sha": hub.commit_of(branch), "private": False, "siblings": files})

    def _tree(self, branch, folder, query):
        entries = self.server.hub.tree(branch, folder, query.get("recursive", ["false"])[0].lower() == "true")
        if entries is None:
            return self._missing("EntryNotFound")
        self._json(entries)

    def _file(self, branch, path, _query):
        hub = self.server.hub
        data = hub.branches[branch].get(path)
        if data is None:
            return self._missing("EntryNotFound")
        headers = {
            "ETag": f'"{_oid(data)}"',
            "X-Repo-Commit": hub.commit_of(branch),
            "Content-Type": "application/octet-stream",
        }
        body = data
        suffix, how = hub.truncate or (None, None)
        if suffix is not None and path.endswith(suffix) and self.command == "GET":
            body = data[: len(data) // 2]
        headers["Content-Length"] = str(len(body) if how == "short" else len(data))
        self._send(200, headers, body)

    def _json(self, value):
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _missing(self, code):
        self._send(404, {"X-Error-Code": code}, b"")

    def _send(self, status, headers, body):
        self.server.hub.requests.append((self.command, unquote(urlsplit(self.path).path), status))
        length = int(headers.setdefault("Content-Length", str(len(body))))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.close_connection = self.close_connection or len(body) < length

    def log_message(self, *_args):
        """Keep quiet: `HubServer.requests` is the log."""
