"""Make the text files that ship in `src/moesaic/data/corpora` from their raw sources.

Run once, by hand; the package reads only what this script wrote:

    python tools/make_corpora.py --novels austen.txt.gz --questions dm_mathematics.jsonl.gz \\
        --out src/moesaic/data/corpora

`--novels` is the plain text of Jane Austen's six novels, one after the other. `--questions` is JSON lines with the
fields `topic` and `text`, where `text` is "Question: ...\\nAnswer: ...\\n". The same input gives the same text.
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

NOVELS = {  # the line a novel begins with, as the source prints it
    "EMMA": "Emma",
    "MANSFIELD PARK": "Mansfield Park",
    "NORTHANGER ABBEY": "Northanger Abbey",
    "Persuasion": "Persuasion",
    "PRIDE AND PREJUDICE": "Pride and Prejudice",
    "SENSE AND SENSIBILITY": "Sense and Sensibility",
}
# What publishers of later editions added: not Austen's, so it does not ship.
ADDED = re.compile(
    r"^(VOLUME [IVX]+|FINIS|Finis|THE END|\[At this point .*\]|\*Vide .*|A NOTE ON THE TEXT(?s:.*))$", re.M
)
CHAPTER = re.compile(r"^(?=chapter [ivxlc\d]+$)", re.M | re.I)
# The package uses 3.2 MB of each domain: a little more leaves room for another seed to choose differently.
QUESTIONS_SIZE_BYTES = 3_600_000


def chapters(text: str) -> Iterator[dict[str, str]]:
    """One row per chapter, in reading order, without title pages and editors' notes."""
    heading = re.compile(r"^(" + "|".join(NOVELS) + r")\n(?=\s*(?:\(\d+\)\s*)?by\s+jane austen)", re.M | re.I)
    parts = heading.split(text)
    for printed, novel in zip(parts[1::2], parts[2::2], strict=True):
        title = next(name for line, name in NOVELS.items() if line.lower() == printed.lower())
        for number, chapter in enumerate(CHAPTER.split(novel)[1:], start=1):
            yield {
                "group": title,
                "title": f"{title}, chapter {number}",
                "text": ADDED.sub("", chapter).strip() + "\n",
            }


def questions(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """One row per question, each question once, in the order of the source, up to the size that ships."""
    seen: set[str] = set()
    size_bytes = 0
    for line in lines:
        row = json.loads(line)
        question = row["text"].split("\nAnswer:")[0]
        if question in seen:
            continue
        seen.add(question)
        size_bytes += len(row["text"].encode())
        if size_bytes > QUESTIONS_SIZE_BYTES:
            return
        yield {"group": question.removeprefix("Question: "), "title": row["topic"], "text": row["text"]}


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write JSON lines, gzip'd without a time stamp so that the same rows give the same file."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(f"{path}: {text.count(chr(10)):,} documents, {path.stat().st_size:,} bytes")


def main() -> None:
    """Read the arguments and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with gzip.open(arguments.novels, "rt", encoding="utf-8") as file:
        write(arguments.out / "literature.jsonl.gz", chapters(file.read()))
    with gzip.open(arguments.questions, "rt", encoding="utf-8") as file:
        write(arguments.out / "mathematics.jsonl.gz", questions(file))


if __name__ == "__main__":
    main()
