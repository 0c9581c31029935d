"""Collects the natural text that is shipped, `docstrings.parquet` and `documentation.parquet`, from source archives.

    python workflow/scripts/natural_text.py FOLDER

pip downloads the archives of the pinned packages into FOLDER, which keeps them. They are read as text, never installed,
imported or run. Both files are written to lorabench/data, and the list of packages to NOTICE. The same archives give
the same rows; with the version of pyarrow in constraints.txt also the same bytes. `lorabench.data.sft` reads the files.
"""

import ast
import hashlib
import json
import re
import sys
import tarfile
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pip._internal.commands.download import DownloadCommand
from pip._internal.network.download import Downloader
from pip._vendor.packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]


class Package(NamedTuple):
    """A package, with those who wrote it; an owner's packages are all in one split."""

    name: str
    version: str
    owner: str
    split: str
    licence: str
    edition: str = "1"
    """The first edition of the text that has the package."""


PACKAGES = [
    Package(*(field.strip() for field in line.split("|")))
    for line in """
accelerate | 1.15.0 | Hugging Face | train | Apache-2.0
alembic | 1.20.1 | Mike Bayer | train | MIT
astropy | 8.0.2 | The Astropy Collaboration | train | BSD-3-Clause
dask | 2026.8.0 | Dask | train | BSD-3-Clause
datasets | 5.2.0 | Hugging Face | train | Apache-2.0
fonttools | 4.68.0 | fontTools | train | MIT
fsspec | 2026.9.0 | Dask | train | BSD-3-Clause
GitPython | 3.2.1 | Sebastian Thiel | train | BSD-3-Clause
h5py | 3.16.0 | h5py | train | BSD-3-Clause
huggingface-hub | 2.4.0 | Hugging Face | train | Apache-2.0
imageio | 2.38.1 | imageio | train | BSD-2-Clause
lm-eval | 0.4.13 | EleutherAI | train | MIT
matplotlib | 3.11.2 | Matplotlib | train | PSF-2.0
mpmath | 1.4.1 | Fredrik Johansson | train | BSD-3-Clause
networkx | 3.6.1 | NetworkX | train | BSD-3-Clause
nltk | 3.10.4 | NLTK | train | Apache-2.0
numba | 0.68.1 | Numba | train | BSD-2-Clause
numpy | 2.4.6 | NumPy | train | BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0
pandas | 3.1.1 | pandas | train | BSD-3-Clause
peft | 0.21.2 | Hugging Face | train | Apache-2.0
pillow | 13.0.0 | Pillow | train | MIT-CMU
pydantic | 2.14.3 | Pydantic | train | MIT
PyWavelets | 1.9.0 | PyWavelets | train | MIT AND BSD-3-Clause
scikit-image | 0.26.0 | scikit-image | train | BSD-3-Clause
scikit-learn | 1.9.1 | scikit-learn | train | BSD-3-Clause
scipy | 1.17.1 | SciPy | train | BSD-3-Clause
SQLAlchemy | 2.1.9 | Mike Bayer | train | MIT
statsmodels | 0.15.0 | statsmodels | train | BSD-3-Clause
sympy | 1.14.0 | SymPy | train | BSD-3-Clause
transformers | 5.23.0 | Hugging Face | train | Apache-2.0
xarray | 2026.9.0 | xarray | train | Apache-2.0
zarr | 3.1.6 | Zarr | train | MIT
anyio | 4.16.0 | Alex Groenholm | validation | MIT
arrow | 1.4.0 | Chris Smith | validation | Apache-2.0
attrs | 26.1.0 | Hynek Schlawack | validation | MIT
behave | 1.3.3 | Jens Engel | validation | BSD-2-Clause
black | 26.10.1 | Lukasz Langa | validation | MIT
botocore | 1.44.5 | Amazon Web Services | validation | Apache-2.0
cachetools | 8.0.0 | Thomas Kemmer | validation | MIT
cattrs | 26.2.1 | Tin Tvrtkovic | validation | MIT
click | 8.5.1 | Pallets | validation | BSD-3-Clause
dill | 0.4.1 | Mike McKerns | validation | BSD-3-Clause
docker | 7.2.0 | Docker | validation | Apache-2.0
doit | 0.37.0 | Eduardo Schettino | validation | MIT
dulwich | 1.2.21 | Jelmer Vernooij | validation | Apache-2.0 OR GPL-2.0-or-later
ezdxf | 1.4.5 | Manfred Moitzi | validation | MIT
icalendar | 7.3.0 | Plone | validation | BSD-2-Clause
invoke | 3.0.3 | Jeff Forcier | validation | BSD-2-Clause
ipython | 9.18.1 | IPython | validation | BSD-3-Clause
lmfit | 1.3.4 | Matthew Newville | validation | BSD-3-Clause
marshmallow | 4.4.0 | Steven Loria | validation | MIT
mistune | 3.4.0 | Hsiaoming Yang | validation | BSD-3-Clause
mypy | 2.4.1 | Jukka Lehtosalo | validation | MIT
oauthlib | 4.0.1 | OAuthlib | validation | BSD-3-Clause
pexpect | 4.9.0 | Jeff Quast | validation | ISC
pika | 1.4.4 | Gavin Roy | validation | BSD-3-Clause
pymunk | 7.3.1 | Victor Blomqvist | validation | MIT
pyopencl | 2026.1.4 | Andreas Kloeckner | validation | MIT
pyparsing | 3.3.3 | Paul McGuire | validation | MIT
pypdf | 7.1.0 | Martin Thoma | validation | BSD-3-Clause
pyproj | 3.7.2 | Jeff Whitaker | validation | MIT
pytest | 9.2.0 | pytest-dev | validation | MIT
python-dateutil | 4.0.0 | Paul Ganssle | validation | BSD-3-Clause
robotframework | 7.5 | Robot Framework Foundation | validation | Apache-2.0
simpy | 4.1.2 | Stefan Scherfke | validation | MIT
Sphinx | 9.0.4 | Sphinx | validation | BSD-2-Clause
trio | 0.35.0 | python-trio | validation | MIT OR Apache-2.0
Twisted | 26.10.0 | Twisted Matrix Laboratories | validation | MIT
urllib3 | 2.8.0 | urllib3 | validation | MIT
watchdog | 7.1.0 | Yesudeep Mangalapilly | validation | Apache-2.0
WebOb | 1.8.11 | Pylons | validation | MIT
wrapt | 2.5.2 | Graham Dumpleton | validation | BSD-2-Clause
agate | 1.14.2 | Christopher Groskopf | test | MIT | 2
aiohttp | 3.14.5 | aio-libs | test | Apache-2.0 AND MIT
asciimatics | 1.15.0 | Peter Brittain | test | Apache-2.0 | 2
beautifulsoup4 | 4.15.0 | Leonard Richardson | test | MIT
bitstring | 5.0.0 | Scott Griffiths | test | MIT | 2
bluesky | 1.15.1 | Brookhaven National Laboratory | test | BSD-3-Clause | 2
bokeh | 3.9.2 | Bokeh | test | BSD-3-Clause | 2
boltons | 26.2.0 | Mahmoud Hashemi | test | BSD-3-Clause
borgbackup | 1.4.5 | The Borg Collective | test | BSD-3-Clause
cassandra-driver | 3.30.1 | DataStax | test | Apache-2.0 | 2
celery | 5.7.0 | Ask Solem | test | BSD-3-Clause
cffi | 2.1.1 | Armin Rigo | test | MIT-0
CherryPy | 18.10.0 | CherryPy | test | BSD-3-Clause
cmd2 | 4.3.1 | cmd2 | test | MIT | 2
colour-science | 0.4.7 | Colour Developers | test | BSD-3-Clause | 2
configobj | 5.0.9 | Michael Foord | test | BSD-3-Clause | 2
control | 0.10.2 | python-control | test | BSD-3-Clause
coverage | 7.17.3 | Ned Batchelder | test | Apache-2.0
cryptography | 50.0.2 | Python Cryptographic Authority | test | Apache-2.0 OR BSD-3-Clause
Cython | 3.3.1 | Cython | test | Apache-2.0
dagster | 1.13.29 | Dagster Labs | test | Apache-2.0 | 2
deepdiff | 9.1.0 | Sep Dehpour | test | MIT
discord.py | 2.7.1 | Rapptz | test | MIT
Django | 5.2.19 | Django Software Foundation | test | BSD-3-Clause
django-allauth | 65.22.1 | Raymond Penners | test | MIT | 2
django-haystack | 3.4.0 | Daniel Lindsley | test | BSD-3-Clause | 2
django-tables2 | 3.0.1 | Bradley Ayers | test | BSD-2-Clause | 2
dnspython | 2.9.2 | Bob Halley | test | ISC
elasticsearch | 9.5.1 | Elastic | test | Apache-2.0 | 2
emcee | 3.1.6 | Dan Foreman-Mackey | test | MIT
enaml | 0.19.0 | Nucleic | test | BSD-3-Clause | 2
Eve | 2.1.0 | Nicola Iarocci | test | BSD-3-Clause | 2
factory-boy | 3.3.3 | Mark Sandstrom | test | MIT | 2
Faker | 40.54.0 | joke2k | test | MIT
falcon | 4.4.0 | Kurt Griffiths | test | Apache-2.0
feedparser | 6.0.14 | Kurt McKee | test | BSD-2-Clause
geopandas | 1.2.0 | GeoPandas | test | BSD-3-Clause | 2
gevent | 26.9.0 | Denis Bilenko | test | MIT
gpiozero | 2.0.1.post3 | Ben Nuttall | test | BSD-3-Clause | 2
gpytorch | 1.15.2 | Jacob Gardner | test | MIT | 2
h2 | 4.4.1 | Cory Benfield | test | MIT | 2
IMAPClient | 4.1.0 | Menno Smits | test | BSD-3-Clause | 2
jira | 3.10.5 | Ben Speakmon | test | BSD-2-Clause | 2
jsonschema | 4.26.0 | Julian Berman | test | MIT
kafka-python | 3.0.12 | Dana Powers | test | Apache-2.0 | 2
kedro | 1.7.0 | Kedro | test | Apache-2.0 | 2
kornia | 0.9.0 | Edgar Riba | test | Apache-2.0 | 2
lark | 1.3.1 | Erez Shinan | test | MIT
librosa | 0.11.0 | Brian McFee | test | ISC
luigi | 3.8.1 | Spotify | test | Apache-2.0
Markdown | 3.11.3 | Waylan Limberg | test | BSD-3-Clause
Mastodon.py | 2.3.3 | Lorenz Diener | test | MIT | 2
Mesa | 3.3.1 | Project Mesa | test | Apache-2.0 | 2
MetPy | 1.7.1 | Unidata | test | BSD-3-Clause | 2
mido | 1.3.3 | Ole Martin Bjorndalen | test | MIT | 2
mongoengine | 0.29.3 | Harry Marr | test | MIT | 2
more-itertools | 11.2.1 | Erik Rose | test | MIT
mpi4py | 4.1.2 | Lisandro Dalcin | test | BSD-3-Clause
mrjob | 0.7.4 | Yelp | test | Apache-2.0
netaddr | 1.3.0 | David Moss | test | BSD-3-Clause | 2
Nikola | 8.3.3 | Roberto Alsina | test | MIT
nose2 | 0.16.0 | Jason Pellerin | test | BSD-2-Clause | 2
openstacksdk | 4.22.0 | OpenStack | test | Apache-2.0 | 2
parso | 0.8.7 | Dave Halter | test | MIT
passlib | 1.7.4 | Eli Collins | test | BSD-3-Clause
peewee | 4.5.3 | Charles Leifer | test | MIT
pgmpy | 1.1.2 | Ankur Ankan | test | MIT | 2
Pint | 0.25.3 | Hernan Grecco | test | BSD-3-Clause
pip | 26.3 | Python Packaging Authority | test | MIT | 2
plasmapy | 2025.8.0 | PlasmaPy | test | BSD-3-Clause | 2
plumbum | 2.0.2 | Tomer Filiba | test | MIT
praw | 8.0.3 | Bryce Boe | test | BSD-2-Clause
progressbar2 | 4.6.0 | Rick van Hattem | test | BSD-3-Clause | 2
prompt_toolkit | 3.0.53 | Jonathan Slenders | test | BSD-3-Clause
psutil | 7.2.2 | Giampaolo Rodola | test | BSD-3-Clause
PuLP | 3.3.2 | COIN-OR | test | MIT
pydicom | 3.0.2 | Darcy Mason | test | MIT | 2
pyglet | 2.1.19 | Alex Holkner | test | BSD-3-Clause | 2
PyJWT | 2.15.1 | Jose Padilla | test | MIT | 2
pymc | 5.28.5 | PyMC | test | Apache-2.0 | 2
PyMeasure | 0.16.0 | PyMeasure | test | MIT | 2
pymodbus | 3.16.1 | Galen Collins | test | BSD-3-Clause | 2
pymongo | 4.20.0 | MongoDB | test | Apache-2.0
pyqtgraph | 0.13.7 | Luke Campagnola | test | MIT | 2
pyserial | 3.5 | Chris Liechti | test | BSD-3-Clause
python-docx | 1.2.0 | Steve Canny | test | MIT
pytorch-ignite | 0.5.5 | PyTorch-Ignite | test | BSD-3-Clause | 2
pyvista | 0.49.2 | PyVista | test | MIT | 2
qiskit | 2.6.2 | Qiskit | test | Apache-2.0 | 2
rdflib | 7.6.0 | RDFLib | test | BSD-3-Clause | 2
redis | 8.1.0 | Redis | test | MIT | 2
reportlab | 5.1.0 | ReportLab | test | BSD-3-Clause | 2
rich | 15.0.0 | Will McGugan | test | MIT
scikit-bio | 0.7.4 | scikit-bio | test | BSD-3-Clause | 2
Scrapy | 2.19.0 | Zyte | test | BSD-3-Clause
segno | 1.6.6 | Lars Heuer | test | BSD-3-Clause | 2
shapely | 2.2.0 | Sean Gillies | test | BSD-3-Clause
snakemake | 9.27.1 | Johannes Koester | test | MIT
soco | 0.32.5 | SoCo | test | MIT | 2
sqlglot | 30.31.0 | Toby Mao | test | MIT | 2
sqlparse | 0.6.1 | Andi Albrecht | test | BSD-3-Clause
stable-baselines3 | 2.9.2 | Antonin Raffin | test | MIT | 2
testfixtures | 12.4.0 | Chris Withers | test | MIT
textX | 4.4.0 | Igor Dejanovic | test | MIT | 2
tornado | 6.6.1 | Ben Darnell | test | Apache-2.0
traits | 7.3.0 | Enthought | test | BSD-3-Clause | 2
trimesh | 5.2.0 | Michael Dawson-Haggerty | test | MIT
WeasyPrint | 70.0 | Kozea | test | BSD-3-Clause | 2
Whoosh | 2.7.4 | Matt Chaput | test | BSD-2-Clause | 2
XlsxWriter | 3.3.1 | John McNamara | test | BSD-2-Clause | 2
xonsh | 0.25.0 | xonsh | test | BSD-2-Clause
""".strip().splitlines()
]  # fmt: skip

SPLITS = ("train", "validation", "test")
PERMISSIVE = {"0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "HPND", "ISC", "MIT", "MIT-0", "MIT-CMU",
              "PSF-2.0", "Unlicense", "Zlib"}  # fmt: skip
# The most examples of a package in a file, by split. A package with fewer than FEWEST of at most SHORT characters is
# left out of the file.
MOST = {"train": 200, "validation": 30, "test": 30}
FEWEST, SHORT = 10, 500
MIN_WORDS, MAX_CHARS, CODE_CHARS, BEFORE_CHARS = 14, 800, 400, 160
QUESTION = "What does this Python function do?"

# Folders of tests, examples and tools, of copies of other packages, and (`models`) of the near-copies of one model's
# code for the next; text files that are no documentation of the package itself.
NO_CODE = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|externals?|extern|array_api_compat|models|docs?|doc_src|examples?|samples|demos?|"
    r"benchmarks?|tools|scripts|ci|\..*)/|(^|/)(test_|conftest|__config__|setup\.py|versioneer|_version)",
    re.IGNORECASE,
)
DOCUMENTATION = re.compile(
    r"(^|/)(docs?|documentation|doc_src|sites?|website)/.*\.(rst|md|txt)$|^[^/]*\.(rst|md)$", re.IGNORECASE
)
NO_DOCUMENTATION = re.compile(
    r"(^|/)(licen[cs]es?|copying|notice|authors|thanks|contributors|credits|code[-_]of[-_]conduct|security|governance|"
    r"citation|acknowledge?ments?|tests?|_?vendor(ed)?|third_?party|node_modules|_?templates?|_theme|requirements)\b",
    re.IGNORECASE,
)

# An English description consists of letters and spaces by this share at least, and has some common words.
PROSE, FEWEST_COMMON = 0.88, 3
TRIPLE_QUOTES, PARAGRAPH_END = re.compile("\"\"\"|'''"), re.compile(r"\n\s*\n")
WORD = re.compile(r"[A-Za-z]+")
# Marks of reStructuredText and Markdown, and what is written for them.
PLAIN = [
    (re.compile(r":[\w:.+-]+:`~?!?([^`<>]*[^`<>\s])\s*<[^<>`]*>`"), r"\1"),
    (re.compile(r":[\w:.+-]+:`[~!.]*([^`<>]+)`"), r"`\1`"),
    (re.compile(r"`([^`<>]*[^`<>\s])\s*<[^<>`]*>`__?"), r"\1"),
    (re.compile(r"(?<![`\w])`([^`<>]+)`__?(?!\w)"), r"\1"),
    (re.compile(r"(?<!!)\[([^\[\]]+)\](\([^()\s]*\)|\[[^\[\]]*\])"), r"\1"),
    (re.compile(r"``"), "`"),
    (re.compile(r"(?<!\w)(\*{1,2})([^\s*][^*]{0,60}?)\1(?!\w)"), r"\2"),
    (re.compile("[\u2018\u2019]"), "'"),
    (re.compile("[\u201c\u201d]"), '"'),
    (re.compile("\\s*(\u2014|---)\\s*"), " - "),
    (re.compile("\u2013"), "-"),
]
MARKUP = re.compile(
    r">>>|https?:|www\.|::|\.\.|[@{}\\|$#*\[\]]|\w_([\s.,;:)]|$)|`_|<[^>]*>|:[a-z]+:|&\w+;|"
    r"\b(Args|Arguments|Parameters?|Params|Returns?|Raises|Yields|Usage|Examples?|Notes?|Todo|Warning|See [Aa]lso):|"
    r"TODO|FIXME|XXX"
)
POINTS = re.compile(
    r"(See|Alias|Same as|Refer|Like|Equivalent to|Wrapper|Overrid|Inherit|Copied|Adapted|Calls? )\w*\b|"
    r".*\b(deprecat|obsolete|overrid|backwards?[- ]compat|docstring|see\b)",
    re.IGNORECASE | re.DOTALL,
)
ITEM = re.compile(r"^\s*([-*+\u2022]|\d+[.)]|\(?[a-z]\))\s", re.MULTILINE)
TITLE = re.compile(r"^.{1,49}[^.,;:(\s]\n(?=[A-Z])")
UNDERLINE = re.compile(r"^([=\-~^\"'`#*+.:_])\1{2,}\s*$")
HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*$")
COMMON_WORD = re.compile(
    r"\b(an?|and|are|as|be|been|by|can|for|from|has|have|if|in|into|is|its?|may|must|not?|of|on|or|so|such|than|that|the|"
    r"their|then|there|these|this|to|used|using|was|when|where|which|will|with)\b"
)


def fetch(folder: Path) -> None:
    """Download the archives that the folder lacks, named after their packages.

    pip has no command that downloads a source archive without running its build, so this calls the parts that do.
    """
    command = DownloadCommand("download", "")
    options, _ = command.parse_args(["--no-binary", ":all:", "--quiet"])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        for package in PACKAGES:
            if not archive(folder, package).exists():
                best = finder.find_best_candidate(package.name, SpecifierSet(f"=={package.version}")).best_candidate
                if best is None:
                    sys.exit(f"{package.name} {package.version} has no source archive for this version of Python")
                path, _ = Downloader(session, "off")(best.link, str(folder))
                Path(path).rename(archive(folder, package))


def archive(folder: Path, package: Package) -> Path:
    """Return the path of a package's archive."""
    return folder / f"{package.name}-{package.version}.tar.gz"


def texts(path: Path) -> dict[str, str]:
    """Return the Python sources and text files of an archive by their paths in it, in the order of the paths."""
    with tarfile.open(path) as opened:
        members = {
            member.name.partition("/")[2]: file.read().decode(errors="replace")
            for member in opened.getmembers()
            if member.isfile() and member.name.endswith((".py", ".rst", ".md", ".txt"))
            # Links are left out: their files are in the archive under other names.
            if (file := opened.extractfile(member))
        }
    return dict(sorted(members.items()))


def docstrings(package: Package, files: dict[str, str], left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield a package's functions that have a usable description; count the others by reason."""
    for name, text in files.items():
        if not name.endswith(".py") or NO_CODE.search(name):
            continue
        starts = (PARAGRAPH_END.split(part, maxsplit=1)[0].strip() for part in TRIPLE_QUOTES.split(text)[1:])
        # Parsing takes far longer than looking for a text that may be usable.
        if not any(unusable(start) is None for start in starts):
            continue
        with warnings.catch_warnings():
            # Python warns of escape sequences in other people's code.
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(text, feature_version=(3, 11))
            except (SyntaxError, ValueError, RecursionError):
                continue
        # These are the lines that Python counts; `splitlines` would also split at form feeds.
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for node in definitions(tree.body):
            if docstring := ast.get_docstring(node):
                paragraph = PARAGRAPH_END.split(docstring.strip(), maxsplit=1)[0]
                reason = unusable(paragraph)
                if reason is None and POINTS.match(plain(paragraph)):
                    reason = "a pointer or a deprecation"
                shown = code(node, lines) if reason is None else ""
                if reason is None and not shown:
                    reason = "no code besides the docstring"
                yield from example(package, f"{QUESTION}\n\n{shown}", paragraph, reason, left_out)


def example(
    package: Package, prompt: str, paragraph: str, reason: str | None, left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield an example, or count it by the reason for which it cannot be used."""
    text = plain(paragraph)
    if reason is None and len(prompt) + len(text) > MAX_CHARS:
        reason = "too long"
    if reason is None:
        yield {
            "split": package.split,
            "package": package.name,
            "prompt": prompt,
            "text": text,
            "words": len(WORD.findall(text)),
        }
    else:
        left_out[reason] += 1


def definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions and methods of a module; functions within functions are not searched."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node
            case ast.ClassDef() | ast.With() | ast.If() | ast.Try():
                yield from definitions([*node.body, *getattr(node, "orelse", [])])


def code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Return the signature and body without the docstring, cut after whole lines; empty if nothing else is there."""
    docstring, *others = node.body
    end = docstring.end_lineno or docstring.lineno
    if not others or docstring.lineno == node.lineno or others[0].lineno == end:
        return ""
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[end : node.end_lineno]]
    whole = [line.rstrip() for line in textwrap.dedent("\n".join(kept)).splitlines() if line.strip()]
    shown: list[str] = []
    for line in whole:
        if sum(map(len, shown)) + len(shown) + len(line) > CODE_CHARS:
            break
        shown.append(line)
    if len(shown) == len(whole):
        return "\n".join(shown)
    # A function is not shown if its signature alone exceeds the limit.
    return "\n".join([*shown, "    ..."]) if len(shown) > docstring.lineno - node.lineno else ""


def documentation(package: Package, files: dict[str, str], left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the usable paragraphs of a package's documentation; count the others by reason."""
    for name, text in files.items():
        if not DOCUMENTATION.search(name) or NO_DOCUMENTATION.search(name):
            continue
        for titles, before, paragraph in paragraphs(text, name.endswith(".md")):
            where = ", ".join(f'"{title}"' for title in titles)
            prompt = f"Continue the documentation of {package.name}" + (f", {where}." if where else ".")
            if before:
                prompt += f"\n\n{before}"
            yield from example(package, prompt, paragraph, unusable(paragraph), left_out)


def paragraphs(text: str, is_markdown: bool) -> Iterator[tuple[list[str], str, str]]:
    """Yield the paragraphs of a page, each with the titles of page and section and the end of the last one before it.

    Indented text (code, lists, what directives hold), tables and the like are no paragraphs.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").expandtabs()
    if is_markdown:
        text = re.sub(r"^(---\n.*?\n---\n)", "\n", text, flags=re.DOTALL)
        text = re.sub(r"^ *(```+|~~~+|:::+).*?^ *\1 *$", "\n.. code\n", text, flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    titles: list[str] = []
    before, styles = "", list[str]()
    for block in PARAGRAPH_END.split(text):
        lines = block.strip("\n").split("\n")
        while lines and (heading := title(lines)):
            name, style, taken = heading
            level = styles.index(style) if style in styles else len(styles)
            if style not in styles:
                styles.append(style)
            # A page that starts with a lower title than its others has no title of its own.
            titles, before, lines = [*titles[:level], plain(name)], "", lines[taken:]
        paragraph = "\n".join(lines)
        if not paragraph.strip():
            continue
        if any(line[:1] in " .|+=:>" for line in lines) or ITEM.search(paragraph):
            continue
        shown = [title for title in dict.fromkeys(titles[:1] + titles[-1:]) if title]
        if all(map(is_clean, shown)):
            yield shown, before, paragraph
        if is_clean(plain(paragraph)):
            before = end_of(plain(paragraph))


def title(lines: list[str]) -> tuple[str, str, int] | None:
    """Return the title with which lines start, the style that stands for its level, and its number of lines."""
    if match := HEADING.match(lines[0]):
        return match[2], match[1], 1
    if len(lines) > 1 and UNDERLINE.match(lines[1]) and lines[0].strip() and not UNDERLINE.match(lines[0]):
        return lines[0].strip(), lines[1][0], 2
    if len(lines) > 2 and UNDERLINE.match(lines[0]) and UNDERLINE.match(lines[2]):
        return lines[1].strip(), lines[0][0] * 2, 3
    return None


def end_of(text: str) -> str:
    """Return the end of a text, from the start of a word."""
    return text if len(text) <= BEFORE_CHARS else f"... {text[-BEFORE_CHARS:].partition(' ')[2]}"


def is_clean(text: str) -> bool:
    """Return whether a text is free of markup."""
    return text.isascii() and not MARKUP.search(text) and text.count("`") % 2 == 0


def plain(paragraph: str) -> str:
    """Return a paragraph in one line, with the marks of Sphinx and Markdown reduced to backticks."""
    text = " ".join(paragraph.split())
    for mark, replacement in PLAIN:
        text = mark.sub(replacement, text)
    return text


def unusable(paragraph: str) -> str | None:
    """Return why a paragraph is no text of English sentences; None if it is."""
    # Counting words is much faster than reducing marks, which takes away words of links.
    if len(WORD.findall(paragraph)) < MIN_WORDS or len(WORD.findall(text := plain(paragraph))) < MIN_WORDS:
        return "of too few words"
    prose = sum(character.isalpha() or character == " " for character in text)
    sentences = text.endswith(".") and text[0].isupper() and is_clean(text) and text.count("(") == text.count(")")
    common = len(set(COMMON_WORD.findall(text.lower())))
    layout = ITEM.search(paragraph) or TITLE.match(paragraph)
    if not sentences or prose < PROSE * len(text) or common < FEWEST_COMMON or layout:
        return "not a paragraph of English sentences"
    return None


def letters(text: str) -> str:
    """Return the letters of a text."""
    return "".join(re.findall(r"[a-z]+", text.lower()))


def distinct(rows: list[dict[str, Any]], left_out: Counter[str]) -> list[dict[str, Any]]:
    """Return rows of which no two, in whatever split, have the same text or prompt; count the others.

    Texts are compared without the names in backticks, prompts without the function's name: both by letters alone. Of
    rows with the same text none is kept, of rows with the same prompt the first.
    """
    answers = [letters(re.sub(r"`[^`]*`", "", row["text"])) for row in rows]
    often, prompts, kept = Counter(answers), set[str](), []
    for row, answer in zip(rows, answers, strict=True):
        prompt = letters(re.sub(r"def \w+", "def", row["prompt"], count=1))
        if often[answer] > 1:
            left_out["shares its text with another"] += 1
        elif prompt in prompts:
            left_out["repeats the prompt of another"] += 1
        else:
            prompts.add(prompt)
            kept.append(row)
    return kept


def selected(rows: list[dict[str, Any]], left_out: Counter[str]) -> list[dict[str, Any]]:
    """Return at most as many rows of each package as its split may have, those whose hashes come first."""
    by_package: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_package[row["package"]].append(row)
    chosen = []
    for few in by_package.values():
        few.sort(key=lambda row: hashlib.sha256((row["prompt"] + row["text"]).encode()).hexdigest())
        kept = few[: MOST[few[0]["split"]]]
        if sum(len(row["prompt"]) + len(row["text"]) <= SHORT for row in kept) < FEWEST:
            kept = []
            left_out["of a package with too few"] += len(few)
        else:
            left_out["beyond the number of its package"] += len(few) - len(kept)
        chosen += kept
    return chosen


def check_packages() -> None:
    """Exit with a message if an owner is in two splits, a licence is not permissive, or the order is another."""
    splits: dict[str, str] = {}
    for package in PACKAGES:
        if splits.setdefault(package.owner, package.split) != package.split:
            sys.exit(f"{package.owner} has packages in two splits, one of them {package.name}")
        if not all(PERMISSIVE.intersection(choice.split(" OR ")) for choice in package.licence.split(" AND ")):
            sys.exit(f"{package.name} has the licence {package.licence}; allowed: {', '.join(sorted(PERMISSIVE))}")
    if sorted(PACKAGES, key=lambda package: (SPLITS.index(package.split), package.name.lower())) != PACKAGES:
        sys.exit("the packages must be in the order of their splits and names")


def main(folder: Path) -> None:
    """Write both files and the list of packages in NOTICE."""
    check_packages()
    folder.mkdir(parents=True, exist_ok=True)
    fetch(folder)
    files = {package: texts(archive(folder, package)) for package in PACKAGES}
    hashes = {package: hashlib.sha256(archive(folder, package).read_bytes()).hexdigest() for package in PACKAGES}
    used = set[str]()
    for maker in (docstrings, documentation):
        editions = {}
        # The rows of the last edition are written. Those of the first are among them, as tests/data/test_sft.py checks.
        for edition in (1, 2):
            left_out = Counter[str]()
            known = [package for package in PACKAGES if int(package.edition) <= edition]
            read = [row for package in known for row in maker(package, files[package], left_out)]
            rows = selected(distinct(read, left_out), left_out)
            names = {row["package"] for row in rows}
            editions[edition] = {
                "id": f"{maker.__name__} of {len(names)} Python packages",
                "left_out": dict(sorted(left_out.items())),
            }
        used |= names
        note = {
            "packages": {
                package.name: package._asdict() | {"edition": int(package.edition), "sha256": hashes[package]}
                for package in PACKAGES
                if package.name in names
            },
            "editions": editions,
        }
        table = pa.Table.from_pylist(rows).replace_schema_metadata({"lorabench": json.dumps(note)})
        path = ROOT / "lorabench" / "data" / f"{maker.__name__}.parquet"
        pq.write_table(table, path, compression="zstd", compression_level=19)
        print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    notice = ROOT / "NOTICE"
    lines = [f"  {package.name} {package.version}: {package.licence}" for package in PACKAGES if package.name in used]
    notice.write_text("\n".join([notice.read_text().partition("\n  ")[0], *lines, ""]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
