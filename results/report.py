"""Writes the tables of README.md, and the figures, from the CSVs in this folder.

    python results/report.py                    # laptop.csv next to seed.csv, the published losses
    python results/report.py --check            # write nothing, fail if a table or a figure is out of date
    python results/report.py results/sweep.csv  # print the tables of your CSV, draw its figures next to it

A table stands between <!-- report NAME --> and <!-- /report --> in the README.md here or one folder up. Your
CSV may be any part of a sweep, with one seed per run or several, and with encodings and sizes of your own.
If its rows differ in other flags, the report is one table: what these flags change.
"""
import argparse
import hashlib
import os
import re
import sys
import warnings
from itertools import cycle, product
from pathlib import Path
from statistics import mode

try:
    import pandas as pd
    import tabulate  # for DataFrame.to_markdown
    from matplotlib.figure import Figure
except ImportError as error:
    sys.exit(f"report.py: error: {error.name} is missing; install it with: pip install -r requirements.txt")

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE / "seed.csv"
LAPTOP = HERE / "laptop.csv"
CHOICES = HERE / "choices.csv"

SIZES = ["n_embd", "n_head", "n_layer"]
FACTORS = ["pe_type", *SIZES]
RUN = ["experiment", *FACTORS]  # what tells the runs of a sweep apart
RUN_FLAGS = "--pe --n_embd --n_head --n_layer --seed".split()
NUMBERS = """val_loss train_loss best_val_loss published_val_loss published_train_loss params ms_per_iter
    train_s""".split()
COLUMNS = [*RUN, *NUMBERS, "device", "torch", "data", "data_crc32", "flags", "curve"]
CURVE = r"(\d+:[\d.]+:[\d.]+ ?)*"  # step:train:val of each evaluation
LOSSES = ["val loss", "train loss"]

GRID = [  # the published sweep
    ("gpt", "learned", 384, 6, 6),
    ("gpt_v2", "learned", 384, 6, 6),
    *product(["gpt_v3"], ["randn", "sinpe", "rope"], [384, 768], [6, 8, 12], [6, 8, 12]),
]
SMALLER = {"n_embd": 4, "n_layer": 2}  # what `sweep.sh --laptop` divides the published sizes by
MIN_PAIRS = 3  # fewer carry no verdict
MIN_ITERS = 2500  # half of the published

def fail(message, status=2):
    """End the program with one line on standard error; status 1 means that a file is out of date."""
    print("report.py: error:", *message.split(), file=sys.stderr)
    sys.exit(status)

# --- Reading ---------------------------------------------------------------------------------------------
warnings.simplefilter("ignore", pd.errors.ParserWarning)  # of a line that is too long: read() says it better

def read(path):
    """The rows of a CSV of the scripts, with a column for each flag; equal runs count once."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
        if "experiment" not in table:
            raise ValueError("it is not a CSV of the scripts")
        for name in COLUMNS:
            if name not in table:
                raise ValueError(f"the column {name} is missing")
        whole = table["curve"].str.fullmatch(CURVE, na=False)
        if not whole.all():
            raise ValueError(f"line {whole.argmin() + 2} is cut off")
        if not path.read_bytes().endswith(b"\n"):
            raise ValueError("the last line is cut off")
        table[SIZES] = table[SIZES].astype(int)
        table[NUMBERS] = table[NUMBERS].replace("", "nan").astype(float)
    except (OSError, ValueError) as error:
        fail(f"{path}: {error}")
    table = table.drop_duplicates(["experiment", "flags", "data_crc32"], ignore_index=True)
    table = table.rename(columns=lambda name: name.replace("_", " ") if "loss" in name else name)
    flags = pd.DataFrame([dict(re.findall(r"(--\w+) (\S+)", text)) for text in table["flags"]])
    flags["--data"] = table["data"] + " " + table["data_crc32"]
    of_script = flags.notna().groupby(table["experiment"]).transform("any")
    return table.join(flags.where(flags.notna() | ~of_script, "none"))  # where other rows of its script have it

def sweep(path):
    """The rows of a CSV, in which small sizes become the published ones that they stand for."""
    table = read(path)
    table["small"] = table["n_embd"].max() in (96, 192)
    if table["small"].any():
        table[[*SMALLER]] *= [*SMALLER.values()]
    return table

def is_sweep(table):
    """Whether the rows differ in nothing but what tells the runs of a sweep apart."""
    return table.filter(like="--").drop(columns=RUN_FLAGS, errors="ignore").nunique().max() == 1

def losses_of(rows):
    """The losses of each run, published and ours, the mean over its seeds."""
    return rows.groupby(["whose", *RUN]).mean(numeric_only=True)

def spearman(pairs):
    """The rank correlation of two columns, if they have at least three rows."""
    return pairs.rank().corr(min_periods=3).iloc[0, 1]

# --- Findings --------------------------------------------------------------------------------------------
# what was published | of which loss | the pairs of runs, _lower and _higher, that it compares; in pairs
# where `same` is 4, the runs differ in one thing only
FINDINGS = """\
of two runs, the lower train loss goes with the higher val loss | val loss | `train loss_lower` > `train loss_higher`
n_embd 384 with n_layer 6 has the lowest val losses | val loss | n_embd_lower == 384 and n_layer_lower == 6 and (n_embd_higher != 384 or n_layer_higher != 6)
n_embd 768 has the lowest train loss | train loss | same == 4 and n_embd_lower > n_embd_higher
n_embd 768 has the highest val loss | val loss | same == 4 and n_embd_lower < n_embd_higher
n_layer 12 has the lowest train loss | train loss | same == 4 and n_layer_lower == 12 != n_layer_higher
n_layer 12 has the highest val loss | val loss | same == 4 and n_layer_lower != 12 == n_layer_higher
pe_type sinpe has the lowest val loss | val loss | same == 4 and pe_type_lower == 'sinpe' != pe_type_higher
pe_type sinpe has the highest train loss, n_embd 768 | train loss | same == 4 and pe_type_lower != 'sinpe' == pe_type_higher and n_embd_lower == 768
pe_type rope has the lowest train loss, n_embd 768 | train loss | same == 4 and pe_type_lower == 'rope' != pe_type_higher and n_embd_lower == 768
pe_type rope has the highest val loss, n_embd 768 | val loss | same == 4 and pe_type_lower != 'rope' == pe_type_higher and n_embd_lower == 768
pe_type randn has the lowest train loss, n_embd 768, n_head 12, n_layer 12 | train loss | same == 4 and pe_type_lower == 'randn' != pe_type_higher and n_embd_lower == 768 and n_head_lower == 12 and n_layer_lower == 12
n_head 12 has the highest train loss, n_embd 768, pe_type rope | train loss | same == 4 and n_head_lower != 12 == n_head_higher and n_embd_lower == 768 and pe_type_lower == 'rope'
"""

def effect(losses, factor):
    """How far apart the losses of a factor's levels are in gpt_v3, on average."""
    table = losses.loc[["gpt_v3"]].unstack(factor).dropna()
    return (table.max(axis=1) - table.min(axis=1)).mean()

def findings(losses):
    """By how much each finding holds, in each of the pairs that it compares: {finding: gaps}."""
    losses = losses.reindex(pd.MultiIndex.from_tuples(GRID, names=RUN))
    runs = losses.reset_index()
    pairs = runs.merge(runs, how="cross", suffixes=("_lower", "_higher"))
    pairs["same"] = sum(pairs[f"{name}_lower"] == pairs[f"{name}_higher"] for name in RUN)
    gaps = {}
    for line in FINDINGS.splitlines():
        finding, loss, query = line.split(" | ")
        compared = pairs.query(query)
        gaps[finding] = compared[f"{loss}_higher"] - compared[f"{loss}_lower"]
    for loss in LOSSES:
        effects = pd.Series({factor: effect(losses[loss], factor) for factor in FACTORS})
        gaps[f"n_head moves the {loss} less than the other factors"] = effects.drop("n_head") - effects["n_head"]
    return gaps

def verdict(gaps, spread, iterations):
    """What the gaps of our losses say to a finding, or what is missing for a verdict."""
    if len(gaps) < MIN_PAIRS:
        return f"only {len(gaps)} pairs"
    if iterations < MIN_ITERS:
        return f"only {iterations} iterations"
    if abs(gaps.mean()) < spread:
        return "within the spread of seeds"
    if (gaps > 0).mean() < 2 / 3:
        return "not reproduced"
    return "reproduced"

# --- Tables ----------------------------------------------------------------------------------------------
def markdown(table, floatfmt=".3f"):
    """A Markdown table, empty where nothing was measured."""
    return table.astype(object).where(table.notna(), None).to_markdown(index=False, floatfmt=floatfmt)

def with_spread(values):
    """The mean over seeds: '1.506', or of several '1.506 ± 0.002', with the standard deviation."""
    if values.count() == 0:
        return None
    if values.count() == 1:
        return f"{values.mean():.3f}"
    return f"{values.mean():.3f} ± {values.std():.3f}"

def size(factor, level, rows):
    """A level of a factor: '384 (96)' where ours is smaller than the published one."""
    if factor in SMALLER and rows["small"].any():
        return f"{level} ({level // SMALLER[factor]})"
    return str(level)

def summary_table(rows):
    """How much of the sweep was run, and how."""
    ours = rows.query("whose == 'ours'")
    runs = set(ours[RUN].itertuples(index=False, name=None))
    device = ", ".join(ours["device"].unique())
    torch = ", ".join(ours["torch"].unique())
    flags = re.sub(f"({'|'.join(RUN_FLAGS)}) \\S+ ?", "", max(ours["flags"], key=len))
    return (f"{len(runs & {*GRID})} of {len(GRID)} runs, {len(ours)} rows. Device: {device}; torch: {torch}; "
            f"{ours['train_s'].sum() / 3600:.2f} hours of training. Flags: `{flags}`")

def prediction_table(rows):
    """How alike the published losses and ours rank the runs."""
    losses = losses_of(rows).unstack("whose")
    groups = [("all", losses, "")]
    for factor in ("pe_type", "n_embd"):
        for level, part in losses.groupby(factor):
            groups.append((f"{factor} {size(factor, level, rows)}", part, ""))
    groups.append(("all, ours evaluated as published", losses, "published "))
    lines = []
    for label, part, prefix in groups:
        line = {"runs": label}
        for name in LOSSES:
            pairs = part[[(name, "published"), (prefix + name, "ours")]].dropna()
            line[f"n, {name}"] = len(pairs)
            line[f"Spearman, {name}"] = spearman(pairs)
        lines.append(line)
    return markdown(pd.DataFrame(lines), ".2f")

def held(gaps):
    """In how many pairs a finding holds, and by how much on average."""
    if len(gaps):
        return f"{(gaps > 0).sum()} of {len(gaps)}, {gaps.mean():+.3f}"

def findings_table(rows):
    """In how many pairs of runs a finding holds, by how much on average, and what ours say to it."""
    ours = rows.query("whose == 'ours'")
    variances = ours.groupby(RUN)[LOSSES].var()
    spreads = (2 * variances.mean()) ** 0.5  # of the difference between two seeds
    losses = losses_of(rows)
    published = findings(losses.loc["published"])
    lines = []
    for finding, gaps in findings(losses.loc["ours"]).items():
        gaps = gaps.dropna()
        loss = "val loss" if "val loss" in finding else "train loss"
        lines.append({
            "finding": finding,
            "published": held(published[finding].dropna()),
            "ours": held(gaps),
            "verdict": verdict(gaps, spreads[loss], ours["--max_iters"].astype(int).min()),
        })
    known = [f"{loss} {spread:.3f}" for loss, spread in spreads.dropna().items()]
    seeds = "; ".join(known) or "unknown, there is one seed per run"
    return f"{markdown(pd.DataFrame(lines))}\n\nSpread of seeds: {seeds}."

def comparisons_table(rows):
    """A level's mean loss, and how often it is the lowest, where both sweeps have all levels of the factor."""
    losses = losses_of(rows).query("experiment == 'gpt_v3'")
    parts = {}
    for factor in FACTORS:
        cells = {}
        for name in [*LOSSES, "best val loss"]:
            by_level = losses[name].unstack(["whose", factor]).dropna(axis=1, how="all")
            shared = by_level.dropna()
            if shared.empty:
                shared = by_level.loc[:, by_level.columns.get_level_values("whose") == "ours"].dropna()
            for whose in shared.columns.unique("whose"):
                table = shared[whose]
                lowest = table.idxmin(axis=1)
                cells[f"{name}, {whose}"] = {
                    size(factor, level, rows): f"{table[level].mean():.3f} ({sum(lowest == level)} of {len(table)})"
                    for level in table}
        parts[factor] = pd.DataFrame(cells)
    return markdown(pd.concat(parts, names=["factor", "level"]).reset_index())

def runs_table(rows):
    """Every run, our lowest val loss first."""
    by_run = rows.groupby([*RUN, "whose"])[[*LOSSES, "best val loss"]]
    table = by_run.agg(with_spread).unstack("whose").dropna(axis=1, how="all")
    table.columns = table.columns.map(", ".join)
    table = table.sort_values("val loss, ours", kind="stable").reset_index()
    for name in SMALLER:
        table[name] = [size(name, level, rows) for level in table[name]]
    return (f"<details><summary>All {len(table)} runs, by our val loss</summary>\n\n"
            f"{markdown(table)}\n\n</details>")

def choices_table(table):
    """What flags change: rows that differ in the seed alone are one line, compared with the first line."""
    flags = table.filter(like="--").drop(columns="--seed").join(table["experiment"])
    usual = flags.apply(lambda values: mode(values.dropna()))
    changes = []
    for _, row in flags.where(flags != usual).iterrows():
        changes.append(" ".join(f"`{name} {value}`" for name, value in row.dropna().items()))
    table["what differs"] = pd.Series(changes).replace("", "nothing")
    groups = table.groupby("what differs")
    means = groups["val loss"].mean()
    order = sorted(means.index, key=lambda change: (change != "nothing", means[change]))
    lines = groups.agg({"--seed": "size", "val loss": with_spread, "train loss": with_spread,
                        "params": "first", "ms_per_iter": "mean"}).loc[order]
    lines.insert(2, "difference", means - means[order[0]])
    lines = lines.rename(columns={"--seed": "seeds", "ms_per_iter": "ms/iter"}).reset_index()
    return markdown(lines, ("", "", ".3f", "+.3f", ".3f", ",.0f", ".1f"))

TABLES = {
    "summary": summary_table,
    "prediction": prediction_table,
    "findings": findings_table,
    "comparisons": comparisons_table,
    "runs": runs_table,
}

# --- Figures ---------------------------------------------------------------------------------------------
ENCODINGS = {
    "learned": "learned vectors (gpt, gpt_v2)",
    "randn": "fixed random vectors (randn)",
    "sinpe": "sines and cosines (sinpe)",
    "rope": "rotations (rope)",
}
COLORS = "black #e69f00 #0072b2 #009e73 #cc79a7 #d55e00 #56b4e9".split()  # can be told apart by the color-blind
MARKERS = {384: "o", 768: "s"}  # of widths

def colors(rows):
    """The color of each encoding, own ones included."""
    return dict(zip(rows["pe_type"].unique(), cycle(COLORS)))

def finish(figure, title):
    """Add a title, and one legend for all panels."""
    lines = {}
    for axes in figure.axes:
        axes.grid(color="0.93")
        axes.label_outer()
        lines |= {line.get_label(): line for line in axes.lines}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure

def losses_figure(rows):
    """Final train loss against final val loss, of the published runs and of ours."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    panels[0].set_title("Published (learnGPT)")
    panels[1].set_title("Ours")
    for axes, whose in zip(panels, ["published", "ours"]):
        losses = losses_of(rows).loc[whose][LOSSES].dropna()
        for (width, pe), runs in losses.groupby(["n_embd", "pe_type"]):
            axes.plot(runs["train loss"], runs["val loss"], MARKERS.get(width, "^"), color=colors(rows)[pe],
                      markeredgecolor="white", label=f"{ENCODINGS.get(pe, pe)}, {size('n_embd', width, rows)} wide")
        axes.set(xlabel="final train loss (nats per character)", ylabel="final val loss (nats per character)")
    return finish(figure, "How well models fit their text, and how well they predict new text")

def curves_figure(rows):
    """Losses during the training of the smallest, a middle and the largest model."""
    by_size = list(rows.query("curve != ''").drop_duplicates(RUN).groupby(SIZES))
    chosen = sorted({0, len(by_size) // 2, len(by_size) - 1})
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axes, index in zip(panels, chosen):
        sizes, runs = by_size[index]
        for pe, text in zip(runs["pe_type"], runs["curve"]):
            points = [point.split(":") for point in text.split()[1:]]  # after the first step
            curve = pd.DataFrame(points, columns=["step", "train", "val"], dtype=float)
            color = colors(rows)[pe]
            name = ENCODINGS.get(pe, pe)
            axes.plot(curve["step"], curve["train"], "--", color=color, label=f"train loss, {name}")
            axes.plot(curve["step"], curve["val"], "-o", color=color, label=f"val loss (dot: lowest), {name}",
                      markevery=[curve["val"].argmin()])
        width, heads, layers = [size(factor, level, rows) for factor, level in zip(SIZES, sizes)]
        axes.set_title(f"{width} wide,\n{heads} heads, {layers} layers")
        axes.set(xlabel="iteration", ylabel="loss (nats per character)")
    return finish(figure, "Losses during training")

# --- Main ------------------------------------------------------------------------------------------------
def report(path):
    """The tables and figures of a CSV, {name: text} and {name: figure}."""
    ours = sweep(path)
    rows = pd.concat([sweep(PUBLISHED).assign(whose="published"), ours.assign(whose="ours")])
    if ours.empty:
        return {"summary": f"0 of {len(GRID)} runs"}, {}
    if not is_sweep(ours):
        return {"choices": choices_table(ours)}, {}
    figures = {"losses": losses_figure(rows)}
    if ours["curve"].any():
        figures["curves"] = curves_figure(rows)
    return {name: make(rows) for name, make in TABLES.items()}, figures

def update(file, check):
    """End the program if a file is out of date but should only be checked."""
    if check:
        fail(f"{file} is out of date; report.py updates it", 1)

def update_pages(tables, check):
    """Put new tables into the README.md here and one folder up."""
    for page in [*HERE.glob("README.md"), *HERE.parent.glob("README.md")]:
        old = page.read_text(encoding="utf-8")
        new = re.sub(r"(?<=<!-- report )(\w+) -->\n.*?(?=<!-- /report -->)",
                     lambda block: f"{block[1]} -->\n{tables[block[1]]}\n", old, flags=re.DOTALL)
        if new != old:
            update(page, check)
            page.write_text(new, encoding="utf-8")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="?", help="a CSV of the scripts")
    parser.add_argument("--check", action="store_true", help="write nothing, status 1 if a file is out of date")
    args = parser.parse_args()
    path = args.csv or LAPTOP
    tables, figures = report(path)
    sources = path.read_bytes() + PUBLISHED.read_bytes() + Path(__file__).read_bytes()
    made_from = hashlib.sha256(sources).hexdigest()
    prefix = f"{path.stem}_" if args.csv else ""
    for name, figure in figures.items():
        file = path.with_name(f"{prefix}{name}.png")
        if not file.exists() or made_from.encode() not in file.read_bytes():
            update(file, args.check)
            figure.savefig(file, dpi=200, metadata={"Source": made_from})
    if args.csv is None:
        tables["choices"] = choices_table(read(CHOICES))
        update_pages(tables, args.check)
    elif not args.check:
        try:
            print(*(f"## {name}\n\n{table}\n" for name, table in tables.items()), sep="\n", flush=True)
        except OSError:  # a closed pipe, as after `| head`, or a full disk
            os._exit(1)

if __name__ == "__main__":
    main()
