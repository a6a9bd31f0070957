"""Damaged files: any bytes end in records that are all accounted for, or in one clear refusal.

Valid CSV and JSONL files of many kinds are hurt at random. What is read from each must tile the file (CSV) or be its
lines that are not blank (JSONL), every record must become rows or one rejection, and hardly any file may be refused.
"""
import csv
import gc
import io
import json
import random
import signal
import tracemalloc
from collections import Counter
from contextlib import contextmanager

import pytest
from qlora_nb.data import read_records, text_form
from qlora_nb.rows import BadRow, guess_roles, shape_rows
from qlora_nb.vram_budget import InputError

ROWS = [(f"How do I reset item {i}, please?", f'Press "{i}"; then wait.\nIt takes {i * 3 % 17} minutes.') for i in range(60)]
PLAIN = [(f"What is item {i}?", f"It is the one numbered {i}.") for i in range(90)]
WIDER = [(f"Où est l’élève n° {i} – à Besançon?", f"Là-bas, près du château: salle {i}.") for i in range(60)]
WIDEST = [(f"「{i}」は何ですか?", f"それは{i}番です。😀 Ünïcode, {i}") for i in range(60)]


def as_csv(rows, end="\n", **how):
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end, **how)
    writer.writerow(("question", "answer"))
    writer.writerows(rows)
    return text.getvalue()


def as_jsonl(rows, end="\n", ascii=False):
    return "".join(json.dumps(dict(question=q, answer=a), ensure_ascii=ascii) + end for q, a in rows)


def as_chats(rows):
    turns = [dict(messages=[dict(role="user", content=q), dict(role="assistant", content=a)]) for q, a in rows]
    return "".join(json.dumps(t) + "\n" for t in turns)


FILES = {
    "plain.csv": as_csv(PLAIN).encode(),
    "newlines.csv": as_csv(ROWS).encode(),
    "all-quoted.csv": as_csv(ROWS, quoting=csv.QUOTE_ALL).encode(),
    "crlf.csv": as_csv(ROWS, "\r\n").encode(),
    "mac.csv": as_csv(ROWS, "\r").encode(),
    "semicolon.csv": as_csv(WIDER, delimiter=";").encode(),
    "tab.tsv": as_csv(WIDEST, delimiter="\t").encode(),
    "bar.csv": as_csv(WIDEST, delimiter="|").encode(),
    "mark.csv": as_csv(WIDEST).encode("utf-8-sig"),
    "utf16.csv": as_csv(ROWS, "\r\n").encode("utf-16"),
    "utf16be.csv": as_csv(WIDER).encode("utf-16-be"),
    "cp1252.csv": as_csv(WIDER).encode("cp1252"),
    "plain.jsonl": as_jsonl(PLAIN).encode(),
    "ascii.jsonl": as_jsonl(WIDEST, ascii=True).encode(),
    "wide.jsonl": as_jsonl(WIDEST).encode(),
    "mark.jsonl": as_jsonl(ROWS, "\r\n").encode("utf-8-sig"),
    "utf16.jsonl": as_jsonl(WIDER).encode("utf-16"),
    "cp1252.jsonl": as_jsonl(WIDER).encode("cp1252"),
    "chats.jsonl": as_chats(ROWS).encode(),
}


def hurt(data, rng):
    "The bytes with one kind of damage, at one to three places."
    data = bytearray(data)
    kind = rng.choice(("byte", "bit", "insert", "delete", "repeat", "drop", "swap", "truncate"))
    for _ in range(1 if kind == "truncate" else rng.randint(1, 3)):
        at, n = rng.randrange(len(data)), rng.randint(1, 200)
        if kind == "byte": data[at] = rng.randrange(256)
        elif kind == "bit": data[at] ^= 1 << rng.randrange(8)
        elif kind == "insert": data[at:at] = bytes([rng.choice((rng.randrange(256), *b'",;\n\r\0\\{['))])
        elif kind == "delete": del data[at]
        elif kind == "repeat": data[at:at] = data[at:at + n]
        elif kind == "drop": del data[at:at + n]
        elif kind == "swap": data[at:at + n] = reversed(data[at:at + n])
        else: del data[at:]
        if not data: break
    return bytes(data), kind


@contextmanager
def no_hang(seconds=30):
    "A file that takes this long is a hang."
    def stop(*_): raise AssertionError(f"not read within {seconds} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def shaped(records):
    "What becomes of records: rows, extra rows, rejected records."
    roles = guess_roles(list(dict.fromkeys(c for r in records[:100] for c in r.value or ())), {})
    rows = expanded = rejected = 0
    for record in records:
        try: made = [] if record.error else shape_rows(record, roles)
        except BadRow: made = []
        rows, expanded, rejected = rows + len(made), expanded + max(len(made) - 1, 0), rejected + (not made)
    return rows, expanded, rejected


def check(path):
    "Read a file to the end and see that all of it is accounted for; raises InputError if it is refused."
    data, records = path.read_bytes(), list(read_records(str(path)))
    form, spans = text_form(path), [r.span for r in records]
    cut = lambda part: [form.decode(line) for line in part.split(form.end.encode(form.codec))]
    lines = cut(data[form.bom:])
    if path.suffix == ".jsonl": assert len(records) == sum(bool(line.strip()) for line in lines)
    else:
        assert form.bom < spans[0][0] and spans[-1][1] == len(data)
        assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]
    for r in records:
        assert form.end.join(cut(data[slice(*r.span)])).startswith(r.original)
        assert (r.value is None) == bool(r.error) == bool(r.check) and r.check in ("", "syntax", "encoding")
        line = int(r.place.rpartition(":")[2])
        assert 0 < line <= len(lines) and 0 <= r.column <= len(lines[line - 1]) + 1
    rows, expanded, rejected = shaped(records)
    assert len(records) + expanded == rows + rejected
    return len(records), sum(not r.error for r in records)


def fuzz(folder, count, seed):
    "Counts of outcomes over `count` hurt files; anything but the identity or a refusal is raised."
    rng, tally, start = random.Random(seed), Counter(), None
    tracemalloc.start()
    for n in range(count):
        name = rng.choice(list(FILES))
        data, kind = hurt(FILES[name], rng)
        path = folder / name
        path.write_bytes(data)
        with no_hang():
            try: records, good = check(path)
            except InputError as e:
                assert "\n" not in str(e)
                tally["refused"] += 1
                tally["refused", name, kind] += 1
            except BaseException:
                (folder / f"failed-{n}-{name}").write_bytes(data)
                raise
            else:
                tally["records"] += records
                tally["good"] += good
        if n == count // 10:
            gc.collect()
            start = tracemalloc.get_traced_memory()[0]
    gc.collect()
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now - start < 500_000 and peak < 20e6, (start, now, peak)
    assert tally["refused"] <= count * 0.05, tally.most_common()
    return tally


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_valid(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    records, good = check(tmp_path / name)
    rows = {"plain": len(PLAIN)}.get(name.partition(".")[0], 60)
    assert records == good == rows


def test_short(tmp_path):
    fuzz(tmp_path, 600, seed=0)


@pytest.mark.slow
def test_long(tmp_path):
    print(sorted(map(str, fuzz(tmp_path, 10_000, seed=1).items())))
