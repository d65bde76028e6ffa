"""report.html: a run on one page, in one file that needs no other."""

import base64
import pathlib
from html import escape

from gpt2_flax.config.train_config import FIELDS, GROUPS
from gpt2_flax.filesystem import replace_file
from gpt2_flax.reporting import summary as words
from gpt2_flax.reporting.summary import Outcome

REPORT_FILE = "report.html"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; } th { font-weight: 600; white-space: nowrap; }
tr.changed td { font-weight: 600; }
pre { background: #f5f5f5; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; } .note { color: #666; }
.settings { columns: 2; } .settings table { break-inside: avoid; } h3 { break-after: avoid; }
"""


def write(outcome: Outcome, curves, path) -> None:
    """Write the page. curves: the PNG to show. Raises StorageError."""
    replace_file(path, page(outcome, pathlib.Path(curves).read_bytes()).encode())


def page(outcome: Outcome, png: bytes) -> str:
    """The HTML. Whatever came from outside is escaped, and no script may run."""
    title = f"gpt2_flax: {outcome.output_dir}"
    picture = base64.b64encode(png).decode()
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
            " img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            f"<p>{escape(words.describe_model(outcome.model))}</p>",
            f"<p>{escape(outcome.about_text)}</p>",
            "<h2>Results</h2>",
            table(words.results(outcome)),
            f'<p class="note">MFU: {escape(words.MFU_FORMULA)}.</p>',
            "<h2>Curves</h2>",
            f'<img alt="Losses, learning rate, gradient norm and tokens per second over tokens"'
            f' src="data:image/png;base64,{picture}">',
            *samples(outcome.samples),
            "<h2>Going on</h2>",
            "<p>From the directory in which the run was started:</p>",
            *(f"<p>{escape(w)}</p>\n<pre>{escape(c)}</pre>" for w, c in words.commands(outcome)),
            "<h2>Settings</h2>",
            '<p class="note">Bold: not the default.</p>',
            *settings(words.settings(outcome.config)),
            "<h2>Environment</h2>",
            table(words.environment()),
            "</body>",
            "</html>",
            "",
        ]
    )


def table(pairs: list[tuple[str, str]]) -> str:
    rows = [f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs]
    return "\n".join(["<table>", *rows, "</table>"])


def samples(texts: dict[int, str]) -> list[str]:
    """The last sample, and the others folded away."""
    if not texts:
        return []
    final, *earlier = sorted(texts, reverse=True)
    parts = ["<h2>Samples</h2>", f"<p>step {final:,}</p>\n<pre>{escape(texts[final])}</pre>"]
    if earlier:
        parts.append(f"<details><summary>{len(earlier)} earlier</summary>")
        parts += [f"<p>step {n:,}</p>\n<pre>{escape(texts[n])}</pre>" for n in earlier]
        parts.append("</details>")
    return parts


def settings(values: dict) -> list[str]:
    """A table of each group of settings."""
    parts, group = ['<div class="settings">'], None
    for name, field in FIELDS.items():
        if name in GROUPS or group is None:
            parts += ["</table>"] * (group is not None)
            group = GROUPS.get(name, "")
            parts += [f"<h3>{escape(group)}</h3>", "<table>"]
        if name in values:
            parts.append(setting(name, values[name], field))
    return [*parts, "</table>", "</div>"]


def setting(name: str, value, field) -> str:
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    kind = "" if value == default else ' class="changed"'
    shown = ", ".join(value) if isinstance(value, list) else str(value)
    shown = shown.lower() if isinstance(value, bool) else shown
    about = escape(field.metadata["help"])
    return f'<tr{kind} title="{about}"><th>{escape(name)}</th><td>{escape(shown)}</td></tr>'
