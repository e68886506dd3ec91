"""A stand-in for the Hugging Face Hub on loopback: serves one dataset from a local folder."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from pathlib import Path

SAID = {401: "Invalid credentials in Authorization header"}


@contextlib.contextmanager
def stand_in_hub(folder: Path, repo: str, revision: str, status=200, dies_in=0, seconds=0):
    """Serve `folder` as dataset `repo` at `revision`; yields the URL and the paths fetched.

    A `status` that is not 200 is every answer. The server dies in the middle of the file number
    `dies_in`, from 1. A file takes so many `seconds`.
    """
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    folders = {parent.as_posix() for name in files for parent in Path(name).parents} - {"."}
    fetched = []

    def entry(name: str) -> dict:
        if name in folders:
            return {"type": "directory", "path": name, "oid": "0" * 40}
        content = files[name].read_bytes()
        return {
            "type": "file",
            "path": name,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status: int, body: bytes, **headers: str):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            died = 0 < dies_in == len(fetched)
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if died else body)
            self.close_connection |= died

        def do_GET(self):
            if status != 200:
                self.reply(status, b"{}", X_Error_Message=SAID.get(status, ""))
                return
            if 0 < dies_in == len(fetched):
                self.close_connection = True
                return
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            api, resolve = f"/api/datasets/{repo}", f"/datasets/{repo}/resolve/{revision}/"
            if path in (api, f"{api}/revision/{revision}"):
                siblings = [{"rfilename": name} for name in files]
                info = {
                    "id": repo,
                    "sha": revision,
                    "private": False,
                    "siblings": siblings,
                    "tags": [],
                }
                self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
            elif path.startswith(f"{api}/tree/{revision}"):
                prefix = path.removeprefix(f"{api}/tree/{revision}").strip("/")
                entries = [
                    entry(name)
                    for name in [*folders, *files]
                    if name.startswith(prefix) and name != prefix
                ]
                self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")
            elif path.startswith(resolve) and path.removeprefix(resolve) in files:
                name = path.removeprefix(resolve)
                if self.command == "GET":
                    fetched.append(name)
                    threading.Event().wait(seconds)
                etag = entry(name)["oid"]
                self.reply(200, files[name].read_bytes(), ETag=f'"{etag}"', X_Repo_Commit=revision)
            else:
                self.reply(
                    404, b"{}", X_Error_Code="EntryNotFound" if repo in path else "RepoNotFound"
                )

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if self.headers["Content-Type"].startswith("application/json"):
                wanted = json.loads(body)["paths"]
            else:
                wanted = urllib.parse.parse_qs(body)["paths"]
            entries = [entry(name) for name in wanted if name in files or name in folders]
            self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()
        server.server_close()
