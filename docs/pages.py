"""Code and its words side by side -> docs/html/<file>.html, by pycco from the files' own docstrings and comments.

    pip install pycco && python docs/pages.py        # seconds; open docs/html/grpo.html

Every page names the digest of its file and this one, so that a test can tell a page that is older.
"""
import hashlib
import html
import pathlib
import re

from pycco.main import generate_html, get_language, highlight, parse

ROOT = pathlib.Path(__file__).parent.parent
OUT = ROOT / "docs" / "html"
FILES = ["grpo.py", "bupo.py", "kl3_grpo.py", "entropy_min.py", "long_cot_sft.py", "ppo.py",
         "common/sampling.py", "common/logprobs.py", "common/internal_policy.py", "common/distributed.py"]
STYLE = """
body { margin: 0; font: 15px/1.5 Georgia, 'DejaVu Serif', serif; color: #222; background: #fff; }
nav, header { padding: 14px 28px; }
nav { background: #f4f4f8; border-bottom: 1px solid #ddd; font: 13px/1.6 'DejaVu Sans Mono', Menlo, Consolas, monospace; }
nav a, header a { color: #0b5394; text-decoration: none; margin-right: 14px; }
nav b { margin-right: 14px; }
header h1 { font-size: 26px; margin: 8px 0; }
header p { max-width: 900px; }
pre, code { font: 12px/1.55 'DejaVu Sans Mono', Menlo, Consolas, monospace; }
table { border-collapse: collapse; font-size: 13.5px; line-height: 1.4; }
th, td { border-bottom: 1px solid #ddd; padding: 5px 12px 5px 0; text-align: left; vertical-align: top; }
td:first-child { font-style: italic; }
header pre { overflow-x: auto; }
.section { display: grid; grid-template-columns: minmax(260px, 25%) 1fr; border-top: 1px solid #eee; }
.docs { padding: 8px 18px 8px 28px; font-size: 14.5px; overflow-wrap: break-word; }
.docs pre { white-space: pre-wrap; background: #eef3f8; padding: 6px 8px; margin: 6px 0; }
.docs p { margin: 4px 0 8px; }
.octowrap { display: none; }
.code { background: #f8f8fb; padding: 4px 18px; overflow-x: auto; }
.code pre { margin: 6px 0; }
@media (max-width: 900px) { .section { grid-template-columns: 1fr; } }
.k, .kn, .ow, .kc { color: #7b2d8b; } .nf, .nc { color: #0b5394; font-weight: bold; } .nd { color: #7b2d8b; }
.s1, .s2, .sd, .si, .sa { color: #1e6b3a; } .c1 { color: #8a6d3b; } .mi, .mf { color: #a13d00; } .nb, .bp { color: #22577a; }
"""


def words(text: str) -> str:
    """Markdown that says what the docstring says: flags as code, no sign taken for a tag."""
    return re.sub(r"(?<![\w`-])--[a-z][\w-]*", r"`\g<0>`", text.replace("&", "&amp;").replace("<", "&lt;"))


def ledger(lines: list[str]) -> str:
    """The deviations ledger, a row a topic with hanging indents -> an HTML table. What its head says after a stop is prose."""
    text = "\n".join(lines).removeprefix("Deviations ledger: ")
    head, *rows = re.split(r"\n  (?! )", text)
    cells = lambda row: [html.escape(cell.strip()) for cell in re.split(r"\|\s+", re.sub(r"\n\s*", " ", row))]
    body = [cells(row) for row in rows]
    head, note = cells(re.sub(r"\. .*", "", head, flags=re.S)), re.search(r"\. (.*)", head, re.S)
    head = [""] * (len(body[0]) - len(head)) + head
    row = lambda kind, values: "<tr>" + "".join(f"<{kind}>{value}</{kind}>" for value in values) + "</tr>"
    remark = lambda text: f'<tr><td colspan="{len(head)}">{text}</td></tr>'
    table = "<table>" + row("th", head) + "".join(row("td", c) if len(c) > 1 else remark(c[0]) for c in body) + "</table>"
    return f"<h3>Deviations</h3>{f'<p>{html.escape(note[1])}</p>' if note else ''}{table}"


def opening(docstring: str) -> str:
    """A module's docstring -> what stands above the columns: paragraphs, what is laid out in columns itself, the ledger."""
    blocks = []
    for block in docstring.strip().split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("Deviations ledger: "):
            blocks.append(ledger(lines))
        elif any(line.startswith("   ") for line in lines):
            blocks.append(f"<pre>{html.escape(block)}</pre>")
        else:
            blocks.append(f"<p>{html.escape(block)}</p>")
    return "".join(blocks)


def merged(sections: list[dict]) -> list[dict]:
    """pycco parts a function's head from its body where the docstring stands: together again, words and code."""
    found = []
    for section in sections:
        if found and found[-1]["code_text"].rstrip().endswith(":") and section["code_text"].strip("\n").startswith(" "):
            found[-1]["docs_text"] += section["docs_text"]
            found[-1]["code_text"] = found[-1]["code_text"].rstrip() + "\n" + section["code_text"].strip("\n") + "\n"
        else:
            found.append(section)
    return found


def page(name: str) -> str:
    source = (ROOT / name).read_text()
    language = get_language(name, source)
    source_for_pycco = re.sub(r'^( *)(?!""")(\S.*)"""$', r'\1\2\n\1"""', source, flags=re.M)  # an end on a line of its own, and
    source_for_pycco = re.sub(r"(?<=\n\n)(?=@|class |def )", "#\n", source_for_pycco)           # a comment where a part begins
    sections = merged(parse(source_for_pycco, language))
    top = opening(sections[0]["docs_text"])
    sections[0]["docs_text"] = ""
    for section in sections:
        section["docs_text"] = words(section["docs_text"])
    highlight(sections, language, preserve_paths=False, outdir=str(OUT))
    body = generate_html(name, sections, preserve_paths=False, outdir=str(OUT)).decode()
    sections_html = body[body.index("<div class='section' id='section-0'>"):body.rindex("</div>\n</body>")]
    digest = hashlib.sha256((source + pathlib.Path(__file__).read_text()).encode()).hexdigest()
    sections_html = re.sub(r'<span class="[npow]">([^<]*)</span>', r"\1", sections_html)  # what has no colour of its own
    links = " ".join(f"<b>{name}</b>" if other == name else f'<a href="{pathlib.Path(other).stem}.html">{other}</a>'
                     for other in FILES)
    return (f'<!DOCTYPE html>\n<!-- {name} sha256 {digest} -->\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
            '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="style.css"></head>\n'
            f'<body><nav>{links}</nav><header><h1>{name}</h1>{top}</header>\n{sections_html}</body></html>\n')


def main():
    OUT.mkdir(exist_ok=True)
    (OUT / "style.css").write_text(STYLE.lstrip())
    for name in FILES:
        (OUT / f"{pathlib.Path(name).stem}.html").write_text(page(name))
        print(OUT.relative_to(ROOT) / f"{pathlib.Path(name).stem}.html")


if __name__ == "__main__":
    main()
