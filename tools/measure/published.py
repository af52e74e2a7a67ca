"""
The paper's figures beside ours: assets/paper.json holds its Tables 2-5 and 9-12, and this file looks them up.

A measured figure is compared with that of the same model (RN50 ... ViT-H-14) in the same setup, zero-shot or
finetune, and with the best of all other models in that setup, whatever their size.
"""

import json
import os

from sources.classes import bare_name
from sources.pairs import DataError
from weights.download import RELEASED

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "assets", "paper.json")
RETRIEVAL = ("table2", "table3", "table4", "table10")  # MUGE, Flickr30K-CN, COCO-CN, ICR
CLASSIFICATION = ("table5", "table12")  # Table 5 has the baselines, Table 12 the five models
SETUPS = ("zero-shot", "finetune")
REPRODUCED = 0.2  # points: the paper rounds to 0.1, and float16 may move a figure by as much


def read_paper() -> dict:
    with open(PATH, encoding="utf-8") as file:
        return json.load(file)


def places_of(*tables: str) -> dict[str, tuple[str, str]]:
    """(table, data set) by the bare name of the data set, for all data sets of these tables."""
    paper, places = read_paper(), {}
    for table in tables:
        columns = [column for column in paper[table]["columns"] if column != "average"]
        for data in columns if table in CLASSIFICATION else [row["data"] for row in paper[table]["rows"]]:
            places[bare_name(data)] = table, data
    return places


def figures_for(published: str, name: str, path: str, tables: tuple[str, ...]) -> tuple[str, str, str]:
    """The (table, data set, setup) to compare with: what `published` says, such as "MUGE finetune", or for a
    released model of this name the zero-shot figures of the data set that is named like the folder at `path`.
    Otherwise the table is "", because other weights may be finetuned or not. DataError if `published` is
    wrong."""
    wanted, _, setup = published.rpartition(" ")
    places = places_of(*tables)
    if published and (bare_name(wanted) not in places or setup not in SETUPS):
        known = ", ".join(data for _, data in places.values())
        raise DataError(f"--published {published!r}: expected a data set of the paper ({known}), a space, "
                        f"and one of {', '.join(SETUPS)}")
    if not published and name in RELEASED:
        wanted = os.path.splitext(os.path.basename(os.path.abspath(path)))[0]
    return *places.get(bare_name(wanted), ("", "")), setup or "zero-shot"


def data_sets(table: str, items: list[str]) -> dict[str, str]:
    """What `reproduce --data NAME=PATH NAME ...` names, by the table's names of the data sets: a path, or a
    name that can be fetched; all sets of the table if there are no items."""
    places = places_of(table)
    items = items or [data.lower() for _, data in places.values()]
    sets = {bare_name(name): path if equals else None
            for name, equals, path in (item.partition("=") for item in items)}
    names = [data for _, data in places.values()]
    if not sets.keys() <= places.keys() or "" in sets.values():
        raise DataError(f"{table} is measured on {', '.join(names)}; expected one of these or more, by name "
                        f"or such as --data {names[0]}=path/to/it, got {' '.join(items)}")
    if sets.get("icr", "") is None:
        raise DataError("ICR is not public; expected --data ICR=path/to/it")
    return {places[name][1]: source or places[name][1].lower() for name, source in sets.items()}


def retrieval_columns(result: dict, table: str) -> dict[str, float]:
    """A result of eval.retrieval by the columns of a table. MR is the mean of the table's other columns."""
    ways = {"t2i": result["text_to_image"], "i2t": result["image_to_text"]}
    columns = read_paper()[table]["columns"]
    found = {column: ways[column[:3]][column[4:]] for column in columns if column != "MR"}
    return found | ({"MR": sum(found.values()) / len(found)} if "MR" in columns else {})


def compare(measured: dict[str, float], table: str, data: str, setup: str, ours: str) -> list[dict]:
    """A row for each measured figure: measured, published, gap, best baseline and whose it is. `measured` is
    by column of the table; in classification the column is the data set. `ours` is one of the five models, or
    "" for another; Table 5 prints one row for all five, so there it does not matter."""
    paper, rows = read_paper(), []
    here = [row for row in paper[table]["rows"] if row["setup"] == setup and row.get("data", data) == data]
    others = here if table in RETRIEVAL else paper["table5"]["rows"]
    for column, value in measured.items():
        published = next((row[column] for row in here
                          if row.get("ours", "") == ours != "" or row["printed"] == "CN-CLIP"), None)
        best, whose = max(((row[column], row["model"]) for row in others
                           if not row["printed"].startswith("CN-CLIP") and row.get(column) is not None),
                          default=(None, ""))
        rows.append({"data": data, "column": column, "measured": value, "published": published,
                     "gap": None if published is None else value - published,
                     "best_baseline": best, "best_baseline_model": whose})
    return rows


def verdict(rows) -> str:
    """Whether rows of `compare` agree with the paper: all within REPRODUCED points."""
    gaps = [round(abs(row["gap"]), 1) for row in rows if row["gap"] is not None]
    return "" if not gaps else "reproduced" if max(gaps) <= REPRODUCED else f"off by {max(gaps)}"


def comparison_table(rows: list[dict]) -> str:
    """Rows of `compare` as lines of text, with a dash for what the paper does not have."""
    lines = [f"{'':30} measured  published    gap  best baseline"]
    for row in rows:
        name = row["column"] if row["column"] == row["data"] else f"{row['data']} {row['column']}"
        published, gap, best = ("-" if row[key] is None else format(row[key], form) for key, form in (
            ("published", ".1f"), ("gap", "+.1f"), ("best_baseline", ".1f")))
        lines.append(f"{name:30} {row['measured']:8.1f} {published:>10} {gap:>6} {best:>6} "
                     + row["best_baseline_model"])
    return "\n".join(lines)
