"""
The paper's figures beside ours: paper.json holds its Tables 2-5 and 9-12, this file looks them up.

A measured figure is compared with the row of the same model (RN50 ... ViT-H-14) in the same setup, zero-shot
or finetune, and with the best of the other models in that setup, whatever its size.
"""

import json
import os

from sources.pairs import DataError

HERE = os.path.dirname(os.path.abspath(__file__))
PATH = os.path.join(HERE, "..", "..", "assets", "paper.json")
RETRIEVAL = ("table2", "table3", "table4", "table10")  # MUGE, Flickr30K-CN, COCO-CN, ICR
CLASSIFICATION = ("table5", "table12")  # Table 5 has the baselines, Table 12 the five models
SETUPS = ("zero-shot", "finetune")


def read_paper() -> dict:
    with open(PATH, encoding="utf-8") as file:
        return json.load(file)


def data_of(table: str) -> list[str]:
    """Names of the data sets of a table."""
    columns, rows = (read_paper()[table][key] for key in ("columns", "rows"))
    if table in CLASSIFICATION:
        return [column for column in columns if column != "average"]
    return sorted({row["data"] for row in rows})


def table_of(name: str) -> tuple[str, str]:
    """-> (table, name as it is there) of a data set, "" and "" if the paper has none such; capitals, hyphens
    and underscores do not matter."""
    for table in (*RETRIEVAL, "table12"):
        for data in data_of(table):
            if plain(data) == plain(name):
                return table, data
    return "", ""


def parse(text: str) -> tuple[str, str, str]:
    """"MUGE zero-shot" -> (table, data, setup). DataError if the paper has no such figures."""
    name, _, setup = text.rpartition(" ")
    table, data = table_of(name)
    if setup not in SETUPS or not table:
        known = [data for table in (*RETRIEVAL, "table12") for data in data_of(table)]
        raise DataError(f"--published {text!r}: expected a data set of the paper ({', '.join(known)}), a "
                        f"space, and one of {', '.join(SETUPS)}")
    return table, data, setup


def plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def retrieval_columns(result: dict, table: str) -> dict[str, float]:
    """A result of eval.retrieval -> its figures under the columns of a table; MR is the mean of the table's
    recalls, three or six."""
    ways = {"t2i": result["text_to_image"], "i2t": result["image_to_text"]}
    columns = read_paper()[table]["columns"]
    found = {column: ways[column[:3]][column[4:]] for column in columns if column != "MR"}
    return found | ({"MR": sum(found.values()) / len(found)} if "MR" in columns else {})


def compare(measured: dict[str, float], table: str, data: str, setup: str, ours: str) -> list[dict]:
    """Measured figures by column, of a data set -> a row a figure: measured, published, gap, best baseline
    and whose it is. In classification the column is the data set. ours: one of the five models, or "" for
    another; in Table 5, which prints one row for all five, it does not matter."""
    paper, rows = read_paper(), []
    mine = [row for row in paper[table]["rows"] if row["setup"] == setup and row.get("data", data) == data]
    theirs = mine if table in RETRIEVAL else paper["table5"]["rows"]
    for column, value in measured.items():
        published = [row[column] for row in mine
                     if row.get("ours", "") == ours != "" or row["printed"] == "CN-CLIP"]
        published = published[0] if published else None
        baselines = [(row[column], row["model"]) for row in theirs
                     if not row["printed"].startswith("CN-CLIP") and row.get(column) is not None]
        best, whose = max(baselines, default=(None, ""))
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
