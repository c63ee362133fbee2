"""The few Hugging Face Hub endpoints that `kernels` uses, served on the loopback interface.

    GET  /api/kernels/<repo>/refs                     branches: `v1` is version 1
    GET  /api/kernels/<repo>/tree/<revision>[/<path>] one level, or ?recursive=true
    GET  /api/kernels/<repo>[/revision/<revision>]    revision info
    HEAD, GET /kernels/<repo>/resolve/<revision>/<path>
    GET  /api/organizations/<name>/overview           an organisation without special trust

The repository holds a directory's build variants and nothing else. Faults:
`rename` serves a variant under another name, `truncate` cuts a file short. A
closed server refuses connections.
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

    def __init__(self, repo_id, build_dir, *, rename=None, truncate=None):
        self.repo_id = repo_id
        self.truncate = truncate
        self.requests = []
        self.files = {}
        for path in sorted(Path(build_dir).rglob("*")):
            variant, *rest = path.relative_to(build_dir).parts
            if path.is_file() and "__pycache__" not in rest:
                name = (rename or {}).get(variant, variant)
                self.files["/".join(["build", name, *rest])] = path.read_bytes()
        digest = hashlib.sha1()
        for name, data in self.files.items():
            digest.update(name.encode() + b"\0" + data)
        self.commit = digest.hexdigest()
        self.revisions = {"main", "v1", "refs/heads/main", "refs/heads/v1", self.commit}
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

    def downloaded(self):
        """Repository paths of the files whose content was sent."""
        prefix = f"/kernels/{self.repo_id}/resolve/"
        return {
            path[len(prefix) :].split("/", 1)[1]
            for method, path, status in self.requests
            if method == "GET" and path.startswith(prefix) and status == 200
        }

    def tree(self, folder, recursive):
        """Entries of `folder` as the Hub lists them, or ``None`` if there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, data in self.files.items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "path": name, "oid": _oid(name.encode()), "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = {"type": "file", "path": path, "oid": _oid(data), "size": len(data)}
        return list(entries.values()) or None


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
            return self._json({"name": name, "fullname": name, "avatarUrl": "", "type": "org"})
        if path == f"{api}/refs":
            refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": hub.commit} for name in ("main", "v1")]
            return self._json({"branches": refs, "converts": [], "tags": []})
        if path == api:
            return self._json({"id": hub.repo_id, "sha": hub.commit, "private": False})
        for prefix, answer in (
            (f"{api}/revision/", self._info),
            (f"{api}/tree/", self._tree),
            (files, self._file),
        ):
            if path.startswith(prefix):
                rest = path[len(prefix) :]
                for revision in hub.revisions:
                    if rest == revision or rest.startswith(f"{revision}/"):
                        return answer(rest[len(revision) + 1 :], parse_qs(url.query))
                return self._missing("RevisionNotFound")
        return self._missing("RepoNotFound")

    do_HEAD = do_GET

    def _info(self, _rest, _query):
        self._json({"id": self.server.hub.repo_id, "sha": self.server.hub.commit, "private": False})

    def _tree(self, folder, query):
        entries = self.server.hub.tree(folder, query.get("recursive", ["false"])[0].lower() == "true")
        if entries is None:
            return self._missing("EntryNotFound")
        self._json(entries)

    def _file(self, path, _query):
        hub = self.server.hub
        data = hub.files.get(path)
        if data is None:
            return self._missing("EntryNotFound")
        headers = {
            "ETag": f'"{_oid(data)}"',
            "X-Repo-Commit": hub.commit,
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
        headers = {"X-Error-Code": code, "X-Repo-Commit": self.server.hub.commit}
        self._send(404, headers, b"")

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
