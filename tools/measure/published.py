"""
The paper's figures beside ours: assets/paper.json holds its Tables 2-5 and 9-12, and this file looks them up.

A measured figure is compared with that of the same model (RN50 ... ViT-H-14) in the same setup, zero-shot or
finetune, and with the best of all other models in that setup, whatever their size.
"""

import json
import os

from sources.classes import bare_name
from sources.pairs import DataError

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "assets", "paper.json")
RETRIEVAL = ("table2", "table3", "table4", "table10")  # MUGE, Flickr30K-CN, COCO-CN, ICR
CLASSIFICATION = ("table5", "table12")  # Table 5 has the baselines, Table 12 the five models
SETUPS = ("zero-shot", "finetune")


def read_paper() -> dict:
    with open(PATH, encoding="utf-8") as file:
        return json.load(file)


def data_of(table: str) -> list[str]:
    """The names of a table's data sets."""
    paper = read_paper()[table]
    if table in CLASSIFICATION:
        return [column for column in paper["columns"] if column != "average"]
    return sorted({row["data"] for row in paper["rows"]})


def table_of(name: str) -> tuple[str, str]:
    """The table with this data set, and the set's name there; "" and "" if the paper does not have it.
    Capitals, hyphens and underscores do not matter."""
    for table in (*RETRIEVAL, "table12"):
        for data in data_of(table):
            if bare_name(data) == bare_name(name):
                return table, data
    return "", ""


def figures_named(text: str) -> tuple[str, str, str]:
    """"MUGE zero-shot" -> (table, data set, setup). DataError if the paper has no such figures."""
    name, _, setup = text.rpartition(" ")
    table, data = table_of(name)
    if setup not in SETUPS or not table:
        known = [data for table in (*RETRIEVAL, "table12") for data in data_of(table)]
        raise DataError(f"--published {text!r}: expected a data set of the paper ({', '.join(known)}), a "
                        f"space, and one of {', '.join(SETUPS)}")
    return table, data, setup


def retrieval_columns(result: dict, table: str) -> dict[str, float]:
    """A result of eval.retrieval by the columns of a table. MR is the mean of the table's recalls, three or
    six."""
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


def comparison_table(rows: list[dict]) -> str:
    """Rows of `compare` as lines of text."""
    lines = [f"{'':30} measured  published    gap  best baseline"]
    for row in rows:
        name = row["column"] if row["column"] == row["data"] else f"{row['data']} {row['column']}"
        known = (f"{row['published']:10.1f} {row['gap']:+6.1f}" if row["published"] is not None
                 else f"{'-':>10} {'-':>6}")
        best = (f"{row['best_baseline']:6.1f} {row['best_baseline_model']}" if row["best_baseline_model"]
                else f"{'-':>6}")
        lines.append(f"{name:30} {row['measured']:8.1f} {known} {best}")
    return "\n".join(lines)
