"""The viewer as one file: the page with its styles, scripts and the answers it asks for inside, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

from rich.console import Console

from ramulus.look.progress import Bar
from ramulus.look.viewer.api import Api, Unknown

ASSETS = Path(__file__).parent / "assets"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".txt": "text/plain; charset=utf-8",
}
IMPORT = re.compile(r"""(\bfrom\s*|\bimport\s*\(?\s*)(["'])\./([\w.-]+\.js)\2""")
_STYLE = re.compile(r'<link rel="stylesheet" href="(?:assets/)?([\w.-]+)">')
SCRIPT = re.compile(r'<script src="(?:assets/)?([\w.-]+)"([^>]*)></script>')
LARGE = 50 << 20  # bytes of a page from which on a browser takes its time
NAMED = "ramulus/"  # what the modules of one file are called in its import map


def assets() -> dict[str, Path]:
    """The files of the page by name; only these are served."""
    return {path.name: path for path in sorted(ASSETS.iterdir()) if path.is_file() and path.suffix in KINDS}


def data_url(source: str) -> str:
    """A script as an address: what it holds can end no element."""
    return "data:text/javascript;base64," + base64.b64encode(source.encode()).decode()


def in_script(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def one_file(answers: Iterable[tuple[str, bytes]]) -> str:
    """The page as a single HTML file; `answers` are (address, JSON in ASCII)."""
    files = assets()
    page = files["viewer.html"].read_text(encoding="utf-8")
    scripts = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.suffix == ".js"}
    modules = {NAMED + name: data_url(IMPORT.sub(rf"\1\2{NAMED}\3\2", text)) for name, text in scripts.items()}
    plain = {name for name, kind in SCRIPT.findall(page) if "module" not in kind}
    names = {key: source for key, source in modules.items() if key.removeprefix(NAMED) not in plain}
    imports = json.dumps({"imports": names})
    held = in_script("{" + ",".join(f"{json.dumps(key)}:{answer.decode('ascii')}" for key, answer in answers) + "}")
    started: list[str] = []

    def script(match: re.Match[str]) -> str:
        name, kind = match[1], match[2]
        if "module" not in kind:
            return f'<script src="{data_url(scripts[name])}"{kind}></script>'
        started.append(f'import "{NAMED}{name}";')
        return f'<script type="module">{started[-1]}</script>'

    def style(match: re.Match[str]) -> str:
        return "<style>" + files[match[1]].read_text(encoding="utf-8").replace("</", "<\\/") + "</style>"

    page = _STYLE.sub(style, page)
    page = SCRIPT.sub(script, page)
    allowed = " ".join(f"'sha256-{_digest(text)}'" for text in [imports, *started])
    policy = (
        f"default-src 'none'; script-src data: {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    )
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<script type="importmap">{imports}</script>'
    )
    body = f'<script type="application/json" id="embedded">{held}</script>'
    return page.replace("<title>", f"{head}\n<title>", 1).replace("</body>", f"{body}\n</body>", 1)


def _digest(text: str) -> str:
    """The hash of an inline script that a content security policy names."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


UNQUOTED = "!'()*~"  # what encodeURIComponent of the page's own JavaScript leaves as it is


def url(name: str, /, **parameters: str | int) -> str:
    """The address of a question, which is also its key among embedded answers."""
    return f"/api/{name}" + (f"?{urlencode(parameters, quote_via=quote, safe=UNQUOTED)}" if parameters else "")


def chosen(there: list[int], steps: list[int]) -> list[int]:
    """The steps of a run that go into the file."""
    return [step for step in there if step in steps] if steps else there[-1:]


def everything(api: Api, steps: list[int]) -> Iterator[tuple[str, bytes]]:
    """(address, answer) of all that a page of these steps asks for; the last step with trees where none is named."""
    listed = json.loads(api("runs", {}))
    for one in listed:
        one["trees"] = chosen(one["trees"], steps)
        one["live"], one["folder"] = False, one["title"]
    yield url("runs"), json.dumps(listed).encode("ascii")
    yield url("glossary"), api("glossary", {})
    for one in listed:
        named = {"run": one["id"]}
        if "trouble" in one:
            continue
        yield url("metrics", **named, after=-1), api("metrics", named)
        for name in ("config", "ledger", "differences"):
            yield url(name, **named), api(name, named)
        reports = json.loads(api("evals", named))
        yield url("evals", **named), api("evals", named)
        for row in reports:
            if row["answered"] and (row["step"] in one["trees"] or row["step"] == reports[-1]["step"]):
                asked = {"step": row["step"]}
                if sum(other["step"] == row["step"] for other in reports) > 1:
                    asked["name"] = row["name"]
                words = {name: str(value) for name, value in asked.items()}
                yield url("answers", **named, **asked), api("answers", named | words)
        for step in one["trees"]:
            yield from _of_step(api, one["id"], step)


def _of_step(api: Api, run: str, step: int) -> Iterator[tuple[str, bytes]]:
    """The answers about one step's trees."""

    def ask(name: str, **more: int) -> tuple[str, bytes]:
        named: dict[str, str | int] = {"run": run, "step": step, **more}
        return url(name, **named), api(name, {key: str(value) for key, value in named.items()})

    listed = ask("steps")
    yield listed
    for row in json.loads(listed[1]):
        try:
            address, answer = ask("tree", index=row["index"])
        except Unknown as error:  # a damaged line hides no other
            warnings.warn(f"{error}: it is left out", stacklevel=2)
            continue
        yield address, answer
        nodes = json.loads(answer)["nodes"]
        inner = {node["parent"] for node in nodes}
        for i, node in enumerate(nodes):
            yield ask("node", index=row["index"], node=node["id"])
            if i not in inner:
                yield ask("leaf", index=row["index"], node=node["id"])


def step_numbers(steps: str) -> list[int]:
    """The numbers in a list with commas such as 5,10,15; ValueError for another text."""
    try:
        return [int(part) for part in steps.split(",")] if steps else []
    except ValueError:
        raise ValueError(f"--steps={steps}: give step numbers with commas between, as in --steps 5,10") from None


def write_page(api: Api, out: Path, steps: list[int], console: Console) -> None:
    """The page as one file."""
    known = {step for one in api.shelf.entries.values() if not one.trouble for step in one.tree_steps()}
    if missing := [step for step in steps if step not in known]:
        few = ", ".join(map(str, sorted(known)[-10:])) or "none"
        raise ValueError(f"there are no trees of step {missing[0]}: the last steps that have some are {few}")
    ready(out)
    page = one_file(counted(api, steps, console))
    out.write_text(page, encoding="utf-8")
    size = out.stat().st_size
    console.out(f"{size / 2**20:.1f} MB in {out}", highlight=False)
    if size > LARGE:
        console.print("that is a lot for a browser: choose fewer steps with --steps", style="yellow", highlight=False)


def ready(out: Path) -> None:
    """Make the folder that the page goes into; OSError, before any work, where the page could not be written there."""
    if out.is_dir():
        raise IsADirectoryError(f"--out={out} is a folder: name a file in it, as in --out {out / 'page.html'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "ab") if out.exists() else tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OSError(f"cannot write --out={out}: {error.strerror or error}; name another file") from error


def counted(api: Api, steps: list[int], console: Console) -> Iterator[tuple[str, bytes]]:
    """`everything`, with a bar that counts trees on a terminal."""
    if not console.is_terminal:
        yield from everything(api, steps)
        return
    entries = [one for one in api.shelf.entries.values() if not one.trouble]
    total = sum(len(one.trees(step)[1]) for one in entries for step in chosen(one.tree_steps(), steps))
    with Bar(console, "writing", total, "trees") as bar:
        done = -1
        for address, answer in everything(api, steps):
            done += address.startswith("/api/tree?")  # a tree is done when the next one begins
            bar.show(max(done, 0))
            yield address, answer
